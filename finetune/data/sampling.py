"""Which rows an epoch trains, in which batches and which order; and which rows are held out.

All depend on seeds alone, so that a run can be repeated, resumed, and shared out over processes.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch.utils.data import Sampler
from xxhash import xxh3_64_intdigest

from finetune.data.batches import Batches, arrange, cost, cut, num_batches_window, split_until
from finetune.data.gathering import Limits, RowSizes, gather
from finetune.data.heaviest import NUM_HEAVIEST_KINDS, heaviest_batches_first
from finetune.errors import DataError, RunDirError
from finetune.recipe import TrainingSection
from finetune.rundir import RunDir, read_json


class EpochSampler(Sampler[int]):
    """Row numbers of one epoch after the other, each in an order of its own.

    A row of weight 2 comes twice an epoch; of rows of weight 0.5 half come, in the next epoch the
    other half. `spans` are (number of rows, weight), one a source, in the order of the rows.
    """

    def __init__(self, spans: Sequence[tuple[int, float]], seed: int):
        self.spans = tuple(spans)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration gives, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(_num_drawn(count, weight) for count, weight in self.spans)

    def __iter__(self) -> Iterator[int]:
        yield from self.rows_of(self.epoch).tolist()

    def rows_of(self, epoch: int) -> np.ndarray:
        """The row numbers of an epoch, in its order [n]."""
        drawn, start = [np.zeros(0, np.int64)], 0
        for source, (count, weight) in enumerate(self.spans):
            # The source's rows in a fixed order, gone round and round: the next epoch goes on where
            # this one ended, so that no row comes again before all others have come
            order = np.random.default_rng([self.seed, source]).permutation(count) + start
            number = _num_drawn(count, weight)
            drawn.append(order[np.arange(epoch * number, (epoch + 1) * number) % count])
            start += count
        rng = np.random.default_rng([self.seed, len(self.spans), epoch])
        return rng.permutation(np.concatenate(drawn))


@dataclass(frozen=True)
class Batching:
    """How the rows of an epoch become batches and optimizer steps.

    `by_cost` sorts rows and batches by what they cost, within windows. `epochs` and `max_steps`
    are the recipe's, of which one is set.
    """

    limits: Limits
    accumulation: int = 1
    by_cost: bool = False
    epochs: float | None = 1
    max_steps: int | None = None
    num_processes: int = 1
    num_heaviest_batches: int = 0
    """Of each process, in front of the first epoch."""

    @classmethod
    def of_recipe(cls, training: TrainingSection, *, worst_first: bool = False) -> "Batching":
        """For as many processes as there are.

        `worst_first` puts the heaviest batches in front: those of a whole step, and one of each
        kind after it, for only then does the optimizer's state stand in memory beside a batch.
        """
        accumulation = training.gradient_accumulation
        return cls(
            Limits(
                training.batch_size,
                training.batch_tokens,
                training.batch_patches,
                packs=training.packing,
            ),
            accumulation,
            training.group_by_cost,
            training.epochs,
            training.max_steps,
            int(os.environ.get("WORLD_SIZE") or 1),
            accumulation + NUM_HEAVIEST_KINDS if worst_first else 0,
        )

    def steps_of_epoch(self, num_batches: int) -> int:
        """Optimizer steps in which so many batches are trained, as the trainer counts them."""
        passes = math.ceil(num_batches / self.num_processes)
        return math.ceil(passes / self.accumulation)


class EpochBatches(Sampler[list[int]]):
    """Batches of row numbers, epoch after epoch; every epoch has as many, since the trainer counts
    its steps once.

    Rows come in the sampler's order; of rows that are gathered, those of one picture stay together,
    wherever one of them would come. Grouped by cost, rows and batches change places within windows
    of some steps. Where another epoch has more batches, some are halved. Neighbours are meant for
    neighbouring processes. `sizes`, a line a row, may be left out where batches of so many rows are
    taken as they come.

    The epoch is the sampler's, so that whoever sets one sets both: accelerate and the trainer know
    several ways to a batch sampler, and to the sampler in it.
    """

    def __init__(self, sampler: EpochSampler, batching: Batching, sizes: RowSizes | None = None):
        self.sampler = sampler
        self.batching = batching
        self.sizes = sizes

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration gives, from 0."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.of_epoch(self.sampler.epoch)

    @property
    def have_one_size(self) -> bool:
        """Whether all batches have as many rows, but for an epoch's last one."""
        gathers = self.sizes is not None and self.sizes.pictures is not None
        return self.batching.limits.rows is not None and not gathers

    def num_steps(self) -> int:
        """Optimizer steps of the run, as the trainer counts them."""
        batching = self.batching
        if batching.max_steps:
            return batching.max_steps
        return math.ceil((batching.epochs or 1) * batching.steps_of_epoch(len(self)))

    def of_epoch(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, in their order."""
        rng = self._rng(epoch)
        first, batches = self._cut(epoch, rng)
        batches = self._filled_up(batches, len(self) - len(first))
        first = _split_lists(first, len(self) - len(batches))
        batching = self.batching
        if batching.by_cost and self.sizes:
            tokens, patches = batches.loads(self.sizes, packs=batching.limits.packs)
            costs = cost(tokens, patches) if len(batches) else np.zeros(0)
            order = arrange(costs, batching.accumulation, batching.num_processes, rng)
            batches = batches.in_order(order)
        found = first + batches.lists()
        return found + [[self.idle_row]] * (len(self) - len(found))

    def _filled_up(self, batches: Batches, number: int) -> Batches:
        """So many batches, or fewer where rows are alone: those of the last step are halved, where
        this is enough, so that the steps before it are as in one process.
        """
        num_processes = self.batching.num_processes
        num_last = len(batches) % num_processes
        is_enough = num_last and number - len(batches) < num_processes
        if not is_enough or self.batching.by_cost:  # which brings them into another order
            return split_until(batches, number)
        start = int(batches.starts[-num_last])
        last = Batches(batches.rows[start:], batches.starts[-num_last:] - start)
        last = split_until(last, number - (len(batches) - num_last))
        return Batches(
            batches.rows, np.concatenate([batches.starts[:-num_last], last.starts + start])
        )

    @property
    def idle_row(self) -> int:
        """The number after all rows': of one that nothing is learnt from, for processes that are
        left without a row in an epoch's last step.
        """
        return sum(count for count, _ in self.sampler.spans)

    @cached_property
    def _num_batches(self) -> int:
        batching = self.batching
        if batching.limits.rows and self.have_one_size:
            most = math.ceil(len(self.sampler) / batching.limits.rows)
        else:
            most = self._num_before_even(0)
            if batching.max_steps:
                epochs = math.ceil(batching.max_steps / max(batching.steps_of_epoch(most), 1))
            else:
                epochs = math.ceil(batching.epochs or 1)
            most = max([most, *map(self._num_before_even, range(1, epochs))])
        # or accelerate fills up with batches of the epoch's beginning, and rows come twice
        return math.ceil(most / batching.num_processes) * batching.num_processes

    def _num_before_even(self, epoch: int) -> int:
        first, batches = self._cut(epoch, self._rng(epoch))
        return len(first) + len(batches)

    def _rng(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.sampler.seed, len(self.sampler.spans) + 1, epoch])

    def _cut(self, epoch: int, rng: np.random.Generator) -> tuple[list[list[int]], Batches]:
        """The heaviest batches, where they come first, and those of all other rows."""
        rows, batching, sizes = self.sampler.rows_of(epoch), self.batching, self.sizes
        if sizes is None:
            assert batching.limits.rows, "budgets need the sizes of the rows"
            return [], Batches(rows, np.arange(0, len(rows), batching.limits.rows))
        first: list[list[int]] = []
        if epoch == 0 and batching.num_heaviest_batches:
            num_batches = batching.num_heaviest_batches * batching.num_processes
            chosen = heaviest_batches_first(sizes.of_rows(rows), batching.limits, num_batches)
            first = [rows[batch].tolist() for batch in chosen]
            rows = np.delete(rows, [place for batch in chosen for place in batch])
        units = gather(rows, sizes, batching.limits, rng)
        window = num_batches_window(batching.accumulation, batching.num_processes)
        by_cost = batching.by_cost
        return first, cut(
            units, batching.limits, by_cost=by_cost, rng=rng, num_batches_window=window
        )


def _split_lists(first: list[list[int]], num_batches: int) -> list[list[int]]:
    """So many batches, as `split_until` has them."""
    if len(first) >= num_batches or not first:
        return first
    starts = np.cumsum([0, *map(len, first[:-1])])
    return split_until(Batches(np.concatenate(first), starts), num_batches).lists()


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
