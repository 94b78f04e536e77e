"""How a picture becomes views, the rectangles that the vision tower sees: plan and cutting.

A plan is integers alone, so that tokens can be counted from an image's header. Which plan a picture
gets is its model family's to say.

Shape letters: C channels (3), H height, W width, all in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from finetune.data.pillow import own_pillow_settings

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
    image: Image.Image,
    plan: ImagePlan,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
    *,
    fast_resize: bool = False,
) -> list[np.ndarray]:
    """The pixels of an RGB or grey (L) image's views, each uint8 [C, H, W].

    They are those of the library's processor on Pillow to the last bit. With `fast_resize` torch
    resizes what has colours, two to seven times as fast where the CPU has AVX2, as the library's
    processor on torchvision does: most pixels are the same, some differ by one or two of 255.
    """
    with own_pillow_settings():  # a crop, too, is held against the limit of the process
        if not fast_resize and _is_grey(image):
            image = image.getchannel(0)
        for size in plan.resizes:
            image = _resized(image, size, resample)
        if canvas := plan.canvas:
            ground = Image.new("RGB", (canvas.width_px, canvas.height_px), canvas.colour)
            ground.paste(image, (canvas.left_px, canvas.upper_px))
            image = ground
        if fast_resize and image.mode == "RGB" and resample in _TORCH_MODES:
            return _cut_by_torch(image, plan.views, _TORCH_MODES[resample])
        return [_cut(image, view, resample) for view in plan.views]


def _is_grey(image: Image.Image) -> bool:
    """Whether all bands of an RGB image are the same, as in most scans: each is resized by itself,
    so one stands for all.
    """
    if image.mode != "RGB":
        return False
    few = np.asarray(image.resize((64, 64), Image.Resampling.NEAREST))  # shows colours at no cost
    if (few != few[..., :1]).any():
        return False
    red = image.tobytes("raw", "R")
    return red == image.tobytes("raw", "G") and red == image.tobytes("raw", "B")


def _cut(image: Image.Image, view: View, resample: Image.Resampling) -> np.ndarray:
    """The crop comes first: resizing with a box would let pixels from outside the crop bleed in at
    its edges.
    """
    whole = view.box == (0, 0, *image.size)
    crop = image if whole else image.crop(view.box)
    resized = _resized(crop, (view.width_px, view.height_px), resample)
    # Band by band, since Pillow holds four bytes a pixel: faster than an array that is transposed
    pixels = np.empty((3, view.width_px * view.height_px), np.uint8)
    if resized.mode == "L":
        pixels[:] = np.frombuffer(resized.tobytes(), np.uint8)
    else:
        for i, band in enumerate("RGB"):
            pixels[i] = np.frombuffer(resized.tobytes("raw", band), np.uint8)
    return pixels.reshape(3, view.height_px, view.width_px)


def _resized(image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, resample)


_TORCH_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


def _cut_by_torch(image: Image.Image, views: Sequence[View], mode: str) -> list[np.ndarray]:
    """Crops are slices of one array, read where they stand; only in this layout is torch fast."""
    pixels_1CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    cut = []
    for view in views:
        left, upper, right, lower = view.box
        crop_1CHW = pixels_1CHW[..., upper:lower, left:right]
        size = (view.height_px, view.width_px)
        if crop_1CHW.shape[2:] != size:
            crop_1CHW = interpolate(crop_1CHW, size=size, mode=mode, antialias=True)
        cut.append(crop_1CHW[0].contiguous().numpy())
    return cut


def largest_reduction(plan: ImagePlan, size_px: Size) -> int:
    """By how much, of 8, 4, 2 and 1, the edges of a picture can be divided before it is cut, so
    that no view is left with fewer pixels than it shows.
    """
    if plan.resizes:
        needs = [(size_px, plan.resizes[0])]
    else:
        needs = [
            ((right - left, lower - upper), (view.width_px, view.height_px))
            for view in plan.views
            for left, upper, right, lower in [view.box]
        ]
    for reduction in (8, 4, 2):
        if min(size_px) >= reduction and all(
            width >= reduction * view_width and height >= reduction * view_height
            for (width, height), (view_width, view_height) in needs
        ):
            return reduction
    return 1


def reduced_plan(plan: ImagePlan, size_px: Size, reduction: int) -> ImagePlan:
    """The same views of a picture whose edges were divided, and rounded up, before.

    Edges of boxes go to the nearest pixel, half a pixel of the view at most from where they were.
    """
    if plan.resizes or reduction == 1:  # what is brought to one size may come from any
        return plan
    canvas = plan.canvas
    width, height = (canvas.width_px, canvas.height_px) if canvas else size_px

    def place(edge: int, end: int) -> int:
        return -(-edge // reduction) if edge == end else (edge + reduction // 2) // reduction

    views = []
    for view in plan.views:
        left, upper, right, lower = view.box
        box = (place(left, width), place(upper, height), place(right, width), place(lower, height))
        views.append(replace(view, box=box))
    if canvas:
        canvas = replace(
            canvas,
            width_px=place(width, width),
            height_px=place(height, height),
            left_px=place(canvas.left_px, width),
            upper_px=place(canvas.upper_px, height),
        )
    return replace(plan, views=tuple(views), canvas=canvas)


def num_views(plans: Sequence[ImagePlan]) -> list[int]:
    """The number of views of each image."""
    return [len(plan.views) for plan in plans]
