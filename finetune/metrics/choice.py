"""Multiple choice: the letter that an answer names."""

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGH"
"""Not further: I is a word."""

_ARTICLE = re.compile(r"\s*A\s+\w")
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def multiple_choice(prediction: str, references: Sequence[str]) -> float:
    """1 where the answer names the letter of a reference: `B`, `(B)`, `B. cat`, `It is B`.

    An answer that names several letters, or none, is wrong. Where a reference names none (the A of
    `A cat` is an article there), both are compared without case. Source: MMBench's matching before
    it asks a model (arXiv 2307.06281), as in VLMEvalKit's can_infer_option.
    """
    return float(any(_agrees(prediction, reference) for reference in references))


def _agrees(prediction: str, reference: str) -> bool:
    wanted = None if _ARTICLE.match(reference) else _letter(reference)
    if wanted is None:
        return prediction.strip().casefold() == reference.strip().casefold()
    return _letter(prediction) == wanted


def _letter(text: str) -> str | None:
    words = text.translate(_MARKS).split()
    found = [letter for letter in LETTERS if letter in words]
    if len(found) != 1 or (found == ["A"] and len(words) > 3 and words[0] != "A"):
        return None  # in a sentence, A may be an article
    return found[0]
