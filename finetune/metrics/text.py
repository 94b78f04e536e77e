"""Figures for one answer against its references: pure functions, each between 0 and 1."""

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references, letter by letter; white space at the ends does
    not count.
    """
    return float(prediction.strip() in {reference.strip() for reference in references})


def anls(prediction: str, references: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest reference, without case; 0 where it is 0.5
    or less.

    Source: DocVQA's ANLS (arXiv 1907.00490, section 4): 1 - NL if NL < 0.5, NL the distance over
    the longer length.
    """
    return max((_similarity(prediction, reference) for reference in references), default=0.0)


def _similarity(prediction: str, reference: str) -> float:
    left, right = prediction.strip().lower(), reference.strip().lower()
    distance = Levenshtein.normalized_distance(left, right)  # 0 for two empty strings
    return 1 - distance if distance < 0.5 else 0.0
