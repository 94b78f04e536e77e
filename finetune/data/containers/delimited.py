"""Tables with a header: CSV, and TSV."""

import csv
import io
from collections.abc import Iterator
from typing import IO, Any

from finetune.data.containers import json_text
from finetune.errors import DataError


def read_table(file: IO[bytes], shown: str, *, tabs: bool) -> Iterator[tuple[int, Any]]:
    """The line on which a record starts, and the record by its column names or the `DataError` in
    its stead. An empty field is None. Raises `DataError`, with the place, for a bad header.
    """
    # Bytes that are not UTF-8 come through as surrogates, so that they cost one row, not the file.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _read_records(text, shown, tabs)
    finally:
        text.detach()  # the file is the caller's to close


def _read_records(text: io.TextIOWrapper, shown: str, tabs: bool) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(json_text.MAX_ROW_BYTES)  # one setting for the whole process
    header_text = _first_line(text, shown)
    if not header_text:
        return
    delimiter = "\t" if tabs else _delimiter(header_text)
    lines = _Lines(header_text, text)
    # strict: else an opening quote without a partner swallows the rest of the file without a word
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        names = _column_names(next(records), shown)
    except csv.Error as error:
        raise DataError(
            f"{shown}:1: the header cannot be read ({error}); mend its quotes"
        ) from None
    while True:
        start = lines.number + 1
        try:
            fields = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            yield start, _reason(error, lines.number - start + 1)
            continue
        if len(fields) > 1 or "".join(fields).strip():  # else a blank line
            yield start, _record(names, fields)


class _Lines:
    """Lines with their number; the header has been read already, and may span several."""

    def __init__(self, first: str, rest: io.TextIOWrapper):
        self._first: str | None = first
        self._rest = rest
        self.number = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self.number += 1
        if self._first is not None:
            line, self._first = self._first, None
            return line
        line = self._rest.readline(json_text.MAX_ROW_BYTES)
        if not line:
            self.number -= 1
            raise StopIteration
        return line


def _first_line(text: io.TextIOWrapper, shown: str) -> str:
    line = text.readline(json_text.MAX_ROW_BYTES)
    if line and not line.strip():
        raise DataError(f"{shown}:1: is blank; write the names of the columns there")
    return line


def _delimiter(header: str) -> str:
    if "," in header:
        return ","
    return next((mark for mark in (";", "\t") if mark in header), ",")


def _column_names(fields: list[str], shown: str) -> list[str]:
    """The names; one that is empty is called as pandas would, which writes its index so."""
    names = [name.strip() or f"Unnamed: {number}" for number, name in enumerate(fields)]
    for name in names:
        if not _is_utf8(name):
            raise DataError(f"{shown}:1: the header is not UTF-8; save the file as UTF-8")
        if names.count(name) > 1:
            raise DataError(f"{shown}:1: two columns are called {name!r}; give each its own name")
    return names


def _record(names: list[str], fields: list[str]) -> Any:
    if len(fields) != len(names):
        return DataError(
            f"has {len(fields)} fields, where the header names {len(names)}; put fields that hold "
            "a delimiter or a line break in double quotes"
        )
    record = {name: field or None for name, field in zip(names, fields, strict=True)}
    bad = next((name for name, field in record.items() if field and not _is_utf8(field)), None)
    if bad is not None:
        return DataError(f"column {bad!r} is not UTF-8; save the file as UTF-8")
    return record


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reason(error: csv.Error, num_lines: int) -> DataError:
    if "unexpected end of data" in str(error):
        return DataError(
            f"opens a double quote that is never closed (it takes the last {num_lines:,} lines of "
            "the file); close it, or write a quote within a field twice"
        )
    if "expected after" in str(error):
        return DataError(
            "has text after a closing double quote; write a quote within a field twice"
        )
    return DataError(f"cannot be read ({error}); mend the line")
