from collections import Counter

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from finetune.data.gathering import Limits, RowSizes
from finetune.data.heaviest import heaviest_batches, heaviest_batches_first
from finetune.data.sampling import Batching, EpochBatches, EpochSampler, hold_out
from finetune.errors import DataError
from finetune.recipe import TrainingSection
from finetune.row_numbers import tell_epoch_to_resumed


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


@pytest.mark.parametrize("num_epochs", [1, 4])
def test_by_number_alone_batches_are_the_rows_as_they_come(num_epochs: int) -> None:
    """As a loader would cut them; also of rows whose costs are known."""
    sampler = EpochSampler([(20, 1.5), (5, 1.0)], 7)
    for sizes in (None, RowSizes(np.arange(25), np.arange(25))):
        batches = EpochBatches(sampler, Batching(Limits(4)), sizes)
        for epoch, drawn in enumerate(epochs(sampler, num_epochs)):
            batches.set_epoch(epoch)
            assert list(batches) == [drawn[i : i + 4] for i in range(0, 35, 4)]
            assert len(batches) == 9


MIXED = RowSizes(
    np.random.default_rng(0).integers(20, 500, 300),
    np.random.default_rng(1).integers(0, 3000, 300),
    np.random.default_rng(2).integers(0, 90, 300),
    np.full(300, 10),
    np.zeros(300, np.int64),
)
BATCHINGS = {
    "gathered": Batching(Limits(4), epochs=3),
    "grouped": Batching(Limits(4), by_cost=True, accumulation=2, epochs=3),
    "tokens": Batching(Limits(tokens=1500), epochs=3),
    "patches": Batching(Limits(patches=5000), by_cost=True, accumulation=3, epochs=3),
    "both": Batching(Limits(tokens=1500, patches=5000), by_cost=True, epochs=2.5),
    "packed": Batching(Limits(tokens=1500, packs=True), by_cost=True, epochs=3),
    "processes": Batching(Limits(tokens=900), by_cost=True, num_processes=4, epochs=3),
    "worst first": Batching(Limits(tokens=1500), num_heaviest_batches=5, epochs=3),
}
SPANS = [(200, 1.0), (60, 0.5), (40, 2.5)]


@pytest.mark.parametrize("name", BATCHINGS)
def test_every_epoch_has_its_rows_in_as_many_batches(name: str) -> None:
    batching = BATCHINGS[name]
    sampler = EpochSampler(SPANS, 5)
    batches = EpochBatches(sampler, batching, MIXED)
    made = [batches.of_epoch(epoch) for epoch in range(3)]
    for epoch, drawn in zip(made, epochs(sampler, 3), strict=True):
        assert len(epoch) == len(batches)
        assert len(epoch) % batching.num_processes == 0
        assert all(epoch)
        assert sorted(row for batch in epoch for row in batch) == sorted(drawn)
    assert made[0] != made[1]


@pytest.mark.parametrize("name", BATCHINGS)
def test_batches_depend_on_seed_and_epoch_alone(name: str) -> None:
    """A resumed run finds its place whichever epochs were asked for before."""
    one = EpochBatches(EpochSampler(SPANS, 5), BATCHINGS[name], MIXED)
    first = [one.of_epoch(epoch) for epoch in range(3)]
    other = EpochBatches(EpochSampler(SPANS, 5), BATCHINGS[name], MIXED)
    other.set_epoch(2)
    assert list(other) == first[2]
    assert other.of_epoch(0) == first[0]
    changed = EpochBatches(EpochSampler(SPANS, 6), BATCHINGS[name], MIXED)
    assert changed.of_epoch(0) != first[0]


def test_epochs_that_the_run_will_reach_have_as_many_batches_too() -> None:
    """Of three rows the first comes always, the others in turn: with one of them it fits into a
    batch, with the other it does not, and which comes first is up to the seed.
    """
    sizes = RowSizes(np.array([5, 5, 9]), np.zeros(3, np.int64))

    def lengths(epochs: float | None, max_steps: int | None) -> set[int]:
        batching = Batching(Limits(tokens=10), epochs=epochs, max_steps=max_steps)
        samplers = (EpochSampler([(1, 1.0), (2, 0.5)], seed) for seed in range(9))
        return {len(EpochBatches(sampler, batching, sizes)) for sampler in samplers}

    assert lengths(1, None) == lengths(None, 1) == {1, 2}
    assert lengths(2, None) == lengths(1.5, None) == lengths(None, 3) == {2}


def epochs_of(batches: EpochBatches, count: int) -> list[list[list[int]]]:
    return [batches.of_epoch(epoch) for epoch in range(count)]


