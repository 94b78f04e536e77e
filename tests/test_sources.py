import json
from pathlib import Path

import pytest

from data_formats.chat import FormatError, dump_chat, parse_chat
from finetune.data.sources import Row, read_sources
from finetune.errors import DataError
from finetune.recipe import DataSource
from tests.conftest import chat_row

USER = {"role": "user", "content": "What?"}
ANSWER = {"role": "assistant", "content": "This."}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "expected an object with 'messages', found an empty list"),
        ({}, r"'messages' is missing \(found nothing\)"),
        ({"conversations": [], "id": 1}, "'messages' is missing .found 'conversations', 'id'."),
        ({"messages": []}, "at least one message, found an empty list"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": ["hello"]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "gpt", "content": "x"}]}, r"messages\[0\]\.role is 'gpt'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"messages\[0\]\.role is \['user'\]"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "'images' stands beside 'messages'"),
        ({"messages": [USER | {"image": "a.png"}, ANSWER]}, "unknown key 'image'; expected role"),
        ({"messages": [USER, ANSWER | {"trian": False}]}, "'trian'; did you mean 'train'"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "x", "image": "a"}]}
                ]
            },
            "unknown key 'image'",
        ),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content is missing"),
        ({"messages": [USER, ANSWER | {"train": "no"}]}, r"messages\[1\]\.train must be true or"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be a string or a list"),
        ({"messages": [{"role": "user", "content": [3]}]}, r"content\[0\] must be a text or image"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "type is 'video'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text must be a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image must be a path"),
    ],
)
def test_a_row_of_another_shape_says_where_and_what_was_expected(row: object, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_chat(row)


def test_a_row_reads_back_as_it_was_written() -> None:
    row = chat_row("What?", "This.", "a.png", "b.png")
    row["messages"][1]["train"] = False
    assert dump_chat(parse_chat(row)) == row


def test_plain_string_content_is_one_text_part() -> None:
    conversation = parse_chat({"messages": [USER, ANSWER]})
    assert [message.text for message in conversation.messages] == ["What?", "This."]


def test_empty_columns_of_a_table_are_no_unknown_keys() -> None:
    part = {"type": "text", "text": "What?", "image": None}
    conversation = parse_chat({"messages": [{"role": "user", "content": [part]}, ANSWER], "id": 7})
    assert conversation.messages[0].text == "What?"


def read(path: Path) -> tuple[list[Row], list[str]]:
    rows, problems = read_sources([DataSource(path=str(path))])
    return rows, [str(problem) for problem in problems]


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
        b"[" * 100_000,
        json.dumps({"messages": [USER]}).encode(),
        json.dumps({"messages": [USER, ANSWER | {"train": False}]}).encode(),
        good,
        good.replace(b"This.", b"\\ud83d"),
        good[:-1] + b', "id": ' + b"9" * 5000 + b"}",
        json.dumps({"messages": [USER, ANSWER | {"content": " "}]}).encode(),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(lines))
    rows, problems = read(file)
    assert [row.where for row in rows] == [f"{file}:1", f"{file}:7"]
    for number, words in (
        (2, "is not JSON"),
        (3, "is not UTF-8"),
        (4, "is nested too deeply|is not JSON"),
        (5, "no assistant turn"),
        (6, "no assistant turn"),
        (8, "half of a character"),
        (9, "cannot be read"),
        (10, "no assistant turn"),
    ):
        assert any(p.startswith(f"{file}:{number}: ") for p in problems), problems
        problem = next(p for p in problems if p.startswith(f"{file}:{number}: "))
        assert any(word in problem for word in words.split("|"))


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "folder"])
def test_another_container_is_refused_rather_than_misread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("question,answer")
    with pytest.raises(DataError, match=r"give a \.jsonl file of chat rows"):
        read(tmp_path / name)
