"""What every verb that needs rows does first: read, examine, and let the recipe's policies
decide.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finetune.asking import HeldOut
from finetune.data.examination import (
    BAD,
    CHANGED,
    LEFT_OUT,
    OVERLONG,
    USABLE,
    Examination,
)
from finetune.data.examined import examine_once
from finetune.data.examples import Encoder
from finetune.data.gathering import RowSizes
from finetune.data.sampling import hold_out
from finetune.data.sequences import Layouting
from finetune.data.sources import Rows, Source, StreamSource, open_source, open_stream_source
from finetune.errors import DataError, RecipeError, summarise_problems
from finetune.families.family import Family
from finetune.model.load import load_config, load_processor
from finetune.model.vocabulary import add_extra_tokens
from finetune.recipe import DataSection, DataSource, Recipe
from finetune.rundir import RunDir, write_jsonl

FATAL_SHOWN = 20


@dataclass(frozen=True)
class PreparedRows:
    """Rows that can be trained or judged, and the examination they come from.

    `counts` has a line a usable row; `weights` one a source, over which `rows` are spread.
    """

    rows: Rows
    counts: np.ndarray
    examination: Examination

    def to_ask(self) -> HeldOut:
        """The rows, to be asked."""
        counts = self.counts
        return HeldOut(self.rows, counts["num_tokens"].astype(int), counts["row_key"])

    def spans(self) -> list[tuple[int, float]]:
        """Number of rows and weight of each source."""
        weights = [source.reader.settings.weight for source in self.rows.sources]
        return list(zip(self.rows.num_of_sources(), weights, strict=True))


def load_encoder(recipe: Recipe, console: Console) -> Encoder:
    """What turns rows into examples for the recipe's model; its `images` are the recipe's, with the
    checkpoint's own where the recipe leaves them open.

    Warns of settings that the model has no use for. Raises `ModelError`, and `RecipeError` for
    those that it cannot carry out.
    """
    _, family = load_config(recipe.model)
    if recipe.training.vision_cache != "off" and not family.view_encoder:
        raise RecipeError(
            "training.vision_cache: keeps features that stand in the text, as those of "
            f"{family.name} do not; set it to off"
        )
    processor, images = load_processor(recipe.model, recipe.images)
    add_extra_tokens(processor, recipe)
    idle = [
        f"images.{key} has no effect on {family.name}: its views have a fixed size"
        for key in type(images).model_fields
        if getattr(recipe.images, key) is not None and getattr(images, key) is None
    ]
    views_of = [
        [
            (view.width_px, view.height_px)
            for view in family.plan_image(*size, images, processor.image_processor).views
        ]
        for size in ((120, 90), (480, 360))
    ]
    if recipe.data.random_upscale > 1 and views_of[0] == views_of[1]:
        idle.append(
            f"data.random_upscale has no effect on {family.name}: it brings small pictures to the "
            "size of large ones by itself"
        )
    for warning in idle:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    return Encoder.of_recipe(
        processor,
        family,
        images,
        recipe.data,
        packed_vision=recipe.model.packed_vision,
        layouting=layouting_of(recipe, family),
    )


def cache_of(folder: str | Path) -> Path:
    """Where indexes, examinations and downloads are kept for runs: beside the run directory."""
    return Path(folder).resolve().parent / ".finetune-cache"


def prepare_rows(
    recipe: Recipe, encoder: Encoder, cache: Path, console: Console
) -> tuple[PreparedRows, PreparedRows | None]:
    """The rows to train and, where the recipe has any, those held out; all read, decoded, rendered
    and counted, or found so by an earlier command.

    Raises `DataError` that names the bad and overlong rows the recipe does not let pass.
    """
    data = recipe.data
    train_sources, eval_sources = open_sources([data.train, data.eval], data, cache, console)
    train = _prepare(train_sources, data, encoder, cache, console, "train")
    if eval_sources:
        return train, _prepare(eval_sources, data, encoder, cache, console, "eval")
    return carve(train, data, console) if data.eval_fraction else (train, None)


def prepare_held_out(
    recipe: Recipe,
    encoder: Encoder,
    cache: Path,
    console: Console,
    *,
    max_rows: int | None = None,
) -> PreparedRows | None:
    """The held-out rows alone, as `prepare_rows` gives them; with `max_rows` the first usable ones
    of `data.eval`, and those after them are not looked at.
    """
    data = recipe.data
    if data.eval:
        (sources,) = open_sources([data.eval], data, cache, console)
        return _prepare(sources, data, encoder, cache, console, "eval", max_rows)
    return prepare_rows(recipe, encoder, cache, console)[1] if data.eval_fraction else None


def open_sources(
    parts: Sequence[Sequence[DataSource]], data: DataSection, cache: Path, console: Console
) -> list[list[Source]]:
    """The entries of each part of a recipe, opened, telling which format each was recognised as.

    Raises one `DataError` that names every entry which cannot be read.
    """
    opened: list[list[Source]] = [[] for _ in parts]
    errors = []
    for sources, entries in zip(opened, parts, strict=True):
        for entry in entries:
            try:
                source = open_source(entry, data, cache)
            except DataError as error:
                errors.append(str(error))
                continue
            if entry.format == "auto" and not entry.columns:
                same = " and ".join(source.reader.same_as)
                also = f" ({same} would read it the same)" if same else ""
                console.print(
                    f"{source.container.shown}: {counted(len(source), 'row')}, format "
                    f"{source.reader.format_name}{also}",
                    soft_wrap=True,
                )
            sources.append(source)
    if errors:
        raise DataError("\n".join(errors))
    return opened


def open_streams(recipe: Recipe, cache: Path, console: Console) -> list[StreamSource]:
    """The training entries of a recipe that streams them."""
    streams = []
    for entry in recipe.data.train:
        stream = open_stream_source(entry, recipe.data, cache)
        console.print(
            f"{stream.stream.shown}: streamed, format {stream.reader.format_name}", soft_wrap=True
        )
        streams.append(stream)
    return streams


@contextmanager
def progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, and nothing elsewhere; gives the function to tell rows done and all."""
    bar = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


