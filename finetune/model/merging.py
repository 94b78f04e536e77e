"""An adapter put into the weights it was trained on, tensor by tensor: in memory are the adapter
and one weight.

PEFT's own layers compute each weight, on a model that otherwise has none: it is on the meta device.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import AutoModelForImageTextToText

from finetune.errors import ModelError
from finetune.model.adapters import add_saved_adapter, load_adapter, refuse_unfinished
from finetune.model.checkpoint_files import (
    INDEX,
    StoredTensor,
    checkpoint_folder,
    copy_tensors,
    stored_tensors,
)
from finetune.model.load import load_config
from finetune.model.vocabulary import extend_vocabulary
from finetune.recipe import Recipe
from finetune.rundir import write_json


@dataclass(frozen=True)
class AdapterPart:
    """A run's adapter and how much of it is added."""

    recipe: Recipe
    folder: Path
    weight: float = 1.0


@dataclass(frozen=True)
class MergePlan:
    """Which tensors are written, into which file, and what becomes of them."""

    source: Path
    dtype: torch.dtype
    files: Mapping[str, Sequence[StoredTensor]]
    written: Mapping[str, torch.Size]
    """Shape of each key as it is written; a vocabulary may have grown."""
    changed: Mapping[str, str]
    """Key -> what changes it: `lora`, `trained whole` or `new tokens`."""

    @property
    def bytes_of_files(self) -> dict[str, int]:
        """What each file will take."""
        return {
            file: sum(
                self.written[each.key].numel() * self.dtype_of(each).itemsize for each in held
            )
            for file, held in self.files.items()
        }

    @property
    def num_bytes(self) -> int:
        """What all weight files will take together."""
        return sum(self.bytes_of_files.values())

    def dtype_of(self, tensor: StoredTensor) -> torch.dtype:
        """Numbers take the plan's dtype, indexes and masks keep theirs."""
        return self.dtype if tensor.dtype.is_floating_point else tensor.dtype


class Merger:
    """A base and its adapters, with the adapters' weights alone in memory.

    `processor` has the extra tokens. Raises `ModelError` for what cannot be merged, and
    `RunDirError` for an adapter that is not whole.
    """

    def __init__(self, parts: Sequence[AdapterPart], processor: Any):
        recipe = parts[0].recipe
        self.config, self.family = load_config(recipe.model)
        with torch.device("meta"):
            base: Any = AutoModelForImageTextToText.from_config(
                self.config, dtype=getattr(torch, recipe.model.dtype)
            )
        self.family.adjust_model(base)
        self.folder = checkpoint_folder(recipe.model)
        self.files = stored_tensors(self.folder, base)
        extend_vocabulary(base, processor, recipe)
        self.config = base.config
        self.adapted: PeftModel = load_adapters(base, parts)
        self.names = adapter_names(parts)

    @property
    def base(self) -> Any:
        """The model within PEFT's wrapper."""
        return self.adapted.get_base_model()

    def plan(self, dtype: torch.dtype) -> MergePlan:
        """What `write` would do; touches nothing.

        Raises `ModelError` where the checkpoint lacks a weight that the adapter changes.
        """
        written, changed = {}, {}
        reached: set[str] = set()
        for held in self.files.values():
            for each in held:
                written[each.key] = self._shape(each)
                if found := self._changing(each.name):
                    changed[each.key] = found[0]
                    reached.add(found[1])
        lacking = sorted(set(_changing_modules(self.base)) - reached)
        if lacking:
            raise ModelError(
                f"{self.folder}: holds no weight for {lacking[0]}, which the adapter changes "
                f"({len(lacking)} in all); it is not the checkpoint that was trained on"
            )
        return MergePlan(self.folder, dtype, self.files, written, changed)

    def write(self, plan: MergePlan, out: Path, on_file: Callable[[str], None]) -> None:
        """The merged weights into a folder, under the base's own names, with an index where it has
        several files.
        """
        for file, held in plan.files.items():
            on_file(file)
            names = {each.key: each.name for each in held}
            copy_tensors(
                plan.source / file,
                out / file,
                {each.key: (plan.dtype_of(each), plan.written[each.key]) for each in held},
                lambda key, stored, names=names: self._merged(
                    names[key], stored, plan.written[key]
                ),
            )
        if len(plan.files) > 1:
            weight_map = {each.key: file for file, held in plan.files.items() for each in held}
            total = {"total_size": plan.num_bytes}
            write_json(out / INDEX, {"metadata": total, "weight_map": weight_map})

    def _shape(self, tensor: StoredTensor) -> torch.Size:
        """As the file has it; of a vocabulary that grew, as the model has it."""
        module, rest = _holder(self.base, tensor.name)
        if isinstance(module, TrainableTokensWrapper) and rest == ("weight",):
            original: Any = module.original_module
            return original.weight.shape
        return torch.Size(tensor.shape)

    def _changing(self, name: str) -> tuple[str, str] | None:
        """What changes this weight, and the module that does."""
        module, rest = _holder(self.base, name)
        path = name.removesuffix("." + ".".join(rest))
        if isinstance(module, LoraLayer) and rest == ("weight",):
            return "lora", path
        if isinstance(module, TrainableTokensWrapper) and rest == ("weight",):
            return "new tokens", path
        return ("trained whole", path) if isinstance(module, ModulesToSaveWrapper) else None

    def _merged(self, name: str, stored: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        module, rest = _holder(self.base, name)
        if not self._changing(name):
            return stored
        if isinstance(module, ModulesToSaveWrapper):
            return module.modules_to_save["default"].get_parameter(".".join(rest)).data
        layer: Any = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
        weight = stored.float()
        if weight.shape != shape:  # rows of new tokens, which the adapter has
            weight = torch.cat([weight, weight.new_zeros(shape[0] - len(weight), *shape[1:])])
        held: Any = layer.get_base_layer()
        meta = held.weight
        held.weight = nn.Parameter(weight, requires_grad=False)
        try:
            layer.merge(safe_merge=True, adapter_names=self.names)
            return held.weight.data
        except ValueError as error:
            raise ModelError(f"{name}: {error}; nothing was written") from error
        finally:
            held.weight = meta
            layer.merged_adapters.clear()


def load_adapters(base: Any, parts: Sequence[AdapterPart]) -> PeftModel:
    """The base with all adapters at work, each as strong as its weight says, for inference.

    Raises `RunDirError`, and `ModelError` for adapters that cannot be added up.
    """
    first, *others = parts
    adapted = load_adapter(base, first.folder, first.recipe)
    for name, part in zip(adapter_names(parts)[1:], others, strict=True):
        _refuse_unlike(first.recipe, part)
        add_saved_adapter(adapted, name, part.folder)
    for name, part in zip(adapter_names(parts), parts, strict=True):
        if part.weight == 1.0 and not others:
            continue
        _refuse_unweighable(part)
        for module in adapted.modules():
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] *= part.weight
    cast(Any, adapted.base_model).set_adapter(adapter_names(parts))
    return adapted


