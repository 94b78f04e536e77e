"""VQA accuracy, with the normalisation of the official evaluation.

Source: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py, its known oddities kept:
a period goes unless a digit follows it, and at most 32 of them go; a comma between digits anywhere
makes all punctuation vanish rather than become spaces; a composed letter is not the decomposed one.
"""

import re
from collections.abc import Iterator, Sequence

NEEDED = 3
"""Of the other people's answers, so many that say the same make an answer fully right."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the official code passes a flag where a count is expected
_COMMA = re.compile(r"\d,\d")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(digit) for digit, word in enumerate(_NUMBERS)} | {"none": "0"}

_ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
    oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
    something'd something'll that's there'd there're there's they'd they'll they're they've wasn't
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's
    who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_MORE_APOSTROPHES = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've
    y'all'll you'd've
"""


def _contractions() -> Iterator[tuple[str, str]]:
    """Words without their apostrophe, or without one of several -> with all of them."""
    for word in _ONE_APOSTROPHE.split():
        yield word.replace("'", ""), word
    for word in _MORE_APOSTROPHES.split():
        for k, letter in enumerate(word):
            if letter == "'":
                yield word[:k] + word[k + 1 :], word
    for written in ("ow's'at", "'ows'at", "'ow'sat"):
        yield written, "'ow's'at"
    yield from (("twas", "'twas"), ("somebody'd", "somebodyd"))


_CONTRACTIONS = dict(_contractions())


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """The mean over the people's answers of min(1, others that say the same / 3).

    The prediction is normalised whole; of the references only the punctuation, and only where they
    differ. The formula is for ten answers: with fewer than four it could not reach 1, and there an
    answer that is one of the references is right.
    """
    said = _normalised(prediction)
    wanted = [
        " ".join(reference.split("\n")).replace("\t", " ").strip() for reference in references
    ]
    if len(set(wanted)) > 1:
        wanted = [_without_punctuation(each) for each in wanted]
    if len(wanted) <= NEEDED:
        return float(said in {_normalised(each) for each in wanted})
    matches = [each == said for each in wanted]
    others = [sum(matches) - match for match in matches]
    return sum(min(1.0, count / NEEDED) for count in others) / len(others)


def _normalised(text: str) -> str:
    plain = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (_DIGITS.get(word, word) for word in plain.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    out = text
    has_comma = _COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        vanishes = has_comma or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if vanishes else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)
