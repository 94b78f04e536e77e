import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data.sources import Row, Rows, Source, open_source, open_stream_source
from finetune.errors import DataError
from finetune.recipe import Columns, DataSection, DataSource
from tests.conftest import chat_row, write_rows

USER = {"role": "user", "content": "What?"}
ANSWER = {"role": "assistant", "content": "This."}
LLAVA = {
    "id": "1",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "This."},
    ],
}


def source(path: Path, **settings: Any) -> Source:
    entry = DataSource(path=str(path), **settings)
    return open_source(entry, DataSection(train=(entry,)), path.parent / "cache")


def read(path: Path, **settings: Any) -> tuple[list[Row], list[str]]:
    opened = source(path, **settings)
    both = list(opened.rows(0, len(opened)))
    rows = [row for _, row in both if isinstance(row, Row)]
    return rows, [f"{where}: {row}" for where, row in both if isinstance(row, DataError)]


def test_rows_know_their_line_and_blank_lines_count(tmp_path: Path) -> None:
    line = json.dumps({"messages": [USER, ANSWER]})
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}".encode())  # BOM, CRLF, no last LF
    rows, problems = read(file)
    assert [row.where for row in rows] == [f"{file}:1", f"{file}:3"]
    assert problems == []


def test_rows_in_are_rows_read_plus_problems(tmp_path: Path) -> None:
    good = json.dumps({"messages": [USER, ANSWER]}).encode()
    lines = [
        good,
        good[:-3],
        b"\xff\xfe",
        json.dumps({"messages": [USER]}).encode(),
        good,
        good.replace(b"This.", b"\\ud83d"),
        json.dumps({"messages": [USER, ANSWER | {"content": " "}]}).encode(),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(lines))
    rows, problems = read(file)
    assert [row.where for row in rows] == [f"{file}:1", f"{file}:5"]
    assert [problem.split(": ")[0] for problem in problems] == [
        f"{file}:{i}" for i in (2, 3, 4, 6, 7)
    ]


def test_one_by_number_and_many_in_a_row_are_the_same_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [chat_row(f"q{i}", f"a{i}") for i in range(9)])
    opened = source(tmp_path / "rows.jsonl")
    assert [opened.row(i) for i in range(9)] == [row for _, row in opened.rows(0, 9)]
    again = pickle.loads(pickle.dumps(opened))  # as a spawned process gets it
    assert again.row(4) == opened.row(4)


def test_auto_tells_the_format_and_images_start_from_the_files_folder(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [LLAVA])
    opened = source(tmp_path / "rows.jsonl")
    assert opened.reader.format_name == "llava"
    row = opened.row(0)
    assert [image.source for image in row.conversation.images()] == ["a.png"]
    assert row.image_access.root == tmp_path
    assert source(tmp_path / "rows.jsonl", image_root="/scans").row(0).image_access.root == Path(
        "/scans"
    )


def test_rows_of_two_meanings_are_refused_naming_both_formats(tmp_path: Path) -> None:
    """A picture without its placeholder: ms-swift puts it first, LLaMA-Factory refuses it."""
    row = {
        "query": "What?",
        "response": "This.",
        "instruction": "What?",
        "output": "This.",
        "images": ["a.png"],
    }
    write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=r"rows\.jsonl: .*(llama-factory.*ms-swift).*set format"):
        source(tmp_path / "rows.jsonl")


def test_rows_of_no_known_format_name_their_keys_and_the_columns_to_set(tmp_path: Path) -> None:
    rows = [{"scan": "a.png", "frage": "Was?", "antwort": "Das.", "n": i} for i in range(3)]
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="scan"):
        source(tmp_path / "rows.jsonl")
    columns = Columns(image="scan", question="frage", answer="antwort")
    row = source(tmp_path / "rows.jsonl", columns=columns).row(0)
    assert [message.text for message in row.conversation.messages] == ["Was?", "Das."]


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"rows\.jsonl: holds no rows"):
        source(tmp_path / "rows.jsonl")


def test_rows_of_several_sources_are_numbered_through(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 2)):
        write_rows(tmp_path / f"{name}.jsonl", [chat_row(f"{name}{i}", "x") for i in range(count)])
    sources = [source(tmp_path / "a.jsonl"), source(tmp_path / "b.jsonl")]
    rows = Rows(sources, np.array([0, 2, 4]))
    asked = [row.conversation.messages[0].text for row in rows]
    assert asked == ["a0", "a2", "b1"]
    assert rows.num_of_sources() == [2, 1]
    assert [row.conversation.messages[0].text for row in (rows + rows[1:])] == [*asked, "a2", "b1"]
    assert rows.where_of(3).endswith("b.jsonl:1")


def test_a_row_changed_since_it_was_checked_names_its_place(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows(file, [chat_row("q", "a")])
    rows = Rows([source(file)], np.array([0]))
    assert rows[0].where.endswith("rows.jsonl:1")
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: "):
        rows[0]


def test_a_stream_gives_the_rows_of_the_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [chat_row(f"q{i}", f"a{i}") for i in range(5)])
    entry = DataSource(path=str(tmp_path / "rows.jsonl"), streaming=True)
    stream = open_stream_source(entry, DataSection(train=(entry,)), tmp_path / "cache")
    opened = source(tmp_path / "rows.jsonl")
    assert list(stream.iterate()) == list(opened.rows(0, 5))
    assert list(stream.iterate(skip=3)) == list(opened.rows(3, 5))
