"""Rows of a batch -> sequences: several rows side by side in one, and what rows about one picture
begin with in common once, with each row's own tail behind it.

A sequence is a forest of *nodes*, each a run of tokens of one or more rows. A token sees those
before it in its own node and in the nodes above, and has the position that it has in its row: so
every row is computed as if it were alone.

Shape letters: S sequences, T tokens, N nodes of the sequence that has most, 0 being padding.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from finetune.data.packed_views import view_key
from finetune.data.views import ImagePlan
from finetune.families.family import Family, ViewedRow

MAX_PADDING = 0.02  # of the tokens, in packed sequences


class TrainedRow(ViewedRow, Protocol):
    """What of an example is laid out."""

    @property
    def loss_mask(self) -> list[bool]:
        """For each token whether it is learnt."""
        ...


@dataclass(frozen=True, slots=True)
class Layouting:
    """Which rows of a batch become one sequence."""

    packing: bool = False
    """Any: side by side, in sequences of about `max_tokens`."""
    share_images: bool = False
    """Rows that begin alike up to the end of a picture at least."""
    max_tokens: int | None = None
    """None packs into one sequence."""
    one_sequence: bool = False
    """Pack all rows into one, whose rows the attention kernel tells apart by their positions."""


@dataclass
class PackedRows:
    """Rows laid out as one sequence, a family's row to make its image tensors from."""

    input_ids: list[int] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    """How many rows learn each token, at the place behind the one that predicts it."""
    positions: list[int] = field(default_factory=list)
    """The place of each token in its row."""
    nodes: list[int] = field(default_factory=list)
    """The node of each token, from 1."""
    parents: list[int] = field(default_factory=lambda: [0])
    """The node above each node, 0 where there is none."""
    views: list[Any] = field(default_factory=list, repr=False)
    plans: list[ImagePlan] = field(default_factory=list)
    num_rows: int = 0

    def sees(self) -> np.ndarray:
        """Whether the tokens of a node see those of another [N, N], the seeing one first: itself
        and those above it.
        """
        sees_NN = np.eye(len(self.parents), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent:
                sees_NN[node] |= sees_NN[parent]
        return sees_NN

    def extend(self, other: "PackedRows") -> None:
        """Put the rows of another sequence behind one's own."""
        shift = len(self.parents) - 1
        self.nodes += [node + shift for node in other.nodes]
        self.parents += [parent and parent + shift for parent in other.parents[1:]]
        self.input_ids += other.input_ids
        self.weights += other.weights
        self.positions += other.positions
        self.views += other.views
        self.plans += other.plans
        self.num_rows += other.num_rows


@dataclass(frozen=True)
class Layout:
    """What the attention of a batch needs to know, in the batch as `layout`."""

    nodes: torch.Tensor
    """The node of each token [S, T]."""
    sees: torch.Tensor
    """Whether the tokens of a node see those of another [S, N, N], the seeing one first."""
    num_rows: int

    @classmethod
    def of_sequences(cls, sequences: Sequence[PackedRows], num_tokens: int) -> "Layout":
        """Of sequences that are padded on the right."""
        num_nodes = max(len(each.parents) for each in sequences)
        nodes_ST = torch.zeros((len(sequences), num_tokens), dtype=torch.long)
        sees_SNN = torch.zeros((len(sequences), num_nodes, num_nodes), dtype=torch.bool)
        for s, each in enumerate(sequences):
            nodes_ST[s, : len(each.nodes)] = torch.tensor(each.nodes)
            sees_NN = torch.from_numpy(each.sees())
            sees_SNN[s, : len(sees_NN), : len(sees_NN)] = sees_NN
        return cls(nodes_ST, sees_SNN, sum(each.num_rows for each in sequences))

    def to(self, device: Any, non_blocking: bool = False) -> "Layout":
        """On another device; accelerate and our trainer move a batch's values by this."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Layout":
        """In memory that a GPU reads by itself; torch's DataLoader looks for this."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Layout":
        return replace(self, nodes=move(self.nodes), sees=move(self.sees))


def lay_out(
    rows: Sequence[TrainedRow], processor: Any, family: Family, layouting: Layouting
) -> list[PackedRows]:
    """The sequences that rows become; each row in one of them, in an order of their own where they
    are packed.
    """
    traced = _traced(rows, processor, family, with_pictures=layouting.share_images)
    groups: dict[Hashable, list[_Row]] = {}
    for number, row in enumerate(traced):
        key = row.up_to_first_picture() if layouting.share_images else None
        groups.setdefault(number if key is None else key, []).append(row)
    laid_out = [_lay_out_together(group) for group in groups.values()]
    return _packed(laid_out, layouting) if layouting.packing else laid_out


@dataclass(frozen=True)
class _Row:
    """A row as it is compared with others: `symbols` are its ids, with a number of the picture in
    the place of the first token of each; equal symbols are seen as the same by the model.
    """

    row: TrainedRow
    symbols: np.ndarray
    is_learnt: np.ndarray
    spans: list[tuple[int, int]]
    """Where each picture begins and ends in the tokens, the end excluded."""

    def __len__(self) -> int:
        return len(self.symbols)

    def up_to_first_picture(self) -> bytes | None:
        """The symbols to the end of the first picture; None where there is none."""
        return self.symbols[: self.spans[0][1]].tobytes() if self.spans else None

    def outside_pictures(self, place: int) -> int:
        """The place, or the beginning of the picture whose tokens stand on both sides of it."""
        for start, end in self.spans:
            if start < place < end:
                return start
        return place

    def pictures(self, start: int, end: int) -> Iterator[tuple[ImagePlan, list[Any]]]:
        """Plan and views of each picture that begins between two places."""
        first = 0
        for plan, (begin, _) in zip(self.row.plans, self.spans, strict=True):
            views = self.row.views[first : first + len(plan.views)]
            first += len(plan.views)
            if start <= begin < end:
                yield plan, views


def _traced(
    rows: Sequence[TrainedRow], processor: Any, family: Family, *, with_pictures: bool
) -> list[_Row]:
    numbers: dict[Hashable, int] = {}
    keys: dict[int, Hashable] = {}  # rows about one picture mostly hold the same objects
    traced = []
    for row in rows:
        symbols = np.array(row.input_ids, np.int64)
        is_learnt = np.array(row.loss_mask, bool)
        is_learnt[0] = False  # nothing stands before it
        of_images = np.flatnonzero(symbols == processor.image_token_id)
        spans, first = [], 0
        for plan in row.plans:
            last = first + family.num_image_tokens(processor, plan) - 1
            spans.append((int(of_images[first]), int(of_images[last]) + 1))
            first = last + 1
        each = _Row(row, symbols, is_learnt, spans)
        if with_pictures:
            for (start, _), (_, views) in zip(spans, each.pictures(0, len(each)), strict=True):
                for view in views:
                    if id(view) not in keys:
                        keys[id(view)] = view_key(view)
                key = tuple(keys[id(view)] for view in views)
                symbols[start] = -1 - numbers.setdefault(key, len(numbers))
        traced.append(each)
    return traced


def _lay_out_together(rows: Sequence[_Row]) -> PackedRows:
    """Rows as one tree, or as several beside each other where that is all that can be done."""
    sequence = PackedRows(num_rows=len(rows))
    num_learning = _num_learning(rows, max(map(len, rows)))
    _lay_out_from(sequence, rows, 0, 0, num_learning)
    return sequence


def _num_learning(rows: Iterable[_Row], length: int) -> np.ndarray:
    """How many of the rows learn the token at each place [length]."""
    counts = np.zeros(length, np.int64)
    for row in rows:
        counts[: len(row)] += row.is_learnt
    return counts


def _lay_out_from(
    sequence: PackedRows, rows: Sequence[_Row], start: int, parent: int, num_learning: np.ndarray
) -> None:
    """Append the tokens of rows from `start` on, before which they are the same and laid out.

    `num_learning` are the weights of the tokens, 0 where another branch has learnt them.
    """
    longest = max(rows, key=len)
    parting = min(_common_length(row, longest) for row in rows)
    if parting == len(longest):
        _append_node(sequence, longest, start, parting, parent, num_learning)
        return
    branches: dict[int, list[_Row]] = {}
    for row in rows:
        if len(row) > parting:  # others have ended in what is common
            branches.setdefault(int(row.symbols[parting]), []).append(row)
    # A token is predicted at the place before it, and only the first branch stands directly behind
    # what is common: the others repeat its last token where they learn their own first one.
    learning = {
        key: any(row.is_learnt[parting] for row in branch) for key, branch in branches.items()
    }
    branching = longest.outside_pictures(parting - (sum(learning.values()) > 1))
    node = _append_node(sequence, longest, start, branching, parent, num_learning)
    for number, key in enumerate(sorted(branches, key=lambda key: not learning[key])):
        branch = branches[key]
        own = _num_learning(branch, max(map(len, branch)))
        # what is common is learnt once, for all of them
        own[:parting] = num_learning[:parting] if number == 0 else 0
        _lay_out_from(sequence, branch, branching, node, own)


def _common_length(row: _Row, longest: _Row) -> int:
    """How many tokens the row has in common with the longest before they part: all of the longest
    where the row is a part of it.
    """
    differs = row.symbols != longest.symbols[: len(row)]
    return int(differs.argmax()) if differs.any() else len(longest)


def _append_node(
    sequence: PackedRows,
    row: _Row,
    start: int,
    end: int,
    parent: int,
    num_learning: np.ndarray,
) -> int:
    """Append a row's tokens from `start` to `end` as a node; its number, or the parent's where
    there are none.
    """
    if start == end:
        return parent
    node = len(sequence.parents)
    sequence.parents.append(parent)
    sequence.nodes += [node] * (end - start)
    sequence.input_ids += row.row.input_ids[start:end]
    sequence.weights += num_learning[start:end].tolist()
    sequence.positions += range(start, end)
    for plan, views in row.pictures(start, end):
        sequence.plans.append(plan)
        sequence.views += views
    return node


def _packed(units: Sequence[PackedRows], layouting: Layouting) -> list[PackedRows]:
    """The units in as many sequences as they need, or fewer, so that little is padded."""
    packed = []
    for numbers in _bins([len(unit.input_ids) for unit in units], layouting):
        sequence = PackedRows()
        for i in numbers:
            sequence.extend(units[i])
        packed.append(sequence)
    return packed


def _bins(lengths: Sequence[int], layouting: Layouting) -> list[list[int]]:
    """Which of the lengths go together."""
    total, most = sum(lengths), 1
    if layouting.max_tokens and not layouting.one_sequence:
        most = min(math.ceil(total / layouting.max_tokens), len(lengths))
    for num_bins in range(most, 1, -1):
        bins = _balanced(lengths, num_bins)
        longest = max(sum(lengths[i] for i in each) for each in bins)
        if longest * num_bins - total <= MAX_PADDING * total:
            return bins
    return [list(range(len(lengths)))]


def _balanced(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Numbers of the lengths in bins of like sums: the longest first, each where there is least.

    Source: R. L. Graham, Bounds on multiprocessing timing anomalies, 1969 (the LPT rule).
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    sums = [0] * num_bins
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = sums.index(min(sums))
        bins[least].append(i)
        sums[least] += lengths[i]
    return bins
