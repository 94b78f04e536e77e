"""Did it get better: the answer at the top of a report, from what a run's files say."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.charts import number
from finetune.gallery import RIGHT_BY, Row, is_right, listed, mapping, numbers, right_by, text_of
from finetune.metrics import lower_is_better


@dataclass(frozen=True)
class Share:
    """How many held-out rows were right, by which metric, and the interval of that share that the
    summary has.
    """

    metric: str
    right: int
    total: int
    interval: tuple[float, float] | None

    @property
    def percent(self) -> float:
        """Of all rows, 0 to 100."""
        return 100 * self.right / self.total


@dataclass(frozen=True)
class Verdict:
    """Did it get better: one word for it, the figures behind it, and how far to trust them."""

    word: str
    tone: str  # good, bad or unsure: the colour
    metric: str
    base: float
    adapter: float
    num_rows: int
    num_better: int  # rows on which the adapter scored above the base, by this metric
    num_worse: int
    interval: tuple[float, float] | None  # of the difference; None where none was kept
    shares: tuple[Share, Share] | None
    others: dict[str, list[str]]  # metrics that say better or worse where this one does not


def metrics_of_headline(settings: Row) -> list[str]:
    """The recipe's metrics of answers, first the one that the headline is of where it was measured:
    by which the best weights were chosen, or else the first.
    """
    evaluation = mapping(settings.get("evaluation"))
    named = [text_of(metric) for metric in listed(evaluation.get("metrics"))]
    best = evaluation.get("best_metric")  # may be the loss, which is not of answers
    return [best, *named] if best in named else named


def judge(summary: Row, predictions: Sequence[Row], metrics: Sequence[str] = ()) -> Verdict | None:
    """The verdict on the first of the metrics that was measured; None before base and adapter both
    were.
    """
    before, after = numbers(summary.get("base")), numbers(summary.get("adapter"))
    both = [metric for metric in after if metric in before]
    if not both:
        return None
    metric = next((metric for metric in metrics if metric in both), both[0])
    num_better, num_worse = count_changes(metric, predictions)
    num_rows = int(number(summary.get("num_eval_rows")) or len(predictions))
    verdicts = {
        name: text_of(mapping(each).get("verdict"))
        for name, each in mapping(summary.get("differences")).items()
        if name in both and name != "perplexity"  # which says what the loss says
    }
    found = mapping(mapping(summary.get("differences")).get(metric))
    words = {
        "better": ("Better", "good"),
        "worse": ("Worse", "bad"),
        "cannot tell": (f"Cannot tell at n = {num_rows:,}", "unsure"),
        "no change": ("No change", "unsure"),
    }
    gain = gain_of(metric, before[metric], after[metric])
    seems = "No change" if not gain else f"{'Better' if gain > 0 else 'Worse'}, it seems"
    word, tone = words.get(str(found.get("verdict")), (seems, "unsure"))
    return Verdict(
        word=word,
        tone=tone,
        metric=metric,
        base=before[metric],
        adapter=after[metric],
        num_rows=num_rows,
        num_better=num_better,
        num_worse=num_worse,
        interval=interval_of(found.get("interval")),
        shares=count_right(predictions, mapping(summary.get("intervals"))),
        others={
            word: names
            for word in ("better", "worse")
            if word != verdicts.get(metric)
            and (names := [name for name, each in verdicts.items() if each == word])
        },
    )


def interval_of(value: Any) -> tuple[float, float] | None:
    """Low and high, where the value is that."""
    ends = [number(end) for end in listed(value)]
    return (ends[0], ends[1]) if len(ends) == 2 and None not in ends else None  # type: ignore[return-value]


def gain_of(metric: str, base: float, adapter: float) -> float:
    """How much better the adapter is, positive for better, whichever way the metric points."""
    return base - adapter if lower_is_better(metric) else adapter - base


def count_right(predictions: Sequence[Row], intervals: Row) -> tuple[Share, Share] | None:
    """The shares of right answers, base and adapter, over the rows where both were scored."""
    pairs = [(is_right(row, "base"), is_right(row, "adapter")) for row in predictions]
    scored = [pair for pair in pairs if None not in pair]
    if not scored:
        return None
    metric = next(by for row in predictions if (by := right_by(row, "adapter")))
    base, adapter = (
        Share(
            metric,
            sum(map(bool, right)),
            len(scored),
            interval_of(mapping(intervals.get(side)).get(RIGHT_BY)),
        )
        for side, right in zip(("base", "adapter"), zip(*scored, strict=True), strict=True)
    )
    return base, adapter


def count_changes(metric: str, predictions: Sequence[Row]) -> tuple[int, int]:
    """On how many rows the adapter scored better than the base, and on how many worse."""
    gains = []
    for row in predictions:
        scores = mapping(row.get("scores"))
        before, after = (mapping(scores.get(side)) for side in ("base", "adapter"))
        base, adapter = number(before.get(metric)), number(after.get(metric))
        if base is not None and adapter is not None:
            gains.append(gain_of(metric, base, adapter))
    return sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
