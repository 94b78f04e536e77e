"""Every method from the recipe to the answers: trained, broken off, gone on with, saved, loaded by
plain transformers and PEFT, judged again and asked.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from finetune.chat import answer
from finetune.errors import ModelError, RecipeError, RunDirError
from finetune.evaluate import evaluate
from finetune.model.adapters import part_of_weight
from finetune.model.load import load_model, load_processor, model_location
from finetune.model.methods import load_trainable, pissa_start
from finetune.recipe import load_recipe
from finetune.rundir import RunDir, read_jsonl
from finetune.train import train
from tests.conftest import chat_row, write_rows
from tests.plain_inference import answer_all, load_trained

QUIET: dict[str, Any] = {"console": Console(quiet=True), "results": Console(quiet=True)}
BY_PART = {"rank": {"language": 4, "connector": 8}, "alpha": {"language": 4, "connector": 16}}

# Sections of the recipe; the rates are such that four steps change every answer.
METHODS: dict[str, dict[str, Any]] = {
    "dora": {"adapter": {"method": "dora"}},
    "rslora, rank by part": {"adapter": {"method": "rslora", **BY_PART}},
    "rate by part, LoRA+, NEFTune": {
        "training": {
            "learning_rate": {"language": 0.01, "connector": 0.001},
            "lora_plus_ratio": 4,
            "neftune_alpha": 5,
        }
    },
    "pissa and more": {
        "adapter": {
            "method": "pissa",
            **BY_PART,
            "modules_to_save": ["norm"],
            "extra_tokens": ["<price>"],
        },
        "training": {"learning_rate": 0.005},
    },
    "pissa of a rank above every side": {
        "adapter": {"method": "pissa", "rank": 600},
        "training": {"learning_rate": 0.005},
    },
    "modules to save in bfloat16": {
        "adapter": {"modules_to_save": ["lm_head", "embed_tokens", "modality_projection"]},
        "model": {"dtype": "bfloat16"},
    },
    "extra tokens": {"adapter": {"extra_tokens": ["<price>", "<date>"]}},
    "full in bfloat16": {
        "adapter": {"method": "full"},
        "model": {"dtype": "bfloat16"},
        "training": {"learning_rate": 0.002},
    },
    "full with extra tokens": {
        "adapter": {"method": "full", "extra_tokens": ["<price>"]},
        "training": {"learning_rate": 0.002},
    },
    "schedule-free": {"training": {"optimizer": "schedule_free_adamw"}},
    "frozen": {"adapter": {"method": "frozen"}},
}


def with_extra_tokens(folder: Path, tokens: list[str]) -> None:
    """Put the tokens into some answers and questions of the data."""
    for name, count in (("train", 12), ("eval", 4)):
        rows = []
        for i in range(count):
            token = tokens[i % len(tokens)]
            rows.append(chat_row(f"Which {token} is written?", f"{token}{i}7", f"{name}{i}.png"))
        write_rows(folder / f"{name}.jsonl", rows)


def answered(run: RunDir) -> list[dict[str, Any]]:
    """The predictions without the losses, which depend on the order of additions."""
    rows = read_jsonl(run.predictions)
    for scores in (scores for row in rows for scores in row["scores"].values()):
        scores.pop("loss", None)
        scores.pop("perplexity", None)
    return rows


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_and_goes_on_and_its_answers_come_back_everywhere(
    dataset: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    sections = METHODS[method]
    training = {"learning_rate": 0.02, "warmup_ratio": 0.0} | sections.get("training", {})
    adapter = {"dropout": 0.0} | sections.get("adapter", {})
    if method == "schedule-free":
        pytest.importorskip("schedulefree")
    recipe = load_recipe(dataset(**sections | {"training": training, "adapter": adapter}))
    if recipe.adapter.extra_tokens:
        with_extra_tokens(tmp_path, list(recipe.adapter.extra_tokens))
    train(recipe, **QUIET)
    run = RunDir(tmp_path / "run")
    rows = answered(run)
    frozen = recipe.adapter.method == "frozen"
    assert all((row["base"] == row["adapter"]) is frozen for row in rows), rows

    # what plain transformers and PEFT make of what was saved, and of the base
    dtype = getattr(torch, recipe.model.dtype)
    trained = load_trained(model_location("nano"), run.adapter, dtype)
    processor = AutoProcessor.from_pretrained(run.adapter)
    assert answer_all(trained, processor, run.path, tmp_path) == [r["adapter"] for r in rows]
    base = AutoModelForImageTextToText.from_pretrained(model_location("nano"), dtype=dtype)
    plain = load_processor(recipe.model, recipe.images)[0]
    assert answer_all(base, plain, run.path, tmp_path) == [r["base"] for r in rows]

    # the other verbs
    evaluate(run.path, console=Console(quiet=True))
    assert answered(run) == rows
    asked = answer(run.path, [tmp_path / "eval1.png"], rows[1]["question"])
    assert asked == rows[1]["adapter"]

    if frozen:
        assert not run.metrics.exists()
        return
    weights = saved_weights(run)
    losses = [(m["step"], m["loss"]) for m in read_jsonl(run.metrics) if "loss" in m]
    assert losses[-1][1] < losses[0][1]
    twice = method in ("pissa and more", "full with extra tokens", "schedule-free")
    for finished in (True, False) if twice else (False,):
        shutil.rmtree(run.adapter)  # killed in its evaluation
        if not finished:  # killed in the middle of its steps
            shutil.rmtree(run.checkpoints / "checkpoint-4")
        train(recipe, resume=True, **QUIET)
        again = saved_weights(run)
        assert again.keys() == weights.keys()
        assert all(torch.equal(again[name], weights[name]) for name in weights)
        assert answered(run) == rows
        steps = [(m["step"], m["loss"]) for m in read_jsonl(run.metrics) if "loss" in m]
        assert steps == losses


def saved_weights(run: RunDir) -> dict[str, torch.Tensor]:
    file = run.adapter / "adapter_model.safetensors"
    return load_file(file if file.is_file() else run.adapter / "model.safetensors")


@pytest.mark.parametrize("parts", [["language"], ["connector"], ["vision", "connector"]])
def test_full_trains_the_parts_and_nothing_else(
    dataset: Callable[..., Path], tmp_path: Path, parts: list[str]
) -> None:
    recipe = load_recipe(
        dataset(
            num_eval=0,
            adapter={"method": "full", "parts": parts},
            training={"max_steps": 2, "weight_decay": 0.1},
        )
    )
    train(recipe, **QUIET)
    model, family = load_model(recipe.model)
    before = model.state_dict()
    after = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "run" / "adapter", dtype=torch.float32
    ).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert set(map(part_of_weight(model, family), changed)) == set(parts)
    assert ("lm_head.weight" in changed) is ("language" in parts)


def test_full_is_held_in_float32_and_saved_in_the_recipes_dtype(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = load_recipe(
        dataset(
            num_eval=0,
            model={"dtype": "bfloat16"},
            adapter={"method": "full"},
            training={"max_steps": 1, "save_steps": 1},
        )
    )
    model, _ = load_trainable(recipe, None)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    train(recipe, **QUIET)
    run = RunDir(tmp_path / "run")
    assert {t.dtype for t in saved_weights(run).values()} == {torch.bfloat16}
    checkpoint = load_file(run.checkpoints / "checkpoint-1" / "model.safetensors")
    assert {t.dtype for t in checkpoint.values()} == {torch.float32}
    assert str(tmp_path) not in (run.adapter / "config.json").read_text()


def test_a_frozen_run_is_a_baseline_without_steps(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    train(load_recipe(dataset(adapter={"method": "frozen"})), **QUIET)
    run = RunDir(tmp_path / "run")
    summary = json.loads(run.summary.read_text())
    assert summary["base"] == summary["adapter"]
    assert (summary["steps"], summary["trainable_parameters"]) == (0, 0)
    assert "first_loss" not in summary
    assert "No change" in run.report.read_text()


def test_a_frozen_base_is_loaded_once_to_be_judged_again(
    dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(load_recipe(dataset(adapter={"method": "frozen"})), **QUIET)
    loaded = []

    def load(*settings: Any) -> Any:
        loaded.append(settings)
        return load_model(*settings)

    for module in ("finetune.sides", "finetune.model.methods"):
        monkeypatch.setattr(f"{module}.load_model", load)
    evaluate(tmp_path / "run", console=Console(quiet=True))
    assert len(loaded) == 1
    (tmp_path / "run" / "adapter" / "image_settings.json").unlink()
    with pytest.raises(RunDirError, match="the run has not finished"):
        evaluate(tmp_path / "run", console=Console(quiet=True))


def test_a_pissa_run_with_checkpoints_does_not_go_on_without_its_start(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = load_recipe(
        dataset(
            num_eval=0,
            adapter={"method": "pissa", "dropout": 0.0},
            training={"max_steps": 2, "save_steps": 1},
        )
    )
    train(recipe, **QUIET)
    run = RunDir(tmp_path / "run")
    shutil.rmtree(run.adapter)
    pissa_start(run).unlink()
    with pytest.raises(RunDirError, match="is missing, so that the run cannot go on"):
        train(recipe, resume=True, **QUIET)
    assert not pissa_start(run).exists()
    for checkpoint in run.checkpoints.glob("checkpoint-*"):  # killed before the first one
        shutil.rmtree(checkpoint)
    train(recipe, resume=True, **QUIET)
    assert pissa_start(run).is_file()


def test_a_saved_module_of_a_part_without_a_rate_is_refused_before_anything_is_written(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = load_recipe(
        dataset(
            num_eval=0,
            adapter={"parts": ["connector"], "modules_to_save": ["lm_head"]},
            training={"learning_rate": {"connector": 0.1}},
        )
    )
    with pytest.raises(ModelError, match=r"modules_to_save: lm_head has weights in language, wh"):
        train(recipe, **QUIET)
    assert not (tmp_path / "run").exists()


def test_an_optimizer_that_is_not_installed_is_named_with_what_to_install(
    dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.packages.find_spec", lambda _name: None)
    for optimizer, package in (
        ("paged_adamw_8bit", "bitsandbytes"),
        ("stable_adamw", "torch-optimi"),
        ("schedule_free_adamw", "schedulefree"),
        ("adamw_torch_8bit", "torchao"),
    ):
        recipe = load_recipe(dataset(training={"optimizer": optimizer}))
        with pytest.raises(RecipeError, match=rf"{optimizer}: needs .*; pip install {package}"):
            train(recipe, **QUIET)
