"""Data files -> rows: each a conversation that knows where it came from. Nothing is dropped without
being listed.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_formats.chat import Conversation, FormatError, parse_chat
from finetune.errors import DataError
from finetune.recipe import DataSource


@dataclass(frozen=True, slots=True)
class Row:
    """A usable row: `where` is `file:line`, relative image paths are looked up under
    `image_root`.
    """

    where: str
    conversation: Conversation
    image_root: Path


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row cannot be used."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def read_sources(sources: Sequence[DataSource]) -> tuple[list[Row], list[Problem]]:
    """Every row of every source, in order: those that can be used, and what is wrong with the
    others.

    Raises `DataError` where a whole source cannot be read, or holds no rows.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    for source in sources:
        path = _local_jsonl(source)
        image_root = Path(source.image_root) if source.image_root else path.parent
        before = len(rows) + len(problems)
        for item in _read_jsonl(path, image_root):
            if isinstance(item, Row):
                rows.append(item)
            else:
                problems.append(item)
        if len(rows) + len(problems) == before:
            raise DataError(
                f"{_shown(path)}: holds no rows; give a file with one JSON object a line"
            )
    return rows, problems


def _local_jsonl(source: DataSource) -> Path:
    if source.path is None:
        raise DataError(
            f"data: hub: {source.hub} cannot be read by this version; save it as a chat JSONL file "
            "and give its path"
        )
    path = Path(source.path)
    if source.format not in ("auto", "chat") or path.suffix != ".jsonl":
        raise DataError(
            f"{_shown(path)}: format {source.format!r} of a {path.suffix or 'folder'} cannot be "
            "read by this version; "
            "give a .jsonl file of chat rows"
        )
    return path


def _read_jsonl(path: Path, image_root: Path) -> Iterator[Row | Problem]:
    """A `Row` or a `Problem` for each line that is not blank."""
    shown = _shown(path)
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _read_line(line, f"{shown}:{number}", image_root)
    except OSError as error:
        raise DataError(f"{shown}: cannot be read ({error.strerror})") from error


def _read_line(line: bytes, where: str, image_root: Path) -> Row | Problem:
    try:
        conversation = parse_chat(json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return Problem(
            where, f"is not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
        )
    except json.JSONDecodeError as error:
        return Problem(
            where, f"is not JSON: {error.msg} at column {error.colno}; write one object a line"
        )
    except RecursionError:
        return Problem(where, "is nested too deeply to be read; a chat row has four levels")
    except FormatError as error:
        return Problem(where, str(error))
    except ValueError as error:  # a whole number of thousands of digits
        return Problem(where, f"holds a value that cannot be read ({error}); write it as a string")
    if not _is_text(conversation):
        return Problem(
            where, "holds half of a character (a lone surrogate such as \\ud83d); write it whole"
        )
    if not conversation.learns():
        return Problem(
            where,
            "has no assistant turn to learn from; add one, or leave the row out (train: false "
            "turns do not count)",
        )
    return Row(where, conversation, image_root)


def _is_text(conversation: Conversation) -> bool:
    """Whether every text can be encoded: JSON escapes may cut an emoji in two."""
    try:
        "".join(message.text for message in conversation.messages).encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(path: Path) -> str:
    """The path as a person standing in the current folder would write it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return os.fspath(path)
