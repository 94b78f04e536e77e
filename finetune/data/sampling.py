"""Which rows an epoch trains, and in which order; and which rows are held out.

Both depend on seeds alone, so that a run can be repeated, resumed, and shared out over processes.
"""

import os
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler
from xxhash import xxh3_64_intdigest

from finetune.errors import DataError, RunDirError
from finetune.recipe import TrainingSection
from finetune.rundir import RunDir, read_json

NUM_HEAVIEST_KINDS = 3
"""Batches that `heaviest_batches` gives: mixed, longest, largest."""


class EpochSampler(Sampler[int]):
    """Row numbers of one epoch after the other, each in an order of its own.

    A row of weight 2 comes twice an epoch; of rows of weight 0.5 half come, in the next epoch the
    other half. `spans` are (number of rows, weight), one a source, in the order of the rows.

    With `costs`, an examination's counts, the first epoch begins with the `num_heaviest_batches`
    heaviest batches of `batch_size` of the rows it draws (`heaviest_batches_first`); all others
    keep their order.
    """

    def __init__(
        self,
        spans: Sequence[tuple[int, float]],
        seed: int,
        *,
        costs: np.ndarray | None = None,
        batch_size: int = 1,
        num_heaviest_batches: int = 0,
    ):
        self.spans = tuple(spans)
        self.seed = seed
        self.costs = costs
        self.batch_size = batch_size
        self.num_heaviest_batches = num_heaviest_batches
        self.epoch = 0

    @classmethod
    def of_recipe(
        cls, spans: Sequence[tuple[int, float]], training: TrainingSection, costs: np.ndarray | None
    ) -> "EpochSampler":
        """The sampler of a run; `costs`, an examination's counts, put heavy batches in front.

        Those of a whole step, and one of each kind after it: only then does the optimizer's state
        stand in memory beside a batch.
        """
        if costs is None:
            return cls(spans, training.seed)
        num_processes = int(os.environ.get("WORLD_SIZE") or 1)
        return cls(
            spans,
            training.seed,
            costs=costs,
            batch_size=training.batch_size * num_processes,
            num_heaviest_batches=training.gradient_accumulation + NUM_HEAVIEST_KINDS,
        )

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration gives, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(_num_drawn(count, weight) for count, weight in self.spans)

    def __iter__(self) -> Iterator[int]:
        drawn, start = [], 0
        for source, (count, weight) in enumerate(self.spans):
            # The source's rows in a fixed order, gone round and round: the next epoch goes on where
            # this one ended, so that no row comes again before all others have come
            order = np.random.default_rng([self.seed, source]).permutation(count) + start
            number = _num_drawn(count, weight)
            drawn.append(order[np.arange(self.epoch * number, (self.epoch + 1) * number) % count])
            start += count
        rng = np.random.default_rng([self.seed, len(self.spans), self.epoch])
        numbers = rng.permutation(np.concatenate(drawn))
        if self.costs is not None and self.epoch == 0:
            places = heaviest_batches_first(
                self.costs[numbers], self.batch_size, self.num_heaviest_batches
            )
            numbers = np.concatenate([numbers[places], np.delete(numbers, places)])
        yield from numbers.tolist()


def heaviest_batches(counts: np.ndarray, batch_size: int) -> list[list[int]]:
    """Batches one of which is the heaviest that rows of these counts can make, a kind after the
    other: mixed of the longest and the largest, since rows are padded to the longest of their batch
    and views to the largest; the rows of most tokens; the rows of most pixels.

    `counts` are an examination's. A batch holds a row once, and all rows where there are fewer.
    """
    longest, largest = (order[:batch_size] for order in _by_cost(counts))
    mixed = [row for pair in zip(longest, largest, strict=True) for row in pair]
    return [list(dict.fromkeys(mixed))[:batch_size], longest, largest]


def heaviest_batches_first(counts: np.ndarray, batch_size: int, num_batches: int) -> list[int]:
    """Rows of the heaviest batches, one batch after the other: of the kinds of `heaviest_batches`
    in turn, each of the rows that those before it left.

    A row can be in one batch alone. The mixed one comes first, whole: it alone holds the longest
    and the largest row together, while the others find rows nearly as heavy.
    """
    num_rows = batch_size * num_batches
    # No batch needs rows beyond these, and examinations have millions
    left = np.unique([row for order in _by_cost(counts) for row in order[:num_rows]])
    first: list[int] = []
    for turn in range(num_batches):
        if not len(left):
            break
        batch = heaviest_batches(counts[left], batch_size)[turn % NUM_HEAVIEST_KINDS]
        first += left[batch].tolist()
        left = np.delete(left, batch)
    return first


def _by_cost(counts: np.ndarray) -> tuple[list[int], list[int]]:
    """All rows by tokens and by pixels, the most first; where one is equal the other decides."""
    tokens, pixels = (-counts[name].astype(np.int64) for name in ("num_tokens", "num_view_pixels"))
    return np.lexsort((pixels, tokens)).tolist(), np.lexsort((tokens, pixels)).tolist()


def was_worst_first(run: RunDir, *, asked: bool) -> bool:
    """Whether a run was begun with its heaviest rows. Raises `RunDirError` where it is asked to be
    and was not.
    """
    begun = bool(read_json(run.environment).get("worst_first"))
    if asked and not begun:
        raise RunDirError(
            f"{run.path}: was begun without --worst-first, and its rows keep their order; "
            "resume without it, or start a new run in another output.dir"
        )
    return begun


def _num_drawn(count: int, weight: float) -> int:
    return max(round(count * weight), 1) if count else 0


def hold_out(
    num_rows: int, rows_of_keys: np.ndarray, keys: np.ndarray, fraction: float, seed: int
) -> np.ndarray:
    """Which rows are held out [num_rows, bool]: about `fraction` of them, at least one.

    `keys` are the pictures' (of a row without one, the row's own), `rows_of_keys` whose they are;
    every row has at least one. Rows that share a key, directly or through other rows, stay on one
    side, or a figure would be measured on pictures seen in training. Groups are taken in an order
    that their content and the seed decide, so that rows added later change little. Raises
    `DataError` where nothing would be left to train on.
    """
    _, group_of, sizes = np.unique(
        _groups(num_rows, rows_of_keys, keys), return_inverse=True, return_counts=True
    )
    content = np.full(len(sizes), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(content, group_of[rows_of_keys], keys)
    shuffled = [xxh3_64_intdigest(key.tobytes(), seed) for key in content]
    order = np.argsort(np.array(shuffled, np.uint64), kind="stable")
    before = np.cumsum(sizes[order]) - sizes[order]
    taken = order[before < max(round(num_rows * fraction), 1)]
    if len(taken) == len(sizes):
        todo = "lower it, or name data.eval" if len(sizes) > 1 else "name data.eval instead"
        raise DataError(
            f"data.eval_fraction: rows that share pictures stay together, and {num_rows:,} rows in "
            f"groups of up to {sizes.max():,} leave nothing to train on at {fraction:g}; {todo}"
        )
    return np.isin(group_of, taken)


def _groups(num_rows: int, rows_of_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The lowest row number of each row's group of rows connected by keys [num_rows]."""
    parent = list(range(num_rows))

    def find(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    by_key = np.argsort(keys, kind="stable")
    ordered, rows = keys[by_key], rows_of_keys[by_key]
    for k in np.flatnonzero(ordered[1:] == ordered[:-1]).tolist():
        low, high = sorted((find(int(rows[k])), find(int(rows[k + 1]))))
        parent[high] = low
    return np.array([find(row) for row in range(num_rows)], np.int64)
