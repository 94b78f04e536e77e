import pytest

from finetune.metrics import METRIC_FUNCTIONS, mean_scores, score
from finetune.metrics.text import anls, exact_match
from finetune.recipe import METRICS


def test_recipes_know_every_metric() -> None:
    assert sorted(METRIC_FUNCTIONS) == sorted(METRICS)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("12.50", ["12.50"], 1.0),
        (" 12.50\n", ["12.50"], 1.0),
        ("12.5", ["12.50"], 0.0),
        ("Total", ["total"], 0.0),  # letter by letter
        ("b", ["a", "b"], 1.0),
        ("", [""], 1.0),
    ],
)
def test_exact_match(prediction: str, references: list[str], expected: float) -> None:
    assert exact_match(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("abcd", ["abcd"], 1.0),
        ("ABCD", ["abcd"], 1.0),
        ("abcx", ["abcd"], 0.75),
        ("abxy", ["abcd"], 0.0),  # a distance of exactly one half counts for nothing
        ("abcxy", ["abcde"], 0.6),
        ("", ["abcd"], 0.0),
        ("", [""], 1.0),
        ("abcx", ["zzzz", "abcd"], 0.75),  # the nearest reference
    ],
)
def test_anls(prediction: str, references: list[str], expected: float) -> None:
    assert anls(prediction, references) == pytest.approx(expected)


def test_means_are_over_rows() -> None:
    scores = [score(p, ["a"], ["exact_match", "anls"]) for p in ("a", "b", "b", "b")]
    assert mean_scores(scores) == {"exact_match": 0.25, "anls": 0.25}
    assert mean_scores([]) == {}
