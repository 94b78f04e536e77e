"""LLaMA-Factory's three shapes: messages, ShareGPT's conversations, and Alpaca's columns.

    {"messages": [{"role": "user", "content": "<image>Who are they?"},
                  {"role": "assistant", "content": "Kane and Goretzka."}], "images": ["1.jpg"]}
    {"conversations": [{"from": "human", "value": "<image>Who are they?"}, ...], "images": [...]}
    {"instruction": "<image>Who are they?", "input": "", "output": "Kane and Goretzka.",
     "history": [["Hello", "Hi."]], "system": "", "images": ["1.jpg"]}

Source: github.com/hiyouga/LLaMA-Factory, data/README.md and data/mllm_demo.json. An instruction and
its input are joined by a line break; the answers of the history are learnt, as they are there.
"""

from typing import Any

from data_formats.cells import as_object
from data_formats.chat import Conversation, FormatError, images_of
from data_formats.placeholders import PLACEHOLDER, Turn, place_images
from data_formats.turns import (
    ANY_NAME,
    FROM_VALUE,
    ROLE_CONTENT,
    USER_ASSISTANT,
    are_turns,
    parse_pairs,
    parse_turns,
    refuse_more_than_images,
    with_system,
)
from data_formats.wording import missing, must_be

# of another format, or a misspelt one: read by the formats that refuse what they do not know
_TURN_KEYS = ("role", "content", "loss", "weight")


def fits(row: Any) -> bool:
    """Whether a row is in one of the three shapes; messages with images must have a placeholder,
    since without any they are ms-swift's.
    """
    if not isinstance(row, dict) or (row.get("image") and not row.get("images")):
        return False
    if row.get("messages"):
        return are_plain_messages(row["messages"]) and (
            not row.get("images") or any(PLACEHOLDER in m["content"] for m in row["messages"])
        )
    if row.get("conversations"):
        return are_turns(row["conversations"], FROM_VALUE, ANY_NAME)
    return isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str)


def parse(row: Any) -> Conversation:
    """A conversation, its images taken by its placeholders. Raises `FormatError`."""
    row = as_object(row)
    refuse_more_than_images(row)
    return place_images(parse_any_shape(row), images_of(row))


def parse_any_shape(row: dict[Any, Any]) -> list[Turn]:
    """The turns of whichever of the three shapes a row has. Raises `FormatError`."""
    if row.get("messages") is not None:
        turns = parse_turns(row["messages"], "messages", ROLE_CONTENT, USER_ASSISTANT)
    elif row.get("conversations") is not None:
        turns = parse_turns(row["conversations"], "conversations", FROM_VALUE, ANY_NAME)
    elif row.get("instruction") is not None:
        turns = _alpaca(row)
    else:
        raise FormatError(
            missing(
                row,
                "messages",
                "expected messages, conversations, or instruction and output",
            )
        )
    return with_system(row, turns)


def are_plain_messages(value: Any) -> bool:
    """Whether a value is a list of role and content strings, without another format's keys."""
    return are_turns(value, ROLE_CONTENT, USER_ASSISTANT) and all(
        message[key] is None or key in _TURN_KEYS for message in value for key in message
    )


def _alpaca(row: dict[Any, Any]) -> list[Turn]:
    texts = {}
    for key in ("instruction", "input", "output"):
        texts[key] = row.get(key) if row.get(key) is not None or key == "output" else ""
        if not isinstance(texts[key], str):
            raise FormatError(must_be(repr(key), "a string", texts[key]))
    question = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    history = parse_pairs(row.get("history"), "history")
    return [*history, Turn("user", question), Turn("assistant", texts["output"])]
