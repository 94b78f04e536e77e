"""What every verb that needs rows does first: read, examine, and let the recipe's policies
decide.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import track

from finetune.data.examples import Encoder, Overlong, RowCounts, examine
from finetune.data.sources import Problem, Row, read_sources
from finetune.errors import DataError, summarise_problems
from finetune.recipe import DataSection, DataSource


@dataclass(frozen=True)
class PreparedRows:
    """Rows in = usable rows + skipped rows."""

    rows: list[Row]
    counts: list[RowCounts]
    skipped: list[Problem] = field(default_factory=list)


def prepare_rows(
    sources: Sequence[DataSource], data: DataSection, encoder: Encoder, console: Console, what: str
) -> PreparedRows:
    """Every row of the sources, read, decoded, rendered and counted.

    Bad and overlong rows are skipped where `data` says so; otherwise all of them are named in one
    `DataError`.
    """
    rows, problems = read_sources(sources)
    shown = track(
        examine(encoder, rows, max_tokens=data.max_tokens, num_threads=os.cpu_count() or 1),
        f"checking {what} rows",
        total=len(rows),
        console=console,
        disable=not console.is_terminal,
    )
    usable: list[tuple[Row, RowCounts]] = []
    for row, result in shown:
        if isinstance(result, Problem):
            problems.append(result)
        else:
            usable.append((row, result))
    fatal = [p for p in problems if _policy(p, data) != "skip"]
    if fatal:
        bad = [p for p in fatal if not isinstance(p, Overlong)]
        hint = "\nMend them, or set data.bad_rows: skip to leave bad rows out" if bad else ""
        raise DataError(
            summarise_problems(f"data.{what}", [str(problem) for problem in fatal]) + hint
        )
    if not usable:
        raise DataError(
            f"data.{what}: no usable row is left ({len(problems):,} skipped); nothing to work with"
        )
    return PreparedRows([row for row, _ in usable], [counts for _, counts in usable], problems)


def _policy(problem: Problem, data: DataSection) -> str:
    return data.overlong if isinstance(problem, Overlong) else data.bad_rows
