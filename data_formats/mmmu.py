"""MMMU's questions, most of them with options to choose from.

    {"id": "validation_Art_1", "question": "Which is <image 1>?", "image_1": {"bytes": ...},
     "image_2": null, "options": "['oil', 'pastel']", "answer": "B",
     "question_type": "multiple-choice", "subfield": "Drawing"}
    {..., "question": "How far does <image 1> fall, in m?", "options": "[]", "answer": "24.5",
     "question_type": "open"}

Source: huggingface.co/datasets/MMMU/MMMU and lmms-lab/MMMU. Options are a list written as Python
writes it, and follow the question with a letter each. The letter is learnt; of an open question the
first answer, and all of them count as right.
"""

import ast
import re
import string
import warnings
from typing import Any

from data_formats.cells import answers_of, as_object, ask, text_at
from data_formats.chat import Conversation, FormatError, Image, parse_image
from data_formats.placeholders import PLACEHOLDER
from data_formats.wording import must_be, shown

MAX_IMAGES = 7

MAX_LIST_CHARACTERS = 100_000  # Python's parser takes a hundred times as much memory as the text

_MENTION = re.compile(r"<image (\d{1,9})>")


def fits(row: Any) -> bool:
    """Whether a row has a question, options and a first image in MMMU's columns."""
    return (
        isinstance(row, dict)
        and isinstance(row.get("question"), str)
        and isinstance(row.get("options"), str | list)
        and row.get("image_1") is not None
        and isinstance(row.get("answer"), str | list)
    )


def parse(row: Any) -> Conversation:
    """The question with its options, and the letter of the right one. Raises `FormatError`."""
    row = as_object(row)
    options = _options(row.get("options"))
    lines = [text_at(row, "question")]
    lines += [f"{letter}. {text}" for letter, text in options.items()]
    answers = _answers(row.get("answer"))
    if options and answers[0] not in options:
        raise FormatError(
            f"'answer' is {shown(answers[0])}, and the options have the letters "
            f"{', '.join(options)}; write one of these (test splits come without answers)"
        )
    images, text = _placed(row, "\n".join(lines))
    return ask(images, text, answers[0], answers)


def _answers(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) and value.startswith("["):
        value = _listed(value, "answer")
    if value in (None, "", "?", []):
        raise FormatError(
            "'answer' holds nothing: test splits come without answers; use validation"
        )
    return answers_of(value, "answer")


def _options(value: Any) -> dict[str, str]:
    """Letter -> option; none for an open question."""
    texts = _listed(value, "options") if isinstance(value, str) else value
    if texts is None:
        return {}
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise FormatError(must_be("'options'", "a list of texts", texts))
    if len(texts) > len(string.ascii_uppercase):
        raise FormatError(f"'options' holds {len(texts)} texts; there are only 26 letters")
    return dict(zip(string.ascii_uppercase, texts, strict=False))


def _listed(text: str, key: str) -> list[Any]:
    if len(text) > MAX_LIST_CHARACTERS:
        raise FormatError(
            f"{key!r} is a text of {len(text):,} characters, more than the "
            f"{MAX_LIST_CHARACTERS:,} of a list that is written out; give the list itself"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes such as \d, on standard error
            value = ast.literal_eval(text)  # constants alone: nothing is run
    # the last for a list or a mapping as a key
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise FormatError(
            f"{key!r} is {shown(text)}, which is no list as Python or JSON writes it; write "
            "['first', 'second']"
        ) from error
    if not isinstance(value, list):
        raise FormatError(must_be(repr(key), "a list", value))
    return value


def _placed(row: dict[Any, Any], text: str) -> tuple[list[Image], str]:
    """The images in the order in which they are shown, and the text with a placeholder for each;
    those that it does not mention come first.
    """
    known = {
        number: parse_image(row[key], repr(key))
        for number in range(1, MAX_IMAGES + 1)
        if row.get(key := f"image_{number}")
    }
    mentioned = [int(number) for number in _MENTION.findall(text)]
    if lost := [number for number in mentioned if number not in known]:
        raise FormatError(
            f"<image {lost[0]}> is mentioned, and 'image_{lost[0]}' holds nothing; give it there"
        )
    first = [number for number in known if number not in mentioned]
    text = PLACEHOLDER * len(first) + _MENTION.sub(PLACEHOLDER, text)
    return [known[number] for number in (*first, *mentioned)], text
