from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.augment import Augmentation, Draws, plan_enlarged, shuffle_exchanges
from finetune.data.collate import Collator
from finetune.data.examples import Encoder, Example
from finetune.data.images import ImageAccess
from finetune.data.sampling import EpochSampler
from finetune.data.sources import Row
from finetune.errors import DataError
from finetune.families import FAMILIES
from finetune.families.llava import LARGEST_SQUARE_PX
from finetune.recipe import ImagesSection
from tests.conftest import noise

SYSTEM = Message("system", (Text("Be brief."),))
NUM_SEEDS = 40


def user(*parts: str) -> Message:
    content = (Image(part) if part.endswith(".png") else Text(part) for part in parts)
    return Message("user", tuple(content))


def answer(text: str, *, train: bool = True) -> Message:
    return Message("assistant", (Text(text),), train)


def in_letters(conversation: Conversation) -> str:
    """`a.png` as a, turns one after the other."""
    parts = [part for message in conversation.messages for part in message.content]
    return " ".join(
        part.text if isinstance(part, Text) else str(part.source).removesuffix(".png")
        for part in parts
    )


def orders(*messages: Message) -> set[str]:
    """Every order that some seed gives; image numbers are those of the pictures."""
    conversation = Conversation(messages)
    pictures = list(conversation.images())
    found = set()
    for seed in range(NUM_SEEDS):
        shuffled, numbers = shuffle_exchanges(conversation, np.random.default_rng(seed))
        assert [pictures[i] for i in numbers] == list(shuffled.images())
        found.add(in_letters(shuffled))
    return found


def test_whole_exchanges_change_places_and_system_turns_stay_first() -> None:
    found = orders(
        SYSTEM, user("q1"), answer("a1"), user("q2"), user("q2b"), answer("a2"), user("q3"),
        answer("a3"),
    )  # fmt: skip
    exchanges = ("q1 a1", "q2 q2b a2", "q3 a3")
    places = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    assert found == {"Be brief. " + " ".join(exchanges[i] for i in order) for order in places}


def test_the_pictures_that_open_a_row_move_to_whichever_exchange_comes_first() -> None:
    found = orders(user("A.png", "B.png", "q1"), answer("a1"), user("q2"), answer("a2"))
    assert found == {"A B q1 a1 q2 a2", "A B q2 a2 q1 a1"}


@pytest.mark.parametrize(
    "opening",
    [
        (user("What is in", "A.png", "q1"),),
        (user("q1", "A.png"),),
        (user("A.png"), user("q1")),
        (user("A.png", "q0", "B.png", "q1"),),
    ],
)
def test_an_exchange_with_a_picture_in_its_words_stays_in_front_of_those_about_it(
    opening: tuple[Message, ...],
) -> None:
    found = orders(*opening, answer("a1"), user("q2"), answer("a2"), user("q3"), answer("a3"))
    first = in_letters(Conversation(opening))
    assert found == {f"{first} a1 q2 a2 q3 a3", f"{first} a1 q3 a3 q2 a2"}


def test_pictures_go_with_their_exchange_and_with_the_questions_that_follow_it() -> None:
    found = orders(
        user("A.png", "q1"), answer("a1"), user("B.png", "q2"), answer("a2"), user("q3"),
        answer("a3"),
    )  # fmt: skip
    about_b = ("B q2 a2 q3 a3", "B q3 a3 q2 a2")
    assert found == {f"A q1 a1 {b}" for b in about_b} | {f"{b} A q1 a1" for b in about_b}


def test_a_greeting_stays_first_and_a_question_without_an_answer_last() -> None:
    found = orders(
        answer("hello", train=False), user("q1"), answer("a1"), user("q2"), answer("a2"),
        user("q3"),
    )  # fmt: skip
    assert found == {"hello q1 a1 q2 a2 q3", "hello q2 a2 q1 a1 q3"}


def test_an_answer_that_is_not_learnt_is_not_learnt_in_another_place() -> None:
    conversation = Conversation((user("q1"), answer("a1", train=False), user("q2"), answer("a2")))
    for seed in range(NUM_SEEDS):
        shuffled, _ = shuffle_exchanges(conversation, np.random.default_rng(seed))
        assert {m.text: m.train for m in shuffled.messages if m.role == "assistant"} == {
            "a1": False,
            "a2": True,
        }


# Rows as they are encoded


@pytest.fixture
def make_encoder(nano_processor: Any) -> Callable[..., Encoder]:
    def make(max_tokens: int | None = None, overlong: Any = "stop", split: Any = "never") -> Any:
        images = ImagesSection(split=split, longest_edge_px=112, shortest_edge_px=28)
        return Encoder(nano_processor, FAMILIES["idefics2"], images, max_tokens, overlong)

    return make


