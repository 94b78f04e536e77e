"""Multiple choice: the letter that an answer names."""

import re
from collections.abc import Sequence

from finetune.metrics.text import composed

LETTERS = "ABCDEFGH"
"""Not further: I is a word. Where a reference is another letter, it counts as well."""

LAST_WORDS = 4
"""Of an answer, which name a letter that is not marked as one: in earlier ones, A is an article."""

_CHOICE = re.compile(r"\W*(?:(?i:answer)\W+)?([A-Z])(?:\W*|\**\)?(?:[.:)]\**\s|\n).*)", re.DOTALL)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def multiple_choice(prediction: str, references: Sequence[str]) -> float:
    """1 where the answer names the letter of a reference: `B`, `(B)`, `B. cat`, `It is B`.

    An answer of any length may begin with the letter, marked as one (`B. cat`, `**B.** cat`,
    `Answer: B. cat`) or on a line of its own. Elsewhere it first stands among the last four words:
    an article A is taken for a letter there (`A man rides`), and nowhere else. An answer that names
    several letters, or none, is wrong.

    A reference is a letter, bare or marked as one (`Answer: B`); where it is a text (`A cat`,
    `Vitamin C`), both are compared without case, composed letters as decomposed ones. Source:
    MMBench's matching before it asks a model (arXiv 2307.06281), as in VLMEvalKit's
    vlmeval/utils/matching_util.py, can_infer_option, which looks at the last four words alone.
    """
    prediction = composed(prediction)
    return float(any(_agrees(prediction, reference) for reference in references))


def _agrees(prediction: str, reference: str) -> bool:
    reference = composed(reference)
    wanted = _CHOICE.fullmatch(reference)
    if wanted is None:
        return prediction.strip().casefold() == reference.strip().casefold()
    letter, words = wanted[1], prediction.translate(_MARKS).split()
    if [each for each in {*LETTERS, letter} if each in words] != [letter]:
        return False
    begins = _CHOICE.fullmatch(prediction)
    is_marked = begins is not None and begins[1] == letter
    return is_marked or words.index(letter) >= len(words) - LAST_WORDS
