"""Checkpoints on disk: which one a run goes on from, and what is told of those that it does not."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finetune.checkpoints import ASIDE, MANIFEST, fault_of, last_whole, settle
from finetune.cli import app
from finetune.errors import RunDirError
from finetune.rundir import RunDir
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
        (lambda place: (place / MANIFEST).unlink(), "manifest.json: cannot be read"),
        (lambda place: (place / MANIFEST).write_text("{"), "is not JSON"),
        (lambda place: (place / MANIFEST).write_text("[]"), "is no list of files"),
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


def test_a_disk_that_fills_up_leaves_the_checkpoints_before(
    dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataset(training={"max_steps": 6, "save_steps": 2, "keep_checkpoints": 1})
    train(str(recipe), [f"output.dir={tmp_path / 'unbroken'}"])
    run = RunDir(tmp_path / "run")

    def fail(written: Path, place: Path) -> None:
        if place.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        settle(written, place)

    with monkeypatch.context() as patch:
        patch.setattr("finetune.trainer.settle", fail)
        with pytest.raises(RunDirError, match=r"checkpoint-4: cannot be written .*No space left"):
            train(str(recipe))
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-2"]
    assert fault_of(run.checkpoints / "checkpoint-2") is None
    assert train(str(recipe), resume=True) == 0
    assert_same_run(run, RunDir(tmp_path / "unbroken"))
    assert [path.name for path in run.checkpoints.glob("checkpoint-*")] == ["checkpoint-6"]


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
