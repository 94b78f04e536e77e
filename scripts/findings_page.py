"""docs/findings.md: a table, a plot and a verdict for each finding, of the records of its runs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from finetune.metrics import ratio
from finetune.metrics.bootstrap import paired_interval
from scripts.marked_page import fill, row, table

Record = Mapping[str, Any]
Verdict = Literal["agrees", "disagrees", "cannot tell"]

MARGIN = 0.05
"""Exact match that may be lost where a claim says that little is lost."""


@dataclass(frozen=True)
class Claim:
    """What the paper found, as one recipe against another: the first scores higher; or less than
    `MARGIN` lower, where little is said to be lost; or its loss spikes less often.
    """

    words: str
    first: str
    second: str
    kind: Literal["higher", "little lost", "steadier"] = "higher"


@dataclass(frozen=True)
class Finding:
    """One of the paper's, with the figures that it gives."""

    number: int
    title: str
    paper: str
    claims: tuple[Claim, ...]


FINDINGS = (
    Finding(
        1,
        "The language model matters more than the vision encoder",
        "a better language model 62.5 -> 67.6, a better vision encoder 57.4 -> 60.7",
        (
            Claim(
                "parameters are worth more in the language model",
                "1-stronger-language",
                "1-stronger-vision",
            ),
        ),
    ),
    Finding(
        2,
        "With frozen backbones, cross-attention wins",
        "cross-attention 66.7, autoregressive 60.3 with a perceiver, 51.8 without",
        (
            Claim(
                "cross-attention scores higher than autoregressive",
                "2-cross-attention",
                "2-autoregressive",
            ),
        ),
    ),
    Finding(
        3,
        "Full training can diverge, LoRA is stable",
        "autoregressive with LoRA 69.5, cross-attention with LoRA 67.3; full training diverged",
        (
            Claim("LoRA scores higher than full training", "3-lora", "3-full"),
            Claim("LoRA scores higher at three times the rate", "3-lora-fast", "3-full-fast"),
            Claim("the loss of LoRA spikes less often", "3-lora", "3-full", "steadier"),
            Claim(
                "the loss of LoRA spikes less often at three times the rate",
                "3-lora-fast",
                "3-full-fast",
                "steadier",
            ),
        ),
    ),
    Finding(
        4,
        "Learned pooling: few latents are enough",
        "64 latents 71.7, 128 latents 71.2; perceiver 60.3, mapping network 51.8, linear without "
        "pooling 44.5",
        (
            Claim("pooling scores higher than none", "4-latents-16", "4-no-pooling"),
            Claim(
                "a quarter of the latents loses little",
                "4-latents-16",
                "4-latents-64",
                "little lost",
            ),
            Claim("a sixteenth loses little", "4-latents-4", "4-latents-64", "little lost"),
        ),
    ),
    Finding(
        5,
        "Keeping the aspect ratio loses little and costs less",
        "square 73.1, kept 72.1 at less cost",
        (Claim("keeping it loses little", "5-kept", "5-squared", "little lost"),),
    ),
    Finding(
        6,
        "Splitting helps where print is fine",
        "TextVQA 70.4 -> 73.0, DocVQA 67.3 -> 74.0, MMMU 37.9 -> 37.7; splitting half of the "
        "samples costs nothing",
        (
            Claim("splitting scores higher than none", "6-split-always", "6-split-never"),
            Claim(
                "splitting only what is large loses little",
                "6-split-auto",
                "6-split-always",
                "little lost",
            ),
        ),
    ),
)


@dataclass(frozen=True)
class Difference:
    """Of exact match, first - second: over all seeds with its 95% interval, and of each seed."""

    mean: float
    interval: tuple[float, float]
    by_seed: tuple[float, ...]


def difference(first: Sequence[Record], second: Sequence[Record]) -> Difference:
    """Both asked the same rows, with the same seeds; rows are drawn anew for the interval, with
    their mean over the seeds.
    """
    both = [_right(records) for records in (first, second)]  # [seeds, rows]
    columns = [np.stack([each.mean(0), np.ones(each.shape[1])], axis=1) for each in both]
    between = paired_interval(columns[1], columns[0], ratio)
    assert between
    by_seed = (both[0] - both[1]).mean(1)
    return Difference(float(by_seed.mean()), between, tuple(map(float, by_seed)))


