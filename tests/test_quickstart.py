"""The two shipped recipes, run whole: what a new user does first."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

FINETUNE = str(Path(sys.executable).parent / "finetune")


def train(recipe: str, folder: Path, *overrides: str) -> tuple[dict, float]:
    """The run's summary, and its wall seconds."""
    started = time.monotonic()
    done = subprocess.run(
        [FINETUNE, "train", recipe, f"output.dir={folder / 'run'}", *overrides],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return summary, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.alone
def test_the_quickstart_teaches_nano_a_new_task_within_five_minutes(tmp_path: Path) -> None:
    summary, seconds = train("quickstart", tmp_path)
    assert summary["num_eval_rows"] == 120
    assert summary["adapter"]["exact_match"] - summary["base"]["exact_match"] >= 0.5
    assert summary["last_loss"] < 0.5 < summary["first_loss"]
    assert seconds < 300


@pytest.mark.slow
def test_handwritten_digits_that_nobody_here_drew_are_learnt(tmp_path: Path) -> None:
    from scripts.make_digits import write_digits

    write_digits(tmp_path / "data" / "digits", num_train=2000, num_eval=200)
    summary, _ = train("nano/digits", tmp_path, "training.epochs=2")
    assert summary["num_eval_rows"] == 200
    assert summary["base"]["exact_match"] <= 0.2  # ten digits, and the base only reads print
    assert summary["adapter"]["exact_match"] - summary["base"]["exact_match"] >= 0.5


@pytest.mark.slow
@pytest.mark.alone
def test_the_first_training_step_is_done_within_fifteen_seconds(tmp_path: Path) -> None:
    """From the command to the first line of metrics.jsonl; the better of two: tests run beside."""
    taken = []
    for attempt in range(2):
        metrics = tmp_path / str(attempt) / "metrics.jsonl"
        started = time.monotonic()
        process = subprocess.Popen(
            [FINETUNE, "train", "quickstart", f"output.dir={metrics.parent}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not (metrics.is_file() and metrics.stat().st_size) and process.poll() is None:
            time.sleep(0.05)
        taken.append(time.monotonic() - started)
        process.kill()
        process.wait()
    assert min(taken) < 15
