"""The page of `scripts.bench_train`: tables and a plot, of its records and nothing else."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean, median
from typing import Any

from matplotlib.figure import Figure

from scripts.marked_page import fill, row, table

Record = Mapping[str, Any]
PARTS = ("model", "main", "items", "growth", "curves")
PLOT = "performance.png"


def write_page(page: Path, records: Sequence[Record]) -> None:
    """Put what was measured between the marks of each part, `<!-- measured: main -->` and
    `<!-- end: main -->`; parts without a record stay as they are.
    """
    text = page.read_text(encoding="utf-8")
    for part, section in SECTIONS.items():
        of_part = [record for record in records if record["part"] == part]
        if not of_part:
            continue
        lines = [*section(of_part), "", *provenance(of_part), *failures(of_part)]
        text = fill(text, part, lines)
        if part == "curves":
            draw_curves(of_part, page.parent / PLOT)
    page.write_text(text, encoding="utf-8")


def main_section(records: Sequence[Record]) -> Iterator[str]:
    """The aims, and a table for each set of rows."""
    paired = list(pairs(records, "stock", "ours"))
    yield from aims(paired)
    for name, of_set in _grouped(paired, lambda pair: pair[0]["name"]):
        yield from ("", f"### {name}", "")
        yield from table(
            "rows a batch",
            "trained",
            "samples/s, stock",
            "ours",
            "ratio",
            "ratio by CPU time",
            "training memory MiB, stock",
            "ours",
            "ratio",
            "whole peak MiB, stock",
            "ours",
        )
        for batch_size, measured in _grouped(of_set, lambda pair: pair[0]["batch_size"]):
            stock, ours = zip(*measured, strict=True)
            memory = [mib(b) / mib(a) for a, b in measured]
            yield row(
                batch_size,
                trained(ours),
                f"{median(map(rate, stock)):.3f}",
                f"{median(map(rate, ours)):.3f}",
                spread([rate(b) / rate(a) for a, b in measured], "x"),
                spread([cpu_rate(b) / cpu_rate(a) for a, b in measured], "x"),
                f"{median(map(mib, stock)):,.0f}",
                f"{median(map(mib, ours)):,.0f}",
                spread(memory),
                f"{median(each['peak_mib'] for each in stock):,.0f}",
                f"{median(each['peak_mib'] for each in ours):,.0f}",
            )
        yield from ("", "Computed, as a multiple of what the rows hold:", "")
        yield from table("rows a batch", "tokens, stock", "ours", "pixels, stock", "ours")
        for batch_size, measured in _grouped(of_set, lambda pair: pair[0]["batch_size"]):
            yield row(batch_size, *computed(measured))
    yield from tensors(records)


def tensors(records: Sequence[Record]) -> Iterator[str]:
    """What tensors held, without what the allocator keeps beside them."""
    held = list(pairs(records, "stock, tensors", "ours, tensors"))
    if not held:
        return
    yield ""
    yield (
        "The most that tensors held during the first step, over the weights, counted allocation by "
        "allocation: the resident set has in it what the C library keeps of freed ones, too."
    )
    yield ""
    yield from table("rows, and how many a batch", "MiB, stock", "ours", "ratio")
    for stock, ours in held:
        sizes = stock["tensors_mib"], ours["tensors_mib"]
        ratio = f"{sizes[1] / sizes[0]:.2f}"
        name = f"{stock['name']}, {stock['batch_size']}"
        yield row(name, *(f"{size:,.0f}" for size in sizes), ratio)


def computed(measured: Sequence[tuple[Record, Record]]) -> Iterator[str]:
    """Tokens of stock and ours, pixels of both, over those that the rows themselves hold."""
    for what in ("tokens", "pixels"):
        for side in (0, 1):
            of_rows = [
                pair[1][f"row_{what}"] * pair[1]["samples"] / pair[1]["num_rows"]
                for pair in measured
            ]
            yield f"{mean(p[side][what] / r for p, r in zip(measured, of_rows, strict=True)):.2f}"


def aims(paired: Sequence[tuple[Record, Record]]) -> Iterator[str]:
    """What was wanted at four rows a batch, and what came out."""
    at_four = [pair for pair in paired if pair[0]["batch_size"] == 4]
    by_name = dict(_grouped(at_four, lambda pair: pair[0]["name"]))
    if not by_name:
        return
    yield from table("four rows a batch, against stock", "aim", "measured", "by CPU time")
    if measured := by_name.get("mixed"):
        ratios = [rate(b) / rate(a) for a, b in measured]
        memory = spread([mib(b) / mib(a) for a, b in measured])
        yield row(
            "mixed pictures, a question each, first epoch",
            "4x at 1/3 of the training memory",
            f"{spread(ratios, 'x')} at {memory}",
            spread([cpu_rate(b) / cpu_rate(a) for a, b in measured], "x"),
        )
        of_stock: dict[int, list[Record]] = defaultdict(list)
        for stock, _ in paired:
            if stock["name"] == "mixed":
                of_stock[stock["batch_size"]].append(stock)
        best = max(of_stock, key=lambda size: median(map(rate, of_stock[size])))
        fastest, on_cpu = (median(map(by, of_stock[best])) for by in (rate, cpu_rate))
        yield row(
            f"the same, against stock at its own best batch size ({best})",
            "2.5x",
            spread([rate(b) / fastest for _, b in measured], "x"),
            spread([cpu_rate(b) / on_cpu for _, b in measured], "x"),
        )
    for name, what, aim in (
        ("mixed, three epochs", "fewer of such rows, three epochs with the vision cache", "6x"),
        ("docvqa", "four questions a page", "10x"),
    ):
        if measured := by_name.get(name):
            yield row(
                what,
                aim,
                spread([rate(b) / rate(a) for a, b in measured], "x"),
                spread([cpu_rate(b) / cpu_rate(a) for a, b in measured], "x"),
            )


def trained(measured: Sequence[Record]) -> str:
    """How much work a figure stands on."""
    samples, steps = measured[0]["samples"], len(measured[0]["step_seconds"])
    times = f", {len(measured)} times" if len(measured) > 1 else ""
    return f"{samples} rows, {steps} step{'' if steps == 1 else 's'}{times}"


def items_section(records: Sequence[Record]) -> Iterator[str]:
    """A row an item: with all others on, without it and with it."""
    yield from table(
        "item",
        "trained",
        "samples per CPU second, without",
        "with",
        "gain",
        "training memory MiB, without",
        "with",
        "tokens computed, without",
        "with",
        "pixels computed, without",
        "with",
    )
    paired = pairs(records, "off", "on")
    for name, measured in _grouped(paired, lambda pair: pair[0]["name"]):
        off, on = zip(*measured, strict=True)
        yield row(
            name,
            trained(on),
            f"{median(map(cpu_rate, off)):.3f}",
            f"{median(map(cpu_rate, on)):.3f}",
            spread([cpu_rate(b) / cpu_rate(a) for a, b in measured], "x"),
            f"{median(map(mib, off)):,.0f}",
            f"{median(map(mib, on)):,.0f}",
            *(
                f"{median(each[what] for each in side):,.0f}"
                for what in ("tokens", "pixels")
                for side in (off, on)
            ),
        )


def growth_section(records: Sequence[Record]) -> Iterator[str]:
    """A row a size, then the epochs."""
    yield from table("row", "s a row, stock", "ours", "ratio", "training memory MiB, stock", "ours")
    for stock, ours in pairs(records, "stock", "ours"):
        yield row(
            stock["name"],
            f"{1 / rate(stock):.2f}",
            f"{1 / rate(ours):.2f}",
            f"{rate(ours) / rate(stock):.2f}x",
            f"{mib(stock):,.0f}",
            f"{mib(ours):,.0f}",
        )
    epochs = [each for each in records if each["variant"] == "laid out"]
    if not epochs:
        return
    yield ""
    yield from table("epoch of", "CPU s to lay it out, in drawn order", "gathered, by cost")
    for each in epochs:
        yield row(each["name"], f"{each['plain_seconds']:.3f}", f"{each['gathered_seconds']:.3f}")


def curves_section(records: Sequence[Record]) -> Iterator[str]:
    """The plot, and how far the two are apart in it."""
    for stock, ours in pairs(records, "stock", "ours"):
        apart = [abs(a - b) / a for a, b in zip(stock["losses"], ours["losses"], strict=True)]
        yield f"![loss of stock and ours over {len(apart)} steps]({PLOT})"
        yield ""
        yield (
            f"First step: {stock['losses'][0]:.6f} and {ours['losses'][0]:.6f}, apart by "
            f"{apart[0]:.1e} of it; last step, {len(apart)}: {stock['losses'][-1]:.6f} and "
            f"{ours['losses'][-1]:.6f}, {apart[-1]:.1e}; most of all steps {max(apart):.1e}."
        )


def model_section(records: Sequence[Record]) -> Iterator[str]:
    """Where the arithmetic of a row goes."""
    for record in records:
        yield record["table"]


SECTIONS: dict[str, Callable[[Sequence[Record]], Iterator[str]]] = {
    "model": model_section,
    "main": main_section,
    "items": items_section,
    "growth": growth_section,
    "curves": curves_section,
}


def draw_curves(records: Sequence[Record], path: Path) -> None:
    """Both losses in one plot."""
    for stock, ours in pairs(records, "stock", "ours"):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        steps = range(1, len(stock["losses"]) + 1)
        axes.plot(steps, stock["losses"], color="0.7", linewidth=5, label="stock TRL, our labels")
        axes.plot(steps, ours["losses"], color="tab:blue", linewidth=1.2, label="ours")
        axes.set(xlabel="step", ylabel="loss")
        axes.legend(frameon=False)
        figure.savefig(path, dpi=120)


def provenance(records: Iterable[Record]) -> Iterator[str]:
    """The machines and days behind a table, and how busy the machine was."""
    for told in sorted({record["machine"] for record in records}):
        yield f"{told}."
    loads = [record["load_before"] for record in records if "load_before" in record]
    if loads:
        yield f"Processes that wanted a core before each training: {min(loads)} to {max(loads)}."


def failures(records: Iterable[Record]) -> Iterator[str]:
    """Trainings that did not run, and why."""
    for record in records:
        if error := record.get("error"):
            yield ""
            yield f"Not measured: {record['name']}, {record['variant']}: {error}"


def pairs(records: Sequence[Record], first: str, second: str) -> Iterator[tuple[Record, Record]]:
    """Records of two variants that belong together, where both ran: name after name, from small
    batches to large ones.
    """
    names = list(dict.fromkeys(record["name"] for record in records))
    found: dict[tuple[int, int, int], dict[str, Record]] = defaultdict(dict)
    for record in records:
        if record["variant"] in (first, second):
            key = (names.index(record["name"]), record["batch_size"], record["repeat"])
            found[key][record["variant"]] = record
    for _, both in sorted(found.items(), key=lambda item: item[0]):
        if len(both) == 2 and not any("error" in each for each in both.values()):
            yield both[first], both[second]


def rate(record: Record) -> float:
    """Samples a second."""
    return record["samples"] / record["seconds"]


def cpu_rate(record: Record) -> float:
    """Samples a second of this process's CPU time, which a busy machine changes less."""
    return record["samples"] / record["cpu_seconds"]


def mib(record: Record) -> float:
    """Training memory over the weights."""
    return record["peak_mib"] - record["weights_mib"]


def spread(values: Sequence[float], unit: str = "") -> str:
    """The median, and the least and the most of several."""
    middle = f"{median(values):.2f}{unit}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Neighbours of one key, as lists."""
    return ((name, list(group)) for name, group in groupby(items, key))