def row_sizes(recipe: Recipe, encoder: Encoder, prepared: PreparedRows) -> RowSizes:
    """What the rows cost in a batch; those of one picture are known as such where they are to be
    gathered.
    """
    config, family = load_config(recipe.model)
    patch_px = getattr(config.vision_config, "patch_size", 14)
    if not gathers_pictures(recipe, family):
        return RowSizes.of_counts(prepared.counts, patch_px=patch_px)
    processor = encoder.processor
    plan = family.plan_image(480, 360, encoder.images, processor.image_processor)
    return RowSizes.of_counts(
        prepared.counts,
        patch_px=patch_px,
        picture_keys=_beginnings(prepared),
        tokens_a_view=family.num_image_tokens(processor, plan) // len(plan.views),
    )


def first_pictures(prepared: PreparedRows) -> np.ndarray:
    """The key of each row's first picture, 0 for none [N]."""
    examination = prepared.examination
    num_images = examination.counts["num_images"].astype(np.int64)
    with_images = np.flatnonzero(num_images)
    first = np.zeros(len(num_images), np.uint64)
    first[with_images] = examination.image_keys[(np.cumsum(num_images) - num_images)[with_images]]
    return first[prepared.rows.numbers]


def _beginnings(prepared: PreparedRows) -> np.ndarray:
    """The same key for rows that are the same up to the end of their first picture, 0 for rows
    without one [N]: what rows can share.
    """
    pictures = first_pictures(prepared)
    mixed = pictures * np.uint64(0x9E3779B97F4A7C15) ^ prepared.counts["prefix_key"]
    return np.where(pictures == 0, np.uint64(0), np.maximum(mixed, np.uint64(1)))


def gathers_pictures(recipe: Recipe, family: Family) -> bool:
    """Whether rows that begin with one picture are put into one batch: where they can be trained as
    one sequence.
    """
    return (
        recipe.training.share_images == "auto"
        and family.view_encoder is not None  # where cross-attention sees pictures, by row
        and recipe.model.attention != "flash_attention_2"  # whose kernel takes no mask
        and recipe.data.random_upscale == 1  # or each row shows it at a size of its own
        and not recipe.training.neftune_alpha  # or rows would share the noise, too
    )


def layouting_of(recipe: Recipe, family: Family) -> Layouting | None:
    """Which rows of a batch are trained as one sequence; None where all are trained apart.

    Raises `RecipeError` where the recipe packs rows for a model that cannot keep them apart.
    """
    packing = recipe.training.packing
    if packing and not family.view_encoder:
        raise RecipeError(
            f"training.packing: {family.name} sees pictures by cross-attention, which would show "
            "those of a row to all rows of its sequence; leave packing out"
        )
    share_images = gathers_pictures(recipe, family)
    if not packing and not share_images:
        return None
    return Layouting(
        packing=packing,
        share_images=share_images,
        max_tokens=recipe.data.max_tokens,
        one_sequence=recipe.model.attention == "flash_attention_2",
    )


def _prepare(
    sources: Sequence[Source],
    data: DataSection,
    encoder: Encoder,
    cache: Path,
    console: Console,
    what: str,
    max_rows: int | None = None,
) -> PreparedRows:
    num_rows = sum(len(source) for source in sources)
    num_looked_at = min(max_rows or num_rows, num_rows)
    while True:
        looked_at = _first_rows(sources, num_looked_at) if num_looked_at < num_rows else sources
        with progress(console, f"checking {what} rows") as on_progress:
            examination, was_kept = examine_once(looked_at, encoder, cache, on_progress=on_progress)
        if num_looked_at == num_rows or examination.num_of(USABLE) >= (max_rows or 0):
            break
        num_looked_at = min(2 * num_looked_at, num_rows)
    if was_kept:
        console.print(f"{what}: checked before, and the data files have not changed since")
    refuse_fatal(examination, data, what)
    usable = examination.usable()[:max_rows]
    num_in = len(examination.counts)
    if not len(usable):
        raise DataError(
            f"data.{what}: no usable row is left ({num_in:,} skipped); nothing to work with"
        )
    console.print(f"{what}: {in_words(examination)}", soft_wrap=True)
    return PreparedRows(Rows(looked_at, usable), examination.counts[usable], examination)


