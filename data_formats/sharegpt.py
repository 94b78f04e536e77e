"""ShareGPT's conversations, with images beside them.

    {"images": ["a.png"], "conversations": [{"from": "human", "value": "<image>What is this?"},
                                            {"from": "gpt", "value": "A cat."}]}

Source: huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered (turns), and
huggingface.co/datasets/Lin-Chen/ShareGPT4V (with an image). The role names are those of the
conversations people have shared: human or user; gpt, assistant, chatgpt, bing or bard; system.
"""

from typing import Any

from data_formats.cells import as_object
from data_formats.chat import Conversation, FormatError, images_of
from data_formats.placeholders import place_images
from data_formats.turns import (
    ANY_NAME,
    FROM_VALUE,
    are_turns,
    parse_turns,
    refuse_more_than_images,
    with_system,
)
from data_formats.wording import missing


def fits(row: Any) -> bool:
    """Whether a row has turns of `from` and `value`."""
    return isinstance(row, dict) and any(
        are_turns(row.get(key), FROM_VALUE, ANY_NAME) for key in ("conversations", "conversation")
    )


def parse(row: Any) -> Conversation:
    """A conversation, its images taken by its placeholders. Raises `FormatError`."""
    row = as_object(row)
    refuse_more_than_images(row)
    key = "conversation" if row.get("conversation") else "conversations"
    if row.get(key) is None:
        raise FormatError(missing(row, key, "a sharegpt row has turns of 'from' and 'value'"))
    turns = parse_turns(row[key], key, FROM_VALUE, ANY_NAME)
    return place_images(with_system(row, turns), images_of(row))