@pytest.fixture
def row(tmp_path: Path) -> Row:
    """Three exchanges, one about a picture of its own; the first picture may grow, the second has
    the longest edge already.
    """
    noise(60, 40).save(tmp_path / "A.png")
    noise(130, 112, seed=1).save(tmp_path / "B.png")
    messages = (
        user("A.png", "q1"), answer("a1"), user("What else?"), answer("none"),
        user("B.png", "q3"), answer("a3"),
    )  # fmt: skip
    return Row("rows.jsonl:1", Conversation(messages), ImageAccess(tmp_path))


def as_drawn(seed: int, upscale: float = 1.0, *, shuffle: bool = False) -> Draws:
    return Augmentation(upscale, shuffle, seed).draws(0, 7)


def same(one: Example, other: Example) -> bool:
    """Whether the model sees and learns the same, to the byte."""
    return (one.input_ids, one.loss_mask) == (other.input_ids, other.loss_mask) and all(
        np.array_equal(a, b) for a, b in zip(one.views, other.views, strict=True)
    )


def test_a_row_for_which_nothing_is_drawn_is_encoded_as_without(
    make_encoder: Any, row: Row
) -> None:
    assert same(make_encoder().encode(row, as_drawn(0)), make_encoder().encode(row))


def test_a_shuffled_row_is_encoded_as_if_it_had_been_written_so(
    make_encoder: Any, row: Row
) -> None:
    encoder = make_encoder(split="always")
    own, seen = encoder.encode(row), []
    for seed in range(12):
        shuffled, _ = as_drawn(seed, shuffle=True).order(row.conversation)
        written = Row(row.where, shuffled, row.image_access)
        drawn = encoder.encode(row, as_drawn(seed, shuffle=True))
        assert same(drawn, encoder.encode(written))
        assert len(drawn.input_ids) == len(own.input_ids)
        seen.append(same(drawn, own))
    assert not all(seen)


def test_an_enlarged_picture_is_seen_as_if_its_file_were_larger(
    make_encoder: Any, row: Row, tmp_path: Path
) -> None:
    """The file enlarged beforehand with Pillow, and encoded as it is."""
    encoder = make_encoder()
    drawn = encoder.encode(row, as_drawn(3, 1.8))
    factor, _ = as_drawn(3, 1.8).factors(2)
    size = (round(60 * factor), round(40 * factor))
    assert size[0] > 60
    with PilImage.open(tmp_path / "A.png") as picture:
        resample = PilImage.Resampling(encoder.processor.image_processor.resample)
        larger = picture.resize(size, resample)
    expected = encoder.encode(row).views[1:]
    larger.save(tmp_path / "A.png")
    assert same(drawn, encoder.encode(row))
    assert drawn.views[0].shape == (3, size[1], size[0])
    assert np.array_equal(drawn.views[1], expected[0])  # at its longest edge before, and unblurred


def test_other_epochs_rows_and_seeds_have_other_draws_and_the_same_ones_the_same() -> None:
    augmentation = Augmentation(2.0, shuffle_turns=True, seed=5)
    factors = augmentation.draws(1, 3).factors(2)
    assert factors == augmentation.draws(1, 3).factors(2)
    assert all(1 <= factor <= 2 for factor in factors)
    others = [augmentation.draws(0, 3), augmentation.draws(1, 4)]
    others.append(Augmentation(2.0, shuffle_turns=True, seed=6).draws(1, 3))
    assert all(draws.factors(2) != factors for draws in others)


def test_a_picture_gets_more_views_only_where_the_row_has_room_for_them(
    make_encoder: Any, tmp_path: Path
) -> None:
    """`auto` splits above 112 pixels: a picture of 60, where it is doubled; one of 30 never is."""
    for name, width in (("A.png", 60), ("C.png", 30)):
        noise(width, 28).save(tmp_path / name)
    conversation = Conversation((user("A.png", "C.png", "q"), answer("a")))
    row = Row("rows.jsonl:1", conversation, ImageAccess(tmp_path))
    room, num_grown = make_encoder(split="auto"), 0
    limit = len(room.encode(row).input_ids)
    narrow = make_encoder(limit, split="auto")
    for seed in range(NUM_SEEDS):
        first, second = as_drawn(seed, 3).factors(2)
        with_room = room.encode(row, as_drawn(seed, 3))
        without = narrow.encode(row, as_drawn(seed, 3))
        grows = round(60 * first) > 112
        num_grown += grows
        assert len(with_room.views) == (6 if grows else 2)
        assert len(without.input_ids) == limit
        # only the picture that would be split stays as it is
        widths = [view.shape[2] for view in without.views]
        assert widths == [60 if grows else round(60 * first), round(30 * second)]
    assert 0 < num_grown < NUM_SEEDS


def test_a_row_that_fits_still_fits_whatever_is_drawn(make_encoder: Any, row: Row) -> None:
    """At every limit that some shortening meets, though the tokens of words change with place."""
    for overlong in ("drop_turns", "fewer_views"):
        for split in ("auto", "always"):
            for limit in range(20, len(make_encoder(split=split).encode(row).input_ids) + 3, 3):
                encoder = make_encoder(limit, overlong, split)
                if any(not hasattr(each, "num_tokens") for each in encoder.count_many([row])):
                    continue
                for seed in range(4):
                    drawn = encoder.encode(row, as_drawn(seed, 3, shuffle=True))
                    assert len(drawn.input_ids) <= limit


