"""`training.compile`: the layers of the language model, compiled by torch.

Layer by layer rather than the model as a whole: all layers of a kind share one graph, so that time
to compile does not grow with their number, and what stands between them (hooks, packed vision, the
loss) stays as it is.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.errors import ModelError
from finetune.families.family import Family
from finetune.model.parts import part_of


@contextlib.contextmanager
def compiled_layers(base: Any, family: Family) -> Iterator[Sequence[nn.Module]]:
    """Within, the language model's layers run compiled; after, as before. Gives them.

    Compiled once for all lengths (`dynamic`): batches differ in nothing else, and one for each
    length would never end. Not for generation, whose cache grows with each token. Raises
    `ModelError` where there is no compiler, or no layer.
    """
    find = part_of(family, base.config)
    layers = [
        module
        for name, module in base.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and find(name) == "language"
    ]
    if not layers:
        raise ModelError(
            f"training.compile: finds no layer in the language model of {family.name}; set false"
        )
    refuse_without_compiler()
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield layers
    finally:
        for layer in layers:
            layer._compiled_call_impl = None  # torch has no public way back


def refuse_without_compiler() -> None:
    """Raise `ModelError` where torch would find, in the first step, nothing to compile with: a C++
    compiler for the CPU, Triton for a GPU.
    """
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ModelError("training.compile: needs Triton for this GPU; install it or set false")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ModelError(
            "training.compile: needs a C++ compiler, and none was found; install g++ or set false"
        ) from None
