"""Train small runs of nano in one process and in two (DDP) with half of the batch each: how far do
they come apart?

    python -m scripts.equality                          # two minutes; prints a table
    python -m scripts.equality --out docs/scale.md      # the table into the page, too

On the CPU in float32, with the whole command. Exit code 1 where a figure is further apart than the
tests allow. FSDP2 needs GPUs but in the tests (tests/test_sharding.py), and is not compared here.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from finetune.recipe.files import recipes_dir
from finetune.rundir import RunDir, read_jsonl
from scripts.bench_results import machine
from scripts.marked_page import fill, row, table

STEPS = 6
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A run: so many rows with a picture, and without, of which each of two processes takes
    `batch_size` a step.
    """

    num_pictures: int
    num_texts: int = 0
    batch_size: int = 2
    settings: tuple[str, ...] = ()


CASES = {
    "a picture in every row": Case(12),
    "an uneven last batch (9 rows, 4 a step)": Case(9),
    "a picture in one process, texts in the other": Case(1, 5, batch_size=1),
    "all weights trained": Case(12, settings=("adapter.method=full",)),
}


@dataclass(frozen=True)
class Differences:
    """The largest of each figure, over all steps: loss and norm relative to the one process's."""

    loss: float
    grad_norm: float
    weights: float
    """Over all trained weights after the last step."""

    def are_small(self) -> bool:
        """As the tests ask."""
        return max(self.loss, self.grad_norm, self.weights) < TOLERANCE


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare, print a table; the exit code."""
    parser = argparse.ArgumentParser(description="One process against two.")
    parser.add_argument("--out", type=Path, help="a page with a place for the table")
    args = parser.parse_args(argv)
    lines = table("largest difference of", "loss", "norm of the gradient", "weights")
    print("\n".join(lines), flush=True)
    are_small = True
    with tempfile.TemporaryDirectory() as folder:
        for title, case in CASES.items():
            found = compare(case, Path(folder))
            are_small &= found.are_small()
            figures = (found.loss, found.grad_norm, found.weights)
            lines.append(row(title, *(f"{figure:.1e}" for figure in figures)))
            print(lines[-1], flush=True)
    if args.out:
        how = f"{STEPS} steps of nano in float32; loss and norm relative, weights as they are."
        text = args.out.read_text(encoding="utf-8")
        page = fill(text, "equality", [*lines, "", f"{how} {machine(2)}."])
        args.out.write_text(page, encoding="utf-8")
    return 0 if are_small else 1


def compare(case: Case, folder: Path) -> Differences:
    """Both runs of a case, begun in `folder`."""
    write_rows(case, folder)
    one, two = RunDir(folder / "one"), RunDir(folder / "two")
    train(case, folder, one, f"training.batch_size={2 * case.batch_size}")
    train(case, folder, two, f"training.batch_size={case.batch_size}", "--processes", "2")
    return differences(two, one)


def write_rows(case: Case, folder: Path) -> None:
    """Rows of the quickstart; the last ones without their pictures."""
    shutil.copytree(recipes_dir() / "quickstart", folder, dirs_exist_ok=True)
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: case.num_pictures + case.num_texts]]
    for each in rows[case.num_pictures :]:
        for message in each["messages"]:
            parts = message["content"]
            message["content"] = [part for part in parts if part["type"] == "text"]
    text = "".join(json.dumps(each) + "\n" for each in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")


def train(case: Case, folder: Path, run: RunDir, *words: str) -> None:
    """By the command, in processes of its own; ends this one with its words where it fails."""
    command = [
        *(sys.executable, "-m", "finetune", "train", "quickstart"),
        f"data.train.0.path={folder / 'rows.jsonl'}",
        "data.eval=[]",
        f"output.dir={run.path}",
        f"training.max_steps={STEPS}",
        "training.epochs=null",
        "training.logging_steps=1",
        *case.settings,
        *words,
        "--overwrite",
    ]
    alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=os.environ | alone, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{shlex.join(command)}: ended with {done.returncode}\n{done.stderr}")


def differences(ours: RunDir, theirs: RunDir) -> Differences:
    """Of two finished runs of as many steps."""
    logs = [
        [line for line in read_jsonl(each.metrics) if "grad_norm" in line]
        for each in (ours, theirs)
    ]
    steps = list(zip(*logs, strict=True))
    assert len(steps) == STEPS, "a step was not logged"
    weights, expected = (_weights(each.adapter) for each in (ours, theirs))
    assert weights.keys() == expected.keys(), "other weights were saved"
    return Differences(
        loss=max(abs(a["loss"] / b["loss"] - 1) for a, b in steps),
        grad_norm=max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in steps),
        weights=max(float((weights[name] - each).abs().max()) for name, each in expected.items()),
    )


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


if __name__ == "__main__":
    sys.exit(main())
