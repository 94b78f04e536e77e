from collections import Counter

import numpy as np
import pytest

from finetune.data.sampling import (
    EpochSampler,
    heaviest_batches,
    heaviest_batches_first,
    hold_out,
)
from finetune.errors import DataError
from finetune.recipe import TrainingSection


def epochs(sampler: EpochSampler, count: int) -> list[list[int]]:
    drawn = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        drawn.append(list(sampler))
    return drawn


def test_at_weight_one_every_row_comes_once_an_epoch_in_another_order() -> None:
    first, second = epochs(EpochSampler([(50, 1.0)], seed=0), 2)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_a_row_of_weight_two_comes_twice_and_of_one_half_every_second_epoch() -> None:
    sampler = EpochSampler([(10, 2.0), (10, 0.5), (10, 1.0)], seed=3)
    assert len(sampler) == 20 + 5 + 10
    first, second = epochs(sampler, 2)
    assert len(first) == len(sampler)
    for drawn in (first, second):
        times = Counter(drawn)
        assert all(times[row] == 2 for row in range(10))
        assert all(times[row] == 1 for row in range(20, 30))
    halves = [{row for row in drawn if 10 <= row < 20} for drawn in (first, second)]
    assert halves[0] | halves[1] == set(range(10, 20))
    assert not halves[0] & halves[1]


def test_a_weight_with_a_fraction_gives_every_row_its_share_over_epochs() -> None:
    times = Counter(row for drawn in epochs(EpochSampler([(7, 1.3)], seed=1), 70) for row in drawn)
    assert max(times.values()) - min(times.values()) <= 1
    assert sum(times.values()) == 70 * round(7 * 1.3)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    spans = [(20, 1.5), (5, 1.0)]
    assert epochs(EpochSampler(spans, 7), 3) == epochs(EpochSampler(spans, 7), 3)
    assert epochs(EpochSampler(spans, 7), 1) != epochs(EpochSampler(spans, 8), 1)
    later = EpochSampler(spans, 7)
    later.set_epoch(2)
    assert list(later) == epochs(EpochSampler(spans, 7), 3)[2]


def test_a_tiny_weight_still_draws_a_row() -> None:
    assert len(EpochSampler([(10, 0.001)], 0)) == 1
    assert len(EpochSampler([(0, 1.0), (3, 1.0)], 0)) == 3


def costs_of(tokens: list[int], pixels: list[int]) -> np.ndarray:
    counts = np.zeros(len(tokens), [("num_tokens", "u4"), ("num_view_pixels", "u8")])
    counts["num_tokens"], counts["num_view_pixels"] = tokens, pixels
    return counts


