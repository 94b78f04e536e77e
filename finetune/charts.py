"""Line charts and histograms as inline SVG, coloured by the page: one drawing for light and dark.

matplotlib draws with stand-in colours; afterwards each becomes a CSS variable (`--chart-raw`, ...)
that the page sets.
"""

import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

# Stand-ins: colours nobody would choose, so that the exchange below can meet no other.
STAND_INS = {
    "ink": "#010203",
    "grid": "#010204",
    "raw": "#010205",
    "smooth": "#010206",
    "held": "#010207",
}
MAX_POINTS = 600  # a line; more cannot be told apart at this width and only make the file larger
SIZE_INCHES = (
    5.2,
    3.0,
)  # two abreast on a desk, one on a phone at about 0.7 of this size: hence the large type

Points = Sequence[tuple[float, float]]
Log = Sequence[dict[str, Any]]  # the rows of metrics.jsonl


@dataclass(frozen=True)
class Line:
    """One curve: name in the legend, colour (a key of `STAND_INS`), (step, value) points."""

    name: str
    colour: str
    points: Points
    width: float = 2.0
    marker: str = ""


def draw_charts(log: Log) -> list[tuple[str, str]]:
    """(title, SVG) of loss and learning rate; a curve of fewer than two points is not drawn."""
    losses, rates = curve(log, "loss"), curve(log, "learning_rate")
    charts = []
    if len(losses) > 1:
        (first, start), (last, end) = losses[0], losses[-1]
        label = f"Loss {start:.3g} at step {first:.0f}, {end:.3g} at step {last:.0f}"
        svg = loss_chart(losses, curve(log, "eval_loss"), label=label)
        charts.append(("Loss", svg))
    if len(rates) > 1:
        label = f"Learning rate, at most {max(rate for _, rate in rates):.3g}"
        charts.append(("Learning rate", learning_rate_chart(rates, label=label)))
    return charts


def number(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def curve(log: Log, key: str) -> list[tuple[float, float]]:
    """(step, value) by rising step; of a step that was run again after a resume, the last."""
    found = {number(row.get("step")): number(row.get(key)) for row in log if key in row}
    pairs = [
        (step, value) for step, value in found.items() if step is not None and value is not None
    ]
    return sorted(pairs)


def smooth(points: Points, *, share: float = 0.05) -> list[tuple[float, float]]:
    """The mean over a window of about `share` of the run, centred so that it does not trail behind.

    Towards both ends the window shrinks evenly on its two sides, so the ends are not bent either.
    """
    reach = max(2, round(share * len(points) / 2))
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    smoothed = []
    for index, (step, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)
        total = sums[index + near + 1] - sums[index - near]
        smoothed.append((step, total / (2 * near + 1)))
    return smoothed


def thin(points: Points, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """About `limit` points at most: of each stretch the lowest and the highest, so spikes stay."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept: set[int] = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept.add(min(stretch, key=lambda index: points[index][1]))
        kept.add(max(stretch, key=lambda index: points[index][1]))
    return [points[index] for index in sorted(kept)]


def loss_chart(train: Points, held_out: Points, *, label: str) -> str:
    """Training loss, raw and smoothed, and the held-out loss where it was measured."""
    few = len(train) < 20
    lines = [Line("each logging step", "smooth", train, marker="o")]
    if not few:
        lines = [Line("each logging step", "raw", train, width=1.0)]
        lines.append(Line("smoothed", "smooth", smooth(train)))
    if held_out:
        lines.append(Line("held-out rows", "held", held_out, marker="o"))
    return draw(lines, name="loss", label=label)


def learning_rate_chart(points: Points, *, label: str) -> str:
    """The learning rate over the steps."""
    lines = [Line("learning rate", "smooth", points)]
    return draw(lines, name="rate", label=label)


def draw(lines: Sequence[Line], *, name: str, label: str) -> str:
    """The curves as an `<svg>`; `name` keeps its ids apart from those of other charts."""
    with _settings(name):
        figure, axes = _empty_chart(xlabel="step")
        for line in lines:
            points = thin(line.points)
            axes.plot(
                [step for step, _ in points],
                [value for _, value in points],
                color=STAND_INS[line.colour],
                linewidth=line.width,
                marker=line.marker,
                markersize=5,
                label=line.name,
            )
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
        if len(lines) > 1:
            _legend(figure, num_columns=len(lines))
        return inline(_svg(figure), name=name, label=label)


@dataclass(frozen=True)
class Limit:
    """A value that none may pass, drawn as an upright line with its name in the legend."""

    name: str
    value: int


def histogram_chart(
    edges: Sequence[int],
    counts: Sequence[int],
    *,
    xlabel: str,
    name: str,
    label: str,
    limit: Limit | None = None,
) -> str:
    """Rows by a whole number they have: `counts[i]` of them from `edges[i]` to below
    `edges[i + 1]`. A bin one wide is drawn around its number.
    """
    with _settings(name):
        figure, axes = _empty_chart(xlabel=xlabel)
        widths = [high - low for low, high in itertools.pairwise(edges)]
        one_each = max(widths) == 1
        shift = 0.5 if one_each else 0.0
        axes.bar(
            [edge - shift for edge in edges[:-1]],
            counts,
            width=[0.92 * width for width in widths],
            align="edge",
            color=STAND_INS["smooth"],
            linewidth=0,
        )
        if one_each and len(counts) <= 10 and not limit:
            axes.set_xticks(edges[:-1])
        if limit:
            axes.axvline(
                limit.value, color=STAND_INS["held"], linewidth=2, linestyle="--", label=limit.name
            )
            _legend(figure, num_columns=1)
        axes.set_ylabel("rows", color=STAND_INS["ink"])
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        return inline(_svg(figure), name=name, label=label)


@contextmanager
def _settings(name: str) -> Iterator[None]:
    """Text stays text, so that the page's font and zoom apply to it."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 13}):
        yield


def _empty_chart(*, xlabel: str) -> tuple[Figure, Axes]:
    """Axes in the page's colours, with nothing drawn in them; the x axis holds whole numbers."""
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel, color=STAND_INS["ink"])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k instead of 20000
    axes.tick_params(colors=STAND_INS["ink"], length=0)
    axes.grid(axis="y", color=STAND_INS["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(STAND_INS["grid"])
    return figure, axes


def _legend(figure: Figure, *, num_columns: int) -> None:
    figure.legend(
        loc="outside upper center",
        ncols=num_columns,
        frameon=False,
        labelcolor=STAND_INS["ink"],
        fontsize=12,
        handlelength=1.2,
        columnspacing=1.2,
    )


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return buffer.getvalue()


def inline(svg: str, *, name: str, label: str) -> str:
    """A standalone SVG made fit for a page: no doctype or namespaces, sized and coloured by CSS."""
    opening, _, rest = svg[svg.index("<svg") :].partition(">")
    view_box = re.search(r'viewBox="[^"]*"', opening)
    assert view_box is not None, "matplotlib writes a viewBox"
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = rest.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    for key, colour in STAND_INS.items():
        rest = rest.replace(colour, f"var(--chart-{key})")
    return f'<svg {view_box[0]} role="img" aria-label="{label}">{rest.strip()}'
