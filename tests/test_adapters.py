from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from finetune.data.collate import collate
from finetune.data.examples import Encoder
from finetune.data.images import ImageAccess
from finetune.data.sources import Row
from finetune.errors import ModelError, RunDirError
from finetune.families import FAMILIES
from finetune.model.adapters import (
    add_adapter,
    count_parameters,
    load_adapter,
    part_of_weight,
    require_grad_on_language_inputs_only,
)
from finetune.model.load import load_model
from finetune.recipe import AdapterSection, ModelSection, Recipe
from tests.conftest import chat_row
from tests.models.idefics2 import full_size

IDEFICS2 = FAMILIES["idefics2"]


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
        part_of_weight(adapted, IDEFICS2)(name)
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    assert trained == {part}


def test_a_part_that_matches_nothing_is_refused() -> None:
    bare: Any = torch.nn.Module()
    bare.add_module("model", torch.nn.Linear(2, 2))
    bare.config = None
    with pytest.raises(ModelError, match="no linear layer of it matches 'language'"):
        add_adapter(bare, IDEFICS2, adapter(), "it")


def test_adapters_of_a_bfloat16_base_are_float32() -> None:
    model, _ = load_model(ModelSection(name="nano", dtype="bfloat16"))
    adapted = add_adapter(model, IDEFICS2, adapter(), "nano")
    dtypes = {p.dtype for p in adapted.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_rank_and_alpha_by_part_reach_the_layers_of_each_part(nano_model: Any) -> None:
    section = adapter(
        parts=("connector", "language", "vision"),
        rank={"connector": 16, "language": 4, "vision": 2},
        alpha={"connector": 16, "language": 12, "vision": 2},
    )
    adapted = add_adapter(nano_model, IDEFICS2, section, "nano")
    part_of, seen = part_of_weight(adapted, IDEFICS2), set()
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            seen.add((part_of(name), module.r["default"], module.scaling["default"]))
    assert seen == {("connector", 16, 1.0), ("language", 4, 3.0), ("vision", 2, 1.0)}


def test_a_module_to_save_that_is_not_there_is_refused_and_those_there_are_named(
    nano_model: Any,
) -> None:
    section = adapter(modules_to_save=("lm_head", "head"))
    with pytest.raises(ModelError, match=r"nano has no module called head; it has lm_head, model,"):
        add_adapter(nano_model, IDEFICS2, section, "nano")


def test_a_part_that_is_saved_whole_is_refused(nano_model: Any) -> None:
    section = adapter(modules_to_save=("model.connector",))
    with pytest.raises(ModelError, match=r"all of 'connector' is in adapter\.modules_to_save"):
        add_adapter(nano_model, IDEFICS2, section, "nano")


def test_modules_to_save_of_a_bfloat16_base_are_trained_in_float32() -> None:
    model, _ = load_model(ModelSection(name="nano", dtype="bfloat16"))
    adapted = add_adapter(model, IDEFICS2, adapter(modules_to_save=("lm_head",)), "nano")
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad and "lora" not in n}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all("lm_head" in name for name in trained)


def test_a_quantised_module_cannot_be_saved(nano_model: Any) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    nano_model.lm_head = bitsandbytes.nn.Linear4bit(128, 447, bias=False)
    with pytest.raises(ModelError, match="lm_head of nano is quantised"):
        add_adapter(nano_model, IDEFICS2, adapter(modules_to_save=("lm_head",)), "nano")


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


def test_an_adapter_with_weights_missing_is_refused(nano_model: Any, tmp_path: Path) -> None:
    """PEFT would leave them random, with a warning."""
    adapted = add_adapter(nano_model, IDEFICS2, adapter(), "nano")
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    gone = [name for name in weights if "connector" in name]
    kept = {name: weight for name, weight in weights.items() if name not in gone}
    save_file(kept, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    recipe = Recipe.model_validate(
        {"model": {"name": "nano"}, "data": {"train": [{"hub": "user/name"}]}}
    )
    with pytest.raises(RunDirError, match=rf"{len(gone)} weights of the adapter are missing"):
        load_adapter(load_model(ModelSection(name="nano"))[0], tmp_path, recipe)


def test_an_adapter_of_other_shapes_than_the_models_is_refused_in_plain_words(
    nano_model: Any, tmp_path: Path
) -> None:
    adapted = add_adapter(nano_model, IDEFICS2, adapter(rank=4), "nano")
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    cut = {n: w[:3] if "connector" in n and "lora_A" in n else w for n, w in weights.items()}
    num_cut = sum(len(cut[name]) < len(weights[name]) for name in weights)
    save_file(cut, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    recipe = Recipe.model_validate(
        {"model": {"name": "nano"}, "data": {"train": [{"hub": "user/name"}]}}
    )
    with pytest.raises(RunDirError, match=rf"{num_cut} weights of the adapter have another shape"):
        load_adapter(load_model(ModelSection(name="nano"))[0], tmp_path, recipe)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_base_has_as_many_parameters_as_before(nano_model: Any, quantize: Any) -> None:
    pytest.importorskip("bitsandbytes")
    quantised, _ = load_model(ModelSection(name="nano", dtype="bfloat16", quantize=quantize))
    assert count_parameters(quantised)[1] == count_parameters(nano_model)[1]
    adapted, plain = (
        add_adapter(model, IDEFICS2, adapter(), "nano") for model in (quantised, nano_model)
    )
    assert count_parameters(adapted) == count_parameters(plain)
