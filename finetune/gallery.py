"""Held-out rows as cards: what was asked, shown, wanted and answered, and where answers differ."""

import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import extractOne

from finetune.charts import number
from finetune.metrics import lower_is_better

HEADLINE_METRIC = "exact_match"  # where it was measured; otherwise the first metric of the recipe
CARDS_PER_STATUS = 48
CHARACTERS_SHOWN = 500
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
    image_paths: list[str]
    images: list[str] = field(default_factory=list)  # data URIs


def make_card(row: Row) -> Card:
    """A row of predictions.jsonl, judged, its pictures not yet read."""
    references = [text_of(reference) for reference in listed(row.get("references"))]
    sides = [side for side in ("base", "adapter", "merged") if side in row]
    answers = [
        Said(side, text, is_right(row, side), differences(text, references))
        for side, text in ((side, text_of(row[side])) for side in sides)
    ]
    return Card(
        where=text_of(row.get("where")),
        question=text_of(row.get("question")),
        references=references,
        answers=answers,
        status=STATUS_OF.get((is_right(row, "base"), is_right(row, "adapter")), "unscored"),
        views=views_in_words(listed(row.get("views"))),
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


def views_in_words(sizes: Sequence[Any]) -> str:
    """`5 views: 4 of 490 × 378, 1 of 980 × 756`, in pixels; empty where none is known."""
    pairs = [tuple(map(number, listed(size))) for size in sizes]
    known = Counter(f"{w:.0f} × {h:.0f}" for w, h in (p for p in pairs if len(p) == 2 and all(p)))
    if not known:
        return ""
    total = known.total()
    if total == 1:
        return f"1 view of {next(iter(known))} px"
    if len(known) == 1:
        return f"{total} views of {next(iter(known))} px"
    return f"{total} views: " + ", ".join(f"{n} of {size}" for size, n in known.items()) + " px"


def is_right(row: Row, side: str) -> bool | None:
    """Whether an answer counts as right; None where not scored. An error rate is right at 0."""
    scores = mapping(mapping(row.get("scores")).get(side))
    metric = HEADLINE_METRIC if HEADLINE_METRIC in scores else next(iter(scores), "")
    score = number(scores.get(metric))
    if score is None:
        return None
    return score <= 0 if lower_is_better(metric) else score >= 1


def first_of_each_status(cards: Sequence[Card], folder: Path) -> list[Card]:
    """The cards to show, in file order, with their pictures; no status crowds out another."""
    seen: Counter[str] = Counter()
    shown = []
    for card in cards:
        seen[card.status] += 1
        if seen[card.status] <= CARDS_PER_STATUS:
            uris = (data_uri(folder, path) for path in card.image_paths)
            card.images = [uri for uri in uris if uri]
            shown.append(card)
    return shown


def data_uri(folder: Path, relative: str) -> str | None:
    """A picture as a data URI; None if missing, no picture, too large, or outside `folder`."""
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    content = path.read_bytes()
    kind = next((kind for magic, kind in IMAGE_KINDS.items() if content.startswith(magic)), None)
    if kind is None or len(content) > MAX_IMAGE_BYTES:
        return None
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def mapping(value: Any) -> Row:
    """The value where it is a JSON object, otherwise an empty one."""
    return value if isinstance(value, dict) else {}


def listed(value: Any) -> list[Any]:
    """The value where it is a list, otherwise an empty one."""
    return value if isinstance(value, list) else []


def text_of(value: Any) -> str:
    """The value as text, empty for None, cut at a length that nobody reads beyond."""
    text = "" if value is None else str(value)
    if len(text) <= CHARACTERS_SHOWN:
        return text
    return f"{text[:CHARACTERS_SHOWN]} … ({len(text):,} characters)"
