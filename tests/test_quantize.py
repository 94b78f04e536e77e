"""QLoRA on the embedded model, on a CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from finetune.errors import ModelError
from finetune.evaluate import evaluate
from finetune.model.load import load_model
from finetune.model.parts import part_of
from finetune.model.quantize import is_quantized, refuse_other_modules
from finetune.recipe import ModelSection, load_recipe
from finetune.rundir import RunDir, read_json, read_jsonl
from finetune.train import train
from tests.conftest import write_dataset
from tests.families import CHECKPOINTS

pytest.importorskip("bitsandbytes")

QUIET = Console(quiet=True)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize(
    "name", ["idefics2-8b", "llava-1.5-7b", "llama-3.2-11b-vision", "idefics-9b"]
)
def test_the_language_layers_alone_are_quantised(name: str, quantize: Any, tmp_path: Path) -> None:
    """What skips are given and what they match differ easily: they are counted, not believed."""
    checkpoint = CHECKPOINTS[name]
    checkpoint.save_tiny(tmp_path)
    section = ModelSection(name=str(tmp_path), dtype="bfloat16", quantize=quantize)
    model, family = load_model(section)
    part = part_of(family, model.config)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    quantised = {n for n, m in linears.items() if is_quantized(m)}
    assert quantised == {n for n in linears if part(n) == "language"}
    assert len(quantised) % 7 == 0
    assert quantised
    sixteen_bit = {m.weight.dtype for n, m in linears.items() if n not in quantised}
    assert sixteen_bit == {torch.bfloat16}


def test_nf4_is_double_quantised() -> None:
    model, _ = load_model(ModelSection(name="nano", dtype="bfloat16", quantize="nf4"))
    layer: Any = next(m for m in model.modules() if is_quantized(m))
    assert layer.weight.quant_type == "nf4"
    assert layer.weight.quant_state.nested


def test_other_modules_than_announced_are_refused(nano_model: Any) -> None:
    with pytest.raises(
        ModelError, match=r"text_model\.layers\.0\.self_attn\.q_proj was not quantised"
    ):
        refuse_other_modules(nano_model, CHECKPOINTS["idefics2-8b"].family, "nano")


@pytest.mark.parametrize(
    ("quantize", "method"), [("nf4", "lora"), ("nf4", "dora"), ("int8", "lora")]
)
def test_a_quantised_base_is_trained_and_reloads_for_eval(
    quantize: str, method: str, tmp_path: Path
) -> None:
    recipe = load_recipe(
        write_dataset(
            tmp_path,
            model={"dtype": "bfloat16", "quantize": quantize},
            adapter={"method": method},
            training={"learning_rate": 2e-5, "warmup_ratio": 0.0, "scheduler": "constant"},
        )
    )
    assert train(recipe, console=QUIET, results=QUIET) == 0
    run = RunDir(tmp_path / "run")
    answers = [line["adapter"] for line in read_jsonl(run.predictions)]
    summary = read_json(run.summary)
    assert evaluate(run.path, console=QUIET).figures["adapter"] == summary["adapter"]
    assert [line["adapter"] for line in read_jsonl(run.predictions)] == answers
    from safetensors.torch import load_file

    weights = load_file(run.adapter / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "nano"


def test_small_steps_move_every_entry_of_the_adapter(tmp_path: Path) -> None:
    """TRL makes the adapters of a quantised base bfloat16, in which steps of 2e-5 are lost."""
    recipe = load_recipe(
        write_dataset(
            tmp_path,
            num_eval=0,
            model={"dtype": "bfloat16", "quantize": "nf4"},
            adapter={"dropout": 0.0},
            training={"learning_rate": 2e-5, "warmup_ratio": 0.0, "max_steps": 3},
        )
    )
    assert train(recipe, console=QUIET, results=QUIET) == 0
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    moved = [(w != 0).float().mean().item() for n, w in weights.items() if "lora_B" in n]
    assert min(moved) > 0.99
