"""ms-swift's shapes: messages with images beside them, and query and response.

    {"messages": [{"role": "user", "content": "<image>What is this?"},
                  {"role": "assistant", "content": "A kitten."}], "images": ["cat.png"]}
    {"query": "What is this?", "response": "A kitten.", "history": [["Hello", "Hi."]],
     "system": "", "images": "cat.png"}
    {"conversation": [{"human": "What is this?", "assistant": "A kitten."}], "images": ["cat.png"]}

Source: github.com/modelscope/ms-swift, docs/source_en/Customization/Custom-dataset.md. Images that
have no placeholder are put before the first user turn's text, as its templates do. LLaMA-Factory's
shapes are taken too, as they are there. `"loss": false` on an answer leaves it unlearnt.
"""

from typing import Any

from data_formats.cells import as_object
from data_formats.chat import Conversation, FormatError, images_of
from data_formats.llama_factory import are_plain_messages, parse_any_shape
from data_formats.placeholders import Turn, place_images
from data_formats.turns import parse_pairs, refuse_more_than_images, with_system
from data_formats.wording import must_be


def fits(row: Any) -> bool:
    """Whether a row has messages of plain text, a query and response, or human and assistant pairs;
    the other shapes it takes are known by the names of those who made them.
    """
    if not isinstance(row, dict):
        return False
    if row.get("messages"):
        return are_plain_messages(row["messages"])
    if isinstance(row.get("query"), str) and isinstance(row.get("response"), str):
        return True
    pairs = row.get("conversation")
    return isinstance(pairs, list) and bool(pairs) and all(_is_pair(pair) for pair in pairs)


def parse(row: Any) -> Conversation:
    """A conversation; images without a placeholder come first. Raises `FormatError`."""
    row = as_object(row)
    refuse_more_than_images(row)
    if row.get("query") is not None and row.get("messages") is None:
        turns = with_system(row, _query(row))
    elif row.get("conversation") is not None and row.get("messages") is None:
        turns = with_system(row, _pairs(row["conversation"]))
    else:
        turns = parse_any_shape(row)
    return place_images(turns, images_of(row), put_missing_first=True)


def _query(row: dict[Any, Any]) -> list[Turn]:
    for key in ("query", "response"):
        if not isinstance(row.get(key), str):
            raise FormatError(must_be(repr(key), "a string", row.get(key)))
    history = parse_pairs(row.get("history"), "history")
    return [*history, Turn("user", row["query"]), Turn("assistant", row["response"])]


def _pairs(value: Any) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise FormatError(must_be("'conversation'", "a list of turns", value))
    turns = []
    for i, pair in enumerate(value):
        if not _is_pair(pair):
            raise FormatError(
                f"conversation[{i}] must be an object with 'human' and 'assistant', each a string; "
                "write it so, or leave the row out"
            )
        turns += [Turn("user", pair["human"]), Turn("assistant", pair["assistant"])]
    return turns


def _is_pair(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("human", "assistant")
    )
