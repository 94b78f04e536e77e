"""Metrics by the names that recipes use: a figure over rows, a score a row, how sure they are."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.metrics.bootstrap import MIN_CHANGED, Interval, interval, paired_interval
from finetune.metrics.caption import bleu, bleu_counts, cider, rouge_l
from finetune.metrics.chart import count, relaxed_accuracy
from finetune.metrics.choice import multiple_choice
from finetune.metrics.fields import anls_star, json_f1, nted
from finetune.metrics.text import anls, cer, contains, exact_match, token_f1, wer
from finetune.metrics.vqa import vqa_accuracy

Texts = Sequence[str]
References = Sequence[Texts]


def ratio(sums: np.ndarray) -> np.ndarray:
    """First column over the second [..., 2] -> [...]; a sum of nothing counts as one."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def perplexity(sums: np.ndarray) -> np.ndarray:
    """The exponential of the loss by token [..., 2] -> [...]; infinite from a loss of 710 on."""
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


@dataclass(frozen=True)
class Metric:
    """`columns` gives what is summed over rows [N, K], `figure` makes figures of sums [B, K].

    Those without `columns` are of how likely the references are to the model, and no answer tells.
    An answer whose score is `right` or better counts as right; None where a score, however high,
    makes no answer right or wrong.
    """

    title: str
    columns: Callable[[Texts, References], np.ndarray] | None = None
    figure: Callable[[np.ndarray], np.ndarray] = ratio
    lower_is_better: bool = False
    right: float | None = 1.0


def _mean(score: Callable[[str, Texts], float]) -> Callable[[Texts, References], np.ndarray]:
    def columns(predictions: Texts, references: References) -> np.ndarray:
        pairs = zip(predictions, references, strict=True)
        return np.array([(score(*pair), 1) for pair in pairs], np.float64).reshape(-1, 2)

    return columns


def _rate(
    parts: Callable[[str, Texts], tuple[float, float]],
) -> Callable[[Texts, References], np.ndarray]:
    def columns(predictions: Texts, references: References) -> np.ndarray:
        pairs = zip(predictions, references, strict=True)
        return np.array([parts(*pair) for pair in pairs], np.float64).reshape(-1, 2)

    return columns


def _cider_columns(predictions: Texts, references: References) -> np.ndarray:
    scores = cider(predictions, references) if predictions else np.zeros(0)
    return np.stack([scores, np.ones(len(scores))], axis=1)


METRICS: dict[str, Metric] = {
    "loss": Metric("loss", lower_is_better=True, right=None),
    "perplexity": Metric("perplexity", figure=perplexity, lower_is_better=True, right=None),
    "exact_match": Metric("exact match", _mean(exact_match)),
    "contains": Metric("contains", _mean(contains)),
    "anls": Metric("ANLS", _mean(anls)),
    "vqa_accuracy": Metric("VQA accuracy", _mean(vqa_accuracy)),
    "relaxed_accuracy": Metric("relaxed accuracy", _mean(relaxed_accuracy)),
    "cer": Metric("CER", _rate(cer), lower_is_better=True, right=0.0),
    "wer": Metric("WER", _rate(wer), lower_is_better=True, right=0.0),
    "token_f1": Metric("token F1", _mean(token_f1)),
    "bleu": Metric("BLEU", bleu_counts, bleu, right=None),
    "rouge_l": Metric("ROUGE-L", _mean(rouge_l), right=None),
    "cider": Metric("CIDEr-D", _cider_columns, right=None),
    "json_f1": Metric("JSON field F1", _rate(json_f1)),
    "nted": Metric("tree similarity (nTED)", _mean(nted)),
    "anls_star": Metric("ANLS*", _mean(anls_star)),
    "multiple_choice": Metric("multiple choice", _mean(multiple_choice)),
    "count": Metric("count", _mean(count)),
}

PACKAGES = {"cider": "pycocoevalcap"}
"""What a metric needs that is not installed with this package."""


def packages_needed(metrics: Sequence[str], source: str) -> dict[str, str]:
    """What these need that is not installed with this package, by where they were named and by
    which name: `evaluation.metrics: cider`.
    """
    return {f"{source}: {name}": PACKAGES[name] for name in metrics if name in PACKAGES}


