"""LoRA whose product is added onto what the frozen layer gives, without a tensor of its own."""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn

try:  # bitsandbytes is not everywhere
    from peft.tuners.lora.bnb import Linear4bit
except ImportError:
    Linear4bit = None


def add_in_place(model: nn.Module) -> None:
    """Let the LoRA layers of a model add their product onto the output of the frozen layer.

    PEFT's own layer makes three tensors as large as that output, B A x, its multiple by alpha / r
    and the sum, and the backward pass one more; here one matrix product writes into the output, and
    numbers differ by rounding alone. The class is changed, not the object's method, so that
    merging, saving and copies are PEFT's. DoRA's and 8-bit layers are left as they are.
    """
    for module in model.modules():
        if in_place := _IN_PLACE.get(type(module)):
            module.__class__ = in_place


def add_apart(model: nn.Module) -> None:
    """Undo `add_in_place`: PEFT's own layers."""
    for module in model.modules():
        for plain, in_place in _IN_PLACE.items():
            if type(module) is in_place:
                module.__class__ = plain


class _AddsInPlace:
    """Before PEFT's class of a layer, in the order of inheritance."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's; what is not one plain adapter in one dtype goes through that."""
        layer: Any = self
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if args or kwargs or not _is_plain(layer, names) or not _computes_in(layer, names[0], x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        name = names[0]
        # with two axes no view of the output stands between it and the graph
        rows = x.reshape(-1, x.shape[-1])
        output = layer.base_layer(rows)
        low = layer.lora_A[name](layer.lora_dropout[name](rows))
        weight, scaling = layer.lora_B[name].weight, layer.scaling[name]
        if output.dtype == low.dtype:
            # not addmm_'s alpha, which compiled layers of changing lengths cannot have
            output.addmm_(low * scaling, weight.to(low.dtype).t())
        else:
            output = output + layer.lora_B[name](low).to(output.dtype) * scaling
        return output.view(*x.shape[:-1], output.shape[-1])


def _is_plain(layer: Any, names: list[str]) -> bool:
    return (
        len(names) == 1
        and not layer.disable_adapters
        and not layer.merged
        and not layer.lora_variant
        and not layer.lora_bias[names[0]]
    )


def _computes_in(layer: Any, name: str, x: torch.Tensor) -> bool:
    """Whether A takes an input as it is."""
    autocast = torch.is_autocast_enabled(x.device.type)
    return autocast or x.dtype == layer.lora_A[name].weight.dtype


class _Linear(_AddsInPlace, Linear):
    pass


_IN_PLACE: dict[type, type] = {Linear: _Linear}

if Linear4bit is not None:

    class _Linear4bit(_AddsInPlace, Linear4bit):
        pass

    _IN_PLACE[Linear4bit] = _Linear4bit
