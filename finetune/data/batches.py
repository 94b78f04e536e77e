"""Which rows share a batch, and which batches a step: so many rows, or as many as budgets allow,
and sorted by what they cost.

Shape letters: N rows of the data, n rows of an epoch, U units, B batches, V windows, W batches of a
window, S steps of a window, A passes of a step, R processes.
"""

import heapq
from collections import deque
from dataclasses import dataclass

import numpy as np

from finetune.data.gathering import Limits, RowSizes, Units, in_order_of

WINDOW_BATCHES = 64
"""Rows are sorted among those of so many batches, so that an epoch stays shuffled beyond them."""
WINDOW_STEPS = 8
"""And of at least so many optimizer steps, or there would be little to balance them with."""


@dataclass(frozen=True)
class Batches:
    """Rows of batches, one batch after the other [n], and where each begins [B]."""

    rows: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def lists(self) -> list[list[int]]:
        """The row numbers of each batch."""
        rows, starts = self.rows.tolist(), self.starts.tolist()
        ends = [*starts, len(rows)][1:]
        return [rows[start:end] for start, end in zip(starts, ends, strict=True)]

    def in_order(self, order_B: np.ndarray) -> "Batches":
        """The same batches, in another order."""
        return Batches(*in_order_of(self.rows, self.starts, order_B))

    def loads(self, sizes: RowSizes, *, packs: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, padding included, and patches of each batch [B].

        Rows of one picture that stand side by side make one sequence.
        """
        if not len(self):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        lines = sizes.of_rows(self.rows)
        is_first = np.ones(len(self.rows), bool)
        if lines.pictures is not None:
            is_first[1:] = lines.pictures[1:] != lines.pictures[:-1]
            is_first[self.starts] = True
        starts_U = np.flatnonzero(is_first)
        tokens_U, patches_U = lines.sums(starts_U)
        first_B = np.searchsorted(starts_U, self.starts)
        patches_B = np.add.reduceat(patches_U, first_B)
        if packs:
            return np.add.reduceat(tokens_U, first_B), patches_B
        num_B = np.diff(first_B, append=len(starts_U))
        return np.maximum.reduceat(tokens_U, first_B) * num_B, patches_B


def cost(tokens: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """What each line costs beside the others: its tokens in shares of their mean, and its patches
    in shares of theirs, as if the language and the vision part took as long as each other.

    Near enough to order batches by: of a step of Idefics2-8b, vision and connector take 54%.
    """
    return tokens / max(tokens.mean(), 1) + patches / max(patches.mean(), 1)


def cut(
    units: Units,
    limits: Limits,
    *,
    by_cost: bool,
    rng: np.random.Generator,
    num_batches_window: int = WINDOW_BATCHES,
) -> Batches:
    """Batches of the units, as they come; `by_cost` of units of like length within windows, where
    they would be padded.

    Where units of several rows must fill batches of so many rows, they are fitted in within a
    window too, the larger first, and the batches of a window are shuffled; a batch stays smaller
    where no unit fits.
    """
    if not len(units.starts):
        return Batches(units.rows, units.starts)
    window_U = _windows(units, limits, num_batches_window)
    if by_cost and not limits.packs:
        # One window falls and the next one rises, so that a batch which reaches over both holds
        # units of like length as well
        tokens_U = np.where(window_U % 2, units.tokens, -units.tokens)
        order = np.lexsort((-units.patches, tokens_U, window_U))
        units, window_U = units.in_order(order), window_U[order]
    if limits.rows is None:
        return cut_by_budget(units, limits)
    if len(units.starts) == len(units.rows):
        return Batches(units.rows, np.arange(0, len(units.rows), limits.rows))
    order_U, first_B, window_B = _fill(units.num_rows, limits.rows, window_U)
    rows, starts = in_order_of(units.rows, units.starts, order_U)
    batches = Batches(rows, starts[first_B])
    return batches.in_order(np.lexsort((rng.random(len(batches)), window_B)))


def _windows(units: Units, limits: Limits, num_batches: int) -> np.ndarray:
    """Which window each unit is in [U]; a window has the rows of so many batches."""
    if limits.rows:
        rows_a_batch = limits.rows
    else:
        most_tokens, most_patches = limits.most
        least = max(units.tokens.sum() / most_tokens, units.patches.sum() / most_patches, 1)
        rows_a_batch = max(round(len(units.rows) / least), 1)
    return units.starts // (rows_a_batch * num_batches)


def cut_by_budget(units: Units, limits: Limits) -> Batches:
    """Batches of the units as they come, each of as many as the budgets allow."""
    most_tokens, most_patches = limits.most
    firsts: list[int] = []
    count, longest, tokens, patches = 0, 0, 0, 0
    each = zip(units.tokens.tolist(), units.patches.tolist(), strict=True)
    for place, (unit_tokens, unit_patches) in enumerate(each):
        count += 1
        longest = max(longest, unit_tokens)
        tokens += unit_tokens
        patches += unit_patches
        padded = tokens if limits.packs else count * longest
        if not firsts or padded > most_tokens or patches > most_patches:
            firsts.append(place)
            count, longest, tokens, patches = 1, unit_tokens, unit_tokens, unit_patches
    return Batches(units.rows, units.starts[firsts])


def _fill(
    num_rows_U: np.ndarray, most_rows: int, window_U: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best fit, of falling size, within each window: the order of the units [U], the place of each
    batch's first one in it [B], and the window of each batch [B].
    """
    falling = np.lexsort((np.arange(len(num_rows_U)), -num_rows_U, window_U))
    batches: list[list[int]] = []
    windows: list[int] = []
    with_room: list[deque[list[int]]] = []
    window = -1
    each = zip(
        falling.tolist(), num_rows_U[falling].tolist(), window_U[falling].tolist(), strict=True
    )
    for unit, num_rows, of_window in each:
        if of_window != window:
            window, with_room = of_window, [deque() for _ in range(most_rows + 1)]
        room = next((r for r in range(num_rows, most_rows) if with_room[r]), None)
        if room is None:
            batch, room = [], most_rows
            batches.append(batch)
            windows.append(window)
        else:
            batch = with_room[room].popleft()
        batch.append(unit)
        if room > num_rows:
            with_room[room - num_rows].append(batch)
    first_B = np.cumsum([0, *map(len, batches[:-1])])
    order_U = np.array([unit for batch in batches for unit in batch])
    return order_U, first_B, np.array(windows)


def split_until(batches: Batches, num_batches: int) -> Batches:
    """So many batches: those of the most rows are halved, again and again, the later first, so
    that the steps before them stay as they are. Fewer where every row is alone.
    """
    missing = num_batches - len(batches)
    if missing <= 0:
        return batches
    starts = batches.starts.tolist()
    ends = [*starts, len(batches.rows)][1:]
    heap = [(start - end, -start, end) for start, end in zip(starts, ends, strict=True)]
    heapq.heapify(heap)
    for _ in range(missing):
        if not heap or heap[0][0] == -1:
            break
        _, later, end = heapq.heappop(heap)
        middle = (end - later + 1) // 2
        heapq.heappush(heap, (-later - middle, later, middle))
        heapq.heappush(heap, (middle - end, -middle, end))
    return Batches(batches.rows, np.sort(np.array([-start for _, start, _ in heap], np.int64)))


def num_batches_window(accumulation: int, num_processes: int) -> int:
    """Batches of a window: whole optimizer steps."""
    a_step = accumulation * num_processes
    return a_step * max(-(-WINDOW_BATCHES // a_step), WINDOW_STEPS)


def arrange(
    costs_B: np.ndarray, accumulation: int, num_processes: int, rng: np.random.Generator
) -> np.ndarray:
    """An order of the batches [B] in which what runs at once costs alike, and every optimizer step
    alike.

    Of the batches of a window, as many as there are processes, neighbours by cost, come side by
    side; a step has some of the heaviest, some of the lightest and of each kind between; steps
    come in any order. At the end of an epoch too few may be left for a step.
    """
    a_step = accumulation * num_processes
    window = num_batches_window(accumulation, num_processes)
    whole = len(costs_B) // window * window
    order = _balanced(costs_B[:whole].reshape(-1, window), accumulation, num_processes, rng)
    parts = [(order + np.arange(len(order))[:, None] * window).ravel()]
    left = whole + rng.permutation(len(costs_B) - whole)
    steps = len(left) // a_step * a_step
    if steps:
        chosen = left[:steps]
        order = _balanced(costs_B[chosen][None], accumulation, num_processes, rng)
        parts.append(chosen[order.ravel()])
    left = left[steps:]
    left = left[np.argsort(-costs_B[left], kind="stable")]
    at_once = len(left) // num_processes * num_processes
    parts += [rng.permutation(left[:at_once].reshape(-1, num_processes)).ravel(), left[at_once:]]
    return np.concatenate(parts).astype(np.int64)


def _balanced(
    costs_VW: np.ndarray, accumulation: int, num_processes: int, rng: np.random.Generator
) -> np.ndarray:
    """For each window, an order of its batches [V, W], whole steps of them."""
    V, W = costs_VW.shape
    A, R = accumulation, num_processes
    S = W // (A * R)
    falling_VW = np.argsort(-costs_VW, axis=1, kind="stable")
    group_VASR = falling_VW.reshape(V, A, S, R)
    # processes wait for the slowest of them
    cost_VAS = np.take_along_axis(costs_VW, falling_VW, axis=1).reshape(V, A, S, R).max(axis=3)
    totals_VS = np.zeros((V, S))
    chosen_VAS = np.empty((V, A, S), np.int64)
    for k in range(A):  # the heaviest of each kind goes to the step that is lightest so far
        lightest_VS = np.argsort(totals_VS, axis=1, kind="stable")
        np.put_along_axis(chosen_VAS[:, k], lightest_VS, np.arange(S)[None], axis=1)
        totals_VS += np.take_along_axis(cost_VAS[:, k], chosen_VAS[:, k], axis=1)
    group_VASR = np.take_along_axis(group_VASR, chosen_VAS[..., None], axis=2)
    passes_VSAR = rng.permuted(group_VASR, axis=3).transpose(0, 2, 1, 3)
    any_pass = np.argsort(rng.random((V, S, A)), axis=2)
    any_step = np.argsort(rng.random((V, S)), axis=1)
    passes_VSAR = np.take_along_axis(passes_VSAR, any_pass[..., None], axis=2)
    passes_VSAR = np.take_along_axis(passes_VSAR, any_step[..., None, None], axis=1)
    return passes_VSAR.reshape(V, W)
