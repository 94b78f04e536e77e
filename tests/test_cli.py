"""How the command ends where something other than its own work ends it."""

import sys
from typing import NoReturn

import pytest

from finetune.cli import main


def ended(
    error: BaseException, verb: str, monkeypatch: pytest.MonkeyPatch, target: str
) -> int | str | None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(target, fail)
    monkeypatch.setattr(sys, "argv", ["finetune", verb, "quickstart"])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.mark.parametrize(
    ("verb", "target", "told"),
    [
        ("train", "finetune.train.train", "a run that had begun goes on with --resume"),
        ("eval", "finetune.cli_judge.run_folder", "the same command goes on with the rows"),
        ("check", "finetune.check.check", "stopped"),
    ],
)
def test_an_interrupted_command_says_how_to_go_on(
    verb: str,
    target: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert ended(KeyboardInterrupt(), verb, monkeypatch, target) == 130
    assert told in capfd.readouterr().err


def test_of_several_processes_the_first_says_that_they_were_interrupted(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert ended(KeyboardInterrupt(), "train", monkeypatch, "finetune.train.train") == 130
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("verb", "target", "told"),
    [
        ("train", "finetune.train.train", "make room, and go on with --resume"),
        ("eval", "finetune.cli_judge.run_folder", "make room, and give the command again"),
    ],
)
def test_a_full_disk_is_told_with_what_the_verb_can_do_then(
    verb: str,
    target: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    error = OSError(28, "No space left on device")
    assert ended(error, verb, monkeypatch, target) == 2
    assert told in capfd.readouterr().err