def _right(records: Sequence[Record]) -> np.ndarray:
    ordered = sorted(records, key=lambda record: record["seed"])
    return np.array([[float(letter) for letter in record["right"]] for record in ordered])


def verdict(claim: Claim, found: Difference) -> Verdict:
    """Whether it is borne out, by the interval and by every seed."""
    least = -MARGIN if claim.kind == "little lost" else 0.0
    low, high = found.interval
    if low > least and all(each > least for each in found.by_seed):
        return "agrees"
    if high < least and all(each < least for each in found.by_seed):
        return "disagrees"
    return "cannot tell"


def judged(claim: Claim, first: Sequence[Record], second: Sequence[Record]) -> tuple[str, Verdict]:
    """The difference in words, and the verdict on it."""
    if claim.kind == "steadier":
        one, other = ([num_spikes(each["losses"]) for each in runs] for runs in (first, second))
        fewer = [b - a for a, b in zip(one, other, strict=True)]
        found = Difference(mean(fewer), (min(fewer), max(fewer)), tuple(fewer))
        return f"{sum(one)} spikes against {sum(other)}", verdict(claim, found)
    found = difference(first, second)
    return _written(found), verdict(claim, found)


def write_page(page: Path, records: Sequence[Record], backbones: Mapping[str, Any]) -> None:
    """Fill the page's places, and draw a plot for each finding, `findings/N.png`; findings that a
    run is missing of stay as they are.
    """
    by_recipe: dict[str, list[Record]] = {}
    for record in records:
        by_recipe.setdefault(record["recipe"], []).append(record)
    text = page.read_text(encoding="utf-8")
    summary = table("finding", "the paper", "nano", "verdict")
    for finding in FINDINGS:
        if not all({each.first, each.second} <= by_recipe.keys() for each in finding.claims):
            continue
        of_finding = {
            name: each for name, each in by_recipe.items() if name[0] == str(finding.number)
        }
        text = fill(text, str(finding.number), _section(finding, of_finding, page))
        for claim in finding.claims:
            found, told = judged(claim, by_recipe[claim.first], by_recipe[claim.second])
            summary.append(
                row(f"{finding.number}: {claim.words}", finding.paper, found, f"**{told}**")
            )
    text = fill(text, "summary", summary)
    text = fill(text, "backbones", _backbones(backbones))
    machines = sorted({record["machine"] for record in records})
    text = fill(text, "machine", [f"{each}." for each in machines])
    page.write_text(text, encoding="utf-8")


def write_scores(page: Path, records: Sequence[Record]) -> None:
    """Give each recipe in the tables of recipes/README.md its mean, as the last of its cells."""
    text = page.read_text(encoding="utf-8")
    for name in {record["recipe"] for record in records}:
        score = mean(each["exact_match"] for each in records if each["recipe"] == name)
        link = re.escape(f"| [findings/{name}](")
        text = re.sub(rf"^({link}.*\| )[^|\n]*( \|)$", rf"\g<1>{score:.3f}\2", text, flags=re.M)
    page.write_text(text, encoding="utf-8")


