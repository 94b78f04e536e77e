"""PiSSA (arXiv 2404.02948): the strongest directions of each weight become the adapter's start, and
the base keeps the rest.

The start is kept, so that a run goes on from there, and so that the adapter can be saved for the
plain base: W' = rest + B A = W + (B A - B0 A0), which is LoRA of twice the rank on W.

PEFT has PiSSA too, but rounds A0 and B0 to the base's dtype after it has taken them out of the
weights unrounded, so that a bfloat16 model starts as another one than the base.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from finetune.errors import RunDirError
from finetune.rundir import replacing, write_json

WEIGHTS = "adapter_model.safetensors"


def decompose(model: PeftModel) -> None:
    """Give a fresh LoRA model its start, and take that out of the base.

    Randomised, as the paper does it: in sixteen rounds it comes as close to the exact decomposition
    as training can tell, and takes seconds for a model where that takes hours (section 4). A rank
    above the smaller side of a weight is filled up with zeros, which learn nothing.
    """
    for _, layer in _layers(model):
        weight: Any = layer.get_base_layer().weight
        rank, scale = layer.r["default"], layer.scaling["default"]
        # a few directions more than are kept, or the last ones kept are mixed with the next
        num = min(rank + 8, *weight.shape)
        left, strengths, right = torch.svd_lowrank(weight.data.float(), q=num, niter=16)
        root = (strengths[:rank] / scale).sqrt()
        lora_A, lora_B = root[:, None] * right.T[:rank], left[:, :rank] * root
        # a weight has no more directions than its smaller side is long
        lacking = rank - len(root)
        _take_out(layer, pad(lora_A, (0, 0, 0, lacking)), pad(lora_B, (0, lacking)))


def _take_out(layer: LoraLayer, lora_A: torch.Tensor, lora_B: torch.Tensor) -> None:
    weight: Any = layer.get_base_layer().weight
    rest = weight.data.float() - layer.scaling["default"] * (lora_B @ lora_A).to(weight.device)
    weight.data = rest.to(weight.dtype)
    for matrices, start in ((layer.lora_A, lora_A), (layer.lora_B, lora_B)):
        parameter: Any = matrices["default"].weight
        parameter.data = start.to(parameter.device).contiguous()


def save_start(model: PeftModel, file: Path) -> None:
    """Keep the adapter as it starts: A0 and B0 of every layer."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    start = {name: tensor.cpu().contiguous() for name, tensor in state.items() if _is_lora(name)}
    with replacing(file) as temporary:
        save_file(start, temporary)


def go_on_from_start(model: PeftModel, file: Path) -> None:
    """Make a fresh LoRA model the one whose start was kept, bit for bit.

    Decomposed anew, other hardware could come out with other directions, and the trained adapter
    would be put on the wrong rest. Raises `RunDirError` where the file is missing.
    """
    if not file.is_file():
        raise RunDirError(
            f"{file}: is missing, so that the run cannot go on; start it again with --overwrite"
        )
    start = load_file(file)
    for name, layer in _layers(model):
        _take_out(layer, start[f"{name}.lora_A.weight"], start[f"{name}.lora_B.weight"])


def _layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def convert_to_lora(folder: Path, start: Path) -> None:
    """Rewrite a saved adapter so that it holds for the plain base: B A - B0 A0, of twice the rank.

    PEFT's own conversion (LoraModel.subtract_mutated_init) does the same with the matrices, and
    drops modules to save and trained tokens.
    """
    initial = load_file(start)
    state = load_file(folder / WEIGHTS)
    for name in filter(_is_lora, list(state)):
        sign, axis = (1, 0) if ".lora_A." in name else (-1, 1)
        state[name] = torch.cat([state[name], sign * initial[name]], dim=axis).contiguous()
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    # both doubled: their quotient scales the adapter
    config |= {key: 2 * config[key] for key in ("r", "lora_alpha")}
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {name: 2 * value for name, value in (config[key] or {}).items()}
    write_json(folder / "adapter_config.json", config)


def _is_lora(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