@pytest.mark.parametrize(("epochs", "accumulation", "num_processes"), [(2, 3, 1), (1.5, 4, 3)])
def test_steps_are_counted_as_the_trainer_counts_them(
    epochs: float, accumulation: int, num_processes: int
) -> None:
    batching = Batching(
        Limits(tokens=1500), accumulation, epochs=epochs, num_processes=num_processes
    )
    batches = EpochBatches(EpochSampler(SPANS, 0), batching, MIXED)
    passes = -(-len(batches) // num_processes)
    per_epoch = passes // accumulation + int(passes % accumulation > 0)
    assert batches.num_steps() == -(-epochs * per_epoch // 1)


@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize("skipped", [0, 5])
def test_accelerate_gives_each_process_its_batches_of_the_right_epoch(
    num_processes: int, skipped: int
) -> None:
    """Neighbouring batches to neighbouring processes; also from the middle of an epoch on."""
    batching = Batching(Limits(tokens=1500), by_cost=True, num_processes=num_processes)
    expected = EpochBatches(EpochSampler(SPANS, 0), batching, MIXED).of_epoch(3)
    for rank in range(num_processes):
        batches = EpochBatches(EpochSampler(SPANS, 0), batching, MIXED)
        loader = prepare_data_loader(
            DataLoader(list(range(300)), batch_sampler=batches, collate_fn=list),  # type: ignore[arg-type]
            num_processes=num_processes,
            process_index=rank,
        )
        tell_epoch_to_resumed(loader, batches)
        loader = skip_first_batches(loader, skipped) if skipped else loader
        loader.set_epoch(3)  # type: ignore[attr-defined]  # accelerate's own
        assert list(loader) == expected[rank::num_processes][skipped:]


def costs_of(tokens: list[int], pixels: list[int]) -> RowSizes:
    return RowSizes(np.array(tokens), np.array(pixels))


def worst_first(spans: list[tuple[int, float]], num_batches: int) -> EpochBatches:
    """In batches of 2; the higher its number, the heavier a row, two by two equal."""
    ranks = [row // 2 for row in range(sum(count for count, _ in spans))]
    batching = Batching(Limits(2), num_heaviest_batches=num_batches)
    return EpochBatches(EpochSampler(spans, 4), batching, costs_of(ranks, ranks))


def flat(batches: EpochBatches, count: int) -> list[list[int]]:
    return [[row for batch in epoch for row in batch] for epoch in epochs_of(batches, count)]


def test_the_first_epoch_begins_with_the_heaviest_rows_and_the_others_keep_their_order() -> None:
    plain, heavy = epochs(EpochSampler([(40, 1.0)], 4), 3), flat(worst_first([(40, 1)], 3), 3)
    assert [row // 2 for row in heavy[0][:6]] == [19, 19, 18, 18, 17, 17]
    assert heavy[0][6:] == [row for row in plain[0] if row < 34]
    assert heavy[1:] == plain[1:]


@pytest.mark.parametrize("by_cost", [True, False])
@pytest.mark.parametrize("num_rows", range(1, 13))
def test_every_epoch_has_as_many_batches_with_the_heaviest_in_front(
    num_rows: int, by_cost: bool
) -> None:
    """Also where the heaviest are all there are, or another epoch draws more."""
    rng = np.random.default_rng(num_rows)
    for weight in (0.5, 1.0, 1.5):
        for num_heaviest in (1, 2, 5):
            batching = Batching(
                Limits(tokens=60), num_heaviest_batches=num_heaviest, by_cost=by_cost, epochs=4
            )
            sizes = costs_of(*rng.integers(1, 40, (2, num_rows)).tolist())
            batches = EpochBatches(EpochSampler([(num_rows, weight)], 4), batching, sizes)
            counts = [len(epoch) for epoch in epochs_of(batches, 4)]
            rows = [sum(map(len, epoch)) for epoch in epochs_of(batches, 4)]
            assert all(
                count == len(batches) or count == drawn
                for count, drawn in zip(counts, rows, strict=True)
            )


def test_every_row_is_drawn_as_often_with_the_heaviest_in_front() -> None:
    """Of rows of weight 0.5, only those whose turn it is come first."""
    spans = [(10, 2.0), (9, 1.3), (20, 0.5)]
    plain, heavy = epochs(EpochSampler(spans, 4), 4), flat(worst_first(spans, 4), 4)
    assert plain[0] != heavy[0]
    assert [Counter(drawn) for drawn in plain] == [Counter(drawn) for drawn in heavy]
    top = sorted((row // 2 for row in plain[0]), reverse=True)[:8]
    assert [row // 2 for row in heavy[0][:8]] == top


def test_fewer_rows_than_come_first_are_all_in_order() -> None:
    (drawn,) = flat(worst_first([(4, 1.0)], 10), 1)
    assert [row // 2 for row in drawn] == [1, 1, 0, 0]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("gradient_accumulation", [1, 4])
def test_a_long_row_of_few_pixels_is_among_the_first_batches(
    batch_size: int, gradient_accumulation: int
) -> None:
    """Of all rows it has the fewest pixels, and a hundred times the tokens."""
    costs = costs_of([40] * 20 + [3787], [12_100] * 20 + [11_000])
    training = TrainingSection(batch_size=batch_size, gradient_accumulation=gradient_accumulation)
    batching = Batching.of_recipe(training, worst_first=True)
    batches = EpochBatches(EpochSampler([(21, 1.0)], training.seed), batching, costs)
    (drawn,) = flat(batches, 1)
    assert 20 in drawn[:batch_size]
    assert sorted(drawn) == list(range(21))


def test_the_heaviest_batches_are_the_mixed_the_longest_and_the_largest() -> None:
    costs = costs_of([10, 50, 40, 20, 30], [900, 0, 0, 800, 100])
    assert heaviest_batches(costs, Limits(1)) == [[1], [1], [0]]
    assert heaviest_batches(costs, Limits(2)) == [[1, 0], [1, 2], [0, 3]]
    assert heaviest_batches(costs, Limits(9))[1:] == [[1, 2, 4, 3, 0], [0, 3, 4, 1, 2]]
    assert sorted(heaviest_batches(costs, Limits(9))[0]) == [0, 1, 2, 3, 4]


def test_of_rows_with_as_many_pixels_the_longer_is_heavier() -> None:
    costs = costs_of([10, 30, 20, 30], [700, 700, 700, 600])
    assert heaviest_batches(costs, Limits(3)) == [[1, 3, 2], [1, 3, 2], [1, 2, 0]]


def test_all_rows_of_the_heaviest_batches_come_before_any_other_row() -> None:
    rng = np.random.default_rng(0)
    costs = costs_of(*rng.integers(0, 1000, (2, 200)).tolist())
    batches = heaviest_batches(costs, Limits(8))
    three = heaviest_batches_first(costs, Limits(8), 3)
    first = [row for batch in three for row in batch]
    assert len(set(first)) == 24
    assert three[0] == batches[0]
    assert {row for batch in batches for row in batch} <= set(first)
    # what is taken goes on from there, as if the rows before had never been
    left = np.delete(np.arange(200), first)
    again = heaviest_batches_first(costs.of_rows(left), Limits(8), 3)
    six = heaviest_batches_first(costs, Limits(8), 6)
    assert six[3:] == [left[batch].tolist() for batch in again]


def test_the_heaviest_batch_shows_as_many_pictures_as_it_has_rows() -> None:
    """Four questions about the largest page would be one sequence, and one picture."""
    pictures = np.array([0, 0, 0, 0, 1, 2, 3, 4])
    tokens = np.array([90, 91, 92, 93, 50, 60, 70, 10])
    shared = np.where(pictures == 0, 80, 0)
    costs = RowSizes(tokens, tokens * 10, pictures, shared, shared * 10)
    for batch in heaviest_batches(costs, Limits(4)):
        assert batch == [3, 6, 5, 4]
    # others of a picture come where there is none left
    assert heaviest_batches(costs, Limits(7))[1] == [3, 6, 5, 4, 7, 2, 1]


def test_within_budgets_the_heaviest_batches_are_the_fullest() -> None:
    """Of the longest row only one fits, and 60 of 100 tokens are less than 10 times 10."""
    costs = costs_of([60, 45, *[10] * 20], [0, 0, *[3] * 20])
    mixed, longest, largest = heaviest_batches(costs, Limits(tokens=100))
    assert len(longest) == 10
    assert set(longest) <= set(range(2, 22))
    assert sum(costs.patches[mixed]) == sum(costs.patches[largest]) == 30
    # a row over the budget is heavier than all that keep it
    costs = costs_of([160, 45, *[10] * 20], [0, 0, *[3] * 20])
    assert heaviest_batches(costs, Limits(tokens=100))[1] == [0]
    # and the first epoch begins with batches of each kind, no row in two
    first = heaviest_batches_first(costs, Limits(tokens=100), 4)
    rows = [row for batch in first for row in batch]
    assert [0] in first
    assert len(set(rows)) == len(rows)


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


@pytest.mark.parametrize("num_rows", range(1, 14))
def test_steps_of_two_processes_have_the_rows_of_one_with_all_of_the_batch(num_rows: int) -> None:
    """The last one, too, with an idle row where there are too few."""
    sampler = EpochSampler([(num_rows, 1.0)], 3)
    two = EpochBatches(sampler, Batching(Limits(2), num_processes=2))
    batches = two.of_epoch(0)
    assert len(batches) == len(two)
    assert len(batches) % 2 == 0
    steps = [batches[i] + batches[i + 1] for i in range(0, len(batches), 2)]
    trained = [[row for row in step if row != two.idle_row] for step in steps]
    assert trained == EpochBatches(sampler, Batching(Limits(4))).of_epoch(0)
