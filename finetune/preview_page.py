"""The page of `finetune preview`: rows as the model reads them, on one file: the views at their
size, the text token by token, and which of it is learnt.

This module decides what is shown; words and numbers are shaped in the template, which escapes all
text from outside.
"""

import base64
import io
import json
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from finetune import __version__
from finetune.data.examples import Example, Fitted
from finetune.data.images import name_of
from finetune.data.views import ImagePlan, Size
from finetune.errors import RunDirError
from finetune.recipe import ImagesSection
from finetune.rundir import write_text

MAX_PNG_BYTES = 200_000  # a view that is larger as PNG is embedded as JPEG, and said to be
MAX_VIEWS_BYTES = 22_000_000  # of all views together, before base64: a page of about 30 MB
JPEG_QUALITIES = (90, 80, 65, 50)
QUARTERS = (
    "upper left quarter",
    "upper right quarter",
    "lower left quarter",
    "lower right quarter",
)
INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"})  # Unicode categories, but for the space


@dataclass(frozen=True, slots=True)
class PreviewImage:
    """A picture of a row: what messages call it, and how it is cut into views."""

    name: str
    size_px: Size
    plan: ImagePlan


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """A row as it would be trained on; `example.views` are those of its images, in their order."""

    example: Example
    images: Sequence[PreviewImage]
    note: str = ""
    """What was done to the row for it to fit, such as "2 turns dropped"."""

    @classmethod
    def of_fitted(cls, example: Example, fitted: Fitted) -> "PreviewRow":
        """The row from what `Encoder.encode_fitted` gives."""
        parts = zip(fitted.conversation.images(), fitted.sizes_px, fitted.plans, strict=True)
        images = [PreviewImage(name_of(part.source), size, plan) for part, size, plan in parts]
        return cls(example, images, fitted.change)


def preview_row(example: Example, processor: Any) -> dict[str, Any]:
    """The row as `--json` prints it; `text` is all that the model reads, special tokens too."""
    return {
        "where": example.where,
        "input_ids": example.input_ids,
        "loss_mask": example.loss_mask,
        "text": processor.tokenizer.decode(example.input_ids, skip_special_tokens=False),
        "views": [[view.shape[2], view.shape[1]] for view in example.views],
    }


