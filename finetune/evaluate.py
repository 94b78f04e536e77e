"""`finetune eval`: a run's figures again on its own held-out rows, or new ones on other rows."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune.asking import HeldOut
from finetune.errors import DataError, RecipeError
from finetune.judging import judge
from finetune.metrics import packages_needed
from finetune.model.load import quiet_libraries
from finetune.packages import refuse_missing
from finetune.preparation import PreparedRows, cache_of, load_encoder, prepare_held_out
from finetune.processes import is_first
from finetune.recipe import DataSource, Recipe, load_recipe
from finetune.report import write_report
from finetune.rundir import RunDir, open_run_dir, read_json, write_json
from finetune.serve import servable
from finetune.sides import Side, side_of_base, side_of_merged, sides_of_run
from finetune.suites import SUITES, Suite
from finetune.tables import messages_console


@dataclass(frozen=True)
class Asked:
    """What is asked of which sides, where it is not the evaluation of the run itself."""

    data: Sequence[str | Path] = ()
    suite: str | None = None
    metrics: Sequence[str] = ()
    base_only: bool = False
    merged: bool = False
    settings: Sequence[str] = ()
    """Of the recipe's `evaluation` and `data`, as KEY=VALUE."""
    name: str | None = None
    """Folder of the figures, within `evaluations`."""

    def is_the_run_s_own(self) -> bool:
        """Whether rows, metrics and settings are the recipe's, for base and adapter."""
        return not (
            self.data or self.suite or self.metrics or self.base_only or self.settings or self.name
        )

    def folder_name(self) -> str:
        """That of the figures, unless it is given."""
        rows = self.suite or (Path(str(self.data[0])).stem if self.data else "held-out")
        return self.name or (f"{rows}-base" if self.base_only else rows)


@dataclass(frozen=True)
class Evaluated:
    """The figures, as in `summary.json`, and where the answers are."""

    figures: dict[str, Any]
    folder: Path
    suite: Suite | None = None


def evaluate(
    path: str | Path, asked: Asked | None = None, *, console: Console | None = None
) -> Evaluated:
    """Judge the adapter of a run against its base.

    On the run's own held-out rows `evaluation/`, `summary.json` and the report are written anew;
    other figures go into a folder of `evaluations/`. A call that was broken off is gone on with by
    the same call. Raises `FinetuneError`.
    """
    asked = asked or Asked()
    console = console or messages_console()
    if not is_first():
        console = Console(quiet=True)
    quiet_libraries()
    run, own = open_run_dir(path), asked.is_the_run_s_own()
    folder = run.evaluation if own else run.evaluations / _safe(asked.folder_name())
    recipe, suite = _recipe_to_ask(run, asked)
    about = {
        "name": folder.name,
        "data": [source.hub or source.path for source in recipe.data.eval],
        "evaluation": recipe.evaluation.model_dump(),
        "paper": {"metric": suite.metric, "figure": suite.beside()} if suite else None,
    }
    if not own:
        _refuse_other_figures(folder, about)
    encoder = load_encoder(recipe, console)
    sides = _sides(run, recipe, asked, encoder, console)
    held_out = _held_out(run, recipe, asked, encoder, console)
    to_ask = held_out.to_ask().first(recipe.evaluation.max_rows)
    if not own:  # which rows they are is known by now
        about["rows_sha256"] = _digest(to_ask)
        _refuse_other_figures(folder, about)
    partial = run.partial if own else folder.with_name(f".{folder.name}.partial")
    judgement = judge(sides, to_ask, recipe.evaluation, folder, partial, console)
    figures = judgement.figures()
    by_source = held_out.rows[: judgement.num_rows].num_of_sources()
    if not is_first():
        return Evaluated(figures, folder, suite)
    if own:
        summary = read_json(run.summary) if run.summary.is_file() else {}
        summary.pop("merged", None)  # a side of an earlier evaluation, whose answers are gone
        write_json(run.summary, summary | figures | {"eval_rows_by_source": by_source})
    else:
        write_json(folder / run.summary.name, about | figures)
    write_report(run)
    return Evaluated(figures, folder, suite)


