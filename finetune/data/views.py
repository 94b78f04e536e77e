"""How a picture becomes views, the rectangles that the vision tower sees: plan and cutting.

A plan is integers alone, so that tokens can be counted from an image's header. Which plan a picture
gets is its model family's to say.

Shape letters: C channels (3), H height, W width, all in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from finetune.data.images import own_pillow_settings

Box = tuple[int, int, int, int]  # left, upper, right, lower
Size = tuple[int, int]  # width, height


@dataclass(frozen=True, slots=True)
class View:
    """Which part of the canvas, and the size it is brought to."""

    box: Box
    width_px: int
    height_px: int


@dataclass(frozen=True, slots=True)
class Canvas:
    """A larger picture of one colour, with the image laid on it."""

    width_px: int
    height_px: int
    left_px: int
    upper_px: int
    colour: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """The steps from the upright image to its views, in the order in which the model reads them.

    The whole image is brought to each size of `resizes`, one after the other, then laid on the
    `canvas`, if there is one; boxes of `views` are in pixels of what comes of that. `rows` and
    `cols` say how many tiles the image is split into, and are 0 where it is not.
    """

    views: tuple[View, ...]
    resizes: tuple[Size, ...] = ()
    canvas: Canvas | None = None
    rows: int = 0
    cols: int = 0

    @property
    def num_pixels(self) -> int:
        """Of all views together."""
        return sum(view.width_px * view.height_px for view in self.views)


def cut_views(
    image: Image.Image, plan: ImagePlan, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> list[np.ndarray]:
    """The pixels of an RGB image's views, each uint8 [C, H, W]."""
    with own_pillow_settings():  # a crop, too, is held against the limit of the process
        for size in plan.resizes:
            image = _resized(image, size, resample)
        if canvas := plan.canvas:
            ground = Image.new("RGB", (canvas.width_px, canvas.height_px), canvas.colour)
            ground.paste(image, (canvas.left_px, canvas.upper_px))
            image = ground
        return [_cut(image, view, resample) for view in plan.views]


def _cut(image: Image.Image, view: View, resample: Image.Resampling) -> np.ndarray:
    """The crop comes first: resizing with a box would let pixels from outside the crop bleed in at
    its edges.
    """
    whole = view.box == (0, 0, *image.size)
    crop = image if whole else image.crop(view.box)
    resized = _resized(crop, (view.width_px, view.height_px), resample)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def _resized(image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, resample)


def num_views(plans: Sequence[ImagePlan]) -> list[int]:
    """The number of views of each image."""
    return [len(plan.views) for plan in plans]