def test_a_shortened_row_is_not_enlarged(make_encoder: Any, row: Row) -> None:
    whole = len(make_encoder(split="always").encode(row).input_ids)
    encoder = make_encoder(whole - 1, "fewer_views", "always")
    example, fitted = encoder.encode_fitted(row, as_drawn(3, 3))
    assert fitted.change == "1 of 2 split pictures shown in fewer views"
    assert same(example, encoder.encode(row))


def test_an_order_that_the_template_refuses_leaves_the_row_as_it_was(
    make_encoder: Any, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder()
    own, render = encoder.encode(row), encoder.renderer.render

    def refusing(conversation: Conversation, plans: Any) -> Any:
        if conversation != row.conversation:
            raise DataError("the model's chat template refuses this order of turns")
        return render(conversation, plans)

    monkeypatch.setattr(encoder.renderer, "render", refusing)
    assert all(same(encoder.encode(row, as_drawn(s, shuffle=True)), own) for s in range(8))


# Families with views of one size


def plan_of(family: str, image_processor: Any, **images: Any) -> Callable[[int, int], Any]:
    section = ImagesSection(**images)
    plan_image = FAMILIES[family].plan_image
    return lambda width, height: plan_image(width, height, section, image_processor)


def test_pictures_of_one_view_of_one_size_stay_as_they_are() -> None:
    square = SimpleNamespace(size={"height": 336, "width": 336}, do_pad=False)
    padded = SimpleNamespace(size={"height": 336, "width": 336}, do_pad=True, image_mean=[0.5] * 3)
    for family, processor in (("idefics", square), ("llava", square), ("llava", padded)):
        plan = plan_of(family, processor)
        assert plan_enlarged(plan, (60, 40), plan(60, 40), 3.0) == plan(60, 40)


def test_a_picture_that_would_be_too_large_to_be_shown_stays_as_it_is() -> None:
    padded = SimpleNamespace(size={"height": 336, "width": 336}, do_pad=True, image_mean=[0.5] * 3)
    plan = plan_of("llava", padded)
    edge_px = LARGEST_SQUARE_PX - 1
    with pytest.raises(DataError):
        plan(2 * edge_px, 40)
    assert plan_enlarged(plan, (edge_px, 20), plan(edge_px, 20), 2.0) == plan(edge_px, 20)


def test_a_tiled_picture_is_brought_to_its_tiles_in_one_step() -> None:
    """Idefics3 shows every picture at its longest edge, Llama 3.2 on as few tiles as do."""
    tiles = SimpleNamespace(max_image_size={"longest_edge": 364})
    plan = plan_of("idefics3", tiles, split="always", longest_edge_px=1456)
    own = plan(600, 400)
    assert plan_enlarged(plan, (600, 400), own, 2.0) == own
    auto = plan_of("idefics3", tiles, split="auto", longest_edge_px=1456)
    assert len(auto(300, 200).views) == 1
    grown = plan_enlarged(auto, (300, 200), auto(300, 200), 2.0)
    assert (len(grown.views), grown.resizes) == (13, own.resizes)
    mllama = SimpleNamespace(size={"height": 560, "width": 560}, max_image_tiles=4)
    plan = plan_of("mllama", mllama)
    assert len(plan(500, 300).views) == 1
    grown = plan_enlarged(plan, (500, 300), plan(500, 300), 2.0)
    assert grown == plan(1000, 600)
    assert len(grown.views) == 4


# Which rows are changed


def test_training_rows_change_from_epoch_to_epoch_and_held_out_rows_never(
    encoder: Encoder, tmp_path: Path
) -> None:
    noise(60, 40).save(tmp_path / "A.png")
    turns = [(user("A.png", "q0") if i == 0 else user(f"q{i}"), answer(f"a{i}")) for i in range(6)]
    conversation = Conversation(tuple(turn for pair in turns for turn in pair))
    rows = [Row(f"rows.jsonl:{i}", conversation, ImageAccess(tmp_path)) for i in (1, 2)]
    sampler = EpochSampler([(1, 1.0)], seed=0)
    collator = Collator(
        encoder,
        rows,
        augmentation=Augmentation(2.0, shuffle_turns=True, seed=0),
        sampler=sampler,
        num_train_rows=1,
    )
    plain = Collator(encoder, rows)([{"row": 1}])
    trained = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        trained.append(collator([{"row": 0}]))
        held_out = collator([{"row": 1}])
        assert all(held_out[key].equal(plain[key]) for key in plain)
    assert not trained[0]["input_ids"].equal(trained[1]["input_ids"])
    assert trained[0]["pixel_values"].shape != trained[1]["pixel_values"].shape
    assert all(trained[0][key].equal(trained[2][key]) for key in plain)
