"""Rows -> examples: the token ids, loss mask and views of one row; and the reasons why a row cannot
become one.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from data_formats.chat import Conversation
from finetune.data.images import View, cut_view, load_image, plan_views
from finetune.data.render import render, render_prompt
from finetune.data.sources import Problem, Row
from finetune.errors import DataError
from finetune.families.family import Family
from finetune.recipe import ImagesSection


@dataclass(frozen=True, slots=True)
class Example:
    """A row, ready to be put into a batch. `views` are uint8 [3, H, W], each at its own size in
    pixels.
    """

    where: str
    input_ids: list[int]
    loss_mask: list[bool]
    views: list[np.ndarray] = field(repr=False)


@dataclass(frozen=True, slots=True)
class RowCounts:
    """What a row costs, without its pixels."""

    where: str
    num_tokens: int
    num_learnt_tokens: int
    num_images: int
    num_views: int


@dataclass(frozen=True)
class Encoder:
    """Turns rows into examples with one processor and one set of image settings."""

    processor: Any
    family: Family
    images: ImagesSection

    def encode(self, row: Row) -> Example:
        """The row with everything in it, to be learnt from. Raises `DataError`."""
        images, plans = self._load(row, row.conversation)
        rendered = render(self.processor, self.family, row.conversation, [len(p) for p in plans])
        return Example(row.where, rendered.input_ids, rendered.loss_mask, self._cut(images, plans))

    def encode_prompt(self, row: Row) -> Example:
        """The row up to its last answer, to be answered; nothing is learnt. Raises `DataError`."""
        conversation = row.conversation.before_last_answer()
        images, plans = self._load(row, conversation)
        ids = render_prompt(self.processor, self.family, conversation, [len(p) for p in plans])
        return Example(row.where, ids, [False] * len(ids), self._cut(images, plans))

    def count(self, row: Row) -> RowCounts:
        """What the row costs; every image is decoded, so a row that can be counted can be trained.
        Raises `DataError`.
        """
        _, plans = self._load(row, row.conversation)
        rendered = render(self.processor, self.family, row.conversation, [len(p) for p in plans])
        return RowCounts(
            where=row.where,
            num_tokens=len(rendered.input_ids),
            num_learnt_tokens=sum(rendered.loss_mask),
            num_images=len(plans),
            num_views=sum(len(plan) for plan in plans),
        )

    def _load(
        self, row: Row, conversation: Conversation
    ) -> tuple[list[Image.Image], list[list[View]]]:
        images, plans = [], []
        for part in conversation.images():
            image = load_image(part.source, row.image_root)
            try:
                plan = plan_views(
                    *image.size,
                    split=self.images.split,
                    shortest_edge_px=self.images.shortest_edge_px,
                    longest_edge_px=self.images.longest_edge_px,
                )
            except DataError as error:
                name = repr(part.source) if isinstance(part.source, str) else "(bytes in the row)"
                raise DataError(f"image {name[:80]} {error}") from error
            images.append(image)
            plans.append(plan)
        return images, plans

    def _cut(self, images: list[Image.Image], plans: list[list[View]]) -> list[np.ndarray]:
        resample = Image.Resampling(self.processor.image_processor.resample)
        return [
            cut_view(image, view, resample)
            for image, plan in zip(images, plans, strict=True)
            for view in plan
        ]


def examine(
    encoder: Encoder, rows: Sequence[Row], *, max_tokens: int, num_threads: int
) -> Iterator[tuple[Row, RowCounts | Problem]]:
    """Each row with its counts, or with the reason why it cannot be trained; in order, decoding in
    threads.
    """

    def check(row: Row) -> RowCounts | Problem:
        try:
            counts = encoder.count(row)
        except DataError as error:
            return Problem(row.where, str(error))
        if counts.num_tokens > max_tokens:
            return Overlong(
                row.where,
                f"is too long ({counts.num_tokens:,} > {max_tokens:,} tokens, {counts.num_views} "
                "views); "
                "raise data.max_tokens, make images smaller or set images.split: never, "
                "or set data.overlong: skip",
            )
        return counts

    with ThreadPoolExecutor(num_threads) as threads:
        yield from zip(rows, _in_windows(threads, check, rows), strict=True)


class Overlong(Problem):
    """A row over `data.max_tokens`, which `data.overlong` decides about rather than
    `data.bad_rows`.
    """


def _in_windows(
    threads: ThreadPoolExecutor, check: Any, rows: Iterable[Row], window: int = 256
) -> Iterator[RowCounts | Problem]:
    """Results in order; a window at a time, so that a broken-off check leaves no queue of work
    behind.
    """
    pending: list[Row] = []
    for row in rows:
        pending.append(row)
        if len(pending) == window:
            yield from threads.map(check, pending)
            pending = []
    yield from threads.map(check, pending)
