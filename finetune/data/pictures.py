"""The pictures of rows that are encoded together: each is read, decoded and cut once, however many
rows show it.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from finetune.data.images import ImageAccess, decode_image, jpeg_size, page_of, read_image_file
from finetune.data.packed_views import KeyedView
from finetune.data.sources import Row
from finetune.data.views import ImagePlan, Size, cut_views, largest_reduction, reduced_plan
from finetune.data.vision_cache import VisionCache, content_key


@dataclass(frozen=True, slots=True)
class Shortcuts:
    """Ways to the views in less time. Pixels then differ a little from those of the library's
    processor on Pillow, plans and tokens never.
    """

    reduced_decode: bool = False
    """Decode JPEG files at a half, a quarter or an eighth of their edges, where that leaves every
    view the pixels it shows.
    """

    fast_resize: bool = False
    """As in `cut_views`."""


EXACT = Shortcuts()


class Pictures:
    """Remembers the pictures of a batch; to be let go of with it, and not shared by threads.

    Pictures are the same where rows name them by the same words, or hold the same bytes, and look
    them up alike. What stays in memory are their views, which the examples of the batch hold as
    well, and decoded pixels for the last row alone.
    """

    def __init__(
        self, resample: Image.Resampling, shortcuts: Shortcuts, cache: VisionCache | None = None
    ):
        self.resample = resample
        self.shortcuts = shortcuts
        self.cache = cache
        self._known: dict[tuple[str | bytes, ImageAccess], Picture] = {}

    def of_row(self, row: Row) -> list["Picture"]:
        """The row's pictures in their order. Raises `DataError` where one cannot be read."""
        keys = [(part.source, row.image_access) for part in row.conversation.images()]
        for key in self._known.keys() - set(keys):
            self._known[key].let_go()
        for key in keys:
            if key not in self._known:
                self._known[key] = Picture(*key, self.resample, self.shortcuts, self.cache)
        return [self._known[key] for key in keys]


class Picture:
    """One picture: its upright size from the start, its views once their plan is known."""

    def __init__(
        self,
        source: str | bytes,
        access: ImageAccess,
        resample: Image.Resampling,
        shortcuts: Shortcuts,
        cache: VisionCache | None = None,
    ):
        """Raises `DataError` where the picture cannot be read."""
        self._source = source
        self._access = access
        self._resample = resample
        self._shortcuts = shortcuts
        self._file: tuple[str, bytes] | None = None
        self._decoded: tuple[int, Image.Image] | None = None
        self._views: dict[ImagePlan, list[Any]] = {}
        self._cache = cache
        self._content = ""
        kept_size = None
        if cache:
            self._content = content_key(self._read()[1], page_of(source), access.pdf_dpi)
            kept_size = cache.size_of(self._content)
        size_px = jpeg_size(*self._read(), access) if shortcuts.reduced_decode else None
        self._is_reducible = size_px is not None
        self.size_px: Size = kept_size or size_px or self._decode(1).size

    def views(self, plan: ImagePlan) -> list[Any]:
        """uint8 [C, H, W] each, or with a cache `KeyedView`s; the same objects whenever they are
        asked for. Raises `DataError` where the picture has to be decoded and cannot.
        """
        if plan not in self._views:
            self._views[plan] = self._keyed(self._cache, plan) if self._cache else self._cut(plan)
        return self._views[plan]

    def _keyed(self, cache: VisionCache, plan: ImagePlan) -> list[KeyedView]:
        views = cache.views(self._content, self.size_px, plan, self._reduction(plan))
        if all(view.features is not None for view in views):
            return views
        pixels = self._cut(plan)
        return [
            view if view.features is not None else replace(view, pixels=cut)
            for view, cut in zip(views, pixels, strict=True)
        ]

    def _cut(self, plan: ImagePlan) -> list[np.ndarray]:
        reduction = self._reduction(plan)
        return cut_views(
            self._decode(reduction),
            reduced_plan(plan, self.size_px, reduction),
            self._resample,
            fast_resize=self._shortcuts.fast_resize,
        )

    def _reduction(self, plan: ImagePlan) -> int:
        return largest_reduction(plan, self.size_px) if self._is_reducible else 1

    def let_go(self) -> None:
        """Forget file and pixels, not the views; they are read again if another plan needs them."""
        self._file = self._decoded = None

    def _read(self) -> tuple[str, bytes]:
        self._file = self._file or read_image_file(self._source, self._access)
        return self._file

    def _decode(self, reduction: int) -> Image.Image:
        if not self._decoded or self._decoded[0] != reduction:
            name, data = self._read()
            page = page_of(self._source)
            image = decode_image(
                name, data, self._access, page=page, reduction=reduction, keep_grey=True
            )
            self._decoded, self._file = (reduction, image), None
        return self._decoded[1]
