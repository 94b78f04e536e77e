"""`report.html`: what a run reached, on one self-contained page, the answer first.

Reads only the run directory, takes what is there and says what is not: a run that was stopped, or
is still going, gets a report too. Answers and recipes are text from outside: the template escapes
all of it, and words and numbers are shaped there too; this module only decides what is shown.
"""

import json
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from finetune import __version__
from finetune.charts import curve, number
from finetune.errors import RunDirError
from finetune.gallery import (
    CARDS_PER_STATUS,
    SIDES,
    STATUSES,
    Row,
    first_of_each_status,
    listed,
    make_card,
    mapping,
    numbers,
    text_of,
)
from finetune.metrics import lower_is_better, title_of, with_interval
from finetune.recipe.syntax import parse_yaml
from finetune.run_charts import curves, histograms
from finetune.rundir import RunDir, read_json, replacing, write_text
from finetune.verdict import interval_of, judge, metrics_of_headline

SKIPPED_SHOWN = 10
BAD_STEPS_SHOWN = 10
BLAMED_SHOWN = 5


def write_report(run: RunDir) -> Path:
    """Write `report.html` from what the run directory holds by now, and its charts as PNG files
    into `charts/`; returns the report's path.
    """
    found = gather(run)
    write_text(run.report, render(found))
    drawn = [*found["curves"], *found["histograms"]]
    if drawn:
        with replacing(run.charts) as folder:
            folder.mkdir()
            for chart in drawn:
                (folder / f"{chart.name}.png").write_bytes(chart.png())
    return run.report


def render(
    found: Mapping[str, Any], *, refresh_seconds: int | None = None, elsewhere: str | None = None
) -> str:
    """The page; one that loads itself again every `refresh_seconds`, if they are given. `elsewhere`
    is where it stands still, or, without `refresh_seconds`, where it loads itself again.
    """
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters["inline_svg"] = lambda chart: Markup(chart.svg())
    template = files("finetune").joinpath("report.html.j2").read_text(encoding="utf-8")
    shown = page.from_string(template).render(
        found, refresh_seconds=refresh_seconds, elsewhere=elsewhere
    )
    return shown.encode("utf-8", errors="replace").decode("utf-8")  # JSON may hold half a character


def gather(run: RunDir) -> dict[str, Any]:
    """Everything the template shows, by name."""
    notes: list[str] = []
    summary = read_mapping(run.summary, notes)
    figures = summary or {}
    log = read_rows(run.metrics, notes)
    skipped = read_rows(run.skipped, notes)
    predictions = read_rows(run.predictions, notes)
    recipe = run.recipe.read_text("utf-8", errors="replace") if run.recipe.is_file() else ""
    settings = settings_of(recipe)
    environment = read_mapping(run.environment, notes) or {}
    data = read_mapping(run.data, notes) or {}
    num_left_out = int(number(figures.get("num_skipped_rows")) or len(skipped))
    cards = [make_card(row) for row in predictions]
    counts = Counter(card.status for card in cards)
    if num_bad := sum(number(row["loss"]) is None for row in log if "loss" in row):
        notes.append(
            f"The loss was no number at {num_bad} logged steps; the curve leaves them out."
        )
    if num_splits := last_count(log, "oom_splits"):
        notes.append(f"Batches that did not fit into the memory were halved {num_splits} times.")
    bad_steps = bad_steps_of(run, notes)
    sides = {side: found for side in SIDES if (found := numbers(figures.get(side)))}
    return {
        "name": run.path.resolve().name,
        "path": shlex.quote(str(run.path)),
        "subtitle": describe_recipe(settings),
        "version": __version__,
        "finished": summary is not None,
        "verdict": judge(figures, predictions, metrics_of_headline(settings)),
        "best_step": best_step(figures),
        "best_metric": text_of(mapping(settings.get("evaluation")).get("best_metric")),
        "num_processes": int(number(environment.get("num_processes")) or 1),
        "num_processes_here": int(number(environment.get("num_processes_here")) or 1),
        "bad_steps": bad_steps[:BAD_STEPS_SHOWN],
        "num_bad_steps": len(bad_steps),
        "end": end_of(run, notes),
        "leaves_out": leaves_out(settings),
        "figures": run_figures(figures, log),
        "device": text_of(figures.get("device")),
        "planned_steps": planned_steps(settings, log),
        "log_age_seconds": age_seconds(run.metrics),
        "curves": curves(
            log,
            num_asked=rows_in_training(settings, figures, data),
            judged_step=best_step(figures),
        ),
        "histograms": histograms(data),
        "data": {name: numbers(part) for name, part in data.items()},
        "sides": sides,
        "measured": list(dict.fromkeys(name for found in sides.values() for name in found)),
        "intervals": {
            side: mapping(found) for side, found in mapping(figures.get("intervals")).items()
        },
        "differences": differences_of(figures, sides),
        "evaluations": other_evaluations(run, notes),
        "lower_is_better": lower_is_better,
        "title_of": title_of,
        "with_interval": with_interval,
        "interval_of": interval_of,
        "filters": [(status, title, counts[status]) for status, title in STATUSES.items()],
        "num_cards": len(cards),
        "cards": first_of_each_status(cards, run.evaluation),
        "cards_per_status": CARDS_PER_STATUS,
        "skipped": skipped[:SKIPPED_SHOWN],
        "num_skipped": len(skipped) or num_left_out,
        "num_left_out": num_left_out,  # a streamed row in every epoch anew
        "recipe": recipe,
        "environment": flatten(environment),
        "notes": notes,
    }


