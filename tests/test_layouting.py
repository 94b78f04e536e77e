"""Packing and shared pictures in a whole run: the recipe's settings, trainer and plan."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from data_formats.chat import parse_chat
from finetune.data.collate import collate
from finetune.data.examples import Encoder
from finetune.data.images import ImageAccess
from finetune.data.sequences import Layouting
from finetune.data.sources import Row
from finetune.errors import RecipeError
from finetune.families import FAMILIES
from finetune.planning import Planner
from finetune.preparation import layouting_of
from finetune.recipe import ImagesSection, Recipe, load_recipe, recipe_warnings
from finetune.rundir import RunDir, read_jsonl
from finetune.train import train
from tests.conftest import chat_row, noise, write_rows

QUIET = Console(quiet=True)


@pytest.fixture
def pages(dataset: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe on twelve rows: four questions on each of three pages; all of them in a step."""

    def make(**sections: Any) -> Recipe:
        training = {
            "batch_size": 12,
            "max_steps": 2,
            # a plain step, as Adam makes the same of a gradient of any size
            "optimizer": "sgd",
            "scheduler": "constant",
            "learning_rate": 0.1,
            "warmup_ratio": 0.0,
        } | sections.pop("training", {})
        settings = {"adapter": {"dropout": 0.0}, "training": training} | sections
        path = dataset(**settings)
        rows = []
        for page in range(3):
            noise(112, 56, seed=50 + page).save(tmp_path / f"page{page}.png")
            rows += [chat_row(f"Line {i}?", f"B{i}{page}", f"page{page}.png") for i in range(4)]
        write_rows(tmp_path / "train.jsonl", rows)
        return load_recipe(path)

    return make


def trained(recipe: Recipe, folder: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """What was logged of each step, and the adapter."""
    assert train(recipe, console=QUIET, results=QUIET, overwrite=True) == 0
    run = RunDir(folder / "run")
    return list(read_jsonl(run.metrics)), load_file(run.adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "settings",
    [
        {"share_images": "auto"},
        {"share_images": "auto", "packing": True},
        {"share_images": "off", "packing": True},
        {"share_images": "auto", "num_workers": 1},
    ],
)
def test_a_run_is_the_same_however_its_rows_are_laid_out(
    pages: Callable[..., Recipe], tmp_path: Path, settings: dict[str, Any]
) -> None:
    apart, adapter_apart = trained(pages(training={"share_images": "off"}), tmp_path)
    laid_out, adapter = trained(pages(training=settings), tmp_path)
    for name in ("loss", "grad_norm", "samples", "eval_loss", "mean_token_accuracy"):
        expected = [line[name] for line in apart if name in line]
        assert expected
        found = [line[name] for line in laid_out if name in line]
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5), name
    torch.testing.assert_close(adapter, adapter_apart, atol=1e-5, rtol=1e-4)
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)


def test_streamed_rows_are_laid_out_too(pages: Callable[..., Recipe], tmp_path: Path) -> None:
    data = {"train": [{"path": str(tmp_path / "train.jsonl"), "streaming": True}]}
    apart, _ = trained(pages(data=data, training={"share_images": "off"}), tmp_path)
    laid_out, _ = trained(pages(data=data, training={"packing": True}), tmp_path)
    for name in ("loss", "samples"):
        expected = [line[name] for line in apart if name in line]
        assert expected
        found = [line[name] for line in laid_out if name in line]
        assert found == pytest.approx(expected, abs=1e-5), name


def test_a_plan_follows_the_batches_as_they_are_laid_out(pages: Callable[..., Recipe]) -> None:
    plans = [
        Planner.of_recipe(pages(training={"share_images": each}), QUIET, "cpu").batch(range(4))
        for each in ("auto", "off")
    ]
    shared, apart = plans
    assert shared.num_padded_tokens < apart.num_padded_tokens
    assert shared.memory.flops < apart.memory.flops


def test_families_that_see_pictures_by_cross_attention_keep_rows_apart(
    pages: Callable[..., Recipe],
) -> None:
    for name in ("mllama", "idefics"):
        assert layouting_of(pages(), FAMILIES[name]) is None
        with pytest.raises(RecipeError, match=f"training.packing: {name} sees pictures by cross-"):
            layouting_of(pages(training={"packing": True}), FAMILIES[name])


@pytest.mark.parametrize(
    ("section", "settings", "why"),
    [
        ("model", {"attention": "flash_attention_2", "dtype": "bfloat16"}, "takes no mask"),
        ("data", {"random_upscale": 1.5}, "at another size"),
        ("training", {"neftune_alpha": 5}, "noise is each row's own"),
    ],
)
def test_what_keeps_pictures_from_being_shared_is_told_where_they_were_asked_to_be(
    pages: Callable[..., Recipe], section: str, settings: dict[str, Any], why: str
) -> None:
    def made(**training: Any) -> Recipe:
        changed = {section: settings}
        changed["training"] = changed.get("training", {}) | training
        return pages(**changed)

    asked = made(share_images="auto")
    assert layouting_of(asked, FAMILIES["idefics2"]) is None
    told = [each for each in recipe_warnings(asked) if "training.share_images" in each]
    assert len(told) == 1
    assert why in told[0]
    assert not [each for each in recipe_warnings(made()) if "training.share_images" in each]


def test_packing_with_flash_attention_makes_one_sequence(pages: Callable[..., Recipe]) -> None:
    model = {"attention": "flash_attention_2", "dtype": "bfloat16"}
    recipe = pages(model=model, training={"packing": True})
    assert layouting_of(recipe, FAMILIES["idefics2"]) == Layouting(
        packing=True, max_tokens=2048, one_sequence=True
    )


def test_packing_and_noise_by_the_length_of_a_row_exclude_each_other(
    pages: Callable[..., Recipe],
) -> None:
    with pytest.raises(RecipeError, match="scaled by the length of a sequence"):
        pages(training={"packing": True, "neftune_alpha": 5})


@pytest.mark.parametrize(("num_questions", "apart", "together"), [(3, 1050, 384), (4, 1400, 399)])
def test_questions_on_one_page_take_the_tokens_that_the_docs_say(
    idefics2_processor: Any, tmp_path: Path, num_questions: int, apart: int, together: int
) -> None:
    noise(1700, 2200).save(tmp_path / "page.png")
    questions = (
        "What is the date of the letter?",
        "Who signed the letter at the bottom of the page?",
        "What is the total amount that is due?",
        "Which company sent this?",
    )
    rows = [
        Row(f"rows:{i}", parse_chat(chat_row(text, "42", "page.png")), ImageAccess(tmp_path))
        for i, text in enumerate(questions[:num_questions])
    ]
    images = ImagesSection(split="always", longest_edge_px=980, shortest_edge_px=378)
    idefics2_processor.image_processor.do_image_splitting = True
    encoder = Encoder(idefics2_processor, FAMILIES["idefics2"], images)
    pictures = encoder.new_pictures()
    examples = [encoder.encode(row, None, pictures) for row in rows]
    tokens = [
        collate(examples, encoder.processor, encoder.family, layouting=layouting)[
            "input_ids"
        ].numel()
        for layouting in (None, Layouting(share_images=True))
    ]
    assert tokens == [apart, together]
