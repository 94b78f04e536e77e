"""Figures for answers that are numbers. Composed letters are decomposed ones."""

import math
import re
from collections.abc import Sequence
from decimal import Decimal

from finetune.metrics.text import composed

TOLERANCE = 0.05

_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
_NUMBERS = {word: number for number, word in enumerate(_WORDS)}
_DIGITS = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_NUMBER = re.compile(
    rf"(?<![\w.])(?<!\d,){_DIGITS}(?!\w|[.,]\d)|\b(?:{'|'.join(_WORDS)})\b", re.ASCII
)


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 where the answer is within 5% of a numeric reference, or else the same text without case.

    `%` divides by 100; a reference of zero is compared as text, as the original does. Source:
    ChartQA (arXiv 2203.10244, section 5.1), as evaluated by google-research/pix2struct, metrics.py.
    """
    return float(any(_is_near(prediction.strip(), each.strip()) for each in references))


def _is_near(prediction: str, reference: str) -> bool:
    said, wanted = _number(prediction), _number(reference)
    if said is not None and wanted:
        return abs(said - wanted) / abs(wanted) <= TOLERANCE
    return composed(prediction).lower() == composed(reference).lower()


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def count(prediction: str, references: Sequence[str]) -> float:
    """1 where the answer names one number, in digits or as a word up to twenty, and it is that of a
    reference; an answer with two different numbers is wrong. Commas part thousands.
    """
    said = _counted(prediction)
    return float(said is not None and said in map(_counted, references))


def _counted(text: str) -> Decimal | None:
    found = {_value(each) for each in _NUMBER.findall(composed(text).lower())}
    return found.pop() if len(found) == 1 else None


def _value(text: str) -> Decimal:
    return Decimal(_NUMBERS[text] if text in _NUMBERS else text.replace(",", ""))
