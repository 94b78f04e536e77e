"""Multiple choice: the letter that an answer names."""

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGH"
"""Not further: I is a word. Where a reference is another letter, it counts as well."""

_CHOICE = re.compile(r"\W*(?:(?i:answer)\W+)?([A-Z])(?:\W*|\)?[.:)]\s.*)", re.DOTALL)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def multiple_choice(prediction: str, references: Sequence[str]) -> float:
    """1 where the answer names the letter of a reference: `B`, `(B)`, `B. cat`, `It is B`.

    An answer that names several letters, or none, is wrong. A reference is a letter, bare or marked
    as one (`Answer: B`); where it is a text (`A cat`, `Vitamin C`), both are compared without case.
    Source: MMBench's matching before it asks a model (arXiv 2307.06281), as in VLMEvalKit's
    can_infer_option, which takes an article A for a letter, too.
    """
    return float(any(_agrees(prediction, reference) for reference in references))


def _agrees(prediction: str, reference: str) -> bool:
    wanted = _CHOICE.fullmatch(reference)
    if wanted is None:
        return prediction.strip().casefold() == reference.strip().casefold()
    words = prediction.translate(_MARKS).split()
    return [each for each in {*LETTERS, wanted[1]} if each in words] == [wanted[1]]
