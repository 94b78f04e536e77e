"""`finetune check`: every row of a recipe read, decoded, rendered and counted, before a GPU is paid
for.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from finetune.check_page import write_check_page
from finetune.checking import (
    Duplicates,
    Entry,
    Part,
    find_duplicates,
    read_problems,
    summarise_part,
)
from finetune.data.examination import (
    CHANGED,
    LEFT_OUT,
    USABLE,
    Examination,
    Finding,
    examine_streams,
)
from finetune.data.examined import examine_once, folder_for_this_command
from finetune.data.examples import Encoder
from finetune.data.sources import Rows, Source, StreamSource
from finetune.errors import RunDirError
from finetune.model.load import quiet_libraries
from finetune.preparation import (
    PreparedRows,
    cache_of,
    carve,
    counted,
    load_encoder,
    open_sources,
    open_streams,
    progress,
    write_lists,
)
from finetune.recipe import DataSection, Recipe, recipe_warnings
from finetune.tables import check_table, costly_rows, messages_console, results_console

PAGE = "check.html"
OURS = {PAGE, "skipped.jsonl", "changed.jsonl"}
PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class CheckResult:
    """All that was found. `problems` can be gone through more than once; it reads from a file."""

    recipe_name: str
    recipe: Recipe
    parts: list[Part]
    duplicates: Duplicates | None
    examinations: list[Examination]
    seconds: float
    folder: Path

    def problems(self) -> Iterator[Finding]:
        """Rows that cannot be used as they are, in their order."""
        for examination in self.examinations:
            yield from examination.findings(*LEFT_OUT)

    def changed(self) -> Iterator[Finding]:
        """Rows that are trained shorter than they were written, in their order."""
        for examination in self.examinations:
            yield from examination.findings(*CHANGED)

    @property
    def num_problems(self) -> int:
        """How many rows `problems` gives."""
        return sum(part.num_bad + part.num_overlong for part in self.parts)

    @property
    def num_rows(self) -> int:
        """Rows read, usable or not."""
        return sum(part.num_rows for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "rows": self.num_rows,
            "usable": sum(part.num_usable for part in self.parts),
            "problems": [f.to_json() for f in self.problems()],
            "changed": [f.to_json() for f in self.changed()],
            "formats": {
                entry.shown: entry.format_name for part in self.parts for entry in part.entries
            },
            "parts": {part.name: asdict(part) for part in self.parts},
            "duplicates": asdict(self.duplicates) if self.duplicates else None,
            "seconds": round(self.seconds, 3),
            "report": str(self.folder / PAGE),
        }


def check(
    recipe: Recipe,
    recipe_name: str,
    *,
    out: Path | None = None,
    console: Console | None = None,
) -> CheckResult:
    """Examine all rows anew and write check.html, skipped.jsonl and changed.jsonl to `out`, by
    default a folder beside the run directory.

    What `train` needs of it is kept, so that it does not check the same rows again. Raises
    `FinetuneError` where a whole source cannot be read.
    """
    console = console or messages_console()
    quiet_libraries()
    for warning in recipe_warnings(recipe):
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    encoder = load_encoder(recipe, console)
    recipe = recipe.model_copy(update={"images": encoder.images})
    folder = _folder(out or Path(recipe.output.dir.rstrip("/") + "-check"))
    cache = cache_of(recipe.output.dir)
    start = time.perf_counter()
    data, streamed = recipe.data, any(entry.streaming for entry in recipe.data.train)
    streams = open_streams(recipe, cache, console) if streamed else []
    opened = open_sources([() if streamed else data.train, data.eval], data, cache, console)
    found: dict[str, Read] = {}
    for name, sources in zip(("train", "eval"), opened, strict=True):
        if not sources and not (name == "train" and streams):
            continue
        with progress(console, f"checking {name} rows") as on_progress:
            if sources:
                found[name] = _read_sources(sources, encoder, cache, on_progress)
            else:
                found[name] = _read_streams(streams, encoder, on_progress)
    examinations = [examination for _, examination, _ in found.values()]
    write_lists(folder, examinations)  # before anything else can be wrong
    if data.eval_fraction and examinations[0].num_of(USABLE):
        found = _carved(found["train"], opened[0], data, console)
    parts = [summarise_part(name, *read) for name, read in found.items()]
    duplicates = None
    if "eval" in found:
        _, held_out, place = found["eval"]
        duplicates = find_duplicates(found["train"][1], held_out, place)
    seconds = time.perf_counter() - start
    result = CheckResult(recipe_name, recipe, parts, duplicates, examinations, seconds, folder)
    write_check_page(result, folder / PAGE)
    return result


def _folder(path: Path) -> Path:
    """The folder to write to, made. Raises `RunDirError` where it holds other things, such as the
    lists of a run.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        # of names that begin with a dot are our own files while they are written
        others = {entry.name for entry in path.iterdir() if entry.name[0] != "."} - OURS
        if others:
            raise RunDirError(
                f"{path}: holds other things than a check ({', '.join(sorted(others)[:3])}); give "
                "another folder with --out"
            )
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        if isinstance(error, RunDirError):
            raise
        raise RunDirError(
            f"{path}: cannot be written to ({error.strerror}); give another folder with --out"
        ) from error


