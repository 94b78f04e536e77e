"""What the vision cache would take for the rows of a recipe, and what it would save.

Shape letters: N rows, n views of one call, C channels (3), H height, W width in pixels, P places of
a view's features, D their width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from finetune.data.packed_views import PackedViews
from finetune.model.planned import PlannedModel
from finetune.model.vision import Stage, frozen_stage
from finetune.preparation import PreparedRows


@dataclass(frozen=True)
class CachePlan:
    """Bytes that the features of all rows take, and arithmetic that each epoch after the first is
    spared.

    `limit_bytes` None: the recipe has the cache off.
    """

    stage: Stage
    needed_bytes: int
    limit_bytes: int | None
    flops_saved: int

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "features_of": self.stage,
            "bytes": self.needed_bytes,
            "limit_bytes": self.limit_bytes,
            "fits": None if self.limit_bytes is None else self.needed_bytes <= self.limit_bytes,
            "flops_saved_an_epoch": self.flops_saved,
        }

    def in_words(self, arithmetic: str) -> str:
        """One line; `arithmetic` is what is saved."""
        takes = f"vision cache: takes {self.needed_bytes / 2**30:,.2f} GiB of disk"
        saves = f"saves {arithmetic} an epoch from the second on"
        if self.limit_bytes is None:
            return f"{takes} and {saves}; training.vision_cache is off"
        limit = f"{self.limit_bytes / 2**30:,.2f} GiB"
        if self.needed_bytes <= self.limit_bytes:
            return f"{takes}, all within {limit}, and {saves}"
        share = self.limit_bytes / self.needed_bytes
        return f"{takes}, of which {limit} hold {share:.0%}; with all of it, {saves}"


@dataclass(frozen=True)
class FeatureShape:
    """How large features are, as seen on one view of so many pixels."""

    stage: Stage
    places: int
    width: int
    pixels: int

    def of_view(self, num_pixels: int) -> tuple[int, int]:
        """P and D; a connector gives each view as many."""
        if self.stage == "connector":
            return self.places, self.width
        return num_pixels * self.places // self.pixels, self.width

    def num_bytes(self, num_views: float, num_pixels: float) -> int:
        """Of so many views in bfloat16, with so many pixels together."""
        places = num_views * self.places
        if self.stage == "tower":
            places = num_pixels * self.places / self.pixels
        return round(places * self.width * 2)

    def in_place_of(self, views: PackedViews) -> PackedViews:
        """The same views with features, which are zeros."""
        groups = tuple(
            torch.zeros((len(each), *self.of_view(each[0, 0].numel())), dtype=torch.bfloat16)
            for each in views.groups
        )
        return replace(views, groups=groups)


@contextmanager
def seeing_features(model: PlannedModel) -> Iterator[list[FeatureShape]]:
    """The shapes of what a step computes that a cache would keep; none where none would."""
    shapes: list[FeatureShape] = []
    encoder, inner, recipe = model.family.view_encoder, model.inner, model.recipe
    is_used = recipe.model.packed_vision and recipe.adapter.method != "frozen"
    stage = frozen_stage(inner) if encoder and is_used else None
    if not encoder or not stage:
        yield shapes
        return
    num_pixels = [0]

    def tower(inner: Any, pixels_nCHW: torch.Tensor) -> torch.Tensor:
        num_pixels[0] = pixels_nCHW.shape[-2] * pixels_nCHW.shape[-1]
        return noted("tower", encoder.tower(inner, pixels_nCHW))

    def noted(of: Stage, features_nPD: torch.Tensor) -> torch.Tensor:
        if of == stage:
            shapes.append(FeatureShape(stage, *features_nPD.shape[1:], pixels=num_pixels[0]))
        return features_nPD

    inner.view_encoder = replace(
        encoder,
        tower=tower,
        connect=lambda inner, hidden: noted("connector", encoder.connect(inner, hidden)),
    )
    try:
        yield shapes
    finally:
        inner.view_encoder = encoder


@dataclass
class KeepsNothing:
    """Lets a model without weights take features."""

    stage: Stage
    num_read: int = 0

    def keep(self, keys: Any, features_nPD: torch.Tensor) -> torch.Tensor:
        """As they are."""
        return features_nPD


def shares_shown_first(rows: PreparedRows) -> np.ndarray:
    """Of each row's pictures the share that no row before it shows [N].

    Summed with the rows' views it counts each picture once: exactly where a row shows one, or all
    its pictures for the first or not for the first time.
    """
    counts = rows.examination.counts
    num_images = counts["num_images"].astype(np.int64)
    is_used = np.zeros(len(counts), bool)
    is_used[rows.rows.numbers] = True
    row_of_image = np.repeat(np.arange(len(counts)), num_images)
    used = np.flatnonzero(is_used[row_of_image])
    _, first = np.unique(rows.examination.image_keys[used], return_index=True)
    num_first = np.bincount(row_of_image[used[first]], minlength=len(counts))
    return (num_first / np.maximum(num_images, 1))[rows.rows.numbers]
