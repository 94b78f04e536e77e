"""Figures for short answers: by letters, words and edits. White space at the ends never counts, and
composed letters are decomposed ones.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from unicodedata import normalize

from rapidfuzz.distance import Levenshtein

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references, letter by letter."""
    return float(_plain(prediction) in map(_plain, references))


def contains(prediction: str, references: Sequence[str]) -> float:
    """1 where a reference stands in the answer, without case; an empty one only in an empty one."""
    said = _plain(prediction).casefold()
    wanted = [_plain(reference).casefold() for reference in references]
    return float(any(each in said if each else not said for each in wanted))


def anls(prediction: str, references: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest reference, without case; 0 where it is 0.5
    or less. White space within counts as one space.

    Source: DocVQA's ANLS (arXiv 1907.00490, section 4): 1 - NL if NL < 0.5, NL the distance over
    the longer length; white space as in the challenge's script.
    """
    return max((_similarity(prediction, reference) for reference in references), default=0.0)


def _similarity(prediction: str, reference: str) -> float:
    left, right = (" ".join(_plain(text).lower().split()) for text in (prediction, reference))
    distance = Levenshtein.normalized_distance(left, right)  # 0 for two empty strings
    return 1 - distance if distance < 0.5 else 0.0


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the words shared with the nearest reference, without case, punctuation and articles.

    Where one side has no words left, 1 if both have none. Source: SQuAD's evaluation (arXiv
    1606.05250), evaluate-v1.1.py, and v2.0's rule for no words.
    """
    return max((_words_f1(prediction, reference) for reference in references), default=0.0)


def _words_f1(prediction: str, reference: str) -> float:
    said, wanted = _squad_words(prediction), _squad_words(reference)
    if not said or not wanted:
        return float(said == wanted)
    num_shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * num_shared / (len(said) + len(wanted))


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", _plain(text).lower().translate(_NO_PUNCTUATION)).split()


def cer(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """Character edits to the nearest reference, and its characters: the rate over rows is the sum
    of the first over that of the second, and can exceed 1.
    """
    said = _plain(prediction)
    return _fewest((Levenshtein.distance(said, r), len(r)) for r in map(_plain, references))


def wer(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """Word edits to the nearest reference, and its words; words are what white space parts.

    Source: the definition of jiwer 4.0, process_words.
    """
    said = _plain(prediction).split()
    wanted = (_plain(reference).split() for reference in references)
    return _fewest((Levenshtein.distance(said, words), len(words)) for words in wanted)


def _fewest(found: Iterable[tuple[int, int]]) -> tuple[float, float]:
    """Those at the lowest rate; edits of an empty reference count as of one character or word."""
    return min(found, key=lambda each: each[0] / max(each[1], 1), default=(0, 0))


def composed(text: str) -> str:
    """In NFC, where an accent that follows its letter has become one with it: unicode writes é in
    both ways, and they are to be equal.
    """
    return normalize("NFC", text)


def _plain(text: str) -> str:
    return composed(text.strip())