class _FirstRows(Source):
    """So many rows of a source, as if there were no others."""

    def __init__(self, source: Source, num_rows: int):
        super().__init__(source.container, source.reader)
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def identity(self) -> list[Any]:
        return [*super().identity(), self.num_rows]


def _first_rows(sources: Sequence[Source], num_rows: int) -> list[Source]:
    """The sources with that many rows together, the first ones; none of the later sources."""
    found = []
    for source in sources:
        found.append(_FirstRows(source, min(num_rows, len(source))))
        num_rows -= len(found[-1])
    return found


def refuse_fatal(examination: Examination, data: DataSection, what: str) -> None:
    """Raise `DataError` naming the rows that the recipe's policies do not let pass."""
    fatal_kinds = {BAD: data.bad_rows != "skip", OVERLONG: data.overlong != "skip"}
    num_fatal = sum(examination.num_of(state) for state, fatal in fatal_kinds.items() if fatal)
    if not num_fatal:
        return
    findings = (
        finding
        for finding in examination.findings(*LEFT_OUT)
        if fatal_kinds[BAD if finding.kind == "bad" else OVERLONG]
    )
    shown = [str(finding) for finding in itertools.islice(findings, FATAL_SHOWN)]
    message = summarise_problems(f"data.{what}", shown, total=num_fatal)
    if fatal_kinds[BAD] and examination.num_of(BAD):
        message += "\nMend them, or set data.bad_rows: skip to leave bad rows out"
    raise DataError(message)


def in_words(examination: Examination) -> str:
    """One line on some sources: rows in = usable + left out, what they cost, what was changed."""
    counts = examination.counts
    usable = counts[counts["state"] == USABLE]
    tokens = int(usable["num_tokens"].sum())
    learnt = int(usable["num_learnt_tokens"].sum())
    bad, overlong = examination.num_of(BAD), examination.num_of(OVERLONG)
    assert len(counts) == len(usable) + bad + overlong
    changes = Counter(finding.group for finding in examination.findings(*CHANGED))
    shortened = "".join(f"; {count:,} with {group}" for group, count in sorted(changes.items()))
    return (
        f"{len(counts):,} rows in = {len(usable):,} usable + {bad:,} bad + {overlong:,} too long"
        f"{shortened}; {tokens:,} tokens, {learnt:,} of them learnt "
        f"({learnt / max(tokens, 1):.0%}); {int(usable['num_views'].sum()):,} views"
    )


def write_lists(folder: Path, examinations: Sequence[Examination]) -> None:
    """Write `skipped.jsonl`, the rows left out, and `changed.jsonl`, those made to fit, if any."""
    run = RunDir(folder)
    for path, kinds in ((run.skipped, LEFT_OUT), (run.changed, CHANGED)):
        findings = [each.findings(*kinds) for each in examinations]
        lines = itertools.chain.from_iterable(findings)
        write_jsonl(path, (f.to_json() for f in lines))
    if not run.changed.stat().st_size:
        run.changed.unlink()


def carve(
    train: PreparedRows, data: DataSection, console: Console
) -> tuple[PreparedRows, PreparedRows]:
    """Training rows parted in those still trained and those held out by `data.eval_fraction`.

    Raises `DataError` where their pictures hang together so that nothing would be left.
    """
    counts, examination = train.counts, train.examination
    without = np.flatnonzero(counts["num_images"] == 0)
    with_images = np.repeat(np.arange(len(counts)), counts["num_images"])
    rows_of_keys = np.concatenate([with_images, without])
    keys = np.concatenate([examination.image_keys, counts["row_key"][without]])
    held = hold_out(len(counts), rows_of_keys, keys, data.eval_fraction, data.eval_seed)
    share = held.sum() / len(held)
    console.print(
        f"held out {held.sum():,} of {counted(len(held), 'row')} ({share:.1%}; data.eval_fraction: "
        f"{data.eval_fraction:g}, seed {data.eval_seed}; rows that share a picture stay together)",
        soft_wrap=True,
    )
    numbers, sources = train.rows.numbers, train.rows.sources
    return (
        PreparedRows(Rows(sources, numbers[~held]), counts[~held], examination),
        PreparedRows(Rows(sources, numbers[held]), counts[held], examination),
    )


def counted(number: int, noun: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
