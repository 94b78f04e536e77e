"""Held-out rows as cards: what was asked, shown, wanted and answered, and where answers differ."""

import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import extractOne

from finetune import metrics
from finetune.charts import number

SIDES = ("base", "adapter", "merged")
RIGHT_BY = "exact_match"  # where it was measured; otherwise the first metric of the recipe
CARDS_PER_STATUS = 48
CHARACTERS_SHOWN = 500
CHARACTERS_BESIDE = 60  # of what is the same on either side of a difference, in a long answer
LIKE = 0.5  # answers less like the reference are wrong as a whole, and not letter by letter
MAX_IMAGE_BYTES = (
    1_000_000  # thumbnails are far below; anything larger would make the page too heavy for a phone
)
IMAGE_KINDS = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
}
STATUSES = {
    "broken": "Broken: right before, wrong now",
    "wrong": "Still wrong",
    "fixed": "Fixed: wrong before, right now",
    "right": "Right both times",
    "unscored": "Not scored",
}
STATUS_OF: dict[tuple[bool | None, bool | None], str] = {  # base right, adapter right
    (False, True): "fixed",
    (True, False): "broken",
    (False, False): "wrong",
    (True, True): "right",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A run of letters of an answer: `same` as in the reference, to be `cut` from it, or
    `missing`.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Cut:
    """A part of a picture, in percent of its width and height."""

    left: float
    upper: float
    width: float
    height: float


@dataclass(frozen=True)
class Said:
    """One side's answer."""

    side: str
    text: str
    right: bool | None
    pieces: list[Piece]


@dataclass
class Card:
    """One held-out row in the gallery."""

    where: str
    question: str
    references: list[str]
    answers: list[Said]
    status: str  # a key of STATUSES
    views: str
    cuts: list[list[Cut]]  # of each picture, the parts that were shown beside the whole
    image_paths: list[str]
    images: list[tuple[str, list[Cut]]] = field(default_factory=list)  # data URI, where it was cut


def make_card(row: Row) -> Card:
    """A row of predictions.jsonl, judged, its pictures not yet read."""
    views = [views_of(each) for each in listed(row.get("views"))]
    references = [whole_text(reference) for reference in listed(row.get("references"))]
    sides = [side for side in SIDES if side in row]
    answers = [
        Said(side, text_of(text), is_right(row, side), shortened(differences(text, references)))
        for side, text in ((side, whole_text(row[side])) for side in sides)
    ]
    return Card(
        where=text_of(row.get("where")),
        question=text_of(row.get("question")),
        references=[text_of(reference) for reference in references],
        answers=answers,
        status=status_of(row),
        views=views_in_words(views),
        cuts=[cuts_of(each) for each in views],
        image_paths=[str(path) for path in listed(row.get("images"))],
    )


def differences(answer: str, references: Sequence[str]) -> list[Piece]:
    """What to cut from an answer and what to add to make it the nearest reference; empty where they
    are equal, or so far apart that every letter would be marked.
    """
    nearest = extractOne(answer, references, scorer=Levenshtein.normalized_similarity)
    if not nearest or not LIKE < nearest[1] < 1:
        return []
    wanted, pieces = nearest[0], []
    for step in Levenshtein.opcodes(answer, wanted):
        said, meant = answer[step.src_start : step.src_end], wanted[step.dest_start : step.dest_end]
        if step.tag == "equal":
            pieces.append(Piece("same", said))
            continue
        pieces += [Piece("cut", said)] * bool(said) + [Piece("missing", meant)] * bool(meant)
    return pieces


def shortened(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces of a long answer, of what is the same only the letters beside a difference."""
    if sum(len(piece.text) for piece in pieces) <= CHARACTERS_SHOWN:
        return list(pieces)
    shown, num_shown = [], 0
    for piece in pieces:
        text = text_of(piece.text)
        if piece.kind == "same" and len(piece.text) > 2 * CHARACTERS_BESIDE:
            text = f"{piece.text[:CHARACTERS_BESIDE]} … {piece.text[-CHARACTERS_BESIDE:]}"
        shown.append(Piece(piece.kind, text))
        num_shown += len(text)
        if num_shown > 2 * CHARACTERS_SHOWN:
            return [*shown, Piece("same", " …")]
    return shown


View = tuple[float, float, float, float, float, float]


def views_of(value: Any) -> list[View]:
    """A picture's views, left, upper, right, lower, width and height each; without what is none."""
    found = (tuple(map(number, listed(view))) for view in listed(value))
    return [view for view in found if len(view) == 6 and None not in view]  # type: ignore[misc]


def views_in_words(pictures: Sequence[Sequence[View]]) -> str:
    """`5 views: 4 of 490 × 378, 1 of 980 × 756`, in pixels; empty where none is known."""
    known = Counter(f"{view[4]:.0f} × {view[5]:.0f}" for views in pictures for view in views)
    total = known.total()
    if total == 0:
        return ""
    if len(known) == 1:
        return f"{total} view{'' if total == 1 else 's'} of {next(iter(known))} px"
    return f"{total} views: " + ", ".join(f"{n} of {size}" for size, n in known.items()) + " px"


def cuts_of(views: Sequence[View]) -> list[Cut]:
    """Where a picture was cut; nothing where it was shown whole alone."""
    width, height = (max((view[edge] for view in views), default=0) for edge in (2, 3))
    if len(views) < 2 or not width or not height:
        return []
    across, down = 100 / width, 100 / height
    return [
        Cut(left * across, upper * down, (right - left) * across, (lower - upper) * down)
        for left, upper, right, lower, *_ in views
        if (right - left, lower - upper) != (width, height)
    ]


def status_of(row: Row) -> str:
    """Which of `STATUSES` a row of predictions.jsonl is."""
    return STATUS_OF.get((is_right(row, "base"), is_right(row, "adapter")), "unscored")


def right_by(row: Row, side: str) -> str:
    """The metric that tells whether an answer counts as right; empty where it was not scored."""
    scores = mapping(mapping(row.get("scores")).get(side))
    return RIGHT_BY if RIGHT_BY in scores else next(iter(scores), "")


def is_right(row: Row, side: str) -> bool | None:
    """Whether an answer counts as right; None where it was not scored, or by a metric that makes no
    answer right or wrong: CIDEr, BLEU, ROUGE-L.
    """
    metric = right_by(row, side)
    score = number(mapping(mapping(row.get("scores")).get(side)).get(metric))
    return None if score is None else metrics.is_right(metric, score)


def first_of_each_status(cards: Sequence[Card], folder: Path) -> list[Card]:
    """The cards to show, in file order, with their pictures; no status crowds out another."""
    seen: Counter[str] = Counter()
    shown = []
    for card in cards:
        seen[card.status] += 1
        if seen[card.status] <= CARDS_PER_STATUS:
            pairs = zip_longest(card.image_paths, card.cuts)
            found = ((data_uri(folder, path), cuts or []) for path, cuts in pairs if path)
            card.images = [(uri, cuts) for uri, cuts in found if uri]
            shown.append(card)
    return shown


def data_uri(folder: Path, relative: str) -> str | None:
    """A picture as a data URI; None if missing, no picture, too large, or outside `folder`."""
    try:
        path = (folder / relative).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            return None
        content = path.read_bytes()
    except (OSError, ValueError):  # a name that no file can have
        return None
    kind = next((kind for magic, kind in IMAGE_KINDS.items() if content.startswith(magic)), None)
    if kind is None or len(content) > MAX_IMAGE_BYTES:
        return None
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def mapping(value: Any) -> Row:
    """The value where it is a JSON object, otherwise an empty one."""
    return value if isinstance(value, dict) else {}


def numbers(value: Any) -> dict[str, float]:
    """The numbers of a JSON object, by name."""
    figures = {name: number(figure) for name, figure in mapping(value).items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def listed(value: Any) -> list[Any]:
    """The value where it is a list, otherwise an empty one."""
    return value if isinstance(value, list) else []


def whole_text(value: Any) -> str:
    """The value as text, empty for None."""
    return "" if value is None else str(value)


def text_of(value: Any) -> str:
    """The value as text, empty for None, cut at a length that nobody reads beyond."""
    text = whole_text(value)
    if len(text) <= CHARACTERS_SHOWN:
        return text
    return f"{text[:CHARACTERS_SHOWN]} … ({len(text):,} characters)"
