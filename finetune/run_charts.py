"""The charts of a run: what its log and its rows show."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune.charts import (
    Chart,
    Line,
    Log,
    Points,
    curve,
    histogram_chart,
    line_chart,
    number,
    with_smoothed,
)
from finetune.metrics import METRICS, title_of


def curves(
    log: Log, *, num_asked: int | None = None, judged_step: int | None = None
) -> list[Chart]:
    """What `metrics.jsonl` holds, over the steps; a curve of fewer than two points is not drawn.

    `num_asked` rows were answered in training, where those are fewer than were judged in the end.
    `judged_step` is where the judged weights are from, where they are not the last ones: it is
    marked on the curves of held-out rows.
    """
    return [*_training(log, judged_step), *_held_out(log, num_asked, judged_step), *_cost(log)]


def _marked(held: Points, judged_step: int | None) -> list[Line]:
    """The point of the judged weights, where the curve has it."""
    judged = [point for point in held if point[0] == judged_step]
    if not judged:
        return []
    return [Line(f"step {judged_step:,}, judged", "ink", judged, width=0, marker="D", size=8)]


def _training(log: Log, judged_step: int | None) -> Iterator[Chart]:
    losses, rates = curve(log, "loss"), curve(log, "learning_rate")
    if len(losses) > 1:
        (first, start), (last, end) = losses[0], losses[-1]
        label = f"Loss {start:.3g} at step {first:.0f}, {end:.3g} at step {last:.0f}"
        lines = with_smoothed(losses, "each logging step")
        if held := curve(log, "eval_loss"):
            lines.append(Line("held-out rows", "held", held, marker="o"))
            lines += _marked(held, judged_step)
        yield line_chart(lines, name="loss", title="Loss", label=label)
    if len(rates) > 1:
        label = f"Learning rate, at most {max(rate for _, rate in rates):.3g}"
        line = Line("learning rate", "smooth", rates)
        yield line_chart([line], name="learning_rate", title="Learning rate", label=label)
    norms = curve(log, "grad_norm")
    if len(norms) > 1:
        label = f"Norm of the gradient, at most {max(norm for _, norm in norms):.3g}"
        lines = with_smoothed(norms, "each logging step")
        yield line_chart(lines, name="grad_norm", title="Norm of the gradient", label=label)


def _held_out(log: Log, num_asked: int | None, judged_step: int | None) -> Iterator[Chart]:
    for metric in METRICS:
        points = curve(log, f"eval_{metric}")
        if len(points) < 2 or metric == "loss":
            continue
        title = f"Held-out {title_of(metric)}"
        if num_asked and metric != "perplexity":  # which is that of the loss, of all rows
            title += f", first {num_asked:,} row{'' if num_asked == 1 else 's'}"
        (_, start), (_, end) = points[0], points[-1]
        label = f"{title}: {start:.3f} at first, {end:.3f} at last"
        lines = [Line(title_of(metric), "held", points, marker="o")]
        lines += _marked(points, judged_step)
        name = f"eval_{metric}"
        yield line_chart(lines, name=name, title=title, label=label, is_share=True)


def _cost(log: Log) -> Iterator[Chart]:
    seconds = seconds_a_step(log)
    if len(seconds) > 1:
        half = sorted(value for _, value in seconds)[len(seconds) // 2]
        label = f"Seconds a step, half of them below {half:.3g}"
        lines = with_smoothed(seconds, "mean since the last log")
        yield line_chart(lines, name="seconds", title="Seconds a step", label=label)
    memory = curve(log, "peak_memory_gib")
    if len(memory) > 1:
        label = f"Peak memory so far, {memory[-1][1]:.3g} GiB at last"
        line = Line("peak so far", "smooth", memory)
        yield line_chart([line], name="memory", title="Peak memory so far, GiB", label=label)


def seconds_a_step(log: Log) -> list[tuple[float, float]]:
    """The mean since the line before, by step."""
    times: Points = [(0.0, 0.0), *curve(log, "seconds")]
    return [
        (step, (now - before) / (step - last))
        for (last, before), (step, now) in itertools.pairwise(times)
        if step > last and now >= before
    ]


def histograms(data: Mapping[str, Any]) -> list[Chart]:
    """What `data.json` counts, a chart for tokens and one for views of each part; none where all
    rows are alike. Of other parts there is no chart: their names would be those of files.
    """
    charts = []
    for part, name in (("train", "Training rows"), ("eval", "Held-out rows")):
        for what in ("tokens", "views", "learnt_tokens"):
            found = _bins(data.get(part), what)
            if not found:
                continue
            edges, counts = found
            words = what.replace("_", " ")
            filled = [edge for edge, count in zip(edges, counts, strict=False) if count]
            label = f"{name}: {words} a row, from {filled[0]:,} to about {filled[-1]:,}"
            charts.append(
                histogram_chart(
                    edges,
                    counts,
                    xlabel=words,
                    name=f"{part}_{what}",
                    title=f"{name}: {words}",
                    label=label,
                )
            )
    return charts


def _bins(counted: Any, what: str) -> tuple[Sequence[int], Sequence[int]] | None:
    """Edges and counts, where they are such, and more than one bin is filled."""
    found = counted.get(what) if isinstance(counted, dict) else None
    if not isinstance(found, dict):
        return None
    edges, counts = found.get("edges"), found.get("counts")
    if not isinstance(edges, list) or not isinstance(counts, list):
        return None
    if len(edges) != len(counts) + 1 or any(number(each) is None for each in [*edges, *counts]):
        return None
    return (edges, counts) if sum(map(bool, counts)) > 1 else None
