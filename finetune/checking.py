"""What `finetune check` finds, as plain values: counts, distributions, extremes and duplicates."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from finetune.data.examination import BAD, CHANGED, OVERLONG, Examination, Finding

NUM_EXTREMES = 10  # longest and heaviest rows that are named
NUM_EXAMPLES = 10  # duplicates that are named
NUM_BINS = 40
PROBLEMS_LISTED = 500
PROBLEMS_COUNTED = 100_000  # told apart by fault; beyond that the picture does not change
REASON_SHOWN = 500  # characters


@dataclass(frozen=True)
class Entry:
    """One data entry of the recipe: its path or Hub id, rows, and the format they were read as."""

    shown: str
    num_rows: int
    format_name: str
    same_as: tuple[str, ...]


@dataclass(frozen=True)
class Histogram:
    """How many usable rows have how much: `counts[i]` of them from `edges[i]` to below
    `edges[i + 1]`, the last edge included. Empty where there are no rows.
    """

    edges: list[int]
    counts: list[int]


@dataclass(frozen=True)
class Extreme:
    """A row that costs much. Views are measured in megapixels, as the vision tower sees them."""

    where: str
    num_tokens: int
    num_images: int
    num_views: int
    megapixels: float


@dataclass(frozen=True)
class Part:
    """The train or eval entries. Figures of tokens, views and so on are of usable rows."""

    name: str
    entries: list[Entry]
    num_rows: int
    num_usable: int
    num_bad: int
    num_overlong: int
    changes: dict[str, int]
    num_images: int
    num_turns: int
    num_views: int
    num_tokens: int
    num_learnt_tokens: int
    tokens: Histogram
    views: Histogram
    longest: list[Extreme]
    heaviest: list[Extreme]
    num_repeated: int


@dataclass(frozen=True)
class Duplicates:
    """Held-out rows that training has seen in part: a picture of theirs, their question, or both.

    `examples` name held-out rows of the last kind, which make figures look better than they are.
    """

    num_same_image: int
    num_same_question: int
    num_same_both: int
    examples: list[str]


def summarise_part(
    name: str, entries: list[Entry], examination: Examination, place: Callable[[int], str]
) -> Part:
    """Figures of one examination; `place` gives the `where` of a row by its number."""
    counts = examination.counts
    numbers = examination.usable()
    usable = counts[numbers]
    return Part(
        name=name,
        entries=entries,
        num_rows=len(counts),
        num_usable=len(usable),
        num_bad=examination.num_of(BAD),
        num_overlong=examination.num_of(OVERLONG),
        changes=dict(Counter(f.group for f in examination.findings(*CHANGED))),
        num_images=_total(usable["num_images"]),
        num_turns=_total(usable["num_turns"]),
        num_views=_total(usable["num_views"]),
        num_tokens=_total(usable["num_tokens"]),
        num_learnt_tokens=_total(usable["num_learnt_tokens"]),
        tokens=histogram(usable["num_tokens"]),
        views=histogram(usable["num_views"]),
        longest=_extremes(usable, numbers, "num_tokens", place),
        heaviest=_extremes(usable, numbers, "num_view_pixels", place),
        num_repeated=len(usable) - len(np.unique(usable["row_key"])),
    )


def histogram(values: np.ndarray) -> Histogram:
    """Whole numbers in bins of equal whole width, at most `NUM_BINS` of them."""
    if not len(values):
        return Histogram([], [])
    low, high = int(values.min()), int(values.max())
    width = max(-(-(high - low + 1) // NUM_BINS), 1)
    edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(values, edges)
    return Histogram(edges.tolist(), counts.tolist())


def find_duplicates(
    train: Examination, held_out: Examination, place: Callable[[int], str]
) -> Duplicates:
    """Held-out rows against training rows, by the files of their pictures and by their
    questions; `place` gives the `where` of a held-out row.

    Rows without a picture count as alike in pictures where their questions are.
    """
    numbers = held_out.usable()
    counts = held_out.counts[numbers]
    asked = np.isin(counts["question_key"], train.counts["question_key"][train.usable()])
    row_of = np.repeat(np.arange(len(counts)), counts["num_images"])
    shown = np.zeros(len(counts), bool)
    shown[row_of[np.isin(held_out.image_keys, train.image_keys)]] = True
    both = _same_picture_and_question(train, counts, held_out.image_keys)
    examples = [place(int(numbers[i])) for i in np.flatnonzero(both)[:NUM_EXAMPLES]]
    return Duplicates(int(shown.sum()), int(asked.sum()), int(both.sum()), examples)


def _same_picture_and_question(
    train: Examination, counts: np.ndarray, image_keys: np.ndarray
) -> np.ndarray:
    """Held-out rows one of whose pictures a training row shows with the same question."""
    known = _pairs(train.counts[train.usable()], train.image_keys)
    rows, pairs = _pairs_with_rows(counts, image_keys)
    both = np.zeros(len(counts), bool)
    both[rows[np.isin(pairs, known)]] = True
    return both


def _pairs(counts: np.ndarray, image_keys: np.ndarray) -> np.ndarray:
    return np.unique(_pairs_with_rows(counts, image_keys)[1])


def _pairs_with_rows(counts: np.ndarray, image_keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A key for every picture together with its row's question, and one for the question of a row
    without pictures; each with its row.
    """
    with_images = np.repeat(np.arange(len(counts)), counts["num_images"])
    without = np.flatnonzero(counts["num_images"] == 0)
    # Keys are evenly spread, so that a product with an odd number mixes two of them well enough
    mixed = image_keys * np.uint64(0x9E3779B97F4A7C15) ^ counts["question_key"][with_images]
    return (
        np.concatenate([with_images, without]),
        np.concatenate([mixed, counts["question_key"][without]]),
    )


