"""Checkpoints on disk: which one a run goes on from, and what is told of those that it does not."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from finetune.checkpoints import ASIDE, MANIFEST, fault_of, last_whole, move_newer_aside, settle
from finetune.cli import app, main
from finetune.errors import RunDirError
from finetune.rundir import RunDir, read_json
from finetune.train import _choose_checkpoint
from tests.test_train import assert_same_run, train


def written(checkpoints: Path, step: int) -> Path:
    """A settled one of a file and a folder with another."""
    aside = checkpoints / ASIDE / f"checkpoint-{step}"
    (aside / "inner").mkdir(parents=True)
    (aside / "weights").write_bytes(b"w" * 1000)
    (aside / "inner" / "state").write_text("s")
    place = checkpoints / aside.name
    settle(aside, place)
    return place


def test_a_settled_checkpoint_is_whole_and_nothing_is_left_aside(tmp_path: Path) -> None:
    place = written(tmp_path, 100)
    assert fault_of(place) is None
    assert set(json.loads((place / MANIFEST).read_text())) == {"weights", "inner/state"}
    assert list((tmp_path / ASIDE).iterdir()) == []


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        assert (tmp_path / "checkpoint-1").exists() == (synced[-1] == tmp_path.name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    written(tmp_path, 1)
    assert sorted(synced[:-1]) == sorted(["weights", "state", MANIFEST, "inner", "checkpoint-1"])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda place: (place / "weights").write_bytes(b"w" * 999), "999 bytes instead of 1,000"),
        (
            lambda place: (place / "weights").write_bytes(b"v" * 1000),
            "other bytes than were written",
        ),
        (lambda place: (place / "inner" / "state").unlink(), "inner/state is missing"),
        (lambda place: (place / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda place: (place / MANIFEST).write_text("{"), "is not JSON"),
        (lambda place: (place / MANIFEST).write_bytes(b"\xff{}"), "is not JSON"),
        (lambda place: (place / MANIFEST).write_text("[3]"), "is no list of files"),
        (lambda place: (place / MANIFEST).write_text("{}"), "lists no files"),
        (lambda place: (place / MANIFEST).write_text('{"weights": 1}'), "is no list of files"),
    ],
)
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_is_taken(
    damage: Callable[[Path], Any], told: str, tmp_path: Path
) -> None:
    before, last = written(tmp_path, 90), written(tmp_path, 100)
    assert last_whole(tmp_path) == last  # neither the oldest, nor the last in alphabetical order
    damage(last)
    messages: list[str] = []
    assert last_whole(tmp_path, messages.append) == before
    (message,) = messages
    assert message.startswith(f"{last}: is damaged (")
    assert told in message


def test_there_is_none_where_none_is_whole(tmp_path: Path) -> None:
    assert last_whole(tmp_path) is None
    shutil.copytree(written(tmp_path, 5), tmp_path / "checkpoint-best")
    (tmp_path / "checkpoint-5" / "weights").unlink()
    assert last_whole(tmp_path) is None


def test_a_checkpoint_takes_the_place_of_a_damaged_one_of_its_step(tmp_path: Path) -> None:
    place = written(tmp_path, 5)
    (place / "weights").unlink()
    assert fault_of(written(tmp_path, 5)) is None


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = written(tmp_path, 5)
    monkeypatch.setattr("finetune.checkpoints._digest", fail_to_read)
    with pytest.raises(RunDirError, match=r"checkpoint-5: cannot be read \(Input/output error\)"):
        last_whole(tmp_path)
    assert last.is_dir()


def test_damaged_ones_are_moved_aside_and_do_not_count(tmp_path: Path) -> None:
    kept = written(tmp_path, 5)
    for text in ("first", "second"):
        (written(tmp_path, 10) / "weights").write_text(text)
        assert last_whole(tmp_path) == kept
        move_newer_aside(tmp_path, kept)
        assert (tmp_path / "damaged-checkpoint-10" / "weights").read_text() == text
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    move_newer_aside(tmp_path, None)
    assert (tmp_path / "damaged-checkpoint-5").is_dir()


def test_a_run_with_damaged_checkpoints_alone_starts_over_and_says_so(
    dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataset(num_eval=0, adapter={"dropout": 0.2})
    train(str(recipe), [f"output.dir={tmp_path / 'unbroken'}"])
    train(str(recipe))
    run, told = RunDir(tmp_path / "run"), io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr("finetune.checkpoints._digest", fail_to_read)
        with pytest.raises(RunDirError, match="mend the drive or folder and start again"):
            train(str(recipe), resume=True)
    for step in (2, 4):
        (run.checkpoints / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")
    assert train(str(recipe), resume=True, console=Console(file=told)) == 0
    assert "all 2 checkpoints are damaged: starting over" in told.getvalue()
    assert "the one before" not in told.getvalue()
    left = {"checkpoint-2", "checkpoint-4", "damaged-checkpoint-2", "damaged-checkpoint-4"}
    assert {path.name for path in run.checkpoints.glob("*checkpoint-*")} == left
    assert_same_adapter(run, RunDir(tmp_path / "unbroken"))


def fail_to_read(path: Path) -> str:
    raise OSError(errno.EIO, "Input/output error")


def assert_same_adapter(ours: RunDir, theirs: RunDir) -> None:
    file = "adapter_model.safetensors"
    assert (ours.adapter / file).read_bytes() == (theirs.adapter / file).read_bytes()


def test_the_first_process_chooses_the_checkpoint_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one looks at no file, and fails as the first does."""
    run, console = RunDir(tmp_path), Console(quiet=True)
    damaged, chosen = written(run.checkpoints, 10), written(run.checkpoints, 5)
    (damaged / "weights").unlink()
    told: list[Any] = []
    monkeypatch.setattr("finetune.train.lists_of_all", lambda mine: told.extend(mine) or told)
    assert _choose_checkpoint(run, console) == chosen
    assert not damaged.exists()
    monkeypatch.setattr("finetune.train.is_first", lambda: False)
    monkeypatch.setattr("finetune.train.last_whole", lambda *_: pytest.fail("looked"))
    assert _choose_checkpoint(run, console) == chosen
    told[:] = [None, "cannot be read"]
    with pytest.raises(RunDirError, match="cannot be read"):
        _choose_checkpoint(run, console)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_leaves_the_checkpoints_before(
    dataset: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
) -> None:
    recipe = dataset(training={"max_steps": 6, "save_steps": 2, "keep_checkpoints": 1})
    run = RunDir(tmp_path / "run")

    def fail(written: Path, place: Path) -> None:
        if place.name == "checkpoint-4":
            raise OSError(number, os.strerror(number))
        settle(written, place)

    with monkeypatch.context() as patch:
        patch.setattr("finetune.saving.settle", fail)
        patch.setattr(sys, "argv", ["finetune", "train", str(recipe)])
        with pytest.raises(SystemExit) as stop:
            main()
    told = capfd.readouterr().err
    assert stop.value.code == 2
    assert re.search(rf"checkpoint-4: cannot be written .*{os.strerror(number)}", told)
    assert "Traceback" not in told
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-2"]
    assert fault_of(run.checkpoints / "checkpoint-2") is None
    if number == errno.ENOSPC:
        train(str(recipe), [f"output.dir={tmp_path / 'unbroken'}"])
        assert train(str(recipe), resume=True) == 0
        assert_same_run(run, RunDir(tmp_path / "unbroken"))
        assert [path.name for path in run.checkpoints.glob("checkpoint-*")] == ["checkpoint-6"]


