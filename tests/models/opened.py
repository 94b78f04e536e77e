"""A tiny checkpoint opened, and rows rendered and cut for it, without the recipe around it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PilImage
from transformers import AutoConfig, AutoProcessor

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.render import Renderer
from finetune.data.views import ImagePlan, cut_views
from finetune.families.family import Family
from finetune.recipe import ImagesSection
from tests.conftest import noise

IMAGES = ImagesSection()


@dataclass
class Opened:
    """A family's variant: its tiny checkpoint and the processor built from it."""

    family: Family
    folder: Path
    config: Any
    processor: Any


def open_tiny(family: Family, folder: Path) -> Opened:
    """As `load_processor` builds it, the family's own template included."""
    config = AutoConfig.from_pretrained(folder)
    processor = family.build_processor(
        lambda kind: (kind or AutoProcessor).from_pretrained(folder), config
    )
    assert family.own_template
    processor.chat_template = family.own_template.text
    return Opened(family, folder, config, processor)


@dataclass
class Row:
    """What of an example a family's `stack` reads."""

    input_ids: list[int]
    views: list[np.ndarray] = field(default_factory=list)
    plans: list[ImagePlan] = field(default_factory=list)


def seen(opened: Opened, pictures: list[PilImage.Image]) -> Row:
    """The views of pictures, cut as the encoder cuts them."""
    image_processor = opened.processor.image_processor
    plans = [opened.family.plan_image(*p.size, IMAGES, image_processor) for p in pictures]
    resample = PilImage.Resampling(image_processor.resample)
    views = [
        view
        for p, plan in zip(pictures, plans, strict=True)
        for view in cut_views(p, plan, resample)
    ]
    return Row([], views, plans)


def encode(opened: Opened, conversation: Conversation, pictures: list[PilImage.Image]) -> Row:
    """The row as it is trained on."""
    row = seen(opened, pictures)
    row.input_ids = (
        Renderer(opened.processor, opened.family).render(conversation, row.plans).input_ids
    )
    return row


def asked(*content: Image | Text, answer: str = "A cat.") -> Conversation:
    """One question and its answer."""
    return Conversation((Message("user", content), Message("assistant", (Text(answer),))))


def pictures_of(conversation: Conversation) -> list[PilImage.Image]:
    """Noise of several sizes in the places of a conversation's images."""
    return [noise(60 + 10 * i, 50, seed=i) for i, _ in enumerate(conversation.images())]
