"""The heaviest batches that rows can make: what must fit into memory, if anything is to."""

import numpy as np

from finetune.data.batches import cut_by_budget
from finetune.data.gathering import Limits, RowSizes, Units

NUM_HEAVIEST_KINDS = 3
"""Batches that `heaviest_batches` gives: mixed, longest, largest."""


def heaviest_batches(sizes: RowSizes, limits: Limits) -> list[list[int]]:
    """Batches one of which is the heaviest that rows of these sizes can make, a kind after the
    other: mixed of the longest and the largest, since rows are padded to the longest of their batch
    and views may be to the largest; the rows of most tokens; the rows of most patches.

    A batch holds a row once, and all rows where there are fewer. Rows of one picture are lighter
    together than rows of several: they come together where others are lacking alone. Within
    budgets no batch is heavier than they are, but for a single row: then the fullest batches.
    """
    if limits.rows is None:
        return [batches[0] for batches in _within_budgets(sizes, limits)]
    longest, largest = (order[: limits.rows] for order in _by_cost(sizes))
    return [_mixed(longest, largest)[: limits.rows], longest, largest]


def heaviest_batches_first(sizes: RowSizes, limits: Limits, num_batches: int) -> list[list[int]]:
    """The heaviest batches, heaviest first: of the kinds of `heaviest_batches` in turn, each of the
    rows that those before it left.

    A row can be in one batch alone. The mixed one comes first, whole: it alone holds the longest
    and the largest row together, while the others find rows nearly as heavy.
    """
    if limits.rows is None:
        return _apart(_within_budgets(sizes, limits), num_batches)
    num_rows = limits.rows * num_batches
    # No batch needs rows beyond these, and examinations have millions
    left = np.unique([row for order in _by_cost(sizes) for row in order[:num_rows]])
    first: list[list[int]] = []
    while len(first) < num_batches and len(left):
        kind = len(first) % NUM_HEAVIEST_KINDS
        batch = heaviest_batches(sizes.of_rows(left), limits)[kind]
        first.append(left[batch].tolist())
        left = np.delete(left, batch)
    return first


def _within_budgets(sizes: RowSizes, limits: Limits) -> list[list[list[int]]]:
    """For each kind all batches that its order of the rows makes, the heaviest first."""
    longest, largest = _by_cost(sizes)
    kinds = []
    for number, order in enumerate((_mixed(longest, largest), longest, largest)):
        rows = np.array(order, np.int64)
        lines = sizes.of_rows(rows)
        units = Units(rows, np.arange(len(rows)), lines.tokens, lines.patches)
        batches = cut_by_budget(units, limits)
        tokens, patches = batches.loads(sizes, packs=limits.packs)
        both = tokens / max(tokens.max(), 1) + patches / max(patches.max(), 1)
        heaviest = np.argsort(-(both, tokens, patches)[number], kind="stable")
        lists = batches.lists()
        kinds.append([lists[place] for place in heaviest.tolist()])
    return kinds


def _apart(kinds: list[list[list[int]]], num_batches: int) -> list[list[int]]:
    """Batches of the kinds in turn, without those that hold a row of one before."""
    taken: set[int] = set()
    chosen: list[list[int]] = []
    waiting = [iter(batches) for batches in kinds]
    while waiting and len(chosen) < num_batches:
        batches = waiting.pop(0)
        for batch in batches:
            if taken.isdisjoint(batch):
                chosen.append(batch)
                taken.update(batch)
                waiting.append(batches)
                break
    return chosen


def _mixed(longest: list[int], largest: list[int]) -> list[int]:
    """By turns of both, each row once."""
    return list(dict.fromkeys(row for pair in zip(longest, largest, strict=True) for row in pair))


def _by_cost(sizes: RowSizes) -> tuple[list[int], list[int]]:
    """All rows by tokens and by patches, the most first; where one is equal the other decides. Of
    rows of one picture all but the first come after all others.
    """
    tokens, patches = -sizes.tokens, -sizes.patches
    orders = np.lexsort((patches, tokens)), np.lexsort((tokens, patches))
    return tuple(_different_first(order, sizes.pictures).tolist() for order in orders)  # type: ignore[return-value]


def _different_first(order: np.ndarray, pictures: np.ndarray | None) -> np.ndarray:
    if pictures is None:
        return order
    repeats = np.ones(len(order), bool)
    repeats[np.unique(pictures[order], return_index=True)[1]] = False
    return np.concatenate([order[~repeats], order[repeats]])
