"""`finetune compare`: several runs on the rows that all of them were judged on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import DataError, RunDirError
from finetune.metrics import Measured, differences, measure
from finetune.recipe import load_recipe
from finetune.rundir import RunDir, open_run_dir, read_jsonl
from finetune.score import metrics_named


@dataclass(frozen=True)
class Compared:
    """Each run's adapter, and the base of the first, over the rows that they share."""

    measured: dict[str, Measured]
    num_rows: int
    left_out: dict[str, int]
    """Rows of each run that not all of them have."""

    def to_json(self) -> dict[str, Any]:
        """Figures, intervals and the differences to the first run, by run."""
        first = next(each for each in self.measured if each != "base")
        return {
            "num_rows": self.num_rows,
            "first": first,
            "figures": {name: each.figures() for name, each in self.measured.items()},
            "intervals": {name: each.intervals() for name, each in self.measured.items()},
            "differences": {
                name: differences(self.measured[first], each)
                for name, each in self.measured.items()
                if name != first
            },
            "left_out": self.left_out,
        }


def compare(paths: Sequence[str | Path], metrics: Sequence[str] = ()) -> Compared:
    """Measure the answers that runs gave, without asking again; `metrics` are by default those of
    the first run's recipe.

    Rows are the same where place, question and references are. Raises `FinetuneError`.
    """
    if len(paths) < 2:
        raise RunDirError("give two runs or more to compare")
    runs = [open_run_dir(path) for path in paths]
    names = _names(runs)
    names_of_metrics = metrics or load_recipe(runs[0].recipe, check_paths=False).evaluation.metrics
    chosen = metrics_named(names_of_metrics)
    answers = {name: _answers(run) for name, run in zip(names, runs, strict=True)}
    shared = [row for row in answers[names[0]] if all(row in each for each in answers.values())]
    if not shared:
        raise DataError(
            f"{' and '.join(names)} were judged on no row in common (by its file's name, question "
            "and references); evaluate them on the same data: finetune eval RUN --data FILE"
        )
    references = [list(row[2]) for row in shared]
    given = {"base": [answers[names[0]][row]["base"] for row in shared]}
    given |= {name: [each[row]["adapter"] for row in shared] for name, each in answers.items()}
    return Compared(
        {name: measure(texts, references, chosen) for name, texts in given.items()},
        len(shared),
        {name: len(each) - len(shared) for name, each in answers.items()},
    )


def _names(runs: Sequence[RunDir]) -> list[str]:
    """Their folders' names, or their paths where these would be the same."""
    names = [run.path.resolve().name for run in runs]
    if len(set(names)) < len(names) or "base" in names:
        names = [str(run.path) for run in runs]
    if len(set(names)) < len(names):
        raise RunDirError("a run is given twice; give each once")
    return names


Place = tuple[str, str, tuple[str, ...]]


def _answers(run: RunDir) -> dict[Place, dict[str, Any]]:
    rows = read_jsonl(run.predictions)
    if not rows:
        raise RunDirError(f"{run.path}: was not judged on held-out rows; finetune eval {run.path}")
    return {
        (Path(row["where"]).name, row["question"], tuple(row["references"])): row for row in rows
    }
