"""Metrics by the names that recipes use."""

from collections.abc import Callable, Sequence

from finetune.metrics.text import anls, exact_match

METRIC_FUNCTIONS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "anls": anls,
}


def score(prediction: str, references: Sequence[str], metrics: Sequence[str]) -> dict[str, float]:
    """Each metric's figure for one answer."""
    return {name: METRIC_FUNCTIONS[name](prediction, references) for name in metrics}


def mean_scores(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each metric's mean over rows; empty for no rows."""
    if not scores:
        return {}
    return {name: sum(row[name] for row in scores) / len(scores) for name in scores[0]}
