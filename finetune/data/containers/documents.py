"""JSON documents: a list of rows, an object that holds one, or COCO's captions.

The document is walked once, an element at a time, for the places of its elements; it is never in
memory as a whole. Its bytes are decoded as latin-1 on that walk, so that a place in the text is a
place in the file.
"""

import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from finetune.data.containers import json_text
from finetune.data.containers.cached import find_derived, keep_index, load_index
from finetune.data.containers.compressed import open_file
from finetune.data.containers.files import FileStamp
from finetune.data.containers.json_rows import BOM, JsonRows, open_lines, open_spilled
from finetune.errors import DataError

LIST_KEYS = (
    *("data", "rows", "examples", "samples", "items", "records", "instances"),
    *("train", "training", "validation", "valid", "val", "dev", "test", "eval"),
    *("annotations", "questions", "dataset"),
)
"""Under these an object may hold its rows."""

_PIECE_BYTES = 4 << 20
_FIRST_LINE_BYTES = 64 << 20
_SPACE = re.compile(r"[ \t\n\r]*")


def open_document(
    data: FileStamp, cache: Path, *, shown: str, root: Path, source: FileStamp
) -> JsonRows:
    """The elements of the document's list as rows, numbered from 1. Raises `DataError`.

    JSON Lines under the name of a document are read as such, since many tools write them so.
    """
    if _is_lines(data):
        return open_lines(data, cache, shown=shown, root=root, source=source)
    if find_derived(data, cache, "coco") is None:
        index = load_index(data, cache)
        if index is not None:
            return JsonRows(data, index, shown=shown, root=root, source=source)
        lists = _Walk(data, shown).lists()
        if not _is_coco(lists, data):
            elements = _choose(lists, shown)
            spans = np.empty((len(elements), 3), np.int64)
            spans[:, :2] = elements.spans()
            spans[:, 2] = np.arange(1, len(elements) + 1)
            index = keep_index(data, cache, spans)
            return JsonRows(data, index, shown=shown, root=root, source=source)
    joined = open_spilled(
        data, cache, "coco", lambda: _coco_rows(data, shown), shown=shown, root=root
    )
    joined.sources = [source]
    return joined


def _is_lines(data: FileStamp) -> bool:
    """Whether a second value follows after the first line, which is an object of its own."""
    with open_file(Path(data.path)) as file:
        head = file.read(4096).removeprefix(BOM).lstrip()
        if not head.startswith(b"{"):
            return False
        file.seek(0)
        line = b"\n"
        while line and not line.removeprefix(BOM).strip():
            line = file.readline(_FIRST_LINE_BYTES)
        if not line.endswith(b"\n"):
            return False
        rest = b"\n"
        while rest and not rest.strip():
            rest = file.readline(4096)
    try:
        return bool(rest) and isinstance(orjson.loads(line.removeprefix(BOM)), dict)
    except orjson.JSONDecodeError:
        return False


class _Elements:
    """The places of a list's elements, 16 bytes each."""

    def __init__(self) -> None:
        self.edges = array("q")
        self.num_objects = 0

    def __len__(self) -> int:
        return len(self.edges) // 2

    def spans(self) -> np.ndarray:
        return (
            np.frombuffer(self.edges, np.int64).reshape(-1, 2) if self.edges else np.empty((0, 2))
        )

    def holds_objects(self) -> bool:
        return self.num_objects == len(self) > 0


def _choose(lists: dict[str | None, _Elements], shown: str) -> _Elements:
    if None in lists:
        return lists[None]
    fitting = [key for key in LIST_KEYS if key in lists and lists[key].holds_objects()]
    if len(fitting) == 1:
        return lists[fitting[0]]
    if fitting:
        named = ", ".join(repr(key) for key in fitting)
        raise DataError(
            f"{shown}: holds several lists of rows ({named}); save the one to read as a file of "
            "its own"
        )
    named = ", ".join(repr(key) for key in list(lists)[:5]) or "no list"
    raise DataError(
        f"{shown}: is one object ({named} in it), not rows; give a list of objects, or an object "
        "with such a list under 'data'"
    )