@dataclass(frozen=True)
class Elsewhere:
    """One figure on other rows than the run's own."""

    name: str
    metric: str
    num_rows: int
    base: str
    adapter: str
    merged: str
    verdict: str
    paper: str


def other_evaluations(run: RunDir, notes: list[str]) -> list[Elsewhere]:
    """What `finetune eval` measured on other rows, or by other metrics."""
    found = []
    for path in sorted(run.evaluations.glob("*/summary.json")):
        summary = read_mapping(path, notes) or {}
        sides = [numbers(summary.get(side)) for side in SIDES]
        for metric in dict.fromkeys(metric for side in sides for metric in side):
            between = mapping(summary.get("intervals"))
            base, adapter, merged = (
                with_interval(side.get(metric), interval_of(mapping(between.get(name)).get(metric)))
                for name, side in zip(SIDES, sides, strict=True)
            )
            verdict = mapping(mapping(summary.get("differences")).get(metric)).get("verdict")
            rows = int(number(summary.get("num_eval_rows")) or 0)
            beside = mapping(summary.get("paper"))
            paper = text_of(beside.get("figure")) if beside.get("metric") == metric else ""
            shown = (base, adapter, merged, text_of(verdict), paper)
            found.append(Elsewhere(path.parent.name, metric, rows, *shown))
    return found


@dataclass(frozen=True)
class BadStep:
    """A step whose loss or gradient was no number, or a spike."""

    step: int
    why: str
    rows: list[str]  # where the first ones stand
    num_rows: int
    page: str  # that shows them, beside the report; empty where there is none


def bad_steps_of(run: RunDir, notes: list[str]) -> list[BadStep]:
    """Those that were left out, or the one that ended the run, in their order."""
    found = []
    for line in read_rows(run.bad_steps / "steps.jsonl", notes):
        step, rows = int(number(line.get("step")) or 0), listed(line.get("rows"))
        places = [text_of(mapping(row).get("where")) for row in rows[:BLAMED_SHOWN]]
        page = run.bad_steps / f"step-{step}.html"
        shown = f"{page.parent.name}/{page.name}" if page.is_file() else ""
        found.append(BadStep(step, text_of(line.get("why")), places, len(rows), shown))
    return found


@dataclass(frozen=True)
class End:
    """Why a run ended before its end."""

    is_error: bool
    why: str
    at: str
    settings: str | None  # with which it goes on by `--resume`; None where none helps


def end_of(run: RunDir, notes: list[str]) -> End | None:
    """What `ended.json` tells; None where nothing is known of an end."""
    told = read_mapping(run.ended, notes)
    if not told or not told.get("why"):
        return None
    settings = told.get("resume_with")
    return End(
        told.get("by") == "error",
        text_of(told.get("why")),
        text_of(told.get("at")).replace("T", " "),
        None if settings is None else " ".join(map(text_of, listed(settings))),
    )


def leaves_out(settings: Row) -> bool:
    """Whether bad steps are left out, and do not end the run."""
    return mapping(settings.get("training")).get("bad_loss") == "skip"


# Reading: a torn line or a missing file costs its own part of the page, and a note, never the page.


def read_mapping(path: Path, notes: list[str]) -> Row | None:
    """A JSON object, or None where the file is missing or (with a note) broken."""
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except (RunDirError, ValueError) as error:
        notes.append(f"{path.name} was left out: {error}")
        return None
    return value if isinstance(value, dict) else {}


