"""Every kind of bad row in the table against what is really said of it."""

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from finetune.data.examples import Encoder
from finetune.data.sources import Row, Source, open_source
from finetune.errors import DataError
from finetune.families import FAMILIES
from finetune.recipe import DataSection, DataSource
from scripts import bad_rows_table
from tests.bad_rows import (
    BAD_FILES,
    BAD_ROWS,
    FOLDER,
    GOOD,
    GOOD_RECORDS,
    PIPE,
    PNG,
    BadFile,
    BadRow,
    Beside,
    Hole,
    Link,
    parquet,
    tar,
)
from tests.conftest import NANO_IMAGES

KINDS = [bad for group in BAD_ROWS.values() for bad in group]
MESSAGES = {bad.kind: bad.message for bad in (*KINDS, *BAD_FILES)}
CASES = [
    pytest.param(bad, bad_first, id=f"{bad.kind}, {'first' if bad_first else 'last'}")
    for bad in KINDS
    for bad_first in (False, True)
    if not (bad_first and bad.ends_file)
]
HOSTS = {"localhost": "127.0.0.1", "wiki.example": "10.1.2.3", "2130706433": "127.0.0.1"}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are looked up in a table, and nothing is connected to."""

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        if host.endswith("gone.example"):
            raise socket.gaierror("Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (HOSTS.get(host, host), port))]

    def connect(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)


def write_files(folder: Path, files: Beside) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is FOLDER:
            path.mkdir()
        elif content is PIPE:
            os.mkfifo(path)
        elif isinstance(content, Link):
            path.symlink_to(content.target)
        else:
            write_pieces(path, [content])


def write_pieces(path: Path, pieces: list[Any], end: bytes = b"") -> None:
    with path.open("wb") as file:
        for piece in pieces:
            if isinstance(piece, Hole):
                file.write(piece.before)
                file.seek(piece.num_bytes, os.SEEK_CUR)
                piece = piece.after
            file.write((piece if isinstance(piece, bytes) else json.dumps(piece).encode()) + end)


def write(bad: BadRow, folder: Path, *, bad_first: bool) -> Path:
    """The data file that holds the bad row and a good one; its folder holds what they name."""
    write_files(folder, {"good.png": PNG} | dict(bad.beside))
    good = bad.good or GOOD_RECORDS.get(bad.container) or GOOD[bad.source.get("format", "columns")]
    rows: list[Any] = [bad.row, good] if bad_first else [good, bad.row]
    path = folder / f"train.{bad.container}"
    match bad.container:
        case "tar":
            path.write_bytes(tar(rows[0] | rows[1])[: bad.cut_at])
        case "parquet":
            path.write_bytes(parquet(rows))
        case "csv" | "tsv":
            write_pieces(path, [bad.header, *rows], b"\n")
        case "jsonl":
            write_pieces(path, rows, b"\n")
    return path


def opened(path: Path, folder: Path, settings: Any, data: Any) -> tuple[Source, DataSection]:
    """The recipe's entry for the file; /data in it stands for the folder."""
    written = json.loads(json.dumps(settings).replace("/data", str(folder)))
    section = DataSection.model_validate(
        {"train": [{"path": str(path)} | written], "max_tokens": 512} | dict(data)
    )
    entry: DataSource = section.train[0]
    return open_source(entry, section, folder.parent / "cache"), section


def said_of(row: Row | DataError, encoder: Encoder) -> str | None:
    """Why the row cannot be used, or None where it can."""
    counted = row if isinstance(row, DataError) else encoder.count_many([row])[0]
    if not isinstance(counted, DataError):
        assert not isinstance(row, DataError)
        assert len(encoder.encode(row).input_ids) == counted.num_tokens
        return None
    if isinstance(row, Row):  # whoever meets the row says the same of it
        with pytest.raises(DataError) as caught:
            encoder.encode(row)
        assert str(caught.value) == str(counted)
    return str(counted)


