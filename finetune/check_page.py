"""`check.html`: what a check found, on one self-contained page, the answer first.

Words and numbers are shaped in the template, which also escapes all that comes from users' data;
this module decides what is told: the verdict, what to do about it, what else is worth a look, and
which problems are one fault repeated.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from finetune import __version__
from finetune.charts import Limit, histogram_chart
from finetune.checking import (
    Duplicates,
    Histogram,
    Part,
    read_problems,
)
from finetune.data.examination import Finding
from finetune.environment import environment
from finetune.gallery import text_of
from finetune.recipe import DataSection, Recipe
from finetune.rundir import write_text

FAULTS_SHOWN = 25
FEW_LEARNT = 0.01  # a smaller share of learnt tokens is worth a look
LIMIT_IN_SIGHT = 1.5  # data.max_tokens is drawn up to this many times the longest row
VERSIONS = (
    "vlm_recipes",
    "commit",
    "python",
    "system",
    "transformers",
    "datasets",
    "pillow",
    "numpy",
)


class Checked(Protocol):
    """What the page shows; `finetune.check.CheckResult` is one."""

    @property
    def recipe_name(self) -> str: ...
    @property
    def recipe(self) -> Recipe: ...
    @property
    def parts(self) -> list[Part]: ...
    @property
    def duplicates(self) -> Duplicates | None: ...
    @property
    def seconds(self) -> float: ...
    @property
    def num_problems(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    def problems(self) -> Iterator[Finding]: ...


def write_check_page(result: Checked, out: Path) -> Path:
    """Write the page to `out`, whole or not at all; returns `out`.

    Of the problems, which may be a million, only the first 100,000 are read.
    """
    page = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    page.filters |= {"with_code": with_code, "text_of": text_of}
    template = files("finetune").joinpath("check.html.j2").read_text(encoding="utf-8")
    write_text(out, page.from_string(template).render(gather(result)))
    return out


def gather(result: Checked) -> dict[str, Any]:
    """Everything the template shows, by name."""
    problems, faults, num_counted = read_problems(result.problems())
    recipe = result.recipe
    parts = result.parts
    num_usable = sum(part.num_usable for part in parts)
    fatal = any(fatal_kinds(recipe.data, parts))
    notes = list(worth_a_look(result))
    return {
        "name": result.recipe_name,
        "model": recipe.model.name,
        "num_rows": result.num_rows,
        "num_usable": num_usable,
        "num_problems": result.num_problems,
        "num_bad": sum(part.num_bad for part in parts),
        "num_overlong": sum(part.num_overlong for part in parts),
        "tone": "bad" if fatal or not num_usable else "unsure" if result.num_problems else "good",
        "advice": list(advice(recipe.data, parts)),
        "notes": notes,
        "parts": parts,
        "held_out": recipe.data.eval_fraction,
        "charts": {part.name: part_charts(part, recipe.data.max_tokens) for part in parts},
        "num_changed": sum(sum(part.changes.values()) for part in parts),
        "duplicates": result.duplicates,
        "problems": problems,
        "faults": faults[:FAULTS_SHOWN],
        "num_faults": len(faults),
        "num_counted": num_counted,
        "data": recipe.data,
        "settings": read_with(recipe),
        "versions": [(k, v) for k, v in environment().items() if k in VERSIONS and v],
        "changes": sorted({kind for part in parts for kind in part.changes}),
        "seconds_taken": result.seconds,
        "now": datetime.now(UTC),
        "version": __version__,
    }


def visible(value: Any) -> Any:
    """Text with characters that are not seen, or turn others around, by their numbers.

    Names of files may hold any, and bytes that are no UTF-8 besides, which no page could.
    """
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in value)


def with_code(text: str) -> Markup:
    """Text with what stands between backticks as code, escaped."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(visible(text)))))


# The answer.


@dataclass(frozen=True)
class Note:
    """Something that stops nothing, but that a person should know; `anchor` is where it stands."""

    text: str
    anchor: str = ""


def fatal_kinds(data: DataSection, parts: Iterable[Part]) -> tuple[bool, bool]:
    """Whether `finetune train` stops at bad rows, and at rows that are too long."""
    parts = list(parts)
    return (
        data.bad_rows != "skip" and any(part.num_bad for part in parts),
        data.overlong != "skip" and any(part.num_overlong for part in parts),
    )


def advice(data: DataSection, parts: Iterable[Part]) -> Iterator[str]:
    """What training does with the rows that cannot be used, and what to do about them."""
    parts = list(parts)
    stops_at_bad, stops_at_overlong = fatal_kinds(data, parts)
    if stops_at_bad:
        yield (
            "`finetune train` stops at bad rows. Mend them, or set `data.bad_rows: skip` to "
            "train without them."
        )
    elif any(part.num_bad for part in parts):
        yield (
            "Bad rows are left out, since `data.bad_rows` is `skip`. Mend them to train on them, "
            "too."
        )
    limit = f"`data.max_tokens` (now {data.max_tokens:,})"
    if stops_at_overlong and data.overlong == "stop":
        yield (
            f"`finetune train` stops at rows that are too long. Raise {limit}, or set "
            "`data.overlong` to `skip` (leave them out), `drop_turns` (leave out their oldest "
            "exchanges) or `fewer_views` (show their pictures unsplit)."
        )
    elif stops_at_overlong:
        yield (
            f"`finetune train` stops at rows that are too long even with `data.overlong: "
            f"{data.overlong}`. Raise {limit}, or set `data.overlong: skip` to leave them out."
        )
    elif any(part.num_overlong for part in parts):
        yield (
            f"Rows that are too long are left out, since `data.overlong` is `skip`. Raise {limit} "
            "to train on them, too."
        )