def read_rows(path: Path, notes: list[str]) -> list[Row]:
    """The rows of a JSONL file, without broken lines such as the torn last one of a killed run."""
    if not path.is_file():
        return []
    rows, bad = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # also for a number of more digits than Python reads
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad.append(line_number)
    if bad:
        notes.append(
            f"{path.name}: unreadable lines left out: {len(bad)}, the first is line {bad[0]}."
        )
    return rows


def last_count(log: Sequence[Row], name: str) -> int:
    """What the last line that has it says of a count that only grows; 0 for none."""
    counts = [int(count) for row in log if (count := number(row.get(name))) is not None]
    return counts[-1] if counts else 0


def flatten(values: Row, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings, and lists of them, as ("outer.inner", text) pairs."""
    pairs = []
    for key, value in values.items():
        if isinstance(value, list) and any(isinstance(each, dict) for each in value):
            value = {str(number): each for number, each in enumerate(value, start=1)}
        if isinstance(value, dict):
            pairs += flatten(value, f"{prefix}{key}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else text_of(value)
            pairs.append((f"{prefix}{key}", shown))
    return pairs


def best_step(summary: Row) -> int | None:
    """Whose weights were judged, where they are not those of the last step."""
    step = number(summary.get("best_step"))
    return None if step is None else int(step)


def differences_of(summary: Row, sides: Mapping[str, Mapping[str, float]]) -> dict[str, Row]:
    """Of each metric that base and adapter both have: the difference, its interval and the verdict,
    where they were kept.
    """
    base, adapter = (sides.get(side, {}) for side in ("base", "adapter"))
    return {
        metric: {
            "figure": adapter[metric] - base[metric],
            "interval": found.get("interval"),
            "verdict": text_of(found.get("verdict")),
        }
        for metric, found in mapping(summary.get("differences")).items()
        if metric in base and metric in adapter and isinstance(found, dict)
    }


# The rest of the page.


def run_figures(summary: Row, log: Sequence[Row]) -> dict[str, float]:
    """The summary's numbers by name; what it lacks is taken from the log where that knows it."""
    losses, speeds = curve(log, "loss"), curve(log, "samples_per_second")
    figures = {}
    if losses:
        figures = {"first_loss": losses[0][1], "last_loss": losses[-1][1], "steps": losses[-1][0]}
    if speeds:
        figures["samples_per_second"] = speeds[-1][1]
    return figures | numbers(summary)


def settings_of(recipe: str) -> Row:
    """The recipe's sections; empty where it is no readable YAML."""
    return mapping(parse_yaml(recipe)[0])


def planned_steps(settings: Row, log: Sequence[Row]) -> str:
    """How many steps the run is to take, about where only its epochs are known; empty where nothing
    tells.
    """
    training = mapping(settings.get("training"))
    if steps := number(training.get("max_steps")):
        return f"{steps:,.0f}"
    epochs, logged = number(training.get("epochs")), curve(log, "epoch")
    if not epochs or not logged or logged[-1][1] <= 0:
        return ""
    step, epoch = logged[-1]
    return f"about {step / epoch * epochs:,.0f}"


def age_seconds(path: Path) -> float | None:
    """Since the file was last written; None where there is none."""
    return max(0.0, time.time() - path.stat().st_mtime) if path.is_file() else None


def rows_in_training(settings: Row, summary: Row, data: Row) -> int | None:
    """How many held-out rows were answered during training; None where those were all that are
    judged, or nothing tells.
    """
    evaluation = mapping(settings.get("evaluation"))
    asked, limit = (number(evaluation.get(key)) for key in ("rows_in_training", "max_rows"))
    judged = number(summary.get("num_eval_rows")) or number(
        mapping(data.get("eval")).get("num_rows")
    )
    if asked is None or judged is None:
        return None
    return int(asked) if asked < min(judged, limit or judged) else None


def describe_recipe(settings: Row) -> str:
    """Model, method and parts in a line."""
    adapter = mapping(settings.get("adapter"))
    words = [mapping(settings.get("model")).get("name"), adapter.get("method")]
    if (rank := adapter.get("rank")) and adapter.get("method") not in ("full", "frozen"):
        by_part = mapping(rank).items()
        ranks = ", ".join(f"{each} ({part})" for part, each in by_part)
        words.append(f"rank {ranks or rank}")
    if isinstance(adapter.get("parts"), list):
        words.append("on " + ", ".join(map(str, adapter["parts"])))
    return " · ".join(str(word) for word in words if word)
