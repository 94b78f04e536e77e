"""Rows laid out as sequences: what every learnt token sees is what its row alone shows it."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from finetune.data.examples import Example
from finetune.data.sequences import Layouting, PackedRows, lay_out
from finetune.data.views import ImagePlan, View

IMAGE, SEPARATOR = 9, 8
TOKENS_A_VIEW = 2
PROCESSOR = SimpleNamespace(image_token_id=IMAGE)
FAMILY: Any = SimpleNamespace(
    num_image_tokens=lambda processor, plan: TOKENS_A_VIEW * len(plan.views)
)
SHARED = Layouting(share_images=True)


def picture(number: int, num_views: int = 1) -> tuple[ImagePlan, list[np.ndarray]]:
    plan = ImagePlan(tuple(View((0, 0, 2, 2), 2, 2) for _ in range(num_views)))
    return plan, [np.full((3, 2, 2), 10 * number + i, np.uint8) for i in range(num_views)]


def example(*parts: Any) -> Example:
    """Of ids, learnt ids in a list, and pictures as (number, number of views)."""
    ids: list[int] = []
    mask: list[bool] = []
    views: list[np.ndarray] = []
    plans: list[ImagePlan] = []
    for part in parts:
        if isinstance(part, tuple):
            plan, cut = picture(*part)
            tokens = [*([IMAGE] * TOKENS_A_VIEW), SEPARATOR] * len(cut)
            ids += tokens[:-1]
            mask += [False] * len(tokens[:-1])
            views += cut
            plans.append(plan)
        else:
            tokens = part if isinstance(part, list) else [part]
            ids += tokens
            mask += [isinstance(part, list)] * len(tokens)
    return Example("row", ids, mask, views, plans)


def shown(ids: list[int], views: list[np.ndarray]) -> list[Any]:
    """Each token as the model reads it: an image token is a part of the view in whose turn it is,
    however they are laid out.
    """
    seen = 0
    tokens: list[Any] = []
    for token in ids:
        if token == IMAGE:
            view = views[seen // TOKENS_A_VIEW]
            tokens.append((int(view.flat[0]), seen % TOKENS_A_VIEW))
            seen += 1
        else:
            tokens.append(token)
    assert seen == TOKENS_A_VIEW * len(views)
    return tokens


def lessons_of_row(row: Example) -> Counter[Any]:
    """What is learnt of a row: the tokens before a learnt one, and that one."""
    tokens = shown(row.input_ids, row.views)
    return Counter(
        (tuple(tokens[:place]), tokens[place])
        for place in range(1, len(tokens))
        if row.loss_mask[place]
    )


def lessons_of_sequence(sequence: PackedRows) -> Counter[Any]:
    """What is learnt of a sequence, a token predicted at the place before its own, from what that
    place sees, in the order of positions.
    """
    tokens = shown(sequence.input_ids, sequence.views)
    sees = sequence.sees()
    lessons: Counter[Any] = Counter()
    for place, weight in enumerate(sequence.weights):
        if not weight:
            continue
        asked = place - 1
        assert asked >= 0
        seen = [
            other for other in range(place) if sees[sequence.nodes[asked]][sequence.nodes[other]]
        ]
        positions = [sequence.positions[other] for other in seen]
        assert sorted(positions) == list(range(sequence.positions[asked] + 1))
        assert sequence.positions[place] == sequence.positions[asked] + 1
        by_position = sorted(seen, key=lambda other: sequence.positions[other])
        lessons[tuple(tokens[other] for other in by_position), tokens[place]] += weight
    return lessons


def assert_learns_the_same(rows: list[Example], sequences: list[PackedRows]) -> None:
    expected = sum(map(lessons_of_row, rows), Counter())
    assert sum(map(lessons_of_sequence, sequences), Counter()) == expected
    assert sum(sequence.num_rows for sequence in sequences) == len(rows)


def random_rows(seed: int) -> list[Example]:
    """Rows that begin as one before them does, up to any part; of text, learnt or not, and of
    pictures that come again.
    """
    draw = np.random.default_rng(seed)
    made: list[list[Any]] = []
    for _ in range(draw.integers(1, 7)):
        parts: list[Any] = [0]
        if made and draw.random() < 0.8:
            before = made[draw.integers(len(made))]
            parts = before[: draw.integers(1, len(before) + 1)]
        for _ in range(draw.integers(0, 6)):
            kind = draw.integers(3)
            text = draw.integers(1, 4, draw.integers(1, 4)).tolist()
            new = [(int(draw.integers(3)), int(draw.integers(1, 3)))] if kind == 0 else text
            parts = [*parts, text] if kind == 1 else [*parts, *new]
        made.append(parts)
    rows = [example(*parts) for parts in made]
    # rows may differ in whether they learn a token, and in the pixels alone
    for row in rows:
        for place, token in enumerate(row.input_ids):
            if token not in (IMAGE, SEPARATOR) and draw.random() < 0.1:
                row.loss_mask[place] = not row.loss_mask[place]
    return rows


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("share_images", [False, True])
@pytest.mark.parametrize("block", range(10))
def test_every_learnt_token_sees_what_its_row_shows_it(
    packing: bool, share_images: bool, block: int
) -> None:
    for seed in range(block * 50, block * 50 + 50):
        rows = random_rows(seed)
        layouting = Layouting(packing=packing, share_images=share_images, max_tokens=16)
        assert_learns_the_same(rows, lay_out(rows, PROCESSOR, FAMILY, layouting))


def test_rows_about_one_picture_hold_it_once() -> None:
    rows = [example(0, (1, 2), 5, [6]), example(0, (1, 2), 4, 4, [7]), example(0, (1, 2), 5, 3)]
    (sequence,) = lay_out(rows, PROCESSOR, FAMILY, SHARED)
    assert sequence.input_ids.count(IMAGE) == 2 * TOKENS_A_VIEW
    assert len(sequence.views) == 2
    assert len(sequence.plans) == 1
    # the first and last of them share their next token, too
    assert len(sequence.input_ids) == 1 + 5 + (1 + 1 + 1) + 3
    assert_learns_the_same(rows, [sequence])


def test_a_picture_of_other_pixels_is_another_one() -> None:
    rows = [example(0, (1, 1), 5, [6]), example(0, (2, 1), 5, [6])]
    assert len(lay_out(rows, PROCESSOR, FAMILY, SHARED)) == 2
    second = example(0, (1, 1), (1, 1), 5, [6])
    third = example(0, (1, 1), (2, 1), 5, [6])
    (sequence,) = lay_out([second, third], PROCESSOR, FAMILY, SHARED)
    assert len(sequence.views) == 3
    assert_learns_the_same([second, third], [sequence])


def test_rows_that_share_no_whole_picture_stay_apart() -> None:
    rows = [
        example(0, 1, 2, 3, [4]),
        example(0, 1, 2, 3, [5]),
        example(0, 1, (1, 1), [5]),
        example(0, 2, (1, 1), [5]),
    ]
    assert len(lay_out(rows, PROCESSOR, FAMILY, SHARED)) == 4
    # a picture in one view is no part of the same picture in two
    assert (
        len(lay_out([example(0, (1, 1), [2]), example(0, (1, 2), [2])], PROCESSOR, FAMILY, SHARED))
        == 2
    )


def test_one_question_with_two_answers_repeats_the_token_before_them() -> None:
    rows = [example(0, (1, 1), 5, [6, 1]), example(0, (1, 1), 5, [7, 1])]
    (sequence,) = lay_out(rows, PROCESSOR, FAMILY, SHARED)
    assert sequence.input_ids == [0, IMAGE, IMAGE, 5, 6, 1, 5, 7, 1]
    assert sequence.weights == [0, 0, 0, 0, 1, 1, 0, 1, 1]
    assert sequence.positions == [0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert_learns_the_same(rows, [sequence])


def test_answers_right_behind_a_picture_repeat_the_picture_whole() -> None:
    rows = [example(0, (1, 1), [6]), example(0, (1, 1), [7])]
    sequences = lay_out(rows, PROCESSOR, FAMILY, SHARED)
    assert_learns_the_same(rows, sequences)
    assert [len(sequence.views) for sequence in sequences] == [2]


def test_a_learnt_token_of_several_rows_counts_for_each_that_learns_it() -> None:
    rows = [example(0, (1, 1), 5, [6], 1, [2])] * 2 + [example(0, (1, 1), 5, 6, 3, [2])]
    (sequence,) = lay_out(rows, PROCESSOR, FAMILY, SHARED)
    assert sequence.input_ids == [0, IMAGE, IMAGE, 5, 6, 1, 2, 3, 2]
    assert sequence.weights == [0, 0, 0, 0, 2, 0, 2, 0, 1]
    assert sequence.num_rows == 3


def test_a_row_that_goes_on_from_another_needs_no_tail() -> None:
    rows = [example(0, (1, 1), 5, [6]), example(0, (1, 1), 5, [6], 7, [8])]
    (sequence,) = lay_out(rows, PROCESSOR, FAMILY, SHARED)
    assert sequence.input_ids == rows[1].input_ids
    assert sequence.weights == [0, 0, 0, 0, 2, 0, 1]


def test_a_packed_row_does_not_learn_its_first_token() -> None:
    rows = [example([1, 2]), example([1, 2])]
    (sequence,) = lay_out(rows, PROCESSOR, FAMILY, Layouting(packing=True, max_tokens=8))
    assert sequence.weights == [0, 1, 0, 1]
    assert sequence.positions == [0, 1, 0, 1]


def test_without_layouting_rows_are_sequences() -> None:
    rows = random_rows(3)
    sequences = lay_out(rows, PROCESSOR, FAMILY, Layouting())
    assert [each.input_ids for each in sequences] == [row.input_ids for row in rows]


@pytest.mark.parametrize("seed", range(40))
def test_packed_sequences_hold_no_more_padding_than_two_percent(seed: int) -> None:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 64, draw.integers(1, 40)).tolist()
    rows = [example(*([1] * length)) for length in lengths]
    sequences = lay_out(rows, PROCESSOR, FAMILY, Layouting(packing=True, max_tokens=64))
    sizes = [len(sequence.input_ids) for sequence in sequences]
    assert sum(sizes) == sum(lengths)
    assert max(sizes) * len(sizes) - sum(sizes) <= 0.02 * sum(sizes)


def test_rows_are_packed_into_about_the_longest_that_a_row_may_be() -> None:
    rows = [example(*([1] * 8)) for _ in range(16)]
    sequences = lay_out(rows, PROCESSOR, FAMILY, Layouting(packing=True, max_tokens=32))
    assert [len(sequence.input_ids) for sequence in sequences] == [32] * 4
    one = replace(Layouting(packing=True, max_tokens=32), one_sequence=True)
    assert len(lay_out(rows, PROCESSOR, FAMILY, one)) == 1
