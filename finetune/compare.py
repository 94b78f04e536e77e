"""`finetune compare`: several runs on the rows that all of them were judged on."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import DataError, RunDirError
from finetune.metrics import Measured, differences, measure
from finetune.recipe import load_recipe
from finetune.rundir import PREDICTIONS, RunDir, open_run_dir, read_json, read_jsonl
from finetune.score import metrics_named


@dataclass(frozen=True)
class Compared:
    """Each run's adapter, and the base of the first, over the rows that they share."""

    measured: dict[str, Measured]
    num_rows: int
    left_out: dict[str, int]
    """Rows of each run that not all of them have."""
    asked_otherwise: dict[str, dict[str, Any]]
    """Settings that answers depend on and that are not the same in all runs; of each its value, by
    run.
    """

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
            "asked_otherwise": self.asked_otherwise,
        }


def compare(
    paths: Sequence[str | Path], metrics: Sequence[str] = (), name: str | None = None
) -> Compared:
    """Measure the answers that runs gave, without asking again; `metrics` are by default those of
    the first run's recipe. `name` is that of an evaluation on other rows than the runs' own.

    Rows are the same where place, question and references are, and rows that repeat these are told
    apart by their order. Raises `FinetuneError`.
    """
    if len(paths) < 2:
        raise RunDirError("give two runs or more to compare")
    runs = [open_run_dir(path) for path in paths]
    names = _names(runs)
    if metrics:
        chosen = metrics_named(metrics, verb="compare")
    else:
        recipe = load_recipe(runs[0].recipe, check_paths=False)
        source = f"{runs[0].recipe}: evaluation.metrics"
        chosen = metrics_named(recipe.evaluation.metrics, source, verb="compare")
    answers = {each: _answers(run, name) for each, run in zip(names, runs, strict=True)}
    shared = [row for row in answers[names[0]] if all(row in each for each in answers.values())]
    if not shared:
        raise DataError(
            f"{' and '.join(names)} were judged on no row in common (by its file's name, question "
            "and references); ask each the same: finetune eval RUN --data FILE --name NAME, then "
            "compare with --name NAME"
        )
    references = [list(row[2]) for row in shared]
    given = {"base": [answers[names[0]][row]["base"] for row in shared]}
    given |= {run: [each[row]["adapter"] for row in shared] for run, each in answers.items()}
    num_tokens = {tuple(each.num_tokens for each in rows) for rows in given.values()}
    has_losses = len(num_tokens) == 1 and None not in num_tokens.pop()
    return Compared(
        {
            run: measure(
                [each.text for each in rows],
                references,
                chosen,
                np.array([(each.loss, each.num_tokens) for each in rows]) if has_losses else None,
            )
            for run, rows in given.items()
        },
        len(shared),
        {run: len(each) - len(shared) for run, each in answers.items()},
        _asked_otherwise({each: _asked(run, name) for each, run in zip(names, runs, strict=True)}),
    )


HOW_ASKED = ("max_new_tokens", "prompt_suffix")
"""Settings of `evaluation` on which answers depend."""


def _asked(run: RunDir, name: str | None) -> dict[str, Any]:
    """How a run was asked what it answered; empty where that is not known."""
    if not name:
        found = load_recipe(run.recipe, check_paths=False).evaluation.model_dump()
    else:
        file = run.evaluations / name / run.summary.name
        found = read_json(file).get("evaluation", {}) if file.is_file() else {}
    return {key: found[key] for key in HOW_ASKED if key in found}


def _asked_otherwise(asked: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    by_setting = {
        f"evaluation.{key}": {run: each[key] for run, each in asked.items() if key in each}
        for key in HOW_ASKED
    }
    return {key: each for key, each in by_setting.items() if len(set(each.values())) > 1}


def _names(runs: Sequence[RunDir]) -> list[str]:
    """Their folders' names, or their paths where these would be the same."""
    names = [run.path.resolve().name for run in runs]
    if len(set(names)) < len(names) or "base" in names:
        names = [str(run.path) for run in runs]
    if len(set(names)) < len(names):
        raise RunDirError("a run is given twice; give each once")
    return names


# Place, question, references, and how many rows with the same came before
Place = tuple[str, str, tuple[str, ...], int]


@dataclass(frozen=True)
class _Answer:
    """A model's own words; of the reference's tokens the loss, summed, NaN where it was no number,
    and how many they are, where that is known.
    """

    text: str
    loss: float
    num_tokens: int | None


def _answers(run: RunDir, name: str | None) -> dict[Place, dict[str, _Answer]]:
    file = run.evaluations / name / PREDICTIONS if name else run.predictions
    rows = read_jsonl(file)
    if not rows:
        how = f" --data FILE --name {name}" if name else ""
        raise RunDirError(f"{file}: holds no answers; get them with: finetune eval {run.path}{how}")
    seen: Counter[tuple[str, str, tuple[str, ...]]] = Counter()
    found = {}
    for number, row in enumerate(rows, start=1):
        try:
            place = Path(row["where"]).name, row["question"], tuple(row["references"])
            found[*place, seen[place]] = {who: _answer(row, who) for who in ("base", "adapter")}
        except (KeyError, TypeError) as error:
            raise RunDirError(
                f"{file}:{number}: lacks what a row of both base and adapter has ({error}); "
                "evaluate the run again, without --base"
            ) from error
        seen[place] += 1
    return found


def _answer(row: dict[str, Any], who: str) -> _Answer:
    num_tokens = row.get("num_learnt_tokens")
    loss = row["scores"][who].get("loss", math.nan) * num_tokens if num_tokens else math.nan
    return _Answer(row[who], loss, num_tokens)
