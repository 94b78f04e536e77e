"""What Pillow is asked the same way everywhere: its settings for the whole process, and the mode in
which a picture is handed on.
"""

import contextlib
import os
import threading
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFile

from finetune.errors import DataError


class _PillowSettings:
    """Two settings of Pillow hold for the whole process, and any library may have changed them:
    whether cut images are filled up with grey, and above how many pixels it warns or raises (we
    hold each image against the recipe's own limit). They are ours while any thread decodes.
    """

    def __init__(self) -> None:
        self.before: tuple[bool, int | None] = (False, None)
        self.reset()

    def reset(self) -> None:
        """As when nobody decodes; also for a forked process, where the lock may be held by a thread
        that was not forked.
        """
        self.lock = threading.Lock()
        self.num_users = 0

    def enter(self) -> None:
        with self.lock:
            if self.num_users == 0:
                self.before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
            ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, None
            self.num_users += 1

    def leave(self) -> None:
        with self.lock:
            self.num_users -= 1
            if self.num_users == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = self.before


_settings = _PillowSettings()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_settings.reset)


@contextlib.contextmanager
def own_pillow_settings() -> Iterator[None]:
    """Pillow's process-wide settings are ours within, whatever other libraries have set, and given
    back after.
    """
    _settings.enter()
    try:
        yield
    finally:
        _settings.leave()


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB: transparency over white as the library does it, 16-bit greys scaled
    rather than clipped.

    Raises `DataError` for floating-point images, whose range nothing tells.
    """
    found = to_rgb_or_grey(image)
    return found if found.mode == "RGB" else found.convert("RGB")


def to_rgb_or_grey(image: Image.Image) -> Image.Image:
    """As `to_rgb`, but a file without colours stays one band (mode L), a third of the work for all
    that comes after.
    """
    if image.mode in ("RGB", "L") and image.info.get("transparency") is None:
        return image
    if image.mode == "F":
        raise DataError("holds floating-point pixels, whose white nothing tells; save it as 8-bit")
    if image.mode.startswith(
        "I"
    ):  # I;16, I;16B, I;16L and the 32-bit I that 16-bit files once opened as
        values = np.asarray(image)
        greys = np.empty(values.shape, np.uint8)
        for start in range(0, len(values), 256):  # all at once would take eight times the picture
            rows = slice(start, start + 256)
            # 257 = 65535 / 255: the brightest 16-bit grey becomes 255
            greys[rows] = (values[rows].clip(0, 65535) / 257).round()
        return Image.fromarray(greys)
    if (
        "A" in image.getbands()
        or "a" in image.getbands()
        or image.info.get("transparency") is not None
    ):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("L" if image.mode == "1" else "RGB")
