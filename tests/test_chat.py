"""Conversations and answered files, on nano with a drawn adapter, against generation row by row."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from finetune import answering, chat
from finetune.cli import app
from finetune.errors import DataError, RecipeError
from finetune.rundir import append_jsonl, read_jsonl
from tests.conftest import chat_row, noise, write_rows
from tests.test_merge import Made, made_run

QUIET = Console(quiet=True)


@pytest.fixture
def made(dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """A run, and the test's folder as the current one."""
    monkeypatch.chdir(tmp_path)
    return made_run(dataset(evaluation={"max_new_tokens": 6}), tmp_path / "run", seed=3)


def talked(made: Made, *lines: str, images: tuple[Path, ...] = (), compare: bool = False) -> str:
    given, screen = iter(lines), io.StringIO()

    def ask() -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    console = Console(file=screen, width=200)
    chat.talk(made.run, images, compare=compare, ask=ask, console=console)
    return screen.getvalue()


def test_words_come_one_by_one_and_are_the_answer(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = "What is written?"
    expected = chat.answer(made.run, [Path("train1.png")], question)
    heard: list[str] = []
    stock = answering.Words.on_finalized_text

    def hear(self: Any, text: str, stream_end: bool = False) -> None:
        heard.append(text)
        stock(self, text, stream_end)

    monkeypatch.setattr(answering.Words, "on_finalized_text", hear)
    screen = talked(made, question, images=(Path("train1.png"),))
    assert expected
    assert f"adapter: {expected}" in screen.replace("adapter:  ", "adapter: ")
    assert "".join(heard).strip() == expected
    assert len([each for each in heard if each]) > 1


def test_a_conversation_is_asked_as_a_whole(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    stock = answering.Asker.answer

    def answer(self: Any, conversation: Any, *args: Any) -> str:
        asked.append(conversation)
        return stock(self, conversation, *args)

    monkeypatch.setattr(answering.Asker, "answer", answer)
    talked(made, "/image train1.png", "First?", "Second?", "/reset", "Third?")
    assert [len(each.messages) for each in asked] == [1, 3, 1]
    assert [len(list(each.images())) for each in asked] == [1, 1, 0]
    first_answer = asked[1].messages[1]
    row = next(iter(asked[1].messages[:1]))
    assert first_answer.text
    assert first_answer.text == chat.answer(made.run, [Path("train1.png")], row.text)


def test_what_is_wrong_is_said_and_the_conversation_goes_on(made: Made) -> None:
    (made.run.parent / "broken.png").write_bytes(b"no picture")
    screen = talked(
        made,
        "/image none.png",
        "/image broken.png",
        "What?",
        "/imag x",
        '/image "',
        "/reset",
        "Go?",
    )
    assert "none.png: no such file" in screen
    assert "broken.png" in screen
    assert "is text, not an image" in screen
    assert screen.count(chat.HELP) == 2  # at the start, and for /imag
    assert screen.count("adapter: ") == 2


def test_base_beside_adapter(made: Made) -> None:
    runner = CliRunner()
    arguments = ["chat", str(made.run), "What is written?", "--image", "train1.png"]
    both = runner.invoke(app, [*arguments, "--compare"]).stdout
    adapter = runner.invoke(app, arguments).stdout
    base, found = both.removeprefix("base: ").split("adapter: ")
    assert found == adapter
    assert base != adapter  # or the adapter was not taken away


def questions(folder: Path, num: int = 11) -> Path:
    """Chat rows that end with a question or with an answer, in turn; one has a broken picture."""
    rows = []
    for number in range(num):
        noise(28 * (1 + number % 3), 56, seed=number).save(folder / f"q{number}.png")
        row = chat_row("What is it?" * (1 + number % 4), "A5", f"q{number}.png")
        rows.append({"messages": row["messages"][:1]} if number % 2 else row)
    write_rows(folder / "questions.jsonl", rows)
    (folder / "q4.png").write_bytes(b"no picture")
    return folder / "questions.jsonl"


def test_a_file_is_answered_row_by_row_in_its_order(made: Made, tmp_path: Path) -> None:
    data, out = questions(tmp_path), tmp_path / "out.jsonl"
    assert chat.answer_file(made.run, data, out, compare=True, console=QUIET) == 11
    lines = read_jsonl(out)
    assert [line["where"].rpartition(":")[2] for line in lines] == [str(i) for i in range(1, 12)]
    assert [i for i, line in enumerate(lines) if "error" in line] == [4]
    assert "q4.png" in lines[4]["error"]
    for number, line in enumerate(lines):
        if number == 4:
            continue
        assert ("references" in line) == (number % 2 == 0)
        alone = chat.answers(
            made.run, [tmp_path / f"q{number}.png"], line["question"], compare=True
        )
        assert (line["base"], line["adapter"]) == (alone["base"], alone["adapter"])


def test_an_answered_file_goes_on_where_it_was_broken_off(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, whole, broken = questions(tmp_path), tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    chat.answer_file(made.run, data, whole, compare=False, console=QUIET)
    kept = whole.read_bytes().splitlines(keepends=True)
    broken.write_bytes(b"".join(kept[:5]) + kept[5][:20])
    asked: list[int] = []
    stock = answering.Asker.answers

    def answers(self: Any, prompts: Any, **settings: Any) -> list[str]:
        asked.append(len(prompts))
        return stock(self, prompts, **settings)

    monkeypatch.setattr(answering.Asker, "answers", answers)
    chat.answer_file(made.run, data, broken, compare=False, console=QUIET)
    assert broken.read_bytes() == whole.read_bytes()
    assert sum(asked) == 6


def test_answers_to_other_rows_are_not_gone_on_with(made: Made, tmp_path: Path) -> None:
    data, out = questions(tmp_path), tmp_path / "out.jsonl"
    out.write_text(json.dumps({"where": "another.jsonl:1", "adapter": "x"}) + "\n")
    with pytest.raises(DataError, match="another file"):
        chat.answer_file(made.run, data, out, compare=False, console=QUIET)
    chat.answer_file(made.run, data, tmp_path / "two.jsonl", compare=False, console=QUIET)
    with pytest.raises(DataError, match="base and adapter"):
        chat.answer_file(made.run, data, tmp_path / "two.jsonl", compare=True, console=QUIET)


@pytest.mark.parametrize(
    "arguments", [["--data", "x.jsonl"], ["--out", "x"], ["q", "--data", "x.jsonl", "--out", "y"]]
)
def test_options_that_do_not_go_together_are_refused(made: Made, arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["chat", str(made.run), *arguments])
    assert isinstance(result.exception, RecipeError)


def test_lines_are_added_after_whole_ones(tmp_path: Path) -> None:
    file = tmp_path / "new" / "lines.jsonl"
    append_jsonl(file, [{"a": 1}])
    append_jsonl(file, [{"b": "é"}])
    with file.open("ab") as opened:
        opened.write(b'{"c": ')
    append_jsonl(file, [{"d": 4}])
    assert read_jsonl(file) == [{"a": 1}, {"b": "é"}, {"d": 4}]
