import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from finetune.data.examples import Encoder
from finetune.errors import ModelError
from finetune.model import compiling
from finetune.model.adapters import add_adapter
from finetune.model.compiling import compiled_layers
from finetune.model.load import load_model
from finetune.recipe import load_recipe
from finetune.train import train
from tests.conftest import NANO


def pieces(encoder: Encoder, length: int, batch_size: int = 2) -> dict[str, torch.Tensor]:
    """Text at random, the first row padded, with a picture in none."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 400, (batch_size, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


@pytest.mark.slow
def test_compiled_layers_give_the_losses_and_gradients_of_eager_ones(
    dataset: Callable[..., Path], encoder: Encoder
) -> None:
    """With LoRA, checkpointing and lengths that change, from one graph; and eager again after."""
    recipe = load_recipe(dataset(adapter={"dropout": 0.0}))
    model, family = load_model(NANO)
    adapted = add_adapter(model, family, recipe.adapter, "nano")
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.enable_input_require_grads()
    adapted.train()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:  # they start at zero, where A has no gradient
            torch.nn.init.normal_(weight, std=0.05)

    def step(length: int) -> tuple[float, torch.Tensor]:
        adapted.zero_grad()
        loss = adapted(**pieces(encoder, length)).loss
        loss.backward()
        gradients = [w.grad.flatten() for w in adapted.parameters() if w.grad is not None]
        return loss.item(), torch.cat(gradients)

    lengths = (40, 61, 33)
    eager = [step(length) for length in lengths]
    counters.clear()
    with compiled_layers(adapted.get_base_model(), family) as layers:
        compiled = [step(length) for length in lengths]
        assert len(layers) == model.config.text_config.num_hidden_layers
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for (loss, gradients), (expected, expected_gradients) in zip(compiled, eager, strict=True):
        assert loss == pytest.approx(expected, abs=1e-4)
        error = (gradients - expected_gradients).norm() / expected_gradients.norm()
        assert error < 1e-4
    assert step(50)[0] > 0
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_a_run_with_compiled_layers_has_the_losses_of_one_without(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    losses = {}
    for setting in ("true", "false"):
        recipe = dataset(adapter={"dropout": 0.0}, training={"save_steps": 10})
        changes = [f"training.compile={setting}", f"output.dir={tmp_path / setting}"]
        counters.clear()
        assert train(load_recipe(recipe, changes), str(recipe)) == 0
        # to train on batches with padding and on one without, and for the loss of held-out rows;
        # none for the answers of the judging
        assert counters["stats"]["unique_graphs"] == (3 if setting == "true" else 0)
        lines = (tmp_path / setting / "metrics.jsonl").read_text().splitlines()
        losses[setting] = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    assert len(losses["true"]) == 4
    assert losses["true"] == pytest.approx(losses["false"], abs=1e-4)


def test_only_layers_of_the_language_model_are_compiled(
    nano_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    with compiled_layers(nano_model, load_model(NANO)[1]) as layers:
        assert compiled == layers == list(nano_model.model.text_model.layers)


def test_a_machine_without_a_compiler_says_so_before_the_first_step(
    nano_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none_found() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"training\.compile: needs a C\+\+ compiler.*set false"):
        compiling.refuse_without_compiler()
