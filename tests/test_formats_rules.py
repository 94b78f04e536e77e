"""What every conversation must hold to, in every format that can write it; and where images go."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_formats.chat import Conversation, FormatError, Image, Message, Text
from data_formats.formats import converter
from data_formats.placeholders import Turn, place_images, with_images
from data_formats.rules import refuse_odd_turns

Turns = list[tuple[str, str]]  # role and text, in which <image> stands for the next image


def parts(text: str, images: list[str], of_openai: bool = False) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for piece in re.split("(<image>)", text):
        if piece != "<image>":
            # what stands next to an image is written here as the other formats are read
            content += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
        elif of_openai:
            content.append({"type": "image_url", "image_url": {"url": images.pop(0)}})
        else:
            content.append({"type": "image", "image": images.pop(0)})
    return content or [{"type": "text", "text": text}]


def chat(turns: Turns, images: list[str]) -> dict[str, Any]:
    left = list(images)
    return {"messages": [{"role": r, "content": parts(t, left)} for r, t in turns]}


def openai(turns: Turns, images: list[str]) -> dict[str, Any]:
    left = list(images)
    return {"messages": [{"role": r, "content": parts(t, left, True)} for r, t in turns]}


def messages(turns: Turns, images: list[str]) -> dict[str, Any]:
    return {"messages": [{"role": r, "content": t} for r, t in turns], "images": images}


def conversations(turns: Turns, images: list[str]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"conversations": [{"from": names[r], "value": t} for r, t in turns], "images": images}


def conversation(turns: Turns, images: list[str]) -> dict[str, Any]:
    return {"conversation": [{"role": r, "content": t} for r, t in turns], "images": images}


def llava(turns: Turns, images: list[str]) -> dict[str, Any]:
    row = conversations(turns, images)
    return row | {"image": row.pop("images")}


def cauldron(turns: Turns, images: list[str]) -> dict[str, Any]:
    texts = [dict(pair) for pair in zip(turns[::2], turns[1::2], strict=True)]
    return {"texts": texts, "images": images}


WRITERS: list[tuple[str, Callable[[Turns, list[str]], dict[str, Any]]]] = [
    ("chat", chat),
    ("openai", openai),
    ("sharegpt", conversations),
    ("llama-factory", messages),
    ("llama-factory", conversations),
    ("ms-swift", messages),
    ("ms-swift", conversations),
    ("mantis", conversation),
    ("mantis", conversations),
    ("llava", llava),
    ("cauldron", cauldron),
]
WITHOUT_SYSTEM = ("llava", "cauldron")
BY_PLACEHOLDER = [(name, write) for name, write in WRITERS if name not in ("chat", "openai")]
IDS = [f"{name}, {write.__name__}" for name, write in WRITERS]

ASKED, SAID = ("user", "What?"), ("assistant", "That.")
ODD: list[tuple[str, Turns, list[str], str]] = [
    (
        "an image in an assistant turn",
        [("user", "Draw."), ("assistant", "<image>Done.")],
        ["a.png"],
        r"turn 2 \(assistant\) holds an image, which the model cannot learn to write",
    ),
    ("an empty user turn", [("user", " \n"), SAID], [], r"turn 1 \(user\) is empty; give it text"),
    ("an empty answer", [ASKED, ("assistant", "")], [], r"turn 2 \(assistant\) is empty"),
    (
        "a system turn in the middle",
        [ASKED, ("system", "Be short."), SAID],
        [],
        "turn 2 is a system turn after the first user turn; move it to the start",
    ),
    ("an answer to nothing", [SAID, ASKED, SAID], [], "comes first, so nothing was asked"),
    ("no answer", [("system", "Be short."), ASKED], [], "no assistant turn to learn from; add one"),
    ("a NUL", [("user", "a\0b"), SAID], [], r"turn 1 \(user\) holds a NUL character; remove it"),
    (
        "half a character",
        [ASKED, ("assistant", "\ud83d")],
        [],
        r"turn 2 \(assistant\) holds half of a character .*\\ud83d\); write it whole",
    ),
    ("a NUL in a path", [("user", "<image>What?"), SAID], ["a\0.png"], "holds a NUL character"),
]


def can_write(name: str, turns: Turns) -> bool:
    roles = [role for role, _ in turns]
    if name == "cauldron":
        return roles == ["user", "assistant"] * (len(turns) // 2)
    return name not in WITHOUT_SYSTEM or "system" not in roles


def read(name: str, row: Any) -> Conversation:
    parsed = converter(name)(json.loads(json.dumps(row)))
    refuse_odd_turns(parsed)
    return parsed


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=IDS)
@pytest.mark.parametrize(("_fault", "turns", "images", "message"), ODD, ids=[row[0] for row in ODD])
def test_odd_turns_are_refused_in_every_format(
    name: str, write: Any, _fault: str, turns: Turns, images: list[str], message: str
) -> None:
    if can_write(name, turns):
        with pytest.raises(FormatError, match=message):
            read(name, write(turns, images))


def test_every_odd_row_can_be_written_in_six_formats_or_more() -> None:
    """So that the test above cannot pass by writing nothing."""
    for _, turns, _, _ in ODD:
        assert len({name for name, _ in WRITERS if can_write(name, turns)}) >= 6


@pytest.mark.parametrize(("name", "write"), BY_PLACEHOLDER)
def test_placeholders_and_images_must_be_equally_many(name: str, write: Any) -> None:
    turns = [("user", "<image>What, and <image>?"), ("assistant", "<image>")]
    with pytest.raises(FormatError, match="3 <image> placeholders but 2 images; write <image>"):
        read(name, write(turns, ["a.png", "b.png"]))
    with pytest.raises(FormatError, match="1 <image> placeholder but no images"):
        read(name, write([("user", "<image>What?"), SAID], []))
    missing = write([ASKED, SAID], ["a.png"])
    if name in ("ms-swift", "cauldron"):
        assert read(name, missing).messages[0].content == (Image("a.png"), Text("What?"))
    else:
        with pytest.raises(FormatError, match=r"no <image> placeholders but 1 image; .*ms-swift"):
            read(name, missing)


def test_images_without_a_placeholder_come_after_the_system_turn() -> None:
    turns = [("system", "Be short."), ("user", "What, and <image>?"), SAID]
    parsed = read("ms-swift", messages(turns, ["a.png", "b.png"]))
    images = (Image("a.png"), Text("What, and"), Image("b.png"), Text("?"))
    assert parsed.messages[:2] == (
        Message("system", (Text("Be short."),)),
        Message("user", images),
    )


def test_a_cauldron_row_is_placed_as_its_texts_say_or_not_at_all() -> None:
    turns = [ASKED, SAID, ("user", "And <image>?"), SAID]
    assert read("cauldron", cauldron(turns, ["a.png"])).messages[2].content[1] == Image("a.png")
    with pytest.raises(FormatError, match="1 <image> placeholder but 2 images"):
        read("cauldron", cauldron(turns, ["a.png", "b.png"]))


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=IDS)
def test_two_user_turns_in_a_row_and_two_answers_are_kept(name: str, write: Any) -> None:
    turns = [("user", "<image>"), ASKED, SAID, ("assistant", "Or this.")]
    if can_write(name, turns):
        assert read(name, write(turns, ["a.png"])) == Conversation(
            (
                Message("user", (Image("a.png"),)),
                Message("user", (Text("What?"),)),
                Message("assistant", (Text("That."),)),
                Message("assistant", (Text("Or this."),)),
            )
        )


@pytest.mark.parametrize(
    ("name", "key", "unlearnt", "learnt"),
    [
        ("chat", "train", False, True),
        ("openai", "weight", 0, 1),
        ("ms-swift", "loss", False, True),
        ("ms-swift", "loss", 0, 1),
        ("llama-factory", "loss", 0.0, 1.0),
        ("sharegpt", "weight", 0, None),
    ],
)
def test_an_answer_may_be_context_alone_and_then_hold_an_image(
    name: str, key: str, unlearnt: Any, learnt: Any
) -> None:
    write = dict(WRITERS)[name]
    row = write([("assistant", "Hello <image>"), ASKED, SAID], ["a.png"])
    turns = next(row[column] for column in ("messages", "conversations") if column in row)
    turns[0][key] = unlearnt
    turns[2][key] = learnt
    parsed = read(name, row)
    assert [message.train for message in parsed.messages] == [False, True, True]
    del turns[0][key]
    with pytest.raises(FormatError, match="comes first, so nothing was asked"):
        read(name, row)


@pytest.mark.parametrize("name", ["sharegpt", "llama-factory", "ms-swift", "mantis"])
def test_a_system_column_comes_first_and_never_beside_a_system_turn(name: str) -> None:
    write = dict(WRITERS)[name]
    row = write([ASKED, SAID], []) | {"system": "Be short."}
    assert read(name, row).messages[0] == Message("system", (Text("Be short."),))
    assert len(read(name, row | {"system": " "}).messages) == 2
    both = write([("system", "Be long."), ASKED, SAID], []) | {"system": "Be short."}
    with pytest.raises(FormatError, match="both a column 'system' and a system turn; keep one"):
        read(name, both)


def test_a_learnt_image_is_refused_wherever_the_text_is() -> None:
    drawn = Message("assistant", (Text("Done."), Image("a.png")))
    with pytest.raises(FormatError, match="holds an image"):
        refuse_odd_turns(Conversation((Message("user", (Text("Draw."),)), drawn)))


def test_references_are_held_to_the_rules_of_text() -> None:
    asked = Message("user", (Text("What?"),))
    answer = Message("assistant", (Text("That."),), True, ("That.", "\udc00"))
    with pytest.raises(FormatError, match="half of a character"):
        refuse_odd_turns(Conversation((asked, answer)))


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<image>\nWhat?", (Image("0"), Text("What?"))),
        ("  What? <image> ", (Text("  What?"), Image("0"))),
        ("<image> <image>\n", (Image("0"), Image("1"))),
        ("a <image> b <image> c ", (Text("a"), Image("0"), Text("b"), Image("1"), Text("c "))),
        (" What? ", (Text(" What? "),)),
    ],
)
def test_white_space_beside_an_image_is_left_to_the_template(text: str, content: Any) -> None:
    images = [Image(str(i)) for i in range(text.count("<image>"))]
    assert with_images(text, images) == content
    assert place_images([Turn("user", text)], images).messages[0].content == content


pieces = st.sampled_from(["What", "That ", " this?", "\n", "<image>", "<image>", "é"])
a_turn = st.tuples(
    st.sampled_from(["user", "assistant"]),
    st.lists(pieces, min_size=1, max_size=5).map("".join).map(str.strip),
).filter(lambda turn: turn[1])


@settings(max_examples=200, deadline=None)
@given(st.lists(a_turn, max_size=5))
def test_one_conversation_reads_the_same_from_every_format(turns: Turns) -> None:
    turns = [("user", "Hello"), SAID, *turns]
    turns = [(r, t.replace("<image>", "[]") if r == "assistant" else t) for r, t in turns]
    images = [f"{i}.png" for i in range(sum(text.count("<image>") for _, text in turns))]
    readings = [
        read(name, write(turns, images)) for name, write in WRITERS if can_write(name, turns)
    ]
    assert all(reading == readings[0] for reading in readings)
    assert [image.source for image in readings[0].images()] == images
