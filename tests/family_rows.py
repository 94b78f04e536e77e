"""Rows for the tests of one family, cut, rendered and padded as in training but from pictures in
memory; and counts over the modules of its parts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image as PilImage

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.collate import collate
from finetune.data.examples import Example
from finetune.data.render import Renderer
from finetune.data.views import cut_views
from finetune.families.family import Family, Part
from finetune.recipe import ImagesSection

Inputs = dict[str, torch.Tensor]


def noise(width: int, height: int, seed: int = 0) -> PilImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PilImage.fromarray(pixels)


def asked(*content: Image | Text, answer: str = "A cat.") -> Conversation:
    return Conversation((Message("user", content), Message("assistant", (Text(answer),))))


def shown(
    processor: Any, family: Family, pictures: Sequence[PilImage.Image], ids: Sequence[int] = ()
) -> Example:
    """A row of these ids with the views of its pictures."""
    image_processor = processor.image_processor
    plans = [family.plan_image(*p.size, ImagesSection(), image_processor) for p in pictures]
    resample = PilImage.Resampling(image_processor.resample)
    views = [
        view
        for picture, plan in zip(pictures, plans, strict=True)
        for view in cut_views(picture, plan, resample)
    ]
    return Example("row", list(ids), [False] * len(ids), views, plans)


def encode(
    processor: Any,
    family: Family,
    conversation: Conversation,
    pictures: Sequence[PilImage.Image] = (),
    *,
    prompt: bool = False,
) -> Example:
    """The conversation to be learnt, or, of a prompt, to be answered."""
    row = shown(processor, family, pictures)
    renderer = Renderer(processor, family)
    if prompt:
        ids = renderer.render_prompt(conversation, row.plans)
        return Example(row.where, ids, [False] * len(ids), row.views, row.plans)
    rendered = renderer.render(conversation, row.plans)
    return Example(row.where, rendered.input_ids, rendered.loss_mask, row.views, row.plans)


def inputs_of(
    processor: Any,
    family: Family,
    rows: Sequence[Example],
    padding_side: Literal["left", "right"] = "right",
) -> Inputs:
    """The batch without its labels."""
    batch = collate(rows, processor, family, padding_side=padding_side)
    del batch["labels"]
    return batch


def learnt_ids(row: Example) -> list[int]:
    return [token for token, learnt in zip(row.input_ids, row.loss_mask, strict=True) if learnt]


def logits_of(model: Any, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def inside(name: str, part: Part) -> bool:
    """Whether a module or parameter is one of a part's."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in part.prefixes)


def parts_of_linears(model: Any, parts: Mapping[str, Part]) -> dict[str, list[str]]:
    """The name of every linear layer and the parts that adapt it."""
    return {
        name: [
            part
            for part, facts in parts.items()
            if inside(name, facts) and name.rsplit(".", 1)[-1] in facts.linears
        ]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def parameters_by_part(model: Any, parts: Mapping[str, Part]) -> dict[str, int]:
    """Parameters of vision, connector and the rest, which is language, and of all."""
    counted = {"vision": 0, "connector": 0, "language": 0, "total": 0}
    for name, parameter in model.named_parameters():
        of = next((p for p in ("connector", "vision") if inside(name, parts[p])), "language")
        counted[of] += parameter.numel()
        counted["total"] += parameter.numel()
    return counted


def lora_parameters(model: Any, parts: Mapping[str, Part], adapted: Sequence[str]) -> int:
    """Of rank 8, on some parts."""
    layers = [
        model.get_submodule(name)
        for name, of in parts_of_linears(model, parts).items()
        if set(of) & set(adapted)
    ]
    return sum(8 * (layer.in_features + layer.out_features) for layer in layers)
