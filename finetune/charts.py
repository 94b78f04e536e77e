"""Line charts and histograms: as inline SVG, coloured by the page, and as PNG files.

For a page matplotlib draws with stand-in colours; afterwards each becomes a CSS variable
(`--chart-raw`, ...) that the page sets, so that one drawing does for light and dark.
"""

import html
import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
# On white, for files.
ON_WHITE = {
    "ink": "#5c5c57",
    "grid": "#dededa",
    "raw": "#9cbce4",
    "smooth": "#1d5fb8",
    "held": "#b4540a",
}
MAX_POINTS = 600  # a line; more cannot be told apart at this width and only make the file larger
# Of the axis of a share. One row of the forty or hundred that are asked in training would otherwise
# fill the height when it becomes wrong; so high, a change of a fiftieth is still seen
LEAST_HEIGHT = 0.2
TICK_STEPS = (1, 2, 2.5, 5, 10)  # not 0.15, 0.3, 0.45
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
    size: float = 5.0
    """Of the marker."""


Colours = Mapping[str, str]


@dataclass(frozen=True)
class Chart:
    """A drawing in colours to be chosen. `name` keeps its ids apart from those of other charts on a
    page, and is that of its file; `label` says what is to be seen.
    """

    name: str
    title: str
    label: str
    paint: Callable[[Colours], Figure]

    def svg(self) -> str:
        """For a page that sets the colours."""
        with _settings(self.name):
            return inline(_svg(self.paint(STAND_INS)), name=self.name, label=self.label)

    def png(self) -> bytes:
        """For a file, on white."""
        file = io.BytesIO()
        with _settings(self.name):
            figure = self.paint(ON_WHITE)
            figure.axes[0].set_title(self.title, color=ON_WHITE["ink"], fontsize=13)
            figure.savefig(file, format="png", dpi=160, metadata={"Software": None})
        return file.getvalue()


def number(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


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


def line_chart(
    lines: Sequence[Line], *, name: str, title: str, label: str, is_share: bool = False
) -> Chart:
    """Curves over the steps; `is_share` is for figures that are 0 to 1, most of them."""

    def paint(colours: Colours) -> Figure:
        figure, axes = _empty_chart(colours, xlabel="step")
        for line in lines:
            points = thin(line.points)
            axes.plot(
                [step for step, _ in points],
                [value for _, value in points],
                color=colours[line.colour],
                linewidth=line.width,
                marker=line.marker,
                markersize=line.size,
                label=line.name,
            )
        values = {value for line in lines for _, value in line.points}
        if is_share and 0 <= min(values) <= max(values) <= 1:
            low, high = _ends_of_share(min(values), max(values))
            margin = 0.04 * (high - low)  # room for half a marker
            axes.set_ylim(low - margin, high + margin)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
        if len(lines) > 1:
            is_wide = sum(len(line.name) for line in lines) > 40  # letters that stand side by side
            _legend(figure, colours, num_columns=2 if is_wide else len(lines))
        return figure

    return Chart(name, title, label, paint)


def _ends_of_share(lowest: float, highest: float) -> tuple[float, float]:
    """Of the value axis: 0 and 1 for one that stays the same, and otherwise `LEAST_HEIGHT` apart or
    more, around the values.
    """
    if lowest == highest:
        return 0.0, 1.0
    low = min(lowest, max(0.0, min(1.0, (lowest + highest + LEAST_HEIGHT) / 2) - LEAST_HEIGHT))
    return low, max(highest, low + LEAST_HEIGHT)


def with_smoothed(points: Points, what: str) -> list[Line]:
    """A noisy curve as it is and smoothed; few points as they are."""
    if len(points) < 20:
        return [Line(what, "smooth", points, marker="o")]
    return [Line(what, "raw", points, width=1.0), Line("smoothed", "smooth", smooth(points))]


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
    title: str,
    label: str,
    limit: Limit | None = None,
) -> Chart:
    """Rows by a whole number they have: `counts[i]` of them from `edges[i]` to below
    `edges[i + 1]`. A bin one wide is drawn around its number.
    """

    def paint(colours: Colours) -> Figure:
        figure, axes = _empty_chart(colours, xlabel=xlabel)
        widths = [high - low for low, high in itertools.pairwise(edges)]
        one_each = max(widths) == 1
        shift = 0.5 if one_each else 0.0
        axes.bar(
            [edge - shift for edge in edges[:-1]],
            counts,
            width=[0.92 * width for width in widths],
            align="edge",
            color=colours["smooth"],
            linewidth=0,
        )
        if one_each and len(counts) <= 10 and not limit:
            axes.set_xticks(edges[:-1])
        if limit:
            axes.axvline(
                limit.value, color=colours["held"], linewidth=2, linestyle="--", label=limit.name
            )
            _legend(figure, colours, num_columns=1)
        axes.set_ylabel("rows", color=colours["ink"])
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=TICK_STEPS))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        return figure

    return Chart(name, title, label, paint)


@contextmanager
def _settings(name: str) -> Iterator[None]:
    """Text stays text, so that the page's font and zoom apply to it."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 13}):
        yield


def _empty_chart(colours: Colours, *, xlabel: str) -> tuple[Figure, Axes]:
    """Axes with nothing drawn in them; the x axis holds whole numbers."""
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel, color=colours["ink"])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=TICK_STEPS))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k instead of 20000
    axes.tick_params(colors=colours["ink"], length=0)
    axes.grid(axis="y", color=colours["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(colours["grid"])
    return figure, axes


def _legend(figure: Figure, colours: Colours, *, num_columns: int) -> None:
    figure.legend(
        loc="outside upper center",
        ncols=num_columns,
        frameon=False,
        labelcolor=colours["ink"],
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
    return f'<svg {view_box[0]} role="img" aria-label="{html.escape(label)}">{rest.strip()}'