LIMITED = """
import resource, signal, sys
from finetune.cli import main
from finetune.saving import SFTTrainer

limit, stock = int(sys.argv.pop()), SFTTrainer._save_checkpoint

def save(trainer, *args):
    if trainer.state.global_step == 4:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    stock(trainer, *args)

SFTTrainer._save_checkpoint = save
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("part", ["adapter_model.safetensors", "optimizer.pt", "all but weights"])
def test_a_limit_of_the_system_met_within_a_file_leaves_the_checkpoint_before(
    dataset: Callable[..., Path], tmp_path: Path, part: str
) -> None:
    """Where no file may be larger, whatever writes it: safetensors, torch, or Python."""
    recipe = dataset(num_eval=0, adapter={"dropout": 0.2}, training={"max_steps": 6})
    train(str(recipe), [f"output.dir={tmp_path / 'unbroken'}"])
    sizes = read_json(tmp_path / "unbroken" / "checkpoints" / "checkpoint-4" / MANIFEST)
    limit = sizes[part]["bytes"] // 2 if part in sizes else 0
    limited = [sys.executable, "-c", LIMITED, "train", str(recipe), str(limit)]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "checkpoint-4: cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    run = RunDir(tmp_path / "run")
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-2"]
    assert train(str(recipe), resume=True) == 0
    assert_same_run(run, RunDir(tmp_path / "unbroken"))


def test_auto_begins_a_run_and_goes_on_with_it(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = dataset(num_eval=0, training={"max_steps": 2})
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(2):
        done = CliRunner().invoke(app, ["train", str(recipe), "--resume", "auto"])
        assert done.exit_code == 0, done.output
        lines = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        assert lines == sorted(set(lines))
    refused = CliRunner().invoke(app, ["train", str(recipe), "auto"])
    assert refused.exit_code != 0