def worth_a_look(result: Checked) -> Iterator[Note]:
    """What is no error, but often a mistake."""
    data, parts, shared = result.recipe.data, result.parts, result.duplicates
    for part in parts:
        if part.num_rows and not part.num_usable:
            yield Note(f"No usable row is left in {part.name}, so that training cannot start.")
        for entry in part.entries:
            if not entry.num_rows:
                yield Note(f"{entry.shown} ({part.name}) has no rows.", part.name)
    if shared and shared.num_same_both:
        yield Note(
            f"{_rows(shared.num_same_both, 'held-out ')} "
            f"{_s(shared.num_same_both, 'asks', 'ask')} what training asks of the same picture. "
            "Figures on them say how well the model remembers, not how well it reads: take them "
            "out of one of the two.",
            "shared",
        )
    elif shared and shared.num_same_image:
        yield Note(
            f"{_rows(shared.num_same_image, 'held-out ')} "
            f"{_s(shared.num_same_image, 'shows', 'show')} a picture that training shows, too, "
            "with other questions. Figures on them may come out better than on new pictures.",
            "shared",
        )
    for part in parts:
        if part.num_repeated:
            effect = (
                "learnt more often than others"
                if part.name == "train"
                else "counted more than once in the figures"
            )
            yield Note(
                f"{_rows(part.num_repeated, part.name + ' ')} "
                f"{_s(part.num_repeated, 'is', 'are')} the same as a row before, and so {effect}.",
                part.name,
            )
        if part.num_usable and not part.num_images:
            yield Note(f"No usable row in {part.name} has a picture.", part.name)
        share = part.num_learnt_tokens / max(part.num_tokens, 1)
        if part.name == "train" and part.num_tokens and share < FEW_LEARNT:
            yield Note(
                f"Only {share:.2%} of the tokens in train are learnt; the rest is pictures and "
                "questions. Several questions on a picture in one row, or fewer views "
                "(`images.split`), make more of the same time.",
                part.name,
            )
    if not data.eval and not data.eval_fraction:
        yield Note(
            "Nothing is held out, so that no figure will say whether training helped. Give "
            "`data.eval`, or set `data.eval_fraction: 0.1`."
        )


def _rows(count: int, which: str) -> str:
    return f"{count:,} {which}{_s(count, 'row', 'rows')}"


def _s(count: int, one: str, many: str) -> str:
    return one if count == 1 else many


# The charts.


@dataclass(frozen=True)
class Chart:
    """A distribution as a drawing, or in words where all rows are alike (`svg` is empty then)."""

    title: str
    words: str
    svg: Markup


def part_charts(part: Part, max_tokens: int) -> list[Chart]:
    """Tokens and views of the usable rows."""
    charts = []
    if part.num_usable:
        limit = Limit(f"data.max_tokens: {max_tokens:,}", max_tokens)
        most = part.longest[0].num_tokens
        charts.append(_chart(part.name, "token", part.tokens, most=most, limit=limit))
    if part.num_views:
        charts.append(_chart(part.name, "view", part.views))
    return charts


def _chart(
    part: str,
    what: str,
    histogram: Histogram,
    *,
    most: int | None = None,
    limit: Limit | None = None,
) -> Chart:
    """`most` is the highest value where it is known; a bin knows it only about."""
    title = f"{what.capitalize()}s of a row"
    counts, edges = histogram.counts, histogram.edges
    filled = [i for i, count in enumerate(counts) if count]
    low, high = edges[filled[0]], most or edges[filled[-1] + 1] - 1
    total = sum(counts)
    if low == high:
        rows = "The only usable row" if total == 1 else f"Each of the {total:,} usable rows"
        return Chart(title, f"{rows} has {low:,} {what}{_s(low, '', 's')}.", Markup())
    if edges[1] - edges[0] == 1:
        count, commonest = max(zip(counts, edges, strict=False))
        middle = f"most often {commonest:,} ({count / total:.0%} of the rows)"
    else:
        running = itertools.accumulate(counts)
        half = next(i for i, rows in enumerate(running) if 2 * rows >= total)
        middle = f"half of the rows have at most {min(edges[half + 1] - 1, high):,}"
    words = f"From {low:,} to {high:,} {what}s; {middle}."
    if limit and limit.value > LIMIT_IN_SIGHT * high:
        words += f" `data.max_tokens`, {limit.value:,}, is far to the right."
        limit = None
    label = f"Histogram of {what}s a row, {total:,} rows in {part}. {words.replace('`', '')}"
    drawn = histogram_chart(
        edges,
        counts,
        xlabel=f"{what}s",
        name=f"{part}-{what}s",
        title=title,
        label=label,
        limit=limit,
    )
    return Chart(title, words, Markup(drawn.svg()))


def read_with(recipe: Recipe) -> list[tuple[str, str]]:
    """The settings that shape a row, by key."""
    model, images, data = recipe.model, recipe.images, recipe.data
    settings = {
        "model.name": model.name,
        "model.revision": model.revision,
        **{f"images.{key}": value for key, value in images.model_dump().items()},
        "data.max_tokens": data.max_tokens,
        "data.overlong": data.overlong,
        "data.bad_rows": data.bad_rows,
        "data.max_megapixels": data.max_megapixels,
        "data.eval_fraction": data.eval_fraction,
    }
    return [
        (key, value if isinstance(value, str) else f"{value:,g}")
        for key, value in settings.items()
        if value is not None
    ]
