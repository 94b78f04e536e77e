"""Why a run ended, kept for its report."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from finetune.callbacks import StopOnSignal
from finetune.endings import told_in_the_report, write_end
from finetune.errors import DataError, FinetuneError, ModelError
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


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


class NothingHelpsError(ModelError):
    resume_with = None


@pytest.mark.parametrize(
    ("error", "by", "why", "resume_with"),
    [
        (DataError("a.jsonl:3: is gone"), "error", "a.jsonl:3: is gone", []),
        (NothingHelpsError("diverged"), "error", "diverged", None),
        (ZeroDivisionError("by nothing"), "error", "ZeroDivisionError: by nothing", []),
        (DataError("caf\udce9.png: is gone"), "error", "caf\\udce9.png: is gone", []),
        (KeyboardInterrupt(), "signal", "SIGINT", []),
        (
            torch.distributed.DistBackendError("broken"),
            *("signal", "the loss of another of its processes", []),
        ),
    ],
)
def test_what_ended_a_run_is_kept_and_goes_on_its_way(
    begun: RunDir, error: BaseException, by: str, why: str, resume_with: list[str] | None
) -> None:
    console = quiet()
    with pytest.raises(type(error)), told_in_the_report(begun, StopOnSignal(console), console):
        raise error
    told = end_of(begun)
    assert (told["by"], told["why"], told["resume_with"]) == (by, why, resume_with)
    assert why in begun.report.read_text()


def test_of_a_loading_process_its_own_words_are_kept(begun: RunDir) -> None:
    words = "Caught DataError in DataLoader worker process 0.\nTraceback\n  File\n"
    write_end(begun, "", DataError(f"{words}finetune.errors.DataError: a.jsonl:3: is gone\n"))
    assert end_of(begun)["why"] == "a.jsonl:3: is gone"


def test_the_signal_that_ends_a_run_is_named(begun: RunDir) -> None:
    stop = StopOnSignal(quiet())
    stop.signal_name = "SIGUSR1"
    with pytest.raises(SystemExit), told_in_the_report(begun, stop, quiet()):
        raise SystemExit(75)
    assert end_of(begun)["why"] == "SIGUSR1"


def test_nothing_is_written_where_no_run_has_begun(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(FinetuneError), told_in_the_report(run, StopOnSignal(quiet()), quiet()):
        raise FinetuneError("too soon")
    assert not run.path.exists()


def test_a_report_that_cannot_be_written_does_not_hide_what_ended_the_run(
    begun: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_run: RunDir) -> None:
        raise OSError("disk quota exceeded")

    monkeypatch.setattr("finetune.endings.write_report", fails)
    console = quiet()
    with (
        pytest.raises(DataError, match="a row is gone"),
        told_in_the_report(begun, StopOnSignal(console), console),
    ):
        raise DataError("a row is gone")
    assert isinstance(console.file, io.StringIO)
    told = console.file.getvalue()
    assert "report.html was not written: disk quota exceeded" in told