def worst_first(spans: list[tuple[int, float]], num_batches: int) -> EpochSampler:
    """In batches of 2; the higher its number, the heavier a row, two by two equal."""
    ranks = [row // 2 for row in range(sum(count for count, _ in spans))]
    costs = costs_of(ranks, ranks)
    return EpochSampler(spans, 4, costs=costs, batch_size=2, num_heaviest_batches=num_batches)


def test_the_first_epoch_begins_with_the_heaviest_rows_and_the_others_keep_their_order() -> None:
    plain, heavy = (epochs(s, 3) for s in (EpochSampler([(40, 1.0)], 4), worst_first([(40, 1)], 3)))
    assert [row // 2 for row in heavy[0][:6]] == [19, 19, 18, 18, 17, 17]
    assert heavy[0][6:] == [row for row in plain[0] if row < 34]
    assert heavy[1:] == plain[1:]


def test_every_row_is_drawn_as_often_with_the_heaviest_in_front() -> None:
    """Of rows of weight 0.5, only those whose turn it is come first."""
    spans = [(10, 2.0), (9, 1.3), (20, 0.5)]
    plain, heavy = epochs(EpochSampler(spans, 4), 4), epochs(worst_first(spans, 4), 4)
    assert plain[0] != heavy[0]
    assert [Counter(drawn) for drawn in plain] == [Counter(drawn) for drawn in heavy]
    top = sorted((row // 2 for row in plain[0]), reverse=True)[:8]
    assert [row // 2 for row in heavy[0][:8]] == top


def test_fewer_rows_than_come_first_are_all_in_order() -> None:
    (drawn,) = epochs(worst_first([(4, 1.0)], 10), 1)
    assert [row // 2 for row in drawn] == [1, 1, 0, 0]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("gradient_accumulation", [1, 4])
def test_a_long_row_of_few_pixels_is_among_the_first_batches(
    batch_size: int, gradient_accumulation: int
) -> None:
    """Of all rows it has the fewest pixels, and a hundred times the tokens."""
    costs = costs_of([40] * 20 + [3787], [12_100] * 20 + [11_000])
    training = TrainingSection(batch_size=batch_size, gradient_accumulation=gradient_accumulation)
    (drawn,) = epochs(EpochSampler.of_recipe([(21, 1.0)], training, costs), 1)
    assert 20 in drawn[:batch_size]
    assert sorted(drawn) == list(range(21))


def test_the_heaviest_batches_are_the_mixed_the_longest_and_the_largest() -> None:
    costs = costs_of([10, 50, 40, 20, 30], [900, 0, 0, 800, 100])
    assert heaviest_batches(costs, 1) == [[1], [1], [0]]
    assert heaviest_batches(costs, 2) == [[1, 0], [1, 2], [0, 3]]
    assert heaviest_batches(costs, 9)[1:] == [[1, 2, 4, 3, 0], [0, 3, 4, 1, 2]]
    assert sorted(heaviest_batches(costs, 9)[0]) == [0, 1, 2, 3, 4]


def test_of_rows_with_as_many_pixels_the_longer_is_heavier() -> None:
    costs = costs_of([10, 30, 20, 30], [700, 700, 700, 600])
    assert heaviest_batches(costs, 3) == [[1, 3, 2], [1, 3, 2], [1, 2, 0]]


def test_all_rows_of_the_heaviest_batches_come_before_any_other_row() -> None:
    rng = np.random.default_rng(0)
    costs = costs_of(*rng.integers(0, 1000, (2, 200)).tolist())
    batches = heaviest_batches(costs, 8)
    first = heaviest_batches_first(costs, 8, 3)
    assert len(set(first)) == 24
    assert first[:8] == batches[0]
    assert {row for batch in batches for row in batch} <= set(first)
    # what is taken goes on from there, as if the rows before had never been
    left = np.delete(np.arange(200), first)
    again = heaviest_batches_first(costs[left], 8, 3)
    assert heaviest_batches_first(costs, 8, 6)[24:] == left[again].tolist()


def keyed(keys_of_rows: list[list[int]]) -> tuple[int, np.ndarray, np.ndarray]:
    rows = [row for row, keys in enumerate(keys_of_rows) for _ in keys]
    keys = [key for keys in keys_of_rows for key in keys]
    return len(keys_of_rows), np.array(rows), np.array(keys, np.uint64)


def test_about_the_fraction_is_held_out_and_the_seed_decides_which() -> None:
    rows = keyed([[1000 + i] for i in range(200)])
    held = hold_out(*rows, 0.1, seed=0)
    assert held.sum() == 20
    assert (held == hold_out(*rows, 0.1, seed=0)).all()
    assert (held != hold_out(*rows, 0.1, seed=1)).any()


def test_rows_that_share_a_picture_stay_on_one_side() -> None:
    # rows 0, 1 and 2 hang together through pictures 5 and 6; others stand alone
    rows = keyed([[5], [5, 6], [6], *[[100 + i] for i in range(9)]])
    sides = set()
    for seed in range(40):
        held = hold_out(*rows, 0.3, seed=seed)
        assert held[0] == held[1] == held[2]
        sides.add(bool(held[0]))
    assert sides == {True, False}


def test_rows_added_later_leave_the_others_where_they_were() -> None:
    before = hold_out(*keyed([[1000 + i] for i in range(100)]), 0.2, seed=0)
    after = hold_out(*keyed([[5000], *[[1000 + i] for i in range(100)]]), 0.2, seed=0)
    assert (before == after[1:]).sum() >= 99


def test_one_group_cannot_be_parted() -> None:
    with pytest.raises(
        DataError, match=r"groups of up to 3 leave nothing .*; name data.eval instead"
    ):
        hold_out(*keyed([[5], [5], [5]]), 0.5, seed=0)
