"""The checkpoints that stand for their families in tests: an entry a checkpoint.

Each module of `tests.models` has `save_tiny` and `stock_inputs`, and most have `full_size`,
`PARAMETERS`, `LORA` and `old_adapter_keys`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from finetune.families import FAMILIES
from finetune.families.family import Family
from tests.models import idefics, idefics2, idefics3, llava, mantis, mllama, smolvlm


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, as a tiny random one on disk and at full size without weights."""

    family: Family
    save_tiny: Callable[[Path], None]
    stock_inputs: Callable[..., Any]
    full_size: Callable[[], Any] | None = None
    parameters: Mapping[str, int] = field(default_factory=dict)
    lora: Mapping[tuple[str, ...], int] = field(default_factory=dict)
    old_adapter_keys: Callable[[dict[str, Any]], dict[str, Any]] = lambda weights: weights


def of_module(module: Any, family: str, **settings: Any) -> Checkpoint:
    settings.setdefault("save_tiny", module.save_tiny)
    settings.setdefault("full_size", getattr(module, "full_size", None))
    settings.setdefault("parameters", module.PARAMETERS)
    settings.setdefault("lora", module.LORA)
    if hasattr(module, "old_adapter_keys"):
        settings.setdefault("old_adapter_keys", module.old_adapter_keys)
    return Checkpoint(FAMILIES[family], stock_inputs=module.stock_inputs, **settings)


def of_mantis(vision: Any) -> Checkpoint:
    return of_module(
        mantis,
        "mantis",
        save_tiny=partial(mantis.save_tiny, vision=vision),
        full_size=partial(mantis.full_size, vision=vision),
        parameters=mantis.PARAMETERS[vision],
        lora=mantis.LORA[vision],
    )


CHECKPOINTS = {
    "idefics2-8b": of_module(idefics2, "idefics2"),
    "idefics2-8b-base": of_module(
        idefics2, "idefics2", save_tiny=partial(idefics2.save_tiny, base=True), full_size=None
    ),
    "llava-1.5-7b": of_module(llava, "llava"),
    "mantis-8b-clip": of_mantis("clip"),
    "mantis-8b-siglip": of_mantis("siglip"),
    "idefics3-8b": of_module(idefics3, "idefics3"),
    "smolvlm2-2.2b": of_module(smolvlm, "smolvlm"),
    "llama-3.2-11b-vision": of_module(mllama, "mllama"),
    "llama-3.2-11b-vision-base": of_module(
        mllama, "mllama", save_tiny=partial(mllama.save_tiny, template=None), full_size=None
    ),
    "idefics-9b-instruct": of_module(idefics, "idefics"),
    "idefics-9b": of_module(
        idefics, "idefics-base", save_tiny=partial(idefics.save_tiny, num_added=2), full_size=None
    ),
}
