"""What the verbs print on a terminal: tables for a person, from plain values."""

import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.checking import Duplicates, Part
from finetune.data.sampling import EpochBatches
from finetune.gallery import SIDES
from finetune.metrics import with_interval
from finetune.model.merging import MergePlan
from finetune.preparation import PreparedRows, counted
from finetune.recipe import Recipe
from finetune.rundir import RunDir, read_json, read_jsonl


def results_console() -> Console:
    """Standard output. Square brackets and colons stand for themselves: they come from users' data
    and command lines.
    """
    return Console(markup=False, emoji=False, highlight=False)


def messages_console() -> Console:
    """Standard error, for progress and messages; the same holds."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def figures_table(title: str, summary: Mapping[str, Any]) -> Table:
    """What each side reached, with 95% intervals, and whether the adapter is better; a row a
    metric.
    """
    table = Table(title=Text(title), title_justify="left", show_lines=True, pad_edge=False)
    sides = [who for who in SIDES if summary.get(who)] or ["base", "adapter"]
    differ = "base" in sides and "adapter" in sides
    table.add_column("")
    for who in (*sides, *(["difference", ""] if differ else [])):
        table.add_column(who, justify="right" if who else "left")
    for metric in summary.get(sides[-1], {}):
        cells = [metric]
        for who in sides:
            between = summary.get("intervals", {}).get(who, {}).get(metric)
            cells.append(_on_two_lines(summary[who].get(metric), between))
        found = summary.get("differences", {}).get(metric) if differ else None
        if found and metric in summary["base"]:  # not of a loss that is no number
            gain = summary["adapter"][metric] - summary["base"][metric]
            cells += [_on_two_lines(gain, found["interval"], "+"), verdict_of(found, summary)]
        table.add_row(*cells)
    return table


def compared_table(found: Mapping[str, Any]) -> Table:
    """Under each metric a row a run: its figure, the difference to the first run and what that
    says, both with 95% intervals. As wide for one metric as for many.
    """
    first = found["first"]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for column in ("figure", "against the first", ""):
        table.add_column(column, no_wrap=True)
    for metric in found["intervals"][first]:
        table.add_row(Text(metric, "bold"))
        for name, figures in found["figures"].items():
            cells = [f"base of {first}" if name == "base" else name]
            cells.append(with_interval(figures.get(metric), found["intervals"][name][metric]))
            against = found["differences"].get(name, {}).get(metric)
            reached = found["figures"][first]
            if against and metric in figures and metric in reached:  # not a loss that is no number
                gain = figures[metric] - reached[metric]
                cells += [with_interval(gain, against["interval"], "+"), against["verdict"]]
            table.add_row(*cells)
        table.add_section()
    return table


def _on_two_lines(figure: float | None, between: Sequence[float] | None, sign: str = "") -> str:
    return with_interval(figure, between, sign).replace(" ", "\n", 1)


def verdict_of(found: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Better, worse, or at how many rows that cannot be told."""
    word = found["verdict"]
    return f"{word}\nat n = {summary['num_eval_rows']:,}" if word == "cannot tell" else word


def scores_table(figures: Mapping[str, float], intervals: Mapping[str, Any]) -> Table:
    """Figures of one model's answers with their 95% intervals."""
    table = Table(show_header=False)
    for metric, figure in figures.items():
        table.add_row(metric, with_interval(figure, intervals[metric]))
    return table


def command_here() -> str:
    """How to call finetune again: by its name alone only where the environment is activated."""
    if shutil.which("finetune"):
        return "finetune"
    python = Path(sys.executable)
    script = python.with_name("finetune")
    shown = called = script if script.is_file() else python
    with suppress(ValueError):
        shown = called.relative_to(Path.cwd())
    text = f"./{shown}" if str(shown) == called.name else str(shown)  # as it is not on the PATH
    return shlex.quote(text) + ("" if called == script else " -m finetune")


def print_summary(run: RunDir, recipe: Recipe, results: Console) -> None:
    """The table at the end of a run, where its files are, and three commands to try next."""
    summary = read_json(run.summary)
    if summary["adapter"]:
        figures = figures_table(str(run.path), summary)
        if step := summary.get("best_step"):
            best = recipe.evaluation.best_metric
            figures.caption = Text(f"weights of step {step:,}, the best {best}")
            figures.caption_justify = "left"
        results.print(figures)
    table = Table(show_header=False)
    if not summary["adapter"]:
        table.add_row("not judged", "no data.eval")
    memory = "peak memory" + (" of the process" if summary["device"] == "cpu" else "")
    trained = "nothing was trained", ""
    if "first_loss" in summary:
        losses = f"{summary['first_loss']:.3f} -> {summary['last_loss']:.3f}"
        trained = "loss, first and last", losses
    speed = summary.get("samples_per_second")
    for name, value in (
        ("held-out rows", f"{summary['num_eval_rows']:,}"),
        trained,
        ("samples per second", f"{speed:.1f}" if speed else ""),
        (memory, f"{summary['peak_memory_gib']:.2f} GiB"),
    ):
        table.add_row(name, value)
    results.print(table)
    results.print(f"report:  {run.report}\nadapter: {run.adapter}", soft_wrap=True)
    asked = next((row for row in read_jsonl(run.predictions) if row.get("images")), None)
    image = run.evaluation / asked["images"][0] if asked else "FILE"
    question = asked["question"] if asked else "What is written?"
    folder, command = shlex.quote(str(run.path)), command_here()
    results.print(
        f"\nnext:\n  {command} chat {folder} --image {shlex.quote(str(image))} "
        f"{shlex.quote(question)}\n"
        f"  {command} {'eval' if asked else 'report'} {folder}\n"
        f"  {command} recipes copy quickstart my-recipe.yaml",
        soft_wrap=True,
    )


