"""Why a run ended, kept for its report."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from finetune.callbacks import StopOnSignal
from finetune.endings import Ending
from finetune.errors import DataError, ModelError
from finetune.rundir import RunDir


@pytest.fixture
def begun(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.recipe.write_text("training: {max_steps: 4}")
    run.environment.write_text("{}")
    return run


def end_of(run: RunDir) -> dict[str, Any]:
    return json.loads(run.ended.read_text())


def end_with(run: RunDir, error: BaseException, *, signal_name: str = "") -> str:
    """What is told beside, where an error ends a run that this process has begun."""
    console = Console(file=io.StringIO(), width=400)
    stop = StopOnSignal(console)
    stop.signal_name = signal_name

    def fails() -> None:
        with Ending(run, stop, console) as ending:
            ending.begin()
            raise error

    with pytest.raises(type(error)):
        fails()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("error", "by", "why", "resume_with"),
    [
        (DataError("a.jsonl:3: is gone"), "error", "a.jsonl:3: is gone", []),
        (ModelError("diverged", resume_with=None), "error", "diverged", None),
        (ZeroDivisionError("by nothing"), "error", "ZeroDivisionError: by nothing", None),
        (OSError("no room"), "error", "OSError: no room", []),
        (DataError("caf\udce9.png: is gone"), "error", "caf\\udce9.png: is gone", []),
        (
            OSError("not at https://me:word@host/a.png?token=abc, nor b"),
            *("error", "OSError: not at https://...@host/a.png?... nor b", []),
        ),
        (KeyboardInterrupt(), "signal", "SIGINT", []),
        (SystemExit(75), "signal", "SIGUSR1", []),
        (
            torch.distributed.DistBackendError("broken"),
            *("signal", "the loss of another of its processes, whose own words are in", []),
        ),
    ],
)
def test_what_ended_a_run_is_kept_and_goes_on_its_way(
    begun: RunDir, error: BaseException, by: str, why: str, resume_with: list[str] | None
) -> None:
    assert not end_with(begun, error, signal_name="SIGUSR1")
    told = end_of(begun)
    assert told["why"].startswith(why)
    assert (told["by"], told["resume_with"]) == (by, resume_with)
    assert why in begun.report.read_text()


def test_of_a_loading_process_its_own_words_are_kept(begun: RunDir) -> None:
    words = "Caught DataError in DataLoader worker process 0.\nTraceback\n  File\n"
    end_with(begun, DataError(f"{words}finetune.errors.DataError: a.jsonl:3: is gone\n"))
    assert end_of(begun)["why"] == "a.jsonl:3: is gone"


def test_nothing_is_kept_of_a_run_that_another_process_has_begun(begun: RunDir) -> None:
    begun.ended.write_text("as before")
    console = Console(file=io.StringIO())
    with pytest.raises(DataError), Ending(begun, StopOnSignal(console), console):
        raise DataError("it is being written by another")
    assert begun.ended.read_text() == "as before"
    assert not begun.report.exists()


def test_how_a_run_ended_is_forgotten_when_it_goes_on(begun: RunDir) -> None:
    begun.ended.write_text("{}")
    console = Console(file=io.StringIO())
    with Ending(begun, StopOnSignal(console), console) as ending:
        ending.begin()
    assert not begun.ended.exists()


def test_a_report_that_cannot_be_written_does_not_hide_what_ended_the_run(
    begun: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_run: RunDir) -> None:
        raise OSError("disk quota exceeded")

    monkeypatch.setattr("finetune.endings.write_report", fails)
    told = end_with(begun, DataError("a row is gone"))
    assert "report.html was not written: disk quota exceeded" in told
    assert end_of(begun)["why"] == "a row is gone"
    console = Console(file=io.StringIO(), width=400)
    Ending(begun, StopOnSignal(console), console).write()  # a signal after a whole step
