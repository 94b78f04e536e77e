"""Mantis-Instruct: several images, each placed by `<image>` in the text.

    {"id": "nlvr2_0", "images": [{"bytes": ..., "path": "a.jpg"}, {"bytes": ..., "path": "b.jpg"}],
     "conversation": [{"role": "user", "content": "<image> <image> Is there a dog in both?"},
                      {"role": "assistant", "content": "Yes"}], "source": "nlvr2"}

Source: huggingface.co/datasets/TIGER-Lab/Mantis-Instruct, and github.com/TIGER-AI-Lab/Mantis for
rows with `conversations` of from and value.
"""

from typing import Any

from data_formats.cells import as_object
from data_formats.chat import Conversation, FormatError, images_of
from data_formats.placeholders import place_images
from data_formats.turns import (
    ANY_NAME,
    FROM_VALUE,
    ROLE_CONTENT,
    are_turns,
    parse_turns,
    refuse_more_than_images,
    with_system,
)
from data_formats.wording import missing

_COLUMNS = ("conversation", "conversations")


def fits(row: Any) -> bool:
    """Whether a row has a conversation in either of its spellings, and images as a list."""
    return (
        isinstance(row, dict)
        and not row.get("image")
        and any(
            are_turns(row.get(column), keys, ANY_NAME)
            for column in _COLUMNS
            for keys in (ROLE_CONTENT, FROM_VALUE)
        )
    )


def parse(row: Any) -> Conversation:
    """A conversation, its images taken by its placeholders. Raises `FormatError`."""
    row = as_object(row)
    refuse_more_than_images(row)
    column = next((name for name in _COLUMNS if row.get(name)), None)
    if column is None:
        raise FormatError(missing(row, "conversation", "a mantis row has a list of turns"))
    value = row[column]
    first = value[0] if isinstance(value, list) else None
    spelling = FROM_VALUE if isinstance(first, dict) and "from" in first else ROLE_CONTENT
    turns = parse_turns(value, column, spelling, ANY_NAME)
    return place_images(with_system(row, turns), images_of(row))
