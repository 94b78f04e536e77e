"""Batches of rows by cost and within budgets, on numbers that can be checked by eye and against
what a plain loop finds.
"""

from collections import Counter, defaultdict

import numpy as np
import pytest

from finetune.data.batches import (
    Batches,
    arrange,
    cost,
    cut,
    num_batches_window,
    split_until,
)
from finetune.data.gathering import Limits, RowSizes, gather


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def sizes_of(tokens: list[int], patches: list[int] | None = None) -> RowSizes:
    return RowSizes(np.array(tokens), np.array(patches or [0] * len(tokens)))


def about(pictures: list[int], tokens: list[int], shared: int) -> RowSizes:
    """Rows of these tokens, of which so many are their picture's; ten patches a shared token."""
    in_common = np.full(len(tokens), shared)
    return RowSizes(np.array(tokens), in_common * 10, np.array(pictures), in_common, in_common * 10)


def batches_of(sizes: RowSizes, limits: Limits, **options: bool | int) -> list[list[int]]:
    units = gather(np.arange(len(sizes.tokens)), sizes, limits, rng())
    return cut(units, limits, **{"by_cost": False} | options, rng=rng()).lists()  # type: ignore[arg-type]


def load(batch: list[int], sizes: RowSizes, *, packs: bool = False) -> tuple[int, int]:
    """Padded tokens and patches of one batch, counted row by row."""
    tokens, patches = defaultdict(int), defaultdict(int)
    for row in batch:
        key = row if sizes.pictures is None else -1 - int(sizes.pictures[row])
        if sizes.shared_tokens is None or sizes.shared_patches is None:
            tokens[key], patches[key] = int(sizes.tokens[row]), int(sizes.patches[row])
            continue
        shared, shown = int(sizes.shared_tokens[row]), int(sizes.shared_patches[row])
        tokens[key] = (tokens[key] or shared) + int(sizes.tokens[row]) - shared
        patches[key] = (patches[key] or shown) + int(sizes.patches[row]) - shown
    padded = sum(tokens.values()) if packs else max(tokens.values()) * len(tokens)
    return padded, sum(patches.values())


def test_a_batch_takes_rows_until_padding_reaches_the_budget() -> None:
    # 4 x 10 are too many; the 30 alone makes the row beside it count 30
    assert batches_of(sizes_of([10, 10, 10, 10, 30, 5]), Limits(tokens=35)) == [
        [0, 1, 2],
        [3],
        [4],
        [5],
    ]
    assert batches_of(sizes_of([10, 10, 10, 10, 30, 5]), Limits(tokens=35, packs=True)) == [
        [0, 1, 2],
        [3],
        [4, 5],
    ]
    assert batches_of(sizes_of([1] * 5, [10, 20, 5, 40, 1]), Limits(patches=35)) == [
        [0, 1, 2],
        [3],
        [4],
    ]


def test_a_row_over_the_budget_is_a_batch_alone() -> None:
    assert batches_of(sizes_of([1, 99, 1]), Limits(tokens=10)) == [[0], [1], [2]]
    assert batches_of(sizes_of([99]), Limits(tokens=10)) == [[0]]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("by_cost", [False, True])
@pytest.mark.parametrize(
    "limits",
    [
        Limits(tokens=900),
        Limits(patches=2000),
        Limits(tokens=900, patches=2000),
        Limits(tokens=900, packs=True),
        Limits(3),
        Limits(7),
    ],
)
def test_no_batch_of_several_rows_is_over_its_limits(
    seed: int, by_cost: bool, limits: Limits
) -> None:
    """With and without pictures in common; the oracle counts row by row."""
    draws = np.random.default_rng(seed)
    pictures = draws.integers(0, 40, 200)
    shared = draws.integers(0, 60, 40)[pictures]
    tokens = shared + draws.integers(1, 300, 200)
    patches = 5 * shared + draws.integers(0, 9, 200)
    for sizes in (
        RowSizes(tokens, patches),
        RowSizes(tokens, patches, pictures, shared, 5 * shared),
    ):
        rows = draws.permutation(200)
        units = gather(rows, sizes, limits, rng())
        batches = cut(units, limits, by_cost=by_cost, rng=rng(), num_batches_window=8)
        lists = batches.lists()
        assert sorted(row for batch in lists for row in batch) == list(range(200))
        counted = [load(batch, sizes, packs=limits.packs) for batch in lists]
        assert [*zip(*batches.loads(sizes, packs=limits.packs), strict=True)] == counted
        for batch, (padded, shown) in zip(lists, counted, strict=True):
            assert len(batch) <= (limits.rows or 200)
            if len(batch) > 1:
                assert padded <= limits.most[0]
                assert shown <= limits.most[1]


