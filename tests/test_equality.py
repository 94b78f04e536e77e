"""What scripts/equality.py compares; tests/test_processes.py compares runs themselves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune.rundir import RunDir, read_jsonl, write_jsonl
from scripts.equality import CASES, STEPS, differences, write_rows


def run_of(folder: Path, *, loss: float, grad_norm: float, weight: float) -> RunDir:
    """Of which the fourth step has these figures, and all others are 2.0 and 4.0."""
    run = RunDir(folder)
    run.adapter.mkdir(parents=True)
    lines = [{"step": step, "loss": 2.0, "grad_norm": 4.0} for step in range(1, STEPS + 1)]
    lines[3] |= {"loss": loss, "grad_norm": grad_norm}
    write_jsonl(run.metrics, [*lines, {"step": STEPS, "eval_loss": 9.0}])
    save_file({"a": torch.zeros(3), "b": torch.tensor([weight])}, run.adapter / "x.safetensors")
    return run


def test_the_largest_difference_of_each_figure_is_told(tmp_path: Path) -> None:
    one = run_of(tmp_path / "one", loss=2.0, grad_norm=4.0, weight=1.0)
    two = run_of(tmp_path / "two", loss=2.5, grad_norm=3.0, weight=1.125)
    found = differences(two, one)
    assert (found.loss, found.grad_norm, found.weights) == (0.25, 0.25, 0.125)
    assert not found.are_small()
    assert differences(one, one).are_small()


@pytest.mark.parametrize("title", CASES)
def test_a_case_has_as_many_rows_with_a_picture_and_without_as_it_says(
    title: str, tmp_path: Path
) -> None:
    write_rows(CASES[title], tmp_path)
    rows = read_jsonl(tmp_path / "rows.jsonl")
    parts = [[part["type"] for part in row["messages"][0]["content"]] for row in rows]
    assert parts.count(["image", "text"]) == CASES[title].num_pictures
    assert parts.count(["text"]) == CASES[title].num_texts
