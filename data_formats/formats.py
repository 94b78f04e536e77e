"""The formats by name, and which of them some rows are in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_formats import (
    cauldron,
    chartqa,
    chat,
    coco_captions,
    columns,
    cord,
    docvqa,
    llama_factory,
    llava,
    mantis,
    mmmu,
    ms_swift,
    openai,
    sharegpt,
    textvqa,
    vqav2,
)
from data_formats.chat import Conversation, FormatError
from data_formats.columns import check_mapping
from data_formats.wording import keys, listed, nearest, shown


@dataclass(frozen=True, slots=True)
class Format:
    """A shape of rows: how it is known, how it is read; `takes_question` where the recipe may set
    the question's text.
    """

    name: str
    fits: Callable[[Any], bool]
    parse: Callable[..., Conversation]
    takes_question: bool = False


@dataclass(frozen=True, slots=True)
class Recognised:
    """The format of some rows, and the others that read them the same."""

    name: str
    same_as: tuple[str, ...] = ()


# The most specific first: where several read rows the same, the first is the one that is named.
FORMATS: dict[str, Format] = {
    format_.name: format_
    for format_ in (
        Format("chat", chat.fits, chat.parse_chat),
        Format("openai", openai.fits, openai.parse),
        Format("llava", llava.fits, llava.parse),
        Format("sharegpt", sharegpt.fits, sharegpt.parse),
        Format("llama-factory", llama_factory.fits, llama_factory.parse),
        Format("ms-swift", ms_swift.fits, ms_swift.parse),
        Format("mantis", mantis.fits, mantis.parse),
        Format("cauldron", cauldron.fits, cauldron.parse),
        Format("docvqa", docvqa.fits, docvqa.parse),
        Format("textvqa", textvqa.fits, textvqa.parse),
        Format("vqav2", vqav2.fits, vqav2.parse),
        Format("chartqa", chartqa.fits, chartqa.parse),
        Format("mmmu", mmmu.fits, mmmu.parse),
        Format("cord", cord.fits, cord.parse, takes_question=True),
        Format("coco-captions", coco_captions.fits, coco_captions.parse, takes_question=True),
        # never recognised: only the recipe can say what its columns mean
        Format("columns", lambda row: False, columns.parse, takes_question=True),
    )
}

_KEYS = ("messages", "conversations", "conversation", "texts", "query", "response", "ground_truth")
_IN_FORMATS = (*_KEYS, "image", "images")
_IMAGE_WORDS = ("image", "img", "photo", "picture", "scan", "file_name", "filename")
_QUESTION_WORDS = ("question", "query", "prompt", "instruction", "problem")
_ANSWER_WORDS = (
    "answer",
    "response",
    "output",
    "label",
    "caption",
    "target",
    "completion",
    "reply",
)


def converter(
    name: str, *, columns: Mapping[str, str] | None = None, question: str | None = None
) -> Callable[[Any], Conversation]:
    """The function that reads a row of a format. Raises `FormatError` where name, columns and
    question do not go together.
    """
    if name not in FORMATS:
        near = nearest(name, FORMATS)
        raise FormatError(
            f"format {shown(name)} is unknown; "
            + (f"did you mean {near!r}?" if near else f"expected {listed(list(FORMATS), 'or')}")
        )
    if name == "columns":
        return partial(
            FORMATS[name].parse, columns=check_mapping(columns, question), question=question
        )
    if columns:
        raise FormatError(f"columns has no effect with format {name!r}; set format: columns")
    if question and not FORMATS[name].takes_question:
        raise FormatError(
            f"question has no effect with format {name!r}, whose rows have their own; remove it"
        )
    return partial(FORMATS[name].parse, question=question) if question else FORMATS[name].parse


def recognise(rows: Sequence[Any]) -> Recognised:
    """The format of a source, from its first rows.

    A format that fits every row is the one; of several, the first in `FORMATS` if they read the
    rows alike. Rows that fit no format are left for the reader to complain about, as long as they
    are fewer than half. Raises `FormatError`, which says what to write into the recipe.
    """
    objects = [row for row in rows if isinstance(row, dict)]
    if not objects:
        raise FormatError(
            "no row is an object, so its format cannot be told; give one JSON object a row"
        )
    fitting = [{f.name for f in FORMATS.values() if f.fits(row)} for row in objects]
    known = [names for names in fitting if names]
    if 2 * len(known) < len(objects):
        raise FormatError(_no_format(objects[fitting.index(set())]))
    names = [name for name in FORMATS if all(name in fits for fits in known)]
    if not names:
        first, other = _two_kinds(known)
        raise FormatError(
            f"some rows look like {first!r} and others like {other!r}; keep rows of one format in "
            "a file, or set format"
        )
    first, *others = names
    mine = [_read(first, row) for row in objects]
    for other in others:
        if [_read(other, row) for row in objects] != mine:
            raise FormatError(
                f"fits {'both ' if len(names) == 2 else ''}{listed(names)}, which read it "
                "differently; set format to the one that made the rows"
            )
    return Recognised(first, tuple(others))


def _read(name: str, row: Any) -> Conversation | None:
    try:
        return FORMATS[name].parse(row)
    except FormatError:
        return None


def _two_kinds(fitting: Sequence[set[str]]) -> tuple[str, str]:
    """A name each of two rows that share none, or else of two that come nearest to it."""

    def first_of(names: set[str]) -> str:
        return next(name for name in FORMATS if name in names)

    other = min(fitting, key=lambda names: len(names & fitting[0]))
    only = (fitting[0] - other, other - fitting[0])
    return first_of(only[0] or fitting[0]), first_of(only[1] or other)


def _fault_under(name: str, row: dict[Any, Any]) -> str:
    """What the first format that knows this key has against what is under it; empty for none."""
    formats = [known for known in FORMATS if known != "columns"] if name in _KEYS else []
    for known in formats:
        try:
            FORMATS[known].parse(row)
        except FormatError as error:
            if str(error).removeprefix("'").startswith(name):
                return f"{known!r}, {error}"
    return ""


def _no_format(row: dict[Any, Any]) -> str:
    message = f"no known format has the keys {keys(row, at_most=20)}; "
    names = [key for key, value in row.items() if isinstance(key, str) and value is not None]
    image = _like(names, _IMAGE_WORDS)
    answer = _like([name for name in names if name != image], _ANSWER_WORDS)
    question = _like([name for name in names if name not in (image, answer)], _QUESTION_WORDS)
    if not answer or not (image or question):
        for name in names:
            if fault := _fault_under(name, row):
                return f"no known format reads it: as {fault}"
        for name in names:
            if name not in _IN_FORMATS and (near := nearest(name, _KEYS)):
                return message + f"is {name!r} meant to be {near!r}?"
        return (
            message + "set format to the one that made the rows, or name the columns, such as "
            "columns: {image: photo, question: asked, answer: given}"
        )
    mapping = {
        "images" if isinstance(row.get(image), list) else "image": image,
        "question": question,
        "answer": answer,
    }
    pairs = ", ".join(f"{role}: {column}" for role, column in mapping.items() if column)
    fixed = "" if question else ", question: the text to ask with"
    return message + f"if these are the columns, set format: columns, columns: {{{pairs}}}{fixed}"


def _like(names: Sequence[str], words: Sequence[str]) -> str | None:
    """The first name that is, or else holds, one of the words."""
    for word in words:
        if near := [name for name in names if name.lower().rstrip("s") == word]:
            return near[0]
    for word in words:
        if near := [name for name in names if word in name.lower()]:
            return near[0]
    return None
