"""Single cells of a dataset's row: its text, image or answers, or a `FormatError` that names the
column; and the conversation they make.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from data_formats.chat import Conversation, FormatError, Image, Message, Text, parse_image
from data_formats.placeholders import with_images
from data_formats.wording import keys, kind, missing, must_be


def as_object(row: Any) -> dict[Any, Any]:
    """The row itself. Raises `FormatError` where it is no object."""
    if not isinstance(row, dict):
        raise FormatError(f"expected an object, found {kind(row)}; write the row so")
    return row


def text_at(row: dict[Any, Any], key: str) -> str:
    """The text of a column. Raises `FormatError` where it is missing, blank or no text."""
    if row.get(key) is None:
        raise FormatError(missing(row, key, "this format needs it"))
    text = row[key]
    if not isinstance(text, str) or not text.strip():
        raise FormatError(must_be(repr(key), "a text", None if _is_blank(text) else text))
    return text


def image_at(row: dict[Any, Any], *names: str) -> Image:
    """The image in the first of the columns that holds one. Raises `FormatError`."""
    for key in names:
        if row.get(key):
            return parse_image(row[key], repr(key))
    raise FormatError(
        f"has no image (found {keys(row)}); give its path or bytes in the column {names[0]!r}"
    )


def answers_of(value: Any, place: str) -> tuple[str, ...]:
    """One answer or a list of them, numbers as they are written. Raises `FormatError`."""
    values = value if isinstance(value, list) else [value]
    return tuple(
        _answer(v, f"{place}[{i}]" if isinstance(value, list) else repr(place))
        for i, v in enumerate(values)
    )


def most_common(answers: Sequence[str]) -> str:
    """The answer given most often, the first of them on a tie."""
    return Counter(answers).most_common(1)[0][0]


def ask(
    images: Sequence[Image],
    question: str,
    answer: str,
    references: Sequence[str] = (),
    system: str | None = None,
) -> Conversation:
    """One question about images and the answer to learn; `references` are all that count as
    right.
    """
    told = [Message("system", (Text(system),))] if system and system.strip() else []
    # an answer that is its own only reference is written as such everywhere
    right = () if tuple(references) == (answer,) else tuple(references)
    return Conversation(
        (
            *told,
            Message("user", with_images(question, images)),
            Message("assistant", (Text(answer),), True, right),
        )
    )


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _answer(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        raise FormatError(f"{place} is {str(value).lower()}; write it as a text, such as 'yes'")
    if isinstance(value, int) and abs(value) < 10**300:  # Python refuses to write longer ones
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    raise FormatError(must_be(place, "a text or a number", value))