@pytest.mark.parametrize(("bad", "bad_first"), CASES)
def test_a_bad_row_gets_its_message_and_the_row_beside_it_stays_good(
    bad: BadRow, bad_first: bool, tmp_path: Path, nano_processor: Any
) -> None:
    if ".pdf" in str(bad.row):
        pytest.importorskip("pypdfium2")
    folder = tmp_path / "data"
    folder.mkdir()
    path = write(bad, folder, bad_first=bad_first)
    source, data = opened(path, folder, bad.source, bad.data)
    images = NANO_IMAGES.model_copy(update=dict(bad.images))
    encoder = Encoder.of_recipe(nano_processor, FAMILIES["idefics2"], images, data)
    said = [said_of(row, encoder) for _, row in source.rows(0, len(source))]
    expected = [bad.message, None] if bad_first else [None, bad.message]
    assert [text and text.replace(str(folder), "/data") for text in said] == expected
    number = 0 if bad_first else len(source) - 1
    try:
        alone: Row | DataError = source.row(number)
    except DataError as error:
        alone = error
    assert said_of(alone, encoder) == said[number]


@pytest.mark.parametrize("bad", BAD_FILES, ids=lambda bad: bad.kind)
def test_a_bad_file_is_refused_with_its_message(bad: BadFile, tmp_path: Path) -> None:
    if ".zst" in bad.path:
        pytest.importorskip("zstandard")
    folder = tmp_path / "data"
    folder.mkdir()
    write_files(folder, bad.files)
    with pytest.raises(DataError) as caught:
        opened(folder / bad.path, folder, bad.source, {})
    where, _, message = str(caught.value).replace(str(folder), "/data").partition(": ")
    assert re.fullmatch(
        re.escape(f"/data/{bad.path}") + r"(/[\w.]+)?(:\d+)?|/data/train-1\.jsonl", where
    )
    assert message == bad.message


# What a person is told to do: an imperative at the start of the last clause, or a question that
# names what was probably meant.
ADVICE = re.compile(
    r"(?:^|[,:?] (?:or |and )?)(?:add|ask|check|close|compress|convert|copy|decompress|download|"
    r"encode|export|fill|get|give|keep|leave|load|look|lower|make|mend|mind|move|name|point|pull|"
    r"put|raise|remove|rename|replace|run|save|scale|set|split|start|try|unpack|use|write)\b"
    r"|(?:^|, )(?:did you mean|is) '.*\?$"
)
OUR_INNARDS = re.compile(
    r"(?<!Python's )\bNone\b|\b(?:dict|str|int|float|bool|tuple|ndarray|object at|NoneType)\b|0x|"
    r"Traceback|\w(?:Error|Exception)\b|<class|\bfinetune\.|\bPIL\b"
)


def faults_of(message: str) -> list[str]:
    """What a reader would hold against a message."""
    faults = []
    if not ADVICE.search(message.rpartition("; ")[2]) or "; " not in message:
        faults.append("it does not say what to do")
    if "\n" in message or len(message) > 300:
        faults.append("it is not one short line")
    if not message.isprintable():
        faults.append("it holds what cannot be shown")
    if OUR_INNARDS.search(message):
        faults.append("it speaks of Python")
    return faults


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_message_is_one_short_line_that_says_what_to_do(kind: str) -> None:
    assert faults_of(MESSAGES[kind]) == []


@pytest.mark.parametrize(
    "message",
    [
        "is bad",
        "'messages' must be a list, found a string",
        "is missing (found 'a'); this format needs it",
        "is not JSON; line 1 column 3",
        "cannot be read (KeyError); mend it",
        "must be text, found <class 'dict'>; write it so",
        "has\ntwo lines; mend it",
        "a" * 300 + "; mend it",
    ],
)
def test_a_message_without_advice_or_for_programmers_would_be_found(message: str) -> None:
    assert faults_of(message)


def test_the_table_is_as_large_as_promised_and_names_each_kind_once() -> None:
    assert len(MESSAGES) == len(KINDS) + len(BAD_FILES) >= 300


def test_the_page_of_bad_rows_is_not_stale() -> None:
    assert bad_rows_table.is_stale() is False, "run python -m scripts.bad_rows_table"