def adapter_names(parts: Sequence[AdapterPart]) -> list[str]:
    """What PEFT is to call each of them."""
    return ["default", *(f"added_{number}" for number in range(1, len(parts)))]


def _refuse_unlike(recipe: Recipe, other: AdapterPart) -> None:
    refuse_unfinished(other.folder, "adapter_config.json", other.recipe)
    for name in ("name", "revision"):
        one, another = getattr(recipe.model, name), getattr(other.recipe.model, name)
        if one != another:
            raise ModelError(
                f"{other.folder}: was trained on model.{name} {another}, the first on {one}; "
                "only adapters of one base can be added up"
            )
    if recipe.images != other.recipe.images:
        raise ModelError(
            f"{other.folder}: was trained with other image settings than the first; a merged model "
            "has one set of them"
        )


def _refuse_unweighable(part: AdapterPart) -> None:
    adapter = part.recipe.adapter
    for is_there, what in (
        (adapter.method == "dora", "DoRA scales the sum of base and adapter"),
        (adapter.modules_to_save, "adapter.modules_to_save takes the place of whole modules"),
        (adapter.extra_tokens, "adapter.extra_tokens gives the vocabulary rows of its own"),
    ):
        if is_there:
            raise ModelError(
                f"{part.folder}: cannot be weighed or added to others: {what}; merge it alone, "
                "with weight 1"
            )


def _holder(base: nn.Module, name: str) -> tuple[Any, tuple[str, ...]]:
    """PEFT's module that stands where a weight of the base is, and how the weight is called within;
    None where there is none.
    """
    parts = name.split(".")
    module: Any = base
    for number, part in enumerate(parts[:-1], start=1):
        module = getattr(module, part, None)
        if module is None:
            break  # stored, but no weight of the model
        if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)):
            return module, tuple(parts[number:])
    return None, ()


def _changing_modules(base: nn.Module) -> Iterator[str]:
    """Where PEFT changes weights; heads that share the table of the embeddings are left out."""
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            is_tied = getattr(getattr(module, "token_adapter", None), "tied_adapter", None)
            if not is_tied:
                yield name
        elif isinstance(module, LoraLayer):
            yield name
