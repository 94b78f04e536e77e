from pathlib import Path
from typing import Any

import pytest

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.examples import Encoder, OverlongError, RowCounts
from finetune.data.images import ImageAccess
from finetune.data.shorten import without_oldest_exchanges
from finetune.data.sources import Row
from finetune.families import FAMILIES
from finetune.recipe import ImagesSection
from tests.conftest import noise


def user(*parts: str) -> Message:
    content = (Image(part) if part.endswith(".png") else Text(part) for part in parts)
    return Message("user", tuple(content))


def answer(text: str, *, train: bool = True) -> Message:
    return Message("assistant", (Text(text),), train)


SYSTEM = Message("system", (Text("Be brief."),))


def texts(conversation: Conversation) -> list[str]:
    return [message.text for message in conversation.messages]


def test_exchanges_go_oldest_first_and_the_system_turn_and_last_exchange_stay() -> None:
    conversation = Conversation(
        (SYSTEM, user("q1"), answer("a1"), user("q2"), user("q2b"), answer("a2"), user("q3"),
         answer("a3"))
    )  # fmt: skip
    shorter = list(without_oldest_exchanges(conversation))
    assert [texts(each.conversation) for each in shorter] == [
        ["Be brief.", "q2", "q2b", "a2", "q3", "a3"],
        ["Be brief.", "q3", "a3"],
    ]
    assert shorter[1].change == "2 of 3 exchanges dropped"


def test_pictures_go_with_their_exchange_where_later_ones_have_their_own() -> None:
    conversation = Conversation(
        (user("a.png", "q1"), answer("a1"), user("b.png", "q2"), answer("a2"))
    )
    (shorter,) = without_oldest_exchanges(conversation)
    assert [image.source for image in shorter.conversation.images()] == ["b.png"]
    assert shorter.image_numbers == (1,)


def test_pictures_that_the_rest_is_about_move_to_the_first_turn_left() -> None:
    conversation = Conversation(
        (user("a.png", "b.png", "q1"), answer("a1"), user("q2"), answer(""))
    )
    (shorter,) = without_oldest_exchanges(conversation)
    first = shorter.conversation.messages[0]
    assert first.content == (Image("a.png"), Image("b.png"), Text("q2"))
    assert shorter.image_numbers == (0, 1)


def test_a_follow_up_question_keeps_its_picture_though_a_later_turn_shows_another() -> None:
    conversation = Conversation(
        (user("a.png", "q1"), answer("a1"), user("its colour?"), answer("black"),
         user("b.png", "and this?"), answer("a dog"))
    )  # fmt: skip
    one, two = without_oldest_exchanges(conversation)
    assert one.conversation.messages[0].content == (Image("a.png"), Text("its colour?"))
    assert one.image_numbers == (0, 1)
    assert [image.source for image in two.conversation.images()] == ["b.png"]
    assert two.image_numbers == (1,)


def test_a_row_is_not_shortened_to_one_that_teaches_nothing() -> None:
    conversation = Conversation((user("q1"), answer("a1"), user("q2"), answer("a2", train=False)))
    assert list(without_oldest_exchanges(conversation)) == []


@pytest.fixture
def make_encoder(nano_processor: Any) -> Any:
    def make(max_tokens: int, overlong: Any, split: Any = "always") -> Encoder:
        images = ImagesSection(split=split, longest_edge_px=56, shortest_edge_px=28)
        return Encoder(nano_processor, FAMILIES["idefics2"], images, max_tokens, overlong)

    return make


@pytest.fixture
def row(tmp_path: Path) -> Row:
    """A small and a large picture in two exchanges; two views' worth of text besides."""
    noise(40, 40).save(tmp_path / "small.png")
    noise(80, 60).save(tmp_path / "large.png")
    messages = (user("large.png", "q1"), answer("a1"), user("small.png", "q2"), answer("a2"))
    return Row("rows.jsonl:1", Conversation(messages), ImageAccess(tmp_path))


