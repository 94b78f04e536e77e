"""The text of one JSON value -> the value, or in plain words why it is none.

orjson reads what is well formed. What it refuses is read again by the standard library: some of it
is fine after all (half of a character, which the converters word themselves), and for the rest its
errors say more.
"""

import json
import re
from typing import Any

import orjson

from finetune.errors import DataError

MAX_ROW_BYTES = 256 << 20  # a row beyond this is a mistake, and would fill the memory

_DIGIT_MAP = bytes(ord("0") if chr(i) in "0123456789" else ord(" ") for i in range(256))
_LONG_NUMBER = b"0" * 19  # orjson rounds whole numbers beyond 64 bits without a word


def parse_json(text: bytes) -> Any:
    """The value. Raises `DataError` with the reason, without the place."""
    refuse_long_row(len(text))
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if "depth limit" in str(error) or "ecursion" in str(error):
            raise _too_deep() from error
        return _parse_slowly(text)
    return _parse_slowly(text) if has_long_number(text) else value


def has_long_number(text: bytes) -> bool:
    """Whether 19 digits stand in a row anywhere, so that `parse_json` is needed for exactness."""
    return _LONG_NUMBER in text.translate(_DIGIT_MAP)


def refuse_long_row(num_bytes: int) -> None:
    """Raise `DataError` for a row too long to be read."""
    if num_bytes > MAX_ROW_BYTES:
        raise DataError(
            f"is {num_bytes / (1 << 20):,.0f} MiB long, more than the {MAX_ROW_BYTES >> 20:,} MiB "
            "that a row may have; keep images in files of their own, or split the row"
        )


def _too_deep() -> DataError:
    return DataError(
        "is nested too deeply to be read (a chat row has four levels); write it flatter"
    )


class _NotFiniteError(ValueError):
    pass


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise _NotFiniteError(text)
    return number


def _refuse_constant(name: str) -> Any:
    raise _NotFiniteError(name)


def _parse_slowly(text: bytes) -> Any:
    if not text.strip(b"\0 \t\r\n"):
        raise DataError(
            "is all NUL bytes: the file was not written to its end; write or copy it again"
        )
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8 (byte {error.start + 1} of the row); save the file as UTF-8"
        ) from error
    try:
        return json.loads(decoded, parse_float=_finite, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise DataError(_reason(decoded, error)) from error
    except RecursionError as error:
        raise _too_deep() from error
    except _NotFiniteError as error:
        number = str(error) if len(str(error)) <= 20 else f"{str(error)[:20]}..."
        raise DataError(
            f"holds {number}, which is no finite number; write null, or a string"
        ) from error
    except ValueError as error:  # a whole number of thousands of digits
        raise DataError("holds a number too large to be read; write it as a string") from error


def _reason(text: str, error: json.JSONDecodeError) -> str:
    """What is wrong, from the standard library's message and the characters around its place."""
    place = f"at column {error.pos + 1}"
    rest = text[error.pos : error.pos + 40]
    stripped = text.rstrip()
    if error.msg == "Extra data":
        return _extra_data(text, error.pos, place)
    if error.msg.startswith("Unterminated string"):
        return f"is cut short: the string that starts {place} has no end; write the row again"
    if error.pos >= len(stripped):
        return (
            f"is cut short after column {len(stripped)}: a bracket or a value is missing; "
            "write the row again"
        )
    if error.msg.startswith("Invalid control character"):
        code = ord(text[error.pos])
        return (
            f"holds a raw control character (U+{code:04X}) {place} within a string; "
            "write it as an escape such as \\n or \\u0009"
        )
    if error.msg.startswith("Invalid \\"):
        return (
            f"holds an escape {place} that JSON does not know; write each backslash as \\\\ "
            "(json.dumps does)"
        )
    if "trailing comma" in error.msg or (
        rest[:1] in ("}", "]") and text[: error.pos].rstrip().endswith(",")
    ):
        return (
            f"has a trailing comma before {text[error.pos :].lstrip(', ')[:1]!r} {place}; remove it"
        )
    if rest.startswith("'"):
        return (
            f"is written as Python, not as JSON (a single quote {place}); write it with json.dumps"
        )
    python = re.match(r"None|True|False", rest)
    if python:
        return (
            f"holds Python's {python[0]} {place}, not JSON's null, true or false; write it with "
            "json.dumps"
        )
    if rest.startswith("\0"):
        return (
            f"is not JSON: {place} it holds NUL bytes, so the file may be damaged; write or copy "
            "it again"
        )
    todo = (
        "mend it there, or write the row with json.dumps"
        if error.pos
        else "write one object a line"
    )
    return f"is not JSON: {error.msg} {place}; {todo}"


def _extra_data(text: str, position: int, place: str) -> str:
    rest = text[position:].lstrip()
    if "\r" in text[:position].rstrip(" \t"):
        return "ends its lines with a bare carriage return; save the file with line feeds"
    if rest.startswith(","):
        after = rest[1:].strip()
        if not after:
            return f"ends with a comma {place}; write one object a line, without commas between"
        return f"holds two values with a comma between {place}; write one object a line"
    if rest.startswith(("{", "[")):
        return f"holds two objects in one line (the second {place}); write one object a line"
    return f"goes on after its end ({place}); write one object a line, and nothing else"
