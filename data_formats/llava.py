"""LLaVA's instruction data.

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat are the colors of the bus?"},
                       {"from": "gpt", "value": "The bus is white and red."}]}

Source: huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K (llava_v1_5_mix665k.json). Rows
without an image are text alone; LLaVA-NeXT-Interleave's rows have a list of images.
"""

from typing import Any

from data_formats.cells import as_object
from data_formats.chat import Conversation, FormatError, images_of
from data_formats.placeholders import place_images
from data_formats.turns import (
    FROM_VALUE,
    HUMAN_GPT,
    are_turns,
    parse_turns,
    refuse_more_than_images,
)
from data_formats.wording import missing


def fits(row: Any) -> bool:
    """Whether a row has turns of human and gpt, and images under `image` if anywhere."""
    return (
        isinstance(row, dict)
        and are_turns(row.get("conversations"), FROM_VALUE, HUMAN_GPT)
        and not row.get("images")
        and not row.get("system")
    )


def parse(row: Any) -> Conversation:
    """A conversation, its images taken by its placeholders. Raises `FormatError`."""
    row = as_object(row)
    refuse_more_than_images(row)
    if row.get("conversations") is None:
        raise FormatError(missing(row, "conversations", "a llava row has turns of human and gpt"))
    for key in ("images", "system"):
        if row.get(key):
            raise FormatError(f"{key!r} is no column of llava's; set format: sharegpt to have it")
    turns = parse_turns(row["conversations"], "conversations", FROM_VALUE, HUMAN_GPT)
    return place_images(turns, images_of(row))
