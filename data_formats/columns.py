"""Any table with columns for the image, the question and the answer: the recipe says which.

    {"scan": "0041.png", "frage": "Was ist die Summe?", "antwort": ["12,50", "12.50"]}

read with `columns: {image: scan, question: frage, answer: antwort}`. The shape is that of most VQA
tables on the Hub, such as huggingface.co/datasets/flaviagiammarino/vqa-rad.
"""

from collections.abc import Mapping
from typing import Any

from data_formats.cells import answers_of, as_object, ask
from data_formats.chat import Conversation, FormatError, Image, parse_image
from data_formats.wording import keys, kind, must_be, nearest

ROLES = ("image", "images", "question", "answer", "system")


def check_mapping(columns: Mapping[str, str] | None, question: str | None) -> Mapping[str, str]:
    """The mapping itself. Raises `FormatError` where no row could be read with it."""
    example = "columns: {image: photo, question: asked, answer: given}"
    if not columns:
        raise FormatError(f"format: columns needs the names of the columns; add {example}")
    for role, column in columns.items():
        if role not in ROLES:
            near = nearest(role, ROLES)
            hint = f"; did you mean {near!r}?" if near else f"; expected {', '.join(ROLES)}"
            raise FormatError(f"columns has an unknown key {role!r}{hint}")
        if not isinstance(column, str) or not column:
            raise FormatError(f"columns.{role} must be a column's name, found {kind(column)}")
    if "answer" not in columns:
        raise FormatError(f"columns.answer is missing; write {example}")
    if "image" in columns and "images" in columns:
        raise FormatError("columns has both 'image' and 'images'; keep the one that the rows have")
    if ("question" in columns) == bool(question):
        raise FormatError(
            "columns.question and question are both given; keep one of them"
            if question
            else "columns.question is missing; name the column, or set question: to a fixed text"
        )
    return columns


def parse(row: Any, *, columns: Mapping[str, str], question: str | None = None) -> Conversation:
    """The question and its (first) answer, from the columns named. Raises `FormatError`."""
    row = as_object(row)
    cells = {role: _cell(row, role, column) for role, column in columns.items()}
    images: list[Image] = []
    for role in ("image", "images"):
        value = cells.get(role)
        if role not in columns:
            continue
        place = columns[role]
        if value in (None, "", []):
            raise FormatError(
                f"{place!r} holds no picture; give one, or keep rows without in a source of their "
                "own whose columns name no picture"
            )
        if isinstance(value, list):
            images += [parse_image(image, f"{place}[{i}]") for i, image in enumerate(value)]
        else:
            images.append(parse_image(value, repr(place)))
    asked = question or _text(cells.get("question"), columns.get("question", ""))
    if cells["answer"] in (None, []):
        raise FormatError(f"{columns['answer']!r} holds no answer; leave the row out")
    answers = answers_of(cells["answer"], columns["answer"])
    system = cells.get("system")
    if system is not None and not isinstance(system, str):
        raise FormatError(must_be(repr(columns["system"]), "a text", system))
    return ask(images, asked, answers[0], answers, system)


def _cell(row: dict[Any, Any], role: str, column: str) -> Any:
    if column in row:
        return row[column]
    near = nearest(column, (name for name in row if isinstance(name, str)))
    hint = f"; did you mean {near!r}?" if near else f"; name one of them under columns.{role}"
    raise FormatError(f"has no column {column!r} (found {keys(row, at_most=20)}){hint}")


def _text(value: Any, column: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    found = None if isinstance(value, str) else value  # a blank one
    raise FormatError(must_be(repr(column), "the question's text", found, verb="hold"))
