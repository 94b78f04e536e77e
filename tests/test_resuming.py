"""Runs that go on: one that its patience ends, and one whose best weights are those of a step
before.
"""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune.errors import RunDirError
from finetune.recipe import load_recipe
from finetune.rundir import RunDir, read_json, read_jsonl, write_jsonl
from finetune.saving import SavingTrainer
from finetune.train import train
from tests.test_train import assert_same_run, tell_at

QUIET: dict[str, Any] = {"console": Console(quiet=True), "results": Console(quiet=True)}


@pytest.fixture
def recipe(dataset: Callable[..., Path]) -> str:
    """Of a run that learns nothing, and so ends at the third evaluation, at step 6; neither a
    checkpoint nor a line of the log is due there.
    """
    training = {"max_steps": 20, "save_steps": 4, "logging_steps": 50, "learning_rate": 1e-30}
    evaluation = {"every_steps": 2, "patience": 2, "rows_in_training": 0}
    return str(dataset(training=training, evaluation=evaluation))


def unbroken(recipe: str, folder: Path) -> RunDir:
    assert train(load_recipe(recipe, [f"output.dir={folder}"]), **QUIET) == 0
    return RunDir(folder)


def steps(run: RunDir, key: str) -> list[int]:
    return [line["step"] for line in read_jsonl(run.metrics) if key in line]


def test_the_steps_before_patience_ends_a_run_are_logged(recipe: str, tmp_path: Path) -> None:
    run = unbroken(recipe, tmp_path / "run")
    assert steps(run, "eval_loss") == [2, 4, 6]
    assert steps(run, "loss") == [1, 2, 4, 6]
    summary = read_json(run.summary)
    assert summary["steps"] == 6
    assert summary["last_loss"] == read_jsonl(run.metrics)[-2]["loss"]


def test_a_run_that_patience_ends_is_the_same_when_it_was_killed(
    recipe: str, tmp_path: Path
) -> None:
    same, run = unbroken(recipe, tmp_path / "unbroken"), unbroken(recipe, tmp_path / "run")
    shutil.rmtree(run.adapter)
    for folder in run.checkpoints.glob("checkpoint-[!4]*"):
        shutil.rmtree(folder)
    *kept, _evaluated = read_jsonl(run.metrics)  # killed within the last evaluation
    write_jsonl(run.metrics, kept)
    assert train(load_recipe(recipe), resume=True, **QUIET) == 0
    assert_same_run(run, same)


def test_a_run_that_patience_ends_is_the_same_when_a_signal_came(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = unbroken(recipe, tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        tell_at("loss", 6, patch)
        assert train(load_recipe(recipe), **QUIET) == 75
    assert train(load_recipe(recipe), resume=True, **QUIET) == 0
    assert_same_run(RunDir(tmp_path / "run"), same)


@pytest.fixture
def early(
    dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, RunDir]:
    """A run that was stopped at step 5, and learns nothing, so that its best step is 2."""
    training = {"max_steps": 6, "save_steps": 2, "keep_checkpoints": 2, "learning_rate": 1e-30}
    evaluation = {"every_steps": 2, "load_best": True, "rows_in_training": 0}
    recipe = str(dataset(training=training, evaluation=evaluation | {"best_metric": "loss"}))
    with monkeypatch.context() as patch:
        tell_at("step", 5, patch)
        assert train(load_recipe(recipe), **QUIET) == 75
    run = RunDir(tmp_path / "run")
    names = {path.name for path in run.checkpoints.glob("checkpoint-*")}
    assert names == {"checkpoint-2", "checkpoint-5"}
    return recipe, run


def damage(checkpoint: Path) -> None:
    file = checkpoint / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_damaged_best_weights_do_not_become_the_run_s(early: tuple[str, RunDir]) -> None:
    recipe, run = early
    damage(run.checkpoints / "checkpoint-2")
    with pytest.raises(RunDirError, match=r"checkpoint-2: is damaged \(adapter_model.*load_best"):
        train(load_recipe(recipe), resume=True, **QUIET)
    assert not run.adapter.exists()
    shutil.rmtree(run.checkpoints / "checkpoint-2")
    told = io.StringIO()
    console = Console(file=told, width=400)
    assert train(load_recipe(recipe), resume=True, console=console, results=console) == 0
    assert "checkpoint-2, of the best evaluation so far, is not there" in told.getvalue()
    assert "best_step" not in read_json(run.summary)
    run.summary.unlink()  # killed before it was written
    assert train(load_recipe(recipe), resume=True, **QUIET) == 0
    assert "best_step" not in read_json(run.summary)


def test_what_else_a_best_checkpoint_holds_is_not_asked_for(early: tuple[str, RunDir]) -> None:
    recipe, run = early
    (run.checkpoints / "checkpoint-2" / "optimizer.pt").unlink()
    assert train(load_recipe(recipe), resume=True, **QUIET) == 0
    assert read_json(run.summary)["best_step"] == 2


def test_a_signal_leaves_no_time_for_the_best_weights(
    early: tuple[str, RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = early

    def damage_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        damage(run.checkpoints / "checkpoint-2")
        return finalize(self, *args, **kwargs)

    finalize = SavingTrainer._finalize_training
    monkeypatch.setattr(SavingTrainer, "_finalize_training", damage_first)
    tell_at("step", 6, monkeypatch)
    assert train(load_recipe(recipe), resume=True, **QUIET) == 75


def test_best_weights_damaged_while_it_trained_do_not_become_the_run_s(
    early: tuple[str, RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = early
    stock = SavingTrainer._finalize_training

    def damaged_before(self: Any, *args: Any, **kwargs: Any) -> Any:
        damage(run.checkpoints / "checkpoint-2")
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(SavingTrainer, "_finalize_training", damaged_before)
    with pytest.raises(RunDirError, match="checkpoint-2: is damaged"):
        train(load_recipe(recipe), resume=True, **QUIET)
    assert not run.adapter.exists()


def test_a_run_that_was_moved_takes_its_own_best_weights(
    early: tuple[str, RunDir], tmp_path: Path
) -> None:
    recipe, run = early
    moved = RunDir(tmp_path / "moved")
    shutil.copytree(run.path, moved.path)
    damage(run.checkpoints / "checkpoint-2")
    assert train(load_recipe(recipe, [f"output.dir={moved.path}"]), resume=True, **QUIET) == 0
    assert read_json(moved.summary)["best_step"] == 2
    weights = Path("adapter_model.safetensors")
    best = moved.checkpoints / "checkpoint-2" / weights
    assert (moved.adapter / weights).read_bytes() == best.read_bytes()