def write_preview(
    rows: Sequence[PreviewRow],
    processor: Any,
    out: Path,
    *,
    title: str,
    model: str,
    images: ImagesSection,
    num_rows: int | None = None,
    problems: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write the page of these rows; returns its path.

    `num_rows` is how many rows there are to choose from, `problems` are (where, reason) of rows
    that could not be shown. Replaces a page, but raises `RunDirError` for a path that holds
    anything else, or cannot be written.
    """
    refuse_other_than_page(out)
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = files("finetune").joinpath("preview.html.j2").read_text(encoding="utf-8")
    cards = make_cards(rows, processor)
    html = page.from_string(template).render(
        title=title,
        model=model,
        images=images,
        num_rows=num_rows,
        problems=problems,
        cards=cards,
        jpegs=[view for card in cards for view in card.views if view.jpeg_quality is not None],
        max_png_bytes=view_limit(rows),
        version=__version__,
    )
    try:
        # a file's name may hold bytes that are no UTF-8
        write_text(out, html.encode(errors="replace").decode())
    except OSError as error:
        raise RunDirError(
            f"{out}: cannot be written ({error.strerror}); give another file with --out"
        ) from error
    return out


def refuse_other_than_page(out: Path) -> None:
    """Raise `RunDirError` where the page would take the place of a folder, a device or a file that
    is no page.
    """
    if not out.exists():
        return
    if not out.is_file():
        raise RunDirError(f"{out}: is no file but a folder or a device; give a file with --out")
    with out.open("rb") as existing:
        start = existing.read(64).lstrip().lower()
    if start and not start.startswith(b"<!doctype html"):
        raise RunDirError(f"{out}: holds something else than a page; give another file with --out")


# The views.


@dataclass(frozen=True, slots=True)
class ShownView:
    """A view in the page; `uri` holds its pixels at their true size."""

    uri: str
    jpeg_quality: int | None
    order: int  # within the row, from 1
    image: int  # the same
    number: int  # within its image, from 1
    place: str
    width_px: int
    height_px: int


def view_limit(rows: Sequence[PreviewRow]) -> int:
    """How many bytes a view may take, so that a page of many stays light enough to be opened."""
    num_views = sum(len(row.example.views) for row in rows)
    return min(MAX_PNG_BYTES, MAX_VIEWS_BYTES // max(num_views, 1))


def embed(view: np.ndarray, limit_bytes: int) -> tuple[str, int | None]:
    """A view [3, H, W] as a data URI: PNG where it fits into the limit, otherwise JPEG, whose
    quality is given.

    The lowest quality may be above the limit.
    """
    picture = Image.fromarray(view.transpose(1, 2, 0))
    content = _encoded(picture, "PNG")
    if len(content) <= limit_bytes:
        return _data_uri("png", content), None
    quality = JPEG_QUALITIES[-1]
    for quality in JPEG_QUALITIES:
        content = _encoded(picture, "JPEG", quality=quality)
        if len(content) <= limit_bytes:
            break
    return _data_uri("jpeg", content), quality


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def place_in_picture(plan: ImagePlan, number: int) -> str:
    """Which part of its picture a view shows, in words; views are numbered from 0."""
    if number >= plan.rows * plan.cols:
        return "whole"
    if (plan.rows, plan.cols) == (2, 2):
        return QUARTERS[number]
    return f"row {number // plan.cols + 1}, column {number % plan.cols + 1}"


# The text.


@dataclass(frozen=True, slots=True)
class Span:
    """The least run of tokens that has text of its own: mostly one, several where a character is
    spread over them, and all of a special token that is repeated.
    """

    text: str
    ids: list[int]
    position: int  # of the first of them in the row, from 0
    learnt: bool
    is_special: bool
    is_image: bool

    @property
    def raw(self) -> str:
        """The text as a JSON string in ASCII, which HTML carries unharmed whatever it holds."""
        return json.dumps(self.text)

    @property
    def repeats(self) -> int:
        """How often a special token stands here; 1 for text."""
        return len(self.ids) if self.is_special else 1

    @property
    def token_text(self) -> str:
        """The text of one of the repeats."""
        return self.text[: len(self.text) // self.repeats]

    @property
    def parts(self) -> list[tuple[str, str]]:
        """What to show: plain text, and the characters that would not be seen, by kind."""
        return list(visible_parts(self.text))


def cut_text(tokenizer: Any, ids: Sequence[int]) -> list[tuple[int, str]]:
    """The decoded text cut between tokens: how many tokens, and their text.

    The texts joined are `tokenizer.decode(ids)`, whatever the kind of tokeniser: a cut stands only
    where the decoded beginning is the beginning of the decoded whole. Within a character, it is
    not; nor is there a cut before a token that adds nothing. Time grows with the square of the
    length: half a second for 2,000 tokens.
    """
    text = tokenizer.decode(ids, skip_special_tokens=False)
    cuts = [(len(ids), len(text))]
    for num_tokens in range(len(ids) - 1, 0, -1):
        start = tokenizer.decode(ids[:num_tokens], skip_special_tokens=False)
        # Shorter than the last cut, since a replacement character in the text itself looks like
        # the beginnings of its bytes
        if 0 < len(start) < cuts[-1][1] and text.startswith(start):
            cuts.append((num_tokens, len(start)))
    pieces = []
    tokens_before = length_before = 0
    for num_tokens, length in reversed(cuts):
        pieces.append((num_tokens - tokens_before, text[length_before:length]))
        tokens_before, length_before = num_tokens, length
    return pieces


def make_spans(example: Example, processor: Any) -> list[Span]:
    """The text of an example, in spans; repeated special tokens are one."""
    tokenizer = processor.tokenizer
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    spans: list[Span] = []
    position = 0
    for num_tokens, text in cut_text(tokenizer, example.input_ids):
        ids = example.input_ids[position : position + num_tokens]
        # Answers begin and end between characters, so a span is learnt whole or not at all
        learnt = example.loss_mask[position]
        is_special = num_tokens == 1 and ids[0] in special
        if is_special and spans and spans[-1].ids[-1] == ids[0] and spans[-1].learnt == learnt:
            before = spans.pop()
            position, text, ids = before.position, before.text + text, before.ids + ids
        is_image = ids[0] == processor.image_token_id
        spans.append(Span(text, ids, position, learnt, is_special, is_image))
        position += len(ids)
    return spans


def visible_parts(text: str) -> Iterator[tuple[str, str]]:
    """(kind, text) pairs: `text`, `newline`, `tab`, `space` where it leads or ends, and `code` for
    the name of any other character that is not seen.
    """
    edge = len(text) - len(text.lstrip(" ")), len(text.rstrip(" "))
    for kind, group in groupby(enumerate(text), lambda item: _kind(*item, edge)):
        characters = "".join(character for _, character in group)
        if kind == "text":
            yield kind, characters
        else:
            for character in characters:
                yield kind, f"U+{ord(character):04X}" if kind == "code" else character


def _kind(index: int, character: str, edge: tuple[int, int]) -> str:
    if character == " ":
        return "text" if edge[0] <= index < edge[1] else "space"
    if character in "\n\t":
        return "newline" if character == "\n" else "tab"
    return "code" if unicodedata.category(character) in INVISIBLE else "text"


# The cards.


@dataclass(frozen=True, slots=True)
class Run:
    """Spans in a row that are all learnt, or all not."""

    learnt: bool
    spans: list[Span]

    @property
    def num_tokens(self) -> int:
        return sum(len(span.ids) for span in self.spans)


@dataclass(frozen=True, slots=True)
class Card:
    """A row in the page."""

    row: PreviewRow
    runs: list[Run]
    views: list[ShownView] = field(repr=False)

    @property
    def num_tokens(self) -> int:
        return len(self.row.example.input_ids)

    @property
    def num_learnt(self) -> int:
        return sum(self.row.example.loss_mask)

    def views_of(self, image: int) -> list[ShownView]:
        """Those of one picture, counted from 1."""
        return [view for view in self.views if view.image == image]

    def view_of_span(self) -> dict[int, ShownView]:
        """The view that an image span stands for, by the span's position.

        Empty where spans and views do not pair up, in families without tokens between views.
        """
        spans = [span for run in self.runs for span in run.spans if span.is_image]
        if len(spans) != len(self.views):
            return {}
        return {span.position: view for span, view in zip(spans, self.views, strict=True)}


def make_cards(rows: Sequence[PreviewRow], processor: Any) -> list[Card]:
    """The rows with their text in spans and their views embedded."""
    limit_bytes = view_limit(rows)
    cards = []
    with ThreadPoolExecutor() as threads:  # encoders release the interpreter's lock
        for row in rows:
            embedded = threads.map(lambda view: embed(view, limit_bytes), row.example.views)
            spans = make_spans(row.example, processor)
            runs = [Run(key, list(group)) for key, group in groupby(spans, lambda s: s.learnt)]
            cards.append(Card(row, runs, _shown_views(row, list(embedded))))
    return cards


def _shown_views(row: PreviewRow, embedded: Sequence[tuple[str, int | None]]) -> list[ShownView]:
    planned = [
        (i, number + 1, place_in_picture(image.plan, number))
        for i, image in enumerate(row.images, start=1)
        for number in range(len(image.plan.views))
    ]
    return [
        ShownView(uri, quality, order, image, number, place, pixels.shape[2], pixels.shape[1])
        for order, ((uri, quality), (image, number, place), pixels) in enumerate(
            zip(embedded, planned, row.example.views, strict=True), start=1
        )
    ]