def test_sorted_rows_of_a_batch_are_of_like_length() -> None:
    draws = np.random.default_rng(1)
    tokens = draws.integers(10, 1000, 4096)
    sizes = RowSizes(tokens, np.zeros(4096, np.int64))

    def padded_share(by_cost: bool) -> float:
        units = gather(np.arange(4096), sizes, Limits(8), rng())
        batches = cut(units, Limits(8), by_cost=by_cost, rng=rng())
        assert {len(batch) for batch in batches.lists()} == {8}
        return 1 - tokens.sum() / batches.loads(sizes)[0].sum()

    # the longest of 8 uniform draws is at 8/9 of their range; of 8 neighbours among the 512 of a
    # window, it is 3.5 places of 990 / 512 tokens over their mean of 505
    assert padded_share(False) == pytest.approx(1 - 505 / 890, abs=0.02)
    assert padded_share(True) == pytest.approx(3.5 * 990 / 512 / 505, rel=0.1)


def test_rows_change_places_within_their_window_only() -> None:
    """Windows of 4 batches of 2 rows: each holds the same rows, sorted or not."""
    tokens = np.random.default_rng(1).integers(10, 1000, 40)
    batches = batches_of(sizes_of(tokens.tolist()), Limits(2), by_cost=True, num_batches_window=4)
    for start in range(0, 20, 4):
        rows = [row for batch in batches[start : start + 4] for row in batch]
        assert sorted(rows) == list(range(start * 2, start * 2 + 8))
        falling = [int(tokens[row]) for row in rows]
        assert falling == sorted(falling, reverse=start // 4 % 2 == 0)


def test_rows_of_one_picture_stay_together_up_to_a_batch() -> None:
    pictures = [0, 1, 0, 1, 0, 2, 0, 0, 3, 1]
    batches = batches_of(about(pictures, [50] * 10, 40), Limits(3))
    held = [Counter(pictures[row] for row in batch) for batch in batches]
    # five rows of picture 0: three and two; three of picture 1: all; what is left fills up
    assert sorted(counts[0] for counts in held if counts[0]) == [2, 3]
    assert [counts[1] for counts in held if counts[1]] == [3]
    assert sorted(map(len, batches)) == [1, 3, 3, 3]


def test_rows_with_a_picture_of_their_own_keep_their_order() -> None:
    sizes = about([*range(30)], [50] * 30, 40)
    order = np.random.default_rng(3).permutation(30)
    assert gather(order, sizes, Limits(4), rng()).rows.tolist() == order.tolist()
    assert batches_of(sizes, Limits(4))[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_gathered_unit_comes_anywhere_as_often() -> None:
    """Four rows of one picture among 16 others, over 3,000 epochs: at the place of the first of
    them it would come at 3.4 in the mean, and at that of any it comes at 8.
    """
    sizes = about([*range(16), 16, 16, 16, 16], [50] * 20, 40)
    draws = np.random.default_rng(0)
    places = []
    for _ in range(3000):
        units = gather(draws.permutation(20), sizes, Limits(4), draws)
        places.append(int(np.flatnonzero(units.num_rows == 4)[0]))
    # 17 units: uniform over 0 to 16, whose mean of 3,000 has a deviation of 0.09
    assert np.mean(places) == pytest.approx(8, abs=0.4)
    assert len(set(places)) == 17


def test_a_row_that_comes_twice_an_epoch_is_not_twice_in_a_batch_of_its_picture() -> None:
    sizes = about([0, 0, 1], [50] * 3, 40)
    units = gather(np.array([0, 1, 0, 2, 1]), sizes, Limits(4), rng())
    ends = [*units.starts[1:].tolist(), 5]
    parts = [units.rows[a:b].tolist() for a, b in zip(units.starts.tolist(), ends, strict=True)]
    assert sorted(map(sorted, parts)) == [[0, 1], [0, 1], [2]]


def test_tokens_and_patches_of_a_picture_count_once() -> None:
    # one sequence of 40 + 3 x 10 tokens, and a second of 50: two of 70 padded tokens
    sizes = about([0, 0, 0, 1], [50, 50, 50, 50], 40)
    batches = Batches(np.arange(4), np.array([0]))
    tokens, patches = batches.loads(sizes)
    assert (tokens.tolist(), patches.tolist()) == ([140], [800])
    assert batches.loads(sizes, packs=True)[0].tolist() == [120]
    # so a budget of 70 tokens holds the three questions, and not a fourth
    sizes = about([0, 0, 0, 0], [50] * 4, 40)
    assert sorted(map(len, batches_of(sizes, Limits(tokens=70)))) == [1, 3]


def test_how_much_rows_share_is_known_of_rows_with_one_picture() -> None:
    names = ["num_tokens", "num_images", "num_views", "num_view_pixels"]
    counts = np.zeros(4, [(name, "u4") for name in names])
    for line, values in zip(
        counts, [(400, 1, 5, 980), (400, 2, 10, 1960), (9, 0, 0, 0), (400, 1, 5, 980)], strict=True
    ):
        for name, value in zip(names, values, strict=True):
            line[name] = value
    sizes = RowSizes.of_counts(
        counts, patch_px=14, picture_keys=np.array([7, 7, 0, 7], np.uint64), tokens_a_view=64
    )
    assert sizes.pictures is not None
    assert sizes.shared_tokens is not None
    assert sizes.shared_patches is not None
    assert sizes.patches.tolist() == [5, 10, 0, 5]
    assert sizes.shared_tokens.tolist() == [320, 0, 0, 320]
    assert sizes.shared_patches.tolist() == [5, 0, 0, 5]
    assert sizes.pictures[0] == sizes.pictures[1] == sizes.pictures[3] != sizes.pictures[2]


@pytest.mark.parametrize("accumulation", [1, 3, 8])
def test_a_step_has_batches_from_light_to_heavy_and_costs_what_others_do(accumulation: int) -> None:
    """Of eight steps of a window no two differ by more than batches of one kind do: where the
    heaviest of a kind goes to the lightest step, a difference never grows beyond that.
    """
    A, window = accumulation, num_batches_window(accumulation, 1)
    costs = np.random.default_rng(0).random(4 * window)
    order = arrange(costs, A, 1, rng())
    for start in range(0, len(costs), window):
        chosen = order[start : start + window]
        assert sorted(chosen) == list(range(start, start + window))
        kinds = np.sort(costs[chosen]).reshape(A, window // A)
        steps = costs[chosen].reshape(-1, A)
        for step in steps:
            each = np.sort(step)
            assert ((kinds[:, 0] <= each) & (each <= kinds[:, -1])).all()
        assert np.ptp(steps.sum(1)) <= np.ptp(kinds, axis=1).max() + 1e-9
    if A == 8:  # in no order within a step, nor among steps
        assert len({tuple(np.argsort(costs[step])) for step in order.reshape(-1, A)}) > 20


def test_processes_have_neighbours_by_cost_at_once() -> None:
    window = num_batches_window(2, 4)
    costs = np.random.default_rng(0).permutation(2 * window)
    order = arrange(costs.astype(float), 2, 4, rng())
    for start in range(0, len(costs), window):
        expected = np.sort(costs[start : start + window]).reshape(-1, 4)
        at_once = costs[order[start : start + window]].reshape(-1, 4)
        assert sorted(np.sort(at_once).tolist()) == expected.tolist()
    # and none of the four has the heaviest always
    assert len(set(costs[order].reshape(-1, 4).argmax(1).tolist())) == 4


@pytest.mark.parametrize("num_batches", [0, 1, 3, 8, 63, 65, 130, 200])
@pytest.mark.parametrize(("accumulation", "num_processes"), [(1, 1), (3, 2), (8, 4)])
def test_every_batch_is_arranged_once_also_at_the_end(
    num_batches: int, accumulation: int, num_processes: int
) -> None:
    costs = np.random.default_rng(0).random(num_batches)
    order = arrange(costs, accumulation, num_processes, rng())
    assert sorted(order.tolist()) == list(range(num_batches))


def test_batches_of_most_rows_are_halved_until_there_are_enough() -> None:
    batches = Batches(np.arange(10), np.array([0, 5, 6, 9]))
    assert split_until(batches, 4).lists() == [[0, 1, 2, 3, 4], [5], [6, 7, 8], [9]]
    assert split_until(batches, 6).lists() == [[0, 1, 2], [3, 4], [5], [6, 7], [8], [9]]
    assert split_until(batches, 7).lists()[:2] == [[0, 1], [2]]
    assert len(split_until(batches, 99)) == 10


def test_a_row_costs_its_shares_of_all_tokens_and_patches() -> None:
    assert cost(np.array([10, 30]), np.array([0, 4])).tolist() == [0.5, 3.5]
    assert cost(np.array([10, 30]), np.array([0, 0])).tolist() == [0.5, 1.5]