@dataclass(frozen=True)
class Measured:
    """One model's answers measured: the columns of each metric, by row."""

    columns: dict[str, np.ndarray]

    def figures(self) -> dict[str, float]:
        """Over all rows; empty for no rows. What is no finite number is left out: the loss of
        weights that have diverged.
        """
        found = {
            name: float(METRICS[name].figure(columns.sum(0, keepdims=True))[0])
            for name, columns in self.columns.items()
            if len(columns)
        }
        return _finite(found)

    def scores(self) -> list[dict[str, float]]:
        """Of each row by itself, without what is no finite number: JSON has no name for it."""
        by_metric = {name: METRICS[name].figure(each) for name, each in self.columns.items()}
        num_rows = len(next(iter(by_metric.values()), ()))
        return [
            _finite({name: float(by_metric[name][i]) for name in by_metric})
            for i in range(num_rows)
        ]

    def intervals(self) -> dict[str, Interval | None]:
        """95% of each figure."""
        return {name: interval(each, METRICS[name].figure) for name, each in self.columns.items()}


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: figure for name, figure in figures.items() if math.isfinite(figure)}


def measure(
    predictions: Texts,
    references: References,
    metrics: Sequence[str],
    losses: np.ndarray | None = None,
) -> Measured:
    """Answers against their references, by each of the metrics; and, where `losses` has the sum
    over a row's learnt tokens and their number [N, 2], loss and perplexity.
    """
    found = {}
    for name in metrics:
        columns = METRICS[name].columns
        assert columns, name
        found[name] = columns(predictions, references)
    if losses is not None:
        found |= dict.fromkeys(("loss", "perplexity"), losses)
    return Measured(found)


def title_of(metric: str) -> str:
    """As people write it; the name itself of one that is not known here."""
    return METRICS[metric].title if metric in METRICS else metric.replace("_", " ")


def lower_is_better(metric: str) -> bool:
    """Whether it counts errors."""
    return metric in METRICS and METRICS[metric].lower_is_better


def is_right(metric: str, score: float) -> bool | None:
    """Whether a score counts as right: 1 or more where it is not known here, as for most; None
    where the metric makes no answer right or wrong.
    """
    right = METRICS[metric].right if metric in METRICS else 1.0
    if right is None:
        return None
    return score <= right if lower_is_better(metric) else score >= right


def differences(base: Measured, adapter: Measured) -> dict[str, dict[str, Any]]:
    """Of each metric that both have the `interval` of adapter - base, and the `verdict`: better,
    worse, cannot tell, where there is no interval, it holds zero or fewer than six rows changed, or
    no change, where none did.
    """
    found = {}
    for name in [name for name in base.columns if name in adapter.columns]:
        metric, before, after = METRICS[name], base.columns[name], adapter.columns[name]
        between = paired_interval(before, after, metric.figure)
        changed = int((metric.figure(before) != metric.figure(after)).sum())
        verdict = "cannot tell" if changed else "no change"
        if between and changed >= MIN_CHANGED and not between[0] <= 0 <= between[1]:
            verdict = "better" if (between[0] > 0) != metric.lower_is_better else "worse"
        found[name] = {"interval": between, "verdict": verdict}
    return found


def with_interval(figure: float | None, between: Sequence[float] | None, sign: str = "") -> str:
    """`0.967 [0.933, 0.992]`; empty for no figure. `sign` is + where it is a difference.

    Without an interval of no width: where all rows score the same, as all wrong, drawing them anew
    gives the same again, and says nothing of other rows.
    """
    if figure is None:
        return ""
    if between is None or between[0] == between[1]:
        return _written(figure, sign)
    low, high = between
    return f"{_written(figure, sign)} [{_written(low, sign)}, {_written(high, sign)}]"


def _written(figure: float, sign: str) -> str:
    """Three decimals, or thousands for the perplexity of what a model never saw."""
    if abs(figure) >= 10_000:
        return f"{figure / 1000:{sign},.0f}k"
    return f"{figure:{sign}.1f}" if abs(figure) >= 100 else f"{figure:{sign}.3f}"
