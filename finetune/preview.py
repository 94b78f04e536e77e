"""`finetune preview`: rows as the model reads them, before anything is trained on them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from finetune.data.examples import Encoder
from finetune.data.sources import Row, Rows
from finetune.errors import DataError
from finetune.model.load import quiet_libraries
from finetune.preparation import (
    cache_of,
    load_encoder,
    open_sources,
    open_streams,
    prepare_held_out,
)
from finetune.preview_page import PreviewRow, preview_row, refuse_other_than_page, write_preview
from finetune.recipe import Recipe
from finetune.tables import messages_console

NUM_ROWS = 8


@dataclass(frozen=True)
class Preview:
    """Rows that can be shown, and `(where, reason)` of those that cannot."""

    rows: list[PreviewRow]
    problems: list[tuple[str, str]]
    num_rows_in_all: int | None
    encoder: Encoder

    def to_json(self) -> list[dict[str, Any]]:
        """What `--json` prints, a line a row."""
        return [preview_row(row.example, self.encoder.processor) for row in self.rows]


def preview(
    recipe: Recipe,
    *,
    num_rows: int = NUM_ROWS,
    chosen: Sequence[str] = (),
    seed: int = 0,
    held_out: bool = False,
    console: Console | None = None,
) -> Preview:
    """Encode some rows of the training entries, or of the eval entries with `held_out`.

    `chosen` names rows as other verbs do, by `file:line` or the end of it; without any, `num_rows`
    are drawn by the seed, or come first where the rows are streamed. Raises `FinetuneError`.
    """
    console = console or messages_console()
    quiet_libraries()
    if held_out and not recipe.data.eval and not recipe.data.eval_fraction:
        raise DataError("nothing is held out; leave --held-out out, or set data.eval_fraction: 0.1")
    encoder = load_encoder(recipe, console)
    read, total = _read(recipe, encoder, num_rows, chosen, seed, held_out, console)
    rows, problems = [], []
    for where, row in read:
        try:
            if isinstance(row, DataError):
                raise row
            rows.append(PreviewRow.of_fitted(*encoder.encode_fitted(row)))
        except DataError as error:
            problems.append((where, str(error)))
    return Preview(rows, problems, total, encoder)


def write_page(shown: Preview, recipe: Recipe, title: str, out: Path) -> Path:
    """The page. Raises `RunDirError` for a place that holds something else."""
    refuse_other_than_page(out)
    return write_preview(
        shown.rows,
        shown.encoder.processor,
        out,
        title=title,
        model=recipe.model.name,
        images=shown.encoder.images,
        num_rows=shown.num_rows_in_all,
        problems=shown.problems,
    )


def _read(
    recipe: Recipe,
    encoder: Encoder,
    num_rows: int,
    chosen: Sequence[str],
    seed: int,
    held_out: bool,
    console: Console,
) -> tuple[list[tuple[str, Row | DataError]], int | None]:
    """The rows asked for, and how many there are, where that is known."""
    cache = cache_of(recipe.output.dir)
    entries = recipe.data.eval if held_out else recipe.data.train
    if any(entry.streaming for entry in entries):
        if chosen:
            raise DataError("streamed rows cannot be chosen by their place; leave --row out")
        streams = open_streams(recipe, cache, console)
        rows = itertools.chain.from_iterable(
            itertools.islice(stream.iterate(), num_rows) for stream in streams
        )
        return list(itertools.islice(rows, num_rows)), None
    if held_out and recipe.data.eval_fraction:
        carved = prepare_held_out(recipe, encoder, cache, console)
        assert carved
        all_rows = carved.rows
    else:
        (sources,) = open_sources([entries], recipe.data, cache, console)
        all_rows = Rows(sources, np.arange(sum(len(source) for source in sources)))
    if chosen:
        picked = [_find(all_rows, name) for name in chosen]
    else:
        picked = np.random.default_rng(seed).permutation(len(all_rows))[:num_rows].tolist()
        picked.sort()
    return [all_rows.row_or_error(i) for i in picked], len(all_rows)


def _find(rows: Rows, name: str) -> int:
    """The row whose place is, or ends in, the name. Raises `DataError` unless it is one."""
    places = [rows.where_of(int(number)) for number in rows.numbers]
    found = [i for i, place in enumerate(places) if place.endswith(name)]
    if name in places:
        found = [places.index(name)]
    if len(found) != 1:
        raise DataError(
            f"--row {name}: {len(found):,} rows have a place that ends so; write it as check "
            "prints it, such as data/train.jsonl:41"
        )
    return found[0]
