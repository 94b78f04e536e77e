"""Images: decoding, the geometry of views, and the views' pixels.

A *view* is a rectangle of the image at the size in which the vision tower sees it. The geometry is
integers in, integers out, so that tokens can be counted from an image's header alone.

Shape letters: C channels (3), H height, W width, all in pixels.
"""

import base64
import binascii
import io
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

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
    crop = image if whole else image.crop(view.box)
    resized = crop.resize((view.width_px, view.height_px), resample)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def load_image(source: str | bytes, root: Path) -> Image.Image:
    """Decode an image to upright RGB: a path (relative ones from `root`), a data URI, or the bytes
    of a file.

    Raises `DataError` saying what is wrong with it: missing, cut short, no image, too large, a URL.
    """
    name, data = _read(source, root)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            # Pillow itself only warns up to twice its limit, and warnings are the whole process's
            if opened.width * opened.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError(f"{opened.width:,} x {opened.height:,} pixels")
            opened.load()
            return to_rgb(ImageOps.exif_transpose(opened))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"image {name} is too large ({error}); scale it down before training"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise DataError(f"image {name} {_fault(error, data)}; mend or replace it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB: transparency over white as the library does it, 16-bit greys scaled
    rather than clipped.

    Raises `ValueError` for floating-point images, whose range nothing tells.
    """
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    if image.mode == "F":
        raise ValueError("holds floating-point pixels, whose white nothing tells; save it as 8-bit")
    if image.mode.startswith(
        "I"
    ):  # I;16, I;16B, I;16L and the 32-bit I that 16-bit files once opened as
        values = np.asarray(image, dtype=np.int64).clip(0, 65535)
        # 257 = 65535 / 255: the brightest 16-bit grey becomes 255
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if (
        "A" in image.getbands()
        or "a" in image.getbands()
        or image.info.get("transparency") is not None
    ):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _read(source: str | bytes, root: Path) -> tuple[str, bytes]:
    """A name for messages, and the file's bytes."""
    if isinstance(source, bytes):
        return "(bytes in the row)", source
    if source.startswith("data:"):
        return "(data URI)", _decode_data_uri(source)
    if source.startswith(("http://", "https://")):
        raise DataError(
            f"image {source[:80]!r} is a URL, and nothing is downloaded; save it as a file"
        )
    path = root / source
    try:
        return repr(source), path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"image {source!r} not found in {root}; mend the path, or set image_root"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(
            f"image {source!r} cannot be read ({reason}); mend or replace it"
        ) from error


def _decode_data_uri(uri: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise DataError("image (data URI) must read data:image/...;base64,...")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise DataError(
            f"image (data URI) is not valid base64 ({error}); encode it again"
        ) from error


def _fault(error: Exception, data: bytes) -> str:
    """What is wrong with the file, from Pillow's error."""
    if not data:
        return "is an empty file"
    text = str(error)
    if "truncated" in text or isinstance(error, EOFError):
        return f"is cut short (only {len(data):,} bytes)"
    if "cannot identify" in text:
        return "is no image that can be read"
    return f"cannot be decoded ({text or type(error).__name__})"
