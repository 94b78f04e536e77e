"""The geometry of views, and their pixels.

A *view* is a rectangle of the image at the size in which the vision tower sees it. The geometry is
integers in, integers out, so that tokens can be counted from an image's header alone.

Shape letters: C channels (3), H height, W width, all in pixels.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from finetune.data.images import own_pillow_settings
from finetune.errors import DataError

Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels of the upright image


@dataclass(frozen=True, slots=True)
class View:
    """Which part of the image, and the size it is brought to."""

    box: Box
    width_px: int
    height_px: int


def resize_to_fit(
    width_px: int, height_px: int, *, shortest_edge_px: int, longest_edge_px: int
) -> tuple[int, int]:
    """The size Idefics2 sees: the long edge brought down to its limit, then each edge up to the
    short one.

    The second step may bend the aspect ratio of very long images (100 x 5000 becomes 378 x 980), as
    the model was trained. The divisions are the library's own floating-point ones: exact integers
    would differ by a pixel at times. Source: transformers v5.23,
    idefics2/image_processing_pil_idefics2.py, get_resize_output_image_size.
    """
    aspect_ratio = width_px / height_px
    if width_px >= height_px and width_px > longest_edge_px:
        width_px, height_px = longest_edge_px, int(longest_edge_px / aspect_ratio)
    elif height_px > width_px and height_px > longest_edge_px:
        width_px, height_px = int(longest_edge_px * aspect_ratio), longest_edge_px
    return max(width_px, shortest_edge_px), max(height_px, shortest_edge_px)


def quarters(width_px: int, height_px: int) -> list[Box]:
    """The four quarter crops in reading order; with odd sizes the right and lower ones take the
    extra pixel.

    Source: transformers v5.23, idefics2/image_processing_pil_idefics2.py, split_images.
    """
    middle_x, middle_y = width_px // 2, height_px // 2
    return [
        (0, 0, middle_x, middle_y),
        (middle_x, 0, width_px, middle_y),
        (0, middle_y, middle_x, height_px),
        (middle_x, middle_y, width_px, height_px),
    ]


def plan_views(
    width_px: int,
    height_px: int,
    *,
    split: Literal["always", "never", "auto"],
    shortest_edge_px: int,
    longest_edge_px: int,
) -> list[View]:
    """The views of an image in the order in which the model reads them: the quarters, if split,
    then the whole.

    `auto` splits only where the whole view would lose pixels, that is, where an edge is above
    `longest_edge_px`. Raises `DataError` for an image of one pixel's width or height that would be
    split.
    """
    whole = (0, 0, width_px, height_px)
    is_split = split == "always" or (split == "auto" and max(width_px, height_px) > longest_edge_px)
    if is_split and min(width_px, height_px) < 2:
        raise DataError(
            f"is {width_px} x {height_px} pixels, too small to be split in four; "
            "leave it out, or set images.split: never"
        )
    boxes = [*quarters(width_px, height_px), whole] if is_split else [whole]
    views = []
    for box in boxes:
        left, upper, right, lower = box
        width, height = resize_to_fit(
            right - left,
            lower - upper,
            shortest_edge_px=shortest_edge_px,
            longest_edge_px=longest_edge_px,
        )
        views.append(View(box, width, height))
    return views


def cut_view(
    image: Image.Image, view: View, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> np.ndarray:
    """The pixels of one view of an RGB image, uint8 [C, H, W].

    The crop comes first: resizing with a box would let pixels from outside the crop bleed in at its
    edges.
    """
    whole = view.box == (0, 0, *image.size)
    with own_pillow_settings():  # a crop, too, is held against the limit of the process
        crop = image if whole else image.crop(view.box)
    resized = crop.resize((view.width_px, view.height_px), resample)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))
