"""The Cauldron: images, and exchanges about them.

    {"images": [{"bytes": ..., "path": null}],
     "texts": [{"user": "What is shown?", "assistant": "A cat.", "source": "VQAv2"}]}

Source: huggingface.co/datasets/HuggingFaceM4/the_cauldron. A row is one conversation, in which the
images come before the first question; where the texts hold `<image>`, they are placed there instead
(rows of the same shape that people write themselves).
"""

from typing import Any

from data_formats.cells import as_object
from data_formats.chat import Conversation, FormatError, images_of
from data_formats.placeholders import PLACEHOLDER, Turn, place_images
from data_formats.wording import missing, must_be


def fits(row: Any) -> bool:
    """Whether a row has `texts` of user and assistant."""
    return (
        isinstance(row, dict)
        and isinstance(row.get("texts"), list)
        and bool(row["texts"])
        and all(
            isinstance(text, dict) and "user" in text and "assistant" in text
            for text in row["texts"]
        )
    )


def parse(row: Any) -> Conversation:
    """All exchanges as one conversation. Raises `FormatError`, naming the first fault."""
    row = as_object(row)
    if row.get("texts") is None:
        raise FormatError(missing(row, "texts", "a cauldron row has 'images' and 'texts'"))
    texts = row["texts"]
    if not isinstance(texts, list) or not texts:
        raise FormatError(must_be("'texts'", "a list of exchanges", texts))
    turns = []
    for i, text in enumerate(texts):
        if not isinstance(text, dict):
            raise FormatError(must_be(f"texts[{i}]", "an object with 'user' and 'assistant'", text))
        for role in ("user", "assistant"):
            if not isinstance(text.get(role), str):
                raise FormatError(must_be(f"texts[{i}].{role}", "a string", text.get(role)))
            turns.append(Turn(role, text[role]))
    is_placed = any(PLACEHOLDER in turn.text for turn in turns)
    return place_images(turns, images_of(row), put_missing_first=not is_placed)