Read = tuple[list[Entry], Examination, Callable[[int], str]]


def _read_sources(
    sources: Sequence[Source],
    encoder: Encoder,
    cache: Path,
    on_progress: Callable[[int, int], None],
) -> Read:
    examination, _ = examine_once(sources, encoder, cache, again=True, on_progress=on_progress)
    shown = [
        Entry(each.container.shown, len(each), each.reader.format_name, each.reader.same_as)
        for each in sources
    ]
    return shown, examination, Rows(sources, examination.usable()).where_of


def _carved(
    read: Read, sources: Sequence[Source], data: DataSection, console: Console
) -> dict[str, Read]:
    """The rows that training would have, and those that `data.eval_fraction` holds out."""
    shown, examination, place = read
    usable = examination.usable()
    train = PreparedRows(Rows(sources, usable), examination.counts[usable], examination)
    held = carve(train, data, console)[1].rows.numbers
    rest = np.setdiff1d(np.arange(len(examination.counts)), held)
    return {
        "train": (shown, examination.of_rows(rest), lambda i: place(int(rest[i]))),
        "eval": ([], examination.of_rows(held), lambda i: place(int(held[i]))),
    }


def _read_streams(
    streams: Sequence[StreamSource], encoder: Encoder, on_progress: Callable[[int, int], None]
) -> Read:
    # not kept: a stream may be another one next time
    findings_file = folder_for_this_command() / "findings.jsonl"
    examination = examine_streams(
        streams, encoder, findings_file=findings_file, on_progress=on_progress
    )
    shown = [
        Entry(each.stream.shown, num_rows, each.reader.format_name, each.reader.same_as)
        for each, num_rows in zip(streams, examination.num_rows_of, strict=True)
    ]
    return shown, examination, lambda number: examination.places[number]


def print_check(result: CheckResult, results: Console | None = None) -> None:
    """The table, what is wrong with how many rows, and where all of it stands."""
    results = results or results_console()
    results.print(check_table(result.parts, result.duplicates))
    for line in [*costly_rows(result.parts), "", *_verdict(result)]:
        results.print(line, soft_wrap=True)


def _verdict(result: CheckResult) -> Iterator[str]:
    rows = counted(result.num_rows, "row")
    if not result.num_problems:
        yield f"all {rows} can be used (read in {result.seconds:.1f} s)"
    else:
        data = result.recipe.data
        skipped = (data.bad_rows == "skip" or not any(part.num_bad for part in result.parts)) and (
            data.overlong == "skip" or not any(part.num_overlong for part in result.parts)
        )
        then = "training leaves them out" if skipped else "training stops at them"
        yield f"{result.num_problems:,} of {rows} cannot be used as they are; {then}:"
        yield from _faults(result)
        yield f"each row: {result.folder / 'skipped.jsonl'}"
    if num_changed := sum(sum(part.changes.values()) for part in result.parts):
        yield (f"{counted(num_changed, 'row')} made to fit; how: {result.folder / 'changed.jsonl'}")
    if result.duplicates and result.duplicates.num_same_both:
        yield (
            f"warning: {counted(result.duplicates.num_same_both, 'held-out row')} asked of a "
            f"picture what training asks of it, such as {result.duplicates.examples[0]}; figures "
            "on them say less"
        )
    yield f"report: {result.folder / PAGE}"


def _faults(result: CheckResult) -> Iterator[str]:
    """A line a row where there are few, otherwise a line a fault, the commonest first."""
    if result.num_problems <= PROBLEMS_SHOWN:
        yield from (f"  {problem}" for problem in result.problems())
        return
    _, faults, _ = read_problems(result.problems())
    for fault in faults[:PROBLEMS_SHOWN]:
        more = f" (and {fault.count - 1:,} like it)" if fault.count > 1 else ""
        yield f"  {fault.where}: {fault.reason}{more}"
    if len(faults) > PROBLEMS_SHOWN:
        yield f"  ... and {counted(len(faults) - PROBLEMS_SHOWN, 'other fault')}"
