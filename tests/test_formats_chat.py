"""The native format: what it takes, and what it says of anything else."""

import json
from typing import Any

import pytest

from data_formats.chat import (
    Conversation,
    FormatError,
    Image,
    Message,
    Text,
    dump_chat,
    parse_chat,
)

USER = {"role": "user", "content": "What?"}
ANSWER = {"role": "assistant", "content": "This."}
HOLE = {"type": "image"}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "expected an object with 'messages', found an empty list"),
        ({}, r"'messages' is missing \(found nothing\)"),
        ({"conversations": [], "id": 1}, "'messages' is missing .found 'conversations', 'id'."),
        ({"mesages": []}, "is 'mesages' meant to be 'messages'?"),
        ({"messages": []}, "at least one message, found an empty list"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": ["hello"]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "gpt", "content": "x"}]}, r"messages\[0\]\.role is 'gpt'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"messages\[0\]\.role is a list"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "'images' stands beside 'messages'"),
        ({"messages": [USER | {"image": "a.png"}, ANSWER]}, "unknown key 'image'; expected role"),
        ({"messages": [USER, ANSWER | {"trian": False}]}, "'trian'; did you mean 'train'"),
        ({"messages": [user({"type": "text", "text": "x", "image": "a"})]}, "unknown key 'image'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content is missing"),
        ({"messages": [USER, ANSWER | {"train": "no"}]}, r"messages\[1\]\.train must be true or"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be a string or a list"),
        ({"messages": [user(3)]}, r"content\[0\] must be a text or image"),
        (
            {"messages": [user({"type": "video"})]},
            "expected 'text' or 'image'; write one, or leave",
        ),
        ({"messages": [user({"type": "image_url"})]}, "set format: openai for such parts"),
        ({"messages": [user({"type": "text"})]}, "text must be a string"),
        ({"messages": [user(HOLE)]}, r"content\[0\]\.image must be a path.*found nothing"),
        ({"messages": [user({"type": "image", "image": ""})]}, "found an empty string"),
        ({"messages": [user({"type": "image", "image": {"path": 3}})]}, "found a number under"),
        ({"messages": [{"role": "system", "content": ""}]}, "nothing but an empty system turn"),
        ({"messages": [USER | {"references": ["x"]}, ANSWER]}, "given for a user turn"),
        ({"messages": [USER, ANSWER | {"references": "x"}]}, "must be a list of strings, found a"),
        ({"messages": [USER, ANSWER | {"references": ["x", 3]}]}, "must be a list of strings"),
        (
            {"messages": [user(HOLE, HOLE), ANSWER], "images": ["a.png"]},
            "2 image parts without an image but 1 in 'images'",
        ),
        (
            {"messages": [user(HOLE), ANSWER], "images": ["a.png", "b.png"]},
            "1 image parts without an image but 2 in 'images'; write one part",
        ),
        (
            {"messages": [user({"type": "image", "image": "a.png"})], "images": ["a.png"]},
            "'images' stands beside 'messages'",
        ),
    ],
)
def test_a_row_of_another_shape_says_where_and_what_was_expected(row: object, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_chat(row)


def test_a_row_reads_back_as_it_was_written() -> None:
    row = {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
            user({"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}),
            {"role": "assistant", "content": [{"type": "text", "text": "That."}], "train": False},
            user({"type": "text", "text": "Sure?"}),
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "Yes."}],
                "references": ["Yes.", "Yes", "Yes"],
            },
        ]
    }
    assert dump_chat(parse_chat(json.loads(json.dumps(row)))) == row


def test_plain_string_content_is_one_text_part() -> None:
    conversation = parse_chat({"messages": [USER, ANSWER]})
    assert [message.text for message in conversation.messages] == ["What?", "This."]


def test_empty_columns_of_a_table_are_no_unknown_keys() -> None:
    part = {"type": "text", "text": "What?", "image": None}
    message = {"role": "user", "content": [part], "train": None, "references": None}
    conversation = parse_chat({"messages": [message, ANSWER], "id": 7, "images": []})
    assert conversation.messages[0] == Message("user", (Text("What?"),))


def test_parts_without_an_image_take_those_beside_the_messages_in_order() -> None:
    own = {"type": "image", "image": "own.png"}
    row = {"messages": [user(HOLE, own), ANSWER, user(HOLE), ANSWER], "images": ["a.png", "b.png"]}
    assert [image.source for image in parse_chat(row).images()] == ["a.png", "own.png", "b.png"]


def test_the_last_answer_counts_as_right_unless_it_says_what_does() -> None:
    answer = Message("assistant", (Text(" This. "),))
    voted = Message("assistant", (Text("This."),), references=("This.", "That.", "This."))
    asked = Message("user", (Image("a.png"),))
    assert Conversation((asked, voted, asked, answer)).references() == ("This.",)
    assert Conversation((asked, answer, asked, voted)).references() == ("This.", "That.", "This.")


@pytest.mark.parametrize("key", ["image", "path", "url", "base64"])
def test_a_picture_is_named_as_in_the_templates_of_transformers(key: str) -> None:
    parts = [{"type": "image", key: "a.png"}, {"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]}
    assert [image.source for image in parse_chat(row).images()] == ["a.png"]
    parts[0]["image" if key != "image" else "path"] = "b.png"
    with pytest.raises(FormatError, match="in several ways; keep one of"):
        parse_chat(row)
