"""`finetune score`: figures for predictions made anywhere, by the code that judges runs."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from finetune.errors import DataError, RecipeError, summarise_problems
from finetune.metrics import Measured, measure, packages_needed
from finetune.packages import refuse_missing
from finetune.recipe import METRICS

SHOWN = 10


@dataclass(frozen=True)
class Scored:
    """Figures over all rows of a file."""

    measured: Measured
    num_rows: int

    def to_json(self) -> dict[str, Any]:
        """Figures and their 95% intervals by metric, and the number of rows."""
        return {
            "num_rows": self.num_rows,
            "figures": self.measured.figures(),
            "intervals": self.measured.intervals(),
        }


def score(path: str | Path, metrics: Sequence[str], field: str = "prediction") -> Scored:
    """Score a JSONL file whose lines have `field`, a text, and `references`, a list of them.

    Raises `RecipeError` for unknown metrics, `DataError` for a file or lines that are not so.
    """
    metrics = metrics_named(metrics)
    predictions, references = _read(Path(path), field)
    return Scored(measure(predictions, references, metrics), len(predictions))


def metrics_named(
    names: Sequence[str], source: str = "--metrics", *, verb: str = "score"
) -> list[str]:
    """The names, each once. Raises `RecipeError` for one that is none, or whose package is not
    installed; `source`, where they were named, and `verb`, what needs them, stand in its message.
    """
    found = list(dict.fromkeys(names))
    unknown = [name for name in found if name not in METRICS]
    if unknown or not found:
        which = f"{', '.join(unknown)}: no such metric" if unknown else "no metric given"
        raise RecipeError(f"{source}: {which}; expected some of {', '.join(METRICS)}")
    refuse_missing(packages_needed(found, source), verb)
    return found


def _read(path: Path, field: str) -> tuple[list[str], list[list[str]]]:
    predictions, references, problems = [], [], []
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: is not JSON ({error})")
            continue
        if problem := _problem(row, field):
            problems.append(f"{path}:{number}: {problem}")
            continue
        predictions.append(row[field])
        references.append(row["references"])
    if problems:
        raise DataError(summarise_problems(str(path), problems[:SHOWN], total=len(problems)))
    if not predictions:
        raise DataError(f"{path}: has no rows, so there is nothing to score")
    return predictions, references


def _problem(row: Any, field: str) -> str | None:
    expected = f'expected {{"{field}": "...", "references": ["...", ...]}}'
    if not isinstance(row, dict):
        return f"is no object; {expected}"
    if not isinstance(row.get(field), str):
        found = "is missing" if field not in row else "is no text"
        others = [key for key, value in row.items() if isinstance(value, str)]
        hint = f"; texts there: {', '.join(others)} (--field)" if others else ""
        return f"{field!r} {found}; {expected}{hint}"
    references = row.get("references")
    if not isinstance(references, list) or not references:
        return f"'references' is no list of texts; {expected}"
    if not all(isinstance(each, str) for each in references):
        return "'references' holds what is no text; write each as a string"
    return None
