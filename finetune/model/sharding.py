"""Weights of which processes hold shares (FSDP2), or their optimizer does (DeepSpeed ZeRO-2): which
layers are sharded, and how all weights are put together again.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.families.family import Family
from finetune.model.parts import part_of


def layers_to_shard(base: Any, family: Family) -> list[str]:
    """The classes of the layers whose weights are gathered one layer at a time: those of the
    language model, which every batch passes through once.

    What sees is not among them. How often tower and connector are called depends on the pictures of
    a batch, and a process that calls a layer which another does not waits for it for ever; so they
    are gathered with the rest of the model.
    """
    find = part_of(family, base.config)
    return sorted(
        {
            type(module).__name__
            for name, module in base.named_modules()
            if isinstance(module, GradientCheckpointingLayer) and find(name) == "language"
        }
    )


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether this process holds shares of weights and not all of them, by FSDP."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: torch.nn.Module) -> None:
    """Let go of what is gathered: after a pass without a backward one it stays, rounded to the
    number format of computing.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What is saved of a model, by name, on the CPU: of an adapted one what is trained, of another
    one everything. What DeepSpeed trains comes in float32, as its optimizer has it.

    All processes have to ask, and have the memory for it.
    """
    reshard(model)
    return {
        name: _whole(tensor).detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in _saved(model)
    }


def _saved(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    is_adapted = isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not is_adapted:
            yield name, parameter
    if not is_adapted:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        yield from ((k, v) for k, v in model.state_dict().items() if k not in parameters)


def _whole(tensor: Any) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param  # type: ignore[import-not-found]

        return safe_get_full_fp32_param(tensor)
    return tensor


def put_adapter(model: PeftModel, folder: Path) -> None:
    """The weights of a saved adapter into a model that holds shares of its own."""
    reshard(model)
    own: Any = dict(model.named_parameters())
    # PEFT's names in a file, which leave out that of the adapter
    by_name = get_peft_model_state_dict(model, state_dict=own, save_embedding_layers=False)
    put_weights(by_name, load_peft_weights(str(folder), device="cpu"))


@torch.no_grad()
def put_weights(
    parameters: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> None:
    """Whole weights in the place of shares, by name; each process takes its own share."""
    for name, weight in weights.items():
        share = parameters[name]
        if isinstance(share, DTensor):
            weight = weight.to(share.device, share.dtype)
            mesh, placements = share.device_mesh, share.placements
            # each process has read all of it, so none needs to send
            mine = distribute_tensor(weight, mesh, placements, src_data_rank=None)
            share.to_local().copy_(mine.to_local())
        else:
            share.copy_(weight)