def _recipe_to_ask(run: RunDir, asked: Asked) -> tuple[Recipe, Suite | None]:
    """The run's recipe, with the rows and settings of this evaluation."""
    if asked.data and asked.suite:
        raise RecipeError("--data and --suite exclude each other: each brings its own rows")
    for setting in asked.settings:
        key = setting.partition("=")[0]
        if key.partition(".")[0] not in ("evaluation", "data"):
            raise RecipeError(
                f"{setting}: a run is asked as it was trained; only settings of evaluation and "
                "data can be others"
            )
        if key in ("data.eval_fraction", "data.eval_seed"):
            raise RecipeError(
                f"{setting}: would draw other rows than were held out, and trained ones among "
                "them; give other rows with --data"
            )
        if _names_rows(key) and (asked.data or asked.suite):
            option = "--data" if asked.data else "--suite"
            raise RecipeError(
                f"{key} and {option} exclude each other: each brings its own rows; leave {option} "
                "out"
            )
    suite = SUITES.get(asked.suite) if asked.suite else None
    if asked.suite and suite is None:
        raise RecipeError(f"--suite {asked.suite}: is none of {', '.join(SUITES)}")
    changes = list(asked.settings)
    if any(_names_rows(setting.partition("=")[0]) for setting in asked.settings):
        changes.append("data.eval_fraction=0")  # as --data does: either may be set, not both
    metrics = list(asked.metrics)
    if suite:
        metrics = metrics or [suite.metric]
        given = {setting.partition("=")[0] for setting in changes}
        for key in ("prompt_suffix", "max_new_tokens"):
            if f"evaluation.{key}" not in given:
                changes.append(f"evaluation.{key}={json.dumps(getattr(suite, key))}")
    if metrics:
        changes.append(f"evaluation.metrics={json.dumps(metrics)}")
    # a file that is missing is told of where it is opened: those trained on are not all needed
    recipe = load_recipe(run.recipe, changes, check_paths=False)
    named_in = "--metrics" if asked.metrics else "evaluation.metrics"
    refuse_missing(packages_needed(recipe.evaluation.metrics, named_in), "eval")
    sources = [DataSource(path=str(path)) for path in asked.data]
    sources += [suite.source] if suite else []
    if sources:
        data = recipe.data.model_copy(update={"eval": tuple(sources), "eval_fraction": 0.0})
        recipe = recipe.model_copy(update={"data": data})
    if not recipe.data.eval and not recipe.data.eval_fraction:
        raise DataError(
            f"{run.recipe}: data.eval is empty, so there is nothing to judge on; name held-out "
            "rows there, or give --data or --suite"
        )
    return recipe, suite


def _names_rows(key: str) -> bool:
    return f"{key}.".startswith("data.eval.")


def _sides(
    run: RunDir, recipe: Recipe, asked: Asked, encoder: Any, console: Console
) -> dict[str, Side]:
    if asked.base_only:
        return {"base": side_of_base(recipe, encoder)}
    both = sides_of_run(recipe, run.adapter, encoder)
    sides = {"base": both.base, "adapter": both.adapter or both.base}
    if asked.merged:
        if recipe.adapter.method in ("full", "frozen"):
            raise RecipeError(
                f"--merged: adapter.method {recipe.adapter.method} has nothing to merge"
            )
        sides["merged"] = side_of_merged(recipe, servable(run.path, console), encoder)
    return sides


# Advice that an entry of data.eval can follow, and a path alone cannot
_SET_WITH_THE_ROWS = re.compile(r"\bset (format|image_root)\b")


def _held_out(
    run: RunDir, recipe: Recipe, asked: Asked, encoder: Any, console: Console
) -> PreparedRows:
    known = read_json(run.environment).get("rows_sha256") if run.environment.is_file() else None
    if recipe.data.eval_fraction and known is None:
        raise DataError(
            f"{run.path}: its held-out rows were drawn from the training data "
            "(data.eval_fraction), and it does not say which data that was, so that trained rows "
            "could be judged as held out; evaluate the run where it was trained"
        )
    try:
        held_out = prepare_held_out(
            recipe, encoder, cache_of(run.path), console, max_rows=recipe.evaluation.max_rows
        )
    except DataError as error:
        if not asked.data or not _SET_WITH_THE_ROWS.search(str(error)):
            raise
        entries = ", ".join(f"{{path: {json.dumps(str(path))}, ...}}" for path in asked.data)
        told = (run.path, f"data.eval=[{entries}]", "--name", asked.folder_name())
        raise DataError(
            f"{error}\n--data takes no such setting; give it with the rows: finetune eval "
            + shlex.join(map(str, told))
        ) from error
    assert held_out
    if recipe.data.eval_fraction and held_out.examination.digest() != known:
        raise DataError(
            f"{run.path}: the data files have changed since the training, so that rows it was "
            "trained on would be judged as held out; bring the files back, or train with data.eval"
        )
    return held_out


_WHAT = {
    "data": "files",
    "evaluation": "evaluation settings",
    "rows_sha256": "rows",
}


def _refuse_other_figures(folder: Path, about: dict[str, Any]) -> None:
    """Raise `RecipeError` where the folder holds figures of other rows, metrics or settings, which
    would be lost.
    """
    file = folder / "summary.json"
    stored = read_json(file) if file.is_file() else {}
    now = json.loads(json.dumps(about))
    # what a version before this one did not write is not compared
    others = [
        what
        for key, what in _WHAT.items()
        if key in stored and key in now and stored[key] != now[key]
    ]
    if others:
        raise RecipeError(
            f"{folder}: holds figures of other {' and '.join(others)}; give these "
            "a folder of their own (--name), or remove that one"
        )


def _digest(asked: HeldOut) -> str:
    """Of what a model sees of the rows, and of all their references."""
    references = [row.conversation.references() for row in asked.rows]
    return sha256(f"{asked.digest()}{json.dumps(references)}".encode()).hexdigest()


def _safe(name: str) -> str:
    """A name that is one folder's. Raises `RecipeError`."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise RecipeError(f"--name {name}: expected the name of one folder")
    return name