def _extremes(
    usable: np.ndarray, numbers: np.ndarray, by: str, place: Callable[[int], str]
) -> list[Extreme]:
    order = np.argsort(usable[by], kind="stable")[::-1][:NUM_EXTREMES]
    return [
        Extreme(
            place(int(numbers[i])),
            int(usable["num_tokens"][i]),
            int(usable["num_images"][i]),
            int(usable["num_views"][i]),
            round(int(usable["num_view_pixels"][i]) / 1e6, 2),
        )
        for i in order
    ]


def _total(values: np.ndarray) -> int:
    return int(values.sum(dtype=np.int64))


# What differs between rows with the same fault: quoted names, and numbers.
_SLOT = re.compile(r"""((?<!\w)(['"])(?:\\.|(?!\2).)*\2(?!\w)|\d[\d,]*(?:\.\d+)?)""", re.DOTALL)


@dataclass
class Fault:
    """Problems whose reasons are alike but for quoted names and numbers; `where` is the first."""

    kind: str
    where: str
    pieces: tuple[str, ...]  # the text around the slots
    slots: list[str | None]  # what all reasons have there, or None where it differs
    count: int = field(default=1)

    @property
    def reason(self) -> str:
        """What all of them have in common, with an ellipsis where they differ."""
        slots = ["…" if slot is None else slot for slot in self.slots]
        return "".join(itertools.chain(*itertools.zip_longest(self.pieces, slots, fillvalue="")))


def read_problems(problems: Iterator[Finding]) -> tuple[list[Finding], list[Fault], int]:
    """The first problems, the faults among the first `PROBLEMS_COUNTED`, commonest first, and how
    many those are.
    """
    first: list[Finding] = []
    faults: dict[tuple[str, tuple[str, ...]], Fault] = {}
    num_counted = 0
    for problem in itertools.islice(problems, PROBLEMS_COUNTED):
        num_counted += 1
        if num_counted <= PROBLEMS_LISTED:
            first.append(problem)
        # the pattern has two groups, so that text, slot and quotation mark follow each other
        parts = _SLOT.split(problem.reason[:REASON_SHOWN])
        pieces, slots = tuple(parts[::3]), parts[1::3]
        fault = faults.get((problem.kind, pieces))
        if fault is None:
            faults[problem.kind, pieces] = Fault(problem.kind, problem.where, pieces, [*slots])
            continue
        fault.count += 1
        fault.slots = [
            known if known == slot else None for known, slot in zip(fault.slots, slots, strict=True)
        ]
    # sorted is stable: of equally common faults, the one met first stays first
    return first, sorted(faults.values(), key=lambda fault: -fault.count), num_counted
