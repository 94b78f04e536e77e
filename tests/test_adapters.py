from typing import Any

import pytest
import torch

from finetune.data.collate import collate
from finetune.data.examples import Encoder
from finetune.data.images import ImageAccess
from finetune.data.sources import Row
from finetune.errors import ModelError
from finetune.families import FAMILIES
from finetune.families.family import Family
from finetune.model.adapters import (
    add_adapter,
    count_parameters,
    require_grad_on_language_inputs_only,
)
from finetune.model.load import load_model
from finetune.recipe import AdapterSection, ModelSection
from tests.conftest import chat_row
from tests.models.idefics2 import full_size

IDEFICS2 = FAMILIES["idefics2"]


def part_of(family: Family, config: Any, name: str) -> str | None:
    """The part under whose prefixes a parameter stands."""
    for part, facts in family.parts_of(config).items():
        if any(name.startswith(prefix + ".") for prefix in facts.prefixes):
            return part
    return None


def adapter(**settings: Any) -> AdapterSection:
    return AdapterSection(dropout=0.0, **settings)


@pytest.mark.parametrize(
    ("parts", "rank", "method", "expected"),
    [
        (("language", "connector"), 8, "lora", 23_326_720),
        (("language", "connector"), 16, "lora", 46_653_440),
        (("language", "connector"), 64, "lora", 186_613_760),
        (("language", "connector"), 8, "dora", 24_865_536),
        (("language", "connector", "vision"), 8, "lora", 27_674_368),
        (("language",), 8, "lora", 20_971_520),
    ],
)
def test_idefics2_8b_has_the_published_number_of_trainable_parameters(
    parts: Any, rank: int, method: Any, expected: int
) -> None:
    model = full_size()
    assert count_parameters(model)[1] == 8_402_768_112
    section = adapter(parts=parts, rank=rank, method=method)
    assert count_parameters(add_adapter(model, IDEFICS2, section, "idefics2-8b"))[0] == expected


@pytest.mark.parametrize("part", ["language", "connector", "vision"])
def test_a_parts_pattern_leaves_the_other_parts_alone(nano_model: Any, part: Any) -> None:
    adapted = add_adapter(nano_model, IDEFICS2, adapter(parts=(part,)), "nano")
    trained = {
        part_of(IDEFICS2, nano_model.config, name.removeprefix("base_model.model."))
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    assert trained == {part}


def test_a_part_that_matches_nothing_is_refused() -> None:
    bare = torch.nn.Module()
    bare.add_module("model", torch.nn.Linear(2, 2))
    bare.config = None  # type: ignore[assignment]
    with pytest.raises(ModelError, match="no linear layer of it matches 'language'"):
        add_adapter(bare, IDEFICS2, adapter(), "it")


def test_adapters_of_a_bfloat16_base_are_float32() -> None:
    model, _ = load_model(ModelSection(name="nano", dtype="bfloat16"))
    adapted = add_adapter(model, IDEFICS2, adapter(), "nano")
    dtypes = {p.dtype for p in adapted.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.fixture
def batch(encoder: Encoder, picture: Any, tmp_path: Any) -> dict[str, torch.Tensor]:
    from data_formats.chat import parse_chat

    picture(112, 56).save(tmp_path / "a.png")
    row = Row("rows.jsonl:1", parse_chat(chat_row("What?", "A1", "a.png")), ImageAccess(tmp_path))
    return collate([encoder.encode(row)] * 2, encoder.processor, encoder.family)


def lora_gradients(
    batch: dict[str, torch.Tensor], *, checkpointing: bool, ours: bool, parts: Any
) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of the adapters, and how many tensors of the vision tower a backward pass
    reached.
    """
    model, _ = load_model(ModelSection(name="nano", dtype="float32"))
    torch.manual_seed(0)
    adapted = add_adapter(model, IDEFICS2, adapter(parts=parts), "nano")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros would hide the gradients of lora_A
            torch.nn.init.normal_(parameter, std=0.05)
    if ours:
        require_grad_on_language_inputs_only(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()  # as PEFT and TRL do, each on its own
        adapted.enable_input_require_grads()
    reached = 0

    def count(gradient: torch.Tensor) -> None:
        nonlocal reached
        reached += 1

    def watch(_module: Any, _inputs: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if tensor.requires_grad:
            tensor.register_hook(count)

    for layer in model.model.vision_model.encoder.layers:
        layer.register_forward_hook(watch)
    adapted.train()
    adapted(**batch).loss.backward()
    return {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}, reached


def test_no_gradient_flows_through_a_frozen_vision_tower(batch: Any) -> None:
    parts = ("language", "connector")
    stock, stock_reached = lora_gradients(batch, checkpointing=True, ours=False, parts=parts)
    ours, ours_reached = lora_gradients(batch, checkpointing=True, ours=True, parts=parts)
    plain, _ = lora_gradients(batch, checkpointing=False, ours=False, parts=parts)
    assert stock_reached > 0  # what the stock stack does: the whole tower for nothing
    assert ours_reached == 0
    assert ours.keys() == stock.keys() == plain.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, stock[name], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5)
    assert any(gradient.abs().max() > 1e-4 for gradient in ours.values())


def test_a_trained_vision_tower_gets_its_gradients(batch: Any) -> None:
    parts = ("language", "connector", "vision")
    ours, reached = lora_gradients(batch, checkpointing=True, ours=True, parts=parts)
    plain, _ = lora_gradients(batch, checkpointing=False, ours=False, parts=parts)
    assert reached > 0
    assert any("vision_model" in name for name in ours)
    assert ours.keys() == plain.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5)
