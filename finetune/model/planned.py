"""A recipe's model without weights: what it holds, and what a step of it takes."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from finetune.model.adapters import base_of, count_parameters
from finetune.model.attention import follow_layouts
from finetune.model.kernels import Device
from finetune.model.load import load_config
from finetune.model.memory import StepMemory, quantise, set_up_training, step_memory
from finetune.model.methods import make_trainable, mixes_dtypes
from finetune.model.parts import part_of, target_pattern
from finetune.model.vision import take_packed_views
from finetune.model.vocabulary import extend_vocabulary
from finetune.recipe import Recipe


@dataclass(frozen=True)
class Parameters:
    """How many numbers each part of the model holds; the output head is language's."""

    total: int
    vision: int
    connector: int
    language: int
    trainable: int
    adapter_bytes: int
    """What is saved of a run: the adapter, or of full training the whole model."""


class PlannedModel:
    """A recipe's model on the meta device, adapted and set up as the trainer would."""

    def __init__(self, recipe: Recipe, processor: Any, device: Device):
        self.recipe = recipe
        self.device: Device = device
        self.config, self.family = load_config(recipe.model)
        config = self.config
        attention, is_full = recipe.model.attention, recipe.adapter.method == "full"
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(
                config,
                # full training holds its weights in float32, as `load_trainable` does
                dtype=getattr(torch, "float32" if is_full else recipe.model.dtype),
                # all fused kernels keep the same, and flash_attn need not be here
                attn_implementation="eager" if attention == "eager" else "sdpa",
            )
        self.family.adjust_model(model)
        if recipe.model.packed_vision:
            take_packed_views(model, self.family)
        follow_layouts(model)
        self.part_of = part_of(self.family, config)
        by_part: Counter[str] = Counter()
        for name, parameter in model.named_parameters():
            by_part[self.part_of(name) or "language"] += parameter.numel()
        language = re.compile(target_pattern([self.family.parts_of(config)["language"]]))
        quantise(model, lambda name: bool(language.fullmatch(name)), recipe.model.quantize)
        new_ids = extend_vocabulary(model, processor, recipe)
        self.adapted = make_trainable(model, self.family, recipe, new_token_ids=new_ids)
        trained = [each for each in self.adapted.parameters() if each.requires_grad]
        self.parameters = Parameters(
            total=by_part.total(),
            vision=by_part["vision"],
            connector=by_part["connector"],
            language=by_part["language"],
            trainable=count_parameters(self.adapted)[0],
            adapter_bytes=by_part.total() * getattr(torch, recipe.model.dtype).itemsize
            if is_full
            else sum(each.numel() * each.element_size() for each in trained),
        )
        set_up_training(self.adapted, checkpointing=recipe.training.gradient_checkpointing)

    @property
    def inner(self) -> Any:
        """The model without its head, which holds tower and connector."""
        model = self.adapted
        return base_of(model).model

    def with_training(self, recipe: Recipe) -> "PlannedModel":
        """The same weights, trained otherwise."""
        other = object.__new__(PlannedModel)
        other.__dict__.update(self.__dict__)
        other.recipe = recipe
        return other

    def step(self, batch: Mapping[str, Any], bytes_of_other_batches: int) -> StepMemory:
        """What a step with this batch takes. Raises `ModelError`."""
        training, dtype = self.recipe.training, self.recipe.model.dtype
        set_up_training(self.adapted, checkpointing=training.gradient_checkpointing)
        # as `training_arguments` asks for autocast
        is_mixed = self.device == "cuda" or mixes_dtypes(self.recipe)
        return step_memory(
            self.adapted,
            batch,
            term_of=self._term_of,
            optimizer=training.optimizer,
            device=self.device,
            half=getattr(torch, dtype) if is_mixed and dtype != "float32" else None,
            accumulates=training.gradient_accumulation > 1,
            bytes_of_other_batches=bytes_of_other_batches,
        )

    def _term_of(self, module: str) -> str | None:
        name = module.removeprefix("base_model.model").removeprefix(".")
        if not name:
            # what wraps the model computes nothing; the model itself, beside its parts, the loss
            return "logits" if module in ("base_model.model", "") else None
        if name == "base_model":
            return None
        return "logits" if name == "lm_head" else self.part_of(name) or "language"
