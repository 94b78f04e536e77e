"""A run that its patience ends: its last steps are logged, and it ends the same when it was broken
off.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune.recipe import load_recipe
from finetune.rundir import RunDir, read_json, read_jsonl, write_jsonl
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