def counted(encoder: Encoder, row: Row) -> RowCounts:
    (counts,) = encoder.count_many([row])
    assert isinstance(counts, RowCounts), counts
    return counts


def test_a_row_that_fits_stays_as_it_is(make_encoder: Any, row: Row) -> None:
    whole = counted(make_encoder(10_000, "stop"), row)
    for overlong in ("drop_turns", "fewer_views"):
        encoder = make_encoder(whole.num_tokens, overlong)
        assert counted(encoder, row) == whole
        assert whole.change == ""


def test_the_smallest_picture_is_unsplit_first(make_encoder: Any, row: Row) -> None:
    whole = counted(make_encoder(10_000, "stop"), row)
    encoder = make_encoder(whole.num_tokens - 1, "fewer_views")
    counts = counted(encoder, row)
    assert (counts.num_images, counts.num_views) == (2, 6)
    assert counts.change == "1 of 2 split pictures shown in fewer views"
    example, fitted = encoder.encode_fitted(row)
    assert [len(plan.views) for plan in fitted.plans] == [5, 1]
    assert (len(example.input_ids), len(example.views)) == (counts.num_tokens, 6)


def test_a_dropped_exchange_takes_its_pictures_out_of_the_example(
    make_encoder: Any, row: Row
) -> None:
    whole = counted(make_encoder(10_000, "stop"), row)
    encoder = make_encoder(whole.num_tokens - 1, "drop_turns")
    example, fitted = encoder.encode_fitted(row)
    assert texts(fitted.conversation) == ["q2", "a2"]
    assert list(fitted.image_numbers) == [1]
    alone = Row(row.where, fitted.conversation, row.image_access)
    expected = make_encoder(10_000, "stop").encode(alone)
    assert example.input_ids == expected.input_ids
    assert all((a == b).all() for a, b in zip(example.views, expected.views, strict=True))
    prompt = encoder.encode_prompt(row)
    expected = make_encoder(10_000, "stop").encode_prompt(alone)
    assert prompt.input_ids == expected.input_ids
    assert all((a == b).all() for a, b in zip(prompt.views, expected.views, strict=True))


def test_what_is_learnt_never_loses_its_end(make_encoder: Any, row: Row) -> None:
    """At every limit a row is whole exchanges, or refused: no answer is ever cut."""
    whole = counted(make_encoder(10_000, "stop"), row).num_tokens
    end = make_encoder(1, "stop").processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    kinds = set()
    for overlong in ("drop_turns", "fewer_views"):
        for limit in range(1, whole + 1, 7):
            encoder = make_encoder(limit, overlong)
            try:
                example = encoder.encode(row)
            except OverlongError:
                kinds.add("refused")
                continue
            kinds.add(overlong)
            assert len(example.input_ids) <= limit
            last = max(k for k, learnt in enumerate(example.loss_mask) if learnt)
            assert example.input_ids[last] == end
            image_tokens = example.input_ids.count(encoder.processor.image_token_id)
            assert image_tokens == len(example.views) * encoder.processor.image_seq_len
    assert kinds == {"refused", "drop_turns", "fewer_views"}


@pytest.mark.parametrize(
    ("overlong", "words"),
    [
        ("stop", "raise data.max_tokens, or set data.overlong: skip, drop_turns or fewer_views"),
        ("skip", "raise data.max_tokens, or set data.overlong: drop_turns or fewer_views"),
        (
            "drop_turns",
            "even its last exchange alone; raise data.max_tokens, or set data.overlong: skip",
        ),
        ("fewer_views", "even with every picture in one view; raise data.max_tokens"),
    ],
)
def test_a_row_that_cannot_fit_says_what_to_do(
    make_encoder: Any, row: Row, overlong: str, words: str
) -> None:
    (error,) = make_encoder(5, overlong).count_many([row])
    assert isinstance(error, OverlongError)
    assert words in str(error)
    with pytest.raises(OverlongError):
        make_encoder(5, overlong).encode(row)
