"""Every family against the library: the same facts, checkpoint by checkpoint."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.collate import IGNORED_LABEL, collate
from finetune.data.examples import Encoder, Example
from finetune.data.images import ImageAccess, load_image
from finetune.data.render import Rendered
from finetune.data.sources import Row
from finetune.errors import DataError
from finetune.evaluate import evaluate
from finetune.model.adapters import (
    add_adapter,
    count_parameters,
    load_adapter,
    part_of_weight,
)
from finetune.model.generate import generate_answers
from finetune.model.load import load_model, load_processor
from finetune.model.parts import target_pattern
from finetune.preparation import load_encoder
from finetune.recipe import AdapterSection, ImagesSection, ModelSection, Recipe, load_recipe
from finetune.recipe.fields import Part
from finetune.rundir import RunDir, read_json, read_jsonl
from finetune.train import train
from tests.conftest import noise, write_dataset
from tests.families import CHECKPOINTS, Checkpoint
from tests.test_collate import row_losses

FULL_SIZE = {name: each for name, each in CHECKPOINTS.items() if each.full_size}
PARTS: tuple[Part, ...] = ("language", "connector", "vision")
SIZES_PX = ((90, 60), (40, 130), (64, 64), (33, 20))


@pytest.fixture(params=CHECKPOINTS)
def name(request: Any) -> str:
    return request.param


@pytest.fixture
def checkpoint(name: str) -> Checkpoint:
    return CHECKPOINTS[name]


@pytest.fixture
def section(name: str, folder_of: Callable[[str], Path]) -> ModelSection:
    return ModelSection(name=str(folder_of(name)), dtype="float32")


@pytest.fixture
def encoder(checkpoint: Checkpoint, section: ModelSection) -> Encoder:
    processor, images = load_processor(section, ImagesSection())
    return Encoder(processor, checkpoint.family, images)


@pytest.fixture
def model(section: ModelSection) -> Any:
    return load_model(section)[0].eval()


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """One picture, none, two turns with two, one again."""
    for i, size in enumerate(SIZES_PX):
        noise(*size, seed=i).save(tmp_path / f"{i}.png")
    conversations = [
        [user("0.png", "What is it?"), answer("A cat.")],
        [user("No picture here."), answer("Right, none at all.")],
        [user("1.png", "One?"), answer("Yes."), user("2.png", "Another?"), answer("Two of them.")],
        [user("Look.", "3.png"), answer("It is small")],
    ]
    return [
        Row(f"rows.jsonl:{i + 1}", Conversation(tuple(messages)), ImageAccess(tmp_path))
        for i, messages in enumerate(conversations)
    ]


def user(*parts: str) -> Message:
    return Message("user", tuple(Image(p) if p.endswith(".png") else Text(p) for p in parts))


def answer(text: str) -> Message:
    return Message("assistant", (Text(text),))


def pictures_of(row: Row) -> list[Any]:
    return [load_image(part.source, row.image_access) for part in row.conversation.images()]


def ids_of(inputs: Any) -> list[int]:
    return torch.as_tensor(inputs["input_ids"]).flatten().tolist()


# Full size, without weights


@pytest.fixture(scope="session")
def full_size() -> Callable[[str], Any]:
    built: dict[str, Any] = {}

    def build(name: str) -> Any:
        make = CHECKPOINTS[name].full_size
        assert make
        if name not in built:
            built[name] = make()
        return built[name]

    return build


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_full_size_model_has_the_published_parameters_part_by_part(
    name: str, full_size: Callable[[str], Any]
) -> None:
    checkpoint, model = CHECKPOINTS[name], full_size(name)
    part_of = part_of_weight(model, checkpoint.family)
    counted = dict.fromkeys([*PARTS, "total"], 0)
    for weight, parameter in model.named_parameters():
        counted[part_of(weight)] += parameter.numel()
        counted["total"] += parameter.numel()
    assert counted == checkpoint.parameters


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_page_on_families_has_these_figures(name: str) -> None:
    checkpoint, page = CHECKPOINTS[name], Path("docs/families.md").read_text(encoding="utf-8")
    trained = checkpoint.lora["language", "connector"]
    columns = ("vision", "connector", "language", "total")
    figures = [*(checkpoint.parameters[part] for part in columns), trained]
    assert f"| {' | '.join(f'{each:,}' for each in figures)} |" in page


@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_linear_layer_belongs_to_one_part_or_is_the_head(
    name: str, full_size: Callable[[str], Any]
) -> None:
    checkpoint, model = CHECKPOINTS[name], full_size(name)
    parts = checkpoint.family.parts_of(model.config)
    patterns = {part: re.compile(target_pattern([parts[part]])) for part in PARTS}
    claimed: dict[str, int] = dict.fromkeys(PARTS, 0)
    unclaimed = []
    for module_name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        owners = [part for part, pattern in patterns.items() if pattern.fullmatch(module_name)]
        assert len(owners) < 2, module_name
        if owners:
            claimed[owners[0]] += 1
        else:
            unclaimed.append(module_name)
    assert all(claimed.values()), claimed
    assert [each for each in unclaimed if each.split(".")[0] != "lm_head"] == []


@pytest.mark.parametrize("name", FULL_SIZE)
def test_adapters_have_the_published_number_of_parameters(
    name: str, full_size: Callable[[str], Any]
) -> None:
    checkpoint = CHECKPOINTS[name]
    for parts, expected in checkpoint.lora.items():
        section = AdapterSection.model_validate({"parts": parts, "rank": 8})
        adapted = add_adapter(full_size(name), checkpoint.family, section, name)
        trained = {
            part
            for module_name, parameter in adapted.named_parameters()
            if parameter.requires_grad
            for part, facts in checkpoint.family.parts_of(adapted.config).items()
            if re.match(
                target_pattern([facts]) + r"\.lora_", module_name.removeprefix("base_model.model.")
            )
        }
        assert count_parameters(adapted)[0] == expected
        assert trained == set(parts)
        adapted.unload()


# Rendering


def test_ids_are_the_library_processors_own(
    checkpoint: Checkpoint, encoder: Encoder, rows: list[Row]
) -> None:
    for row in rows:
        stock = checkpoint.stock_inputs(
            encoder.processor, row.conversation, pictures_of(row), generation_prompt=False
        )
        assert encoder.encode(row).input_ids == ids_of(stock), row.where


def test_the_training_prefix_is_the_inference_prefix(
    checkpoint: Checkpoint, encoder: Encoder, rows: list[Row]
) -> None:
    for row in rows:
        whole, prompt = encoder.encode(row), encoder.encode_prompt(row)
        assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
        before = row.conversation.before_last_answer()
        stock = checkpoint.stock_inputs(
            encoder.processor, before, pictures_of(row), generation_prompt=True
        )
        assert prompt.input_ids == ids_of(stock)


def test_exactly_the_answers_and_their_ends_are_learnt(encoder: Encoder, rows: list[Row]) -> None:
    decode = encoder.processor.tokenizer.decode
    end = encoder.renderer.template.turn_end_token
    for row in rows:
        example = encoder.encode(row)
        stretches: list[list[int]] = [[]]
        for token, learnt in zip(example.input_ids, example.loss_mask, strict=True):
            if learnt:
                stretches[-1].append(token)
            elif stretches[-1]:
                stretches.append([])
        learnt_texts = [decode(ids).strip() for ids in stretches if ids]
        answers = [m.text for m in row.conversation.messages if m.role == "assistant"]
        assert learnt_texts == [f"{text}{end}" for text in answers]


def test_an_empty_answer_is_learnt_as_the_end_alone(encoder: Encoder) -> None:
    conversation = Conversation((user("Say nothing."), answer("")))
    example = encoder.encode(Row("rows.jsonl:1", conversation, ImageAccess(Path())))
    learnt = [t for t, m in zip(example.input_ids, example.loss_mask, strict=True) if m]
    assert encoder.processor.tokenizer.decode(learnt).strip() == (
        encoder.renderer.template.turn_end_token
    )


def test_a_system_turn_and_a_train_false_answer_are_not_learnt(encoder: Encoder) -> None:
    messages = (
        Message("system", (Text("Be brief."),)),
        user("One?"),
        Message("assistant", (Text("Long ago."),), train=False),
        user("Two?"),
        answer("Now."),
    )
    example = encoder.encode(Row("rows.jsonl:1", Conversation(messages), ImageAccess(Path())))
    learnt = [t for t, m in zip(example.input_ids, example.loss_mask, strict=True) if m]
    text = encoder.processor.tokenizer.decode(learnt).strip()
    assert text == f"Now.{encoder.renderer.template.turn_end_token}"
    assert "Be brief." in encoder.processor.tokenizer.decode(example.input_ids)


def test_an_order_of_turns_that_the_template_refuses_is_a_bad_row(encoder: Encoder) -> None:
    """Not a traceback, and no end to the rows beside it."""
    greeting = Conversation((answer("Hello."), user("Who is it?"), answer("Me.")))
    plain = Conversation((user("Who?"), answer("Me.")))
    first, second = encoder.renderer.render_many([(greeting, ()), (plain, ())])
    assert isinstance(first, DataError | Rendered)
    assert isinstance(second, Rendered)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("llava-1.5-7b", {"images.split", "data.random_upscale"}), ("idefics2-8b", set())],
)
def test_settings_that_a_family_has_no_use_for_are_told(
    name: str, expected: set[str], section: ModelSection
) -> None:
    recipe = Recipe.model_validate(
        {
            "model": section,
            "images": {"split": "always"},
            "data": {"train": [{"hub": "user/name"}], "random_upscale": 2},
        }
    )
    console = Console(record=True, width=200, quiet=False, file=io.StringIO())
    load_encoder(recipe, console)
    warnings = re.findall(r"warning: (\S+) has no effect", console.export_text())
    assert set(warnings) == expected


# The model


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_gives_each_row_the_loss_it_has_alone(
    encoder: Encoder, model: Any, rows: list[Row], padding_side: Any
) -> None:
    def batch(*examples: Example) -> dict[str, torch.Tensor]:
        return collate(examples, encoder.processor, encoder.family, padding_side=padding_side)

    examples = [encoder.encode(row) for row in rows]
    alone = torch.cat([row_losses(model, batch(example)) for example in examples])
    torch.testing.assert_close(row_losses(model, batch(*examples)), alone, atol=1e-4, rtol=1e-5)


def test_the_models_loss_is_the_cross_entropy_of_what_is_learnt(
    encoder: Encoder, model: Any, rows: list[Row]
) -> None:
    batch = collate([encoder.encode(row) for row in rows], encoder.processor, encoder.family)
    num_learnt = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
    with torch.no_grad():
        loss = model(**batch).loss
    torch.testing.assert_close(loss, row_losses(model, batch).sum() / num_learnt)


def test_an_image_changes_what_is_said_after_it(
    encoder: Encoder, model: Any, rows: list[Row]
) -> None:
    example = encoder.encode(rows[0])
    inverted = Example(
        example.where,
        example.input_ids,
        example.loss_mask,
        [255 - view for view in example.views],
        example.plans,
    )
    losses = [
        row_losses(model, collate([each], encoder.processor, encoder.family))
        for each in (example, inverted)
    ]
    assert (losses[0] - losses[1]).abs().item() > 1e-3


def test_answers_of_a_batch_are_those_one_by_one(
    encoder: Encoder, model: Any, rows: list[Row]
) -> None:
    prompts = [encoder.encode_prompt(row) for row in rows]

    def generate(batch_size: int) -> list[str]:
        return generate_answers(
            model,
            encoder.processor,
            encoder.family,
            prompts,
            max_new_tokens=5,
            batch_size=batch_size,
        )

    assert generate(4) == generate(1)


# From the Hub's files to a run, and back to plain transformers


def test_a_tiny_checkpoint_is_trained_evaluated_merged_and_reloaded(
    name: str, checkpoint: Checkpoint, section: ModelSection, tmp_path: Path
) -> None:
    recipe = load_recipe(
        write_dataset(
            tmp_path,
            num_train=6,
            num_eval=3,
            model={"name": section.name},
            images=ImagesSection().model_dump(),
            adapter={"dropout": 0.0},
            training={"max_steps": 2, "batch_size": 3, "gradient_checkpointing": True},
        )
    )
    quiet = Console(quiet=True)
    assert train(recipe, console=quiet, results=quiet) == 0
    run = RunDir(tmp_path / "run")
    summary = read_json(run.summary)
    assert (summary["steps"], summary["num_eval_rows"]) == (2, 3)
    answers = [line["adapter"] for line in read_jsonl(run.predictions)]

    again = evaluate(run.path, console=quiet)
    assert again.figures["adapter"] == summary["adapter"]
    assert [line["adapter"] for line in read_jsonl(run.predictions)] == answers

    trained = load_recipe(run.recipe)
    processor, images = load_processor(trained.model, trained.images)
    encoder = Encoder(processor, checkpoint.family, images)
    row = Row(
        "rows.jsonl:1",
        Conversation((user("eval0.png", "What is written?"), answer("A07"))),
        ImageAccess(tmp_path),
    )
    batch = collate([encoder.encode(row)], processor, checkpoint.family)
    labels = batch.pop("labels")
    assert (labels != IGNORED_LABEL).any()
    adapted = load_adapter(load_model(trained.model)[0], run.adapter, trained).eval()
    untouched = load_model(trained.model)[0].eval()
    with torch.no_grad():
        expected = adapted(**batch).logits
        assert (untouched(**batch).logits - expected).abs().max() > 1e-4  # it did train
        merged = adapted.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
        checkpoint.family.adjust_model(reloaded)
        torch.testing.assert_close(reloaded(**batch).logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_with_key_names_of_before_transformers_5_loads_whole(
    checkpoint: Checkpoint, section: ModelSection, encoder: Encoder, rows: list[Row], tmp_path: Path
) -> None:
    model, family = load_model(section)
    adapted = add_adapter(model, family, AdapterSection(parts=PARTS, rank=2), "it").eval()
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:  # zeros would say nothing
                torch.nn.init.normal_(parameter, std=0.2)
    batch = collate([encoder.encode(row) for row in rows], encoder.processor, family)
    expected = row_losses(adapted, dict(batch))
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    old = checkpoint.old_adapter_keys(weights)
    save_file(old, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    # what adapters of that time named as their target
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    linears = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in old})
    config["target_modules"] = rf".*\.({'|'.join(linears)})"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = PeftModel.from_pretrained(load_model(section)[0], tmp_path).eval()
    torch.testing.assert_close(row_losses(loaded, dict(batch)), expected)
