"""How the command ends where something other than its own work ends it."""

import os
import signal
import sys
from typing import NoReturn

import pytest
from rich.console import Console
from torch.distributed import DistNetworkError

from finetune.callbacks import StopOnSignal
from finetune.cli import main
from finetune.errors import RunDirError


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


LOST = "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer"


class LeftError(Exception):
    """In place of the end of this process."""


def leaves(code: int) -> NoReturn:
    raise LeftError(code)


@pytest.mark.parametrize("error", [RuntimeError(LOST), DistNetworkError("failed to recv")])
def test_a_process_that_has_lost_another_is_no_fault_of_finetune(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("finetune.cli.SPEAKS_AFTER_SECONDS", 0)
    monkeypatch.setattr("os._exit", leaves)
    with pytest.raises(LeftError, match="2"):
        ended(error, "train", monkeypatch, "finetune.train.train")
    assert capfd.readouterr().err == "error: process 1: another was lost; go on with --resume\n"


def test_a_process_that_is_ended_for_another_has_no_word_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The launcher's signal comes where it still waits for the one that has ended."""
    monkeypatch.setattr("os._exit", leaves)

    def train_and_lose(error: Exception, *, signalled: bool) -> None:
        with StopOnSignal(Console(quiet=True)) as stop:
            stop.on_train_begin(None, None, None)
            if signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            raise error

    with pytest.raises(LeftError, match="75"):
        train_and_lose(RuntimeError(LOST), signalled=True)
    with pytest.raises(RuntimeError, match="by peer"):
        train_and_lose(RuntimeError(LOST), signalled=False)
    with pytest.raises(RunDirError, match="full"):  # which is to be told
        train_and_lose(RunDirError("the disk is full"), signalled=True)


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