def dry_run_table(
    recipe: Recipe, train: PreparedRows, batches: EpochBatches, num_held_out: int
) -> Table:
    """What a dry run found."""
    table = Table(title="dry run: nothing was written", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path is of no use with its end cut off
    an_epoch, accumulation = len(batches.sampler), recipe.training.gradient_accumulation
    if recipe.training.batch_size and batches.have_one_size:
        rows_per_step = f"{recipe.training.batch_size * accumulation:,}"
    else:
        rows_per_step = f"{an_epoch / len(batches) * accumulation:,.1f} in the mean"
    longest = int(train.counts["num_tokens"].argmax())
    tokens, views = (int(train.counts[longest][key]) for key in ("num_tokens", "num_views"))
    for name, value in (
        ("model", recipe.model.name),
        ("train rows", f"{len(train.rows):,}"),
        ("rows an epoch", f"{an_epoch:,}"),
        ("held-out rows", f"{num_held_out:,}"),
        ("rows per step", f"{rows_per_step} per device"),
        ("steps", f"{batches.num_steps():,} on one device"),
        ("longest row", f"{counted(tokens, 'token')}, {counted(views, 'view')}"),
        ("its place", train.rows[longest].where),
        ("run directory", recipe.output.dir),
    ):
        table.add_row(name, value)
    return table


def check_table(parts: Sequence[Part], duplicates: Duplicates | None) -> Table:
    """What a check counted, and the rows that training and judging share."""
    figures = Table(title="rows", title_justify="left")
    figures.add_column("")
    for part in parts:
        figures.add_column(part.name, justify="right")
    for name, of in (
        ("rows read", lambda part: part.num_rows),
        ("usable", lambda part: part.num_usable),
        ("bad", lambda part: part.num_bad),
        ("too long", lambda part: part.num_overlong),
        ("made to fit", lambda part: sum(part.changes.values())),
        ("the same as a row before", lambda part: part.num_repeated),
        ("turns", lambda part: part.num_turns),
        ("pictures", lambda part: part.num_images),
        ("views", lambda part: part.num_views),
        ("tokens", lambda part: part.num_tokens),
        ("tokens learnt", lambda part: part.num_learnt_tokens),
    ):
        figures.add_row(name, *(f"{of(part):,}" for part in parts))
    shares = [part.num_learnt_tokens / max(part.num_tokens, 1) for part in parts]
    figures.add_row("share learnt", *(f"{share:.1%}" for share in shares))
    if duplicates:
        for name, count in (
            ("held out, picture in training", duplicates.num_same_image),
            ("held out, question in training", duplicates.num_same_question),
            ("held out, both in training", duplicates.num_same_both),
        ):
            figures.add_row(name, *[""] * (len(parts) - 1), f"{count:,}")
    return figures


def merge_table(title: str, plan: MergePlan, needed_bytes: int) -> Table:
    """Which tensors are written, what changes them, and how large that is."""
    table = Table(title=Text(title), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("base", str(plan.source))
    table.add_row("tensors", f"{len(plan.written):,}")
    for what, count in sorted(Counter(plan.changed.values()).items()):
        table.add_row(f"  changed: {what}", f"{count:,}")
    table.add_row("dtype", str(plan.dtype).removeprefix("torch."))
    for file, num_bytes in plan.bytes_of_files.items():
        table.add_row(file, f"{num_bytes / 2**20:,.1f} MiB")
    table.add_row("disk needed", f"{needed_bytes / 2**20:,.1f} MiB")
    return table


def costly_rows(parts: Sequence[Part]) -> Iterator[str]:
    """A line for the longest and the heaviest row of each part."""
    for part in parts:
        for what, rows in (("longest", part.longest), ("heaviest", part.heaviest)):
            for row in rows[:1]:
                cost = counted(row.num_tokens, "token")
                if row.num_views:
                    views = counted(row.num_views, "view")
                    cost += f", {views}, {row.megapixels:.2f} megapixels"
                yield f"{what} {part.name} row: {row.where}: {cost}"