def _section(
    finding: Finding, by_recipe: Mapping[str, Sequence[Record]], page: Path
) -> Iterator[str]:
    yield from table(
        "recipe",
        "exact match, mean (of each seed)",
        "held-out loss",
        "trained, of parameters",
        "tokens a row",
        "views a row",
        "MFLOP a row",
    )
    for name, records in by_recipe.items():
        scores = [record["exact_match"] for record in records]
        yield row(
            f"`{name}`",
            f"{mean(scores):.3f} ({', '.join(f'{score:.3f}' for score in scores)})",
            f"{_mean(records, 'loss'):.3f}",
            f"{records[0]['trainable']:,} of {records[0]['parameters']:,}",
            f"{_mean(records, 'tokens_a_row'):.1f}",
            f"{_mean(records, 'views_a_row'):.1f}",
            f"{records[0]['flops_a_row'] / 1e6:,.0f}",
        )
    if finding.number == 3:
        yield from ("", *_spikes_table(by_recipe))
    yield ""
    for claim in finding.claims:
        first, second = by_recipe[claim.first], by_recipe[claim.second]
        found, told = judged(claim, first, second)
        seeds = ", ".join(f"{each:+.3f}" for each in difference(first, second).by_seed)
        of_seeds = "" if claim.kind == "steadier" else f"; of each seed {seeds}"
        yield (
            f"- {claim.words[0].upper()}{claim.words[1:]}: nano **{told}**. "
            f"`{claim.first}` against `{claim.second}`: {found}{of_seeds}."
        )
    file = page.parent / "findings" / f"{finding.number}.png"
    file.parent.mkdir(exist_ok=True)
    (draw_losses if finding.number == 3 else draw_scores)(by_recipe, file)
    yield ""
    shown = "losses" if finding.number == 3 else "exact match"
    yield f"![{finding.title}: {shown} of each run](findings/{finding.number}.png)"


def _written(found: Difference) -> str:
    low, high = found.interval
    return f"{found.mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _mean(records: Sequence[Record], key: str) -> float:
    return mean(record[key] for record in records)


def num_spikes(losses: Sequence[tuple[float, float]]) -> int:
    """Logged losses of more than twice the median of the five before, or of as many as there
    are.
    """
    values = [loss for _, loss in losses]
    return sum(
        values[number] > 2 * float(np.median(values[max(0, number - 5) : number]))
        for number in range(1, len(values))
    )


def _spikes_table(by_recipe: Mapping[str, Sequence[Record]]) -> Iterator[str]:
    """Spikes of each run, and the highest loss on the way."""
    yield from table(
        "recipe", "spikes of each seed", "highest logged loss", "first, mean", "last, mean"
    )
    for name, records in by_recipe.items():
        losses = [[loss for _, loss in record["losses"]] for record in records]
        yield row(
            f"`{name}`",
            ", ".join(str(num_spikes(record["losses"])) for record in records),
            f"{max(map(max, losses)):.2f}",
            f"{mean(each[0] for each in losses):.2f}",
            f"{mean(each[-1] for each in losses):.2f}",
        )


def _backbones(scores: Mapping[str, Any]) -> Iterator[str]:
    yield from table("backbone", "parameters", "right on what it was taught")
    for name, each in scores.items():
        yield row(f"`{name}`", f"{each['parameters']:,}", f"{each['score']:.3f}")


def draw_scores(by_recipe: Mapping[str, Sequence[Record]], file: Path) -> None:
    """A line a recipe: a dot a seed, a stroke at their mean."""
    figure = Figure(figsize=(7, 0.8 + 0.45 * len(by_recipe)), layout="constrained")
    axes = figure.subplots()
    names = sorted(by_recipe, reverse=True)  # drawn from below
    for height, records in enumerate(by_recipe[name] for name in names):
        scores = [record["exact_match"] for record in records]
        axes.plot(scores, [height] * len(scores), "o", color="tab:blue", alpha=0.7)
        axes.plot([mean(scores)] * 2, [height - 0.25, height + 0.25], color="0.3", linewidth=2)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set(xlabel="exact match on held-out rows", xlim=(0, 1))
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    figure.savefig(file, dpi=120, metadata={"Software": None})


def draw_losses(by_recipe: Mapping[str, Sequence[Record]], file: Path) -> None:
    """The losses of every seed, a picture a recipe, all at one scale."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    places = figure.subplots(2, (len(by_recipe) + 1) // 2, sharex=True, sharey=True)
    for axes, (name, records) in zip(np.ravel(places), by_recipe.items(), strict=False):
        for record in records:
            axes.plot(*zip(*record["losses"], strict=True), linewidth=1)
        axes.set_title(name, fontsize=10)
        axes.set_yscale("log")
        axes.grid(color="0.9")
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("loss", fontsize=10)
    figure.savefig(file, dpi=120, metadata={"Software": None})