class _Walk:
    """One pass over a document."""

    def __init__(self, data: FileStamp, shown: str):
        self._data = data
        self._shown = shown
        # numbers are only passed over here
        self._decoder = json.JSONDecoder(strict=False, parse_int=len, parse_float=len)
        self._file = open_file(Path(data.path))
        self._text = ""
        self._position = 0  # in the text
        self._base = 0  # of the text in the file
        self._ended = False

    def lists(self) -> dict[str | None, _Elements]:
        """Every list of the document by its key; the document itself, as a list, by None."""
        with self._file:
            if self._peek() == "\xef":  # a byte order mark
                self._position += len(BOM)
            found: dict[str | None, _Elements] = {}
            match self._peek():
                case "":
                    return {None: _Elements()}
                case "[":
                    found[None] = self._elements()
                case "{":
                    found = dict(self._members())
                case other:
                    raise self._error(f"starts with {other!r}", "expected a list of objects")
            if self._peek():
                raise self._error(
                    "goes on after its end",
                    "one document holds one list; name a file with an object a line .jsonl",
                )
            return found

    def _members(self) -> Iterator[tuple[str, _Elements]]:
        self._position += 1
        ended = self._peek() == "}"
        while not ended:
            if self._peek() != '"':
                raise self._error("a key was expected", "mend the document")
            key = self._value()
            self._expect(":")
            if self._peek() == "[":
                yield key, self._elements()
            else:
                self._value()
            ended = self._peek() == "}"
            if not ended:
                self._expect(",")
        self._position += 1

    def _elements(self) -> _Elements:
        elements = _Elements()
        self._position += 1
        ended = self._peek() == "]"
        while not ended:
            start = self._base + self._position
            elements.num_objects += isinstance(self._value(), dict)
            elements.edges.extend((start, self._base + self._position))
            ended = self._peek() == "]"
            if not ended:
                self._expect(",")
                self._peek()
        self._position += 1
        return elements

    def _expect(self, character: str) -> None:
        if self._peek() != character:
            raise self._error(f"{character!r} was expected", "mend the document")
        self._position += 1

    def _peek(self) -> str:
        """The next character that is not blank; nothing at the end."""
        while True:
            blank = _SPACE.match(self._text, self._position)
            self._position = blank.end() if blank else self._position
            if self._position < len(self._text):
                return self._text[self._position]
            if self._ended:
                return ""
            self._fill()

    def _fill(self) -> None:
        rest = self._text[self._position :]
        self._base += self._position
        piece = self._file.read(max(_PIECE_BYTES, len(rest)))
        self._ended = not piece
        self._text, self._position = rest + piece.decode("latin-1"), 0

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                # what reaches the end of the text read so far may only be incomplete
                open_ended = "Unterminated" in error.msg or error.pos >= len(self._text) - 12
                if self._ended or not open_ended:
                    raise self._malformed(error) from error
            except RecursionError as error:
                raise self._error("is nested too deeply to be read", "write it flatter") from error
            else:
                # a number may go on behind the text read so far
                if end < len(self._text) or self._ended or not isinstance(value, int | float):
                    self._position = end
                    return value
            if len(self._text) - self._position > json_text.MAX_ROW_BYTES:
                raise self._error(
                    f"one value is longer than {json_text.MAX_ROW_BYTES >> 20} MiB",
                    "split it, or mend the quotes before it",
                )
            self._fill()

    def _malformed(self, error: json.JSONDecodeError) -> DataError:
        at_end = error.pos >= len(self._text.rstrip())
        if self._ended and (at_end or error.msg.startswith("Unterminated")):
            return self._error("is cut short: this value has no end", "write the file again")
        self._position = error.pos
        if self._text[error.pos] in "]}":
            return self._error("has a comma before a closing bracket", "remove it")
        return self._error(f"is not JSON: {error.msg}", "mend the document")

    def _error(self, what: str, expected: str) -> DataError:
        """The place as a line and a column in bytes, both from 1."""
        offset = self._base + self._position
        line, line_start, done = 1, 0, 0
        with open_file(Path(self._data.path)) as file:
            while done < offset and (piece := file.read(min(_PIECE_BYTES, offset - done))):
                line += piece.count(b"\n")
                last = piece.rfind(b"\n")
                line_start = done + last + 1 if last >= 0 else line_start
                done += len(piece)
        column = offset - line_start + 1
        if offset >= self._data.size and "cut short" not in what:
            what = "is cut short: the list or object has no end"
            expected = "write the file again"
        return DataError(f"{self._shown}: {what} (line {line}, column {column}); {expected}")


def _is_coco(lists: dict[str | None, _Elements], data: FileStamp) -> bool:
    images, annotations = lists.get("images"), lists.get("annotations")
    if not (images and annotations and images.holds_objects() and annotations.holds_objects()):
        return False
    first = next(_values(data, annotations))
    return "caption" in first and "image_id" in first


def _coco_rows(data: FileStamp, shown: str) -> Iterator[tuple[int, Any]]:
    """A row an image with all its captions, in the images' order; then what belongs to no image."""
    lists = _Walk(data, shown).lists()
    captions: dict[Any, list[Any]] = {}
    orphans: dict[Any, int] = {}
    for number, annotation in enumerate(_values(data, lists["annotations"]), start=1):
        image_id = _identifier(annotation, "image_id")
        captions.setdefault(image_id, []).append(annotation.get("caption"))
        orphans.setdefault(image_id, number)
    number = 0
    for number, image in enumerate(_values(data, lists["images"]), start=1):
        image_id = _identifier(image, "id")
        orphans.pop(image_id, None)
        yield number, {"image": image.get("file_name"), "captions": captions.get(image_id, [])}
    for image_id, first in orphans.items():
        number += 1
        yield (
            number,
            DataError(
                f"annotation {first} is about image_id {image_id!r}, which 'images' does not hold; "
                "add the image, or remove the annotation"
            ),
        )


def _identifier(entry: dict[str, Any], key: str) -> Any:
    value = entry.get(key)
    return value if isinstance(value, str | int) else repr(value)


def _values(data: FileStamp, elements: _Elements) -> Iterator[Any]:
    with open_file(Path(data.path)) as file:
        for start, stop in elements.spans().tolist():
            file.seek(start)
            yield json_text.parse_json(file.read(stop - start))
