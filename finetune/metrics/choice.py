"""Multiple choice: the letter that an answer names."""

import re
from collections.abc import Sequence

from finetune.metrics.text import composed

LETTERS = "ABCDEFGH"
"""Not further: I is a word. Where a reference is another letter, it counts as well."""

LAST_WORDS = 4
"""Of an answer, which name a letter that is not marked as one: in earlier ones, A is an article."""

# `.`, `:` or `)` behind the letter, or a pair of marks around it.
_MARK = r"""(?:\**[.:)]+\**|(?<=[(\[{<"'`$*“‘].)[.:)\]}>"'`$*”’]+)(?!\S)"""
_BEGINS = re.compile(rf"\W*(?:(?i:answer)\W+)?([A-Z])(?:\W*\Z|{_MARK}|[ \t]+[-–—]\s|[ \t]*\n)")
_MARKED = re.compile(
    rf"""(?<![^\s(\[{{<"'`$*“‘])([A-Z]){_MARK}|^[^\w\n]*([A-Z])[^\w\n]*$""", re.MULTILINE
)
_ENDS_A_SENTENCE = re.compile(r"(?<=\b[A-Z])(?<!\bor [A-Z])(?<!\band [A-Z])\.\s*\Z")
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_MARKS_AT_ENDS = "\"'`$<>-–—“”‘’"
_JOINING = ("and", "or")


def multiple_choice(prediction: str, references: Sequence[str]) -> float:
    """1 where the answer names the letter of a reference: `B`, `(B)`, `B. cat`, `It is B`.

    An answer of any length may begin with the letter, marked as one (`B. A cat`, `**B** cat`,
    `Answer: B. cat`) or on a line of its own. A letter behind it counts against it where that is
    marked, too, or nothing else is there (`A. or B`); the full stop at the end is no mark.
    Elsewhere the letter is the only one, and first stands among the last four words: an article A
    is taken for a letter there (`A man rides`), and nowhere else. An answer that names several
    letters, or none, is wrong.

    A reference is a letter, bare or marked as one (`Answer: B`, `B. A cat`), of which the words
    alone are right in either case; where it is a text (`A cat`, `Vitamin C`), both are compared
    without case, composed letters as decomposed ones. Source: MMBench's matching before it asks a
    model (arXiv 2307.06281), as in VLMEvalKit's vlmeval/utils/matching_util.py, can_infer_option,
    which looks at the last four words alone, and takes no quote, backtick, dollar, dash or angle
    bracket for a mark.
    """
    prediction = composed(prediction)
    return float(any(_agrees(prediction, reference) for reference in references))


def _agrees(prediction: str, reference: str) -> bool:
    reference = composed(reference)
    wanted = _BEGINS.match(reference)
    if wanted is None:
        return prediction.strip().casefold() == reference.strip().casefold()
    words = _words(reference.casefold())
    if len(words) > 1 and _words(prediction.casefold()) == words:
        return True
    letter = wanted[1]
    return _named(prediction, {*LETTERS, letter}) == {letter}


def _named(answer: str, letters: set[str]) -> set[str]:
    begins, words = _BEGINS.match(answer), _words(answer)
    if begins is None or begins[1] not in letters:
        named = letters.intersection(words)
        is_last = all(words.index(each) >= len(words) - LAST_WORDS for each in named)
        return named if is_last else set()
    behind = _words(answer[begins.end() :])
    if all(word in letters or word in _JOINING for word in behind):
        return letters.intersection({begins[1], *behind})
    answer = _ENDS_A_SENTENCE.sub("", answer)
    marked = {match[1] or match[2] for match in _MARKED.finditer(answer, begins.end())}
    return letters.intersection({begins[1], *marked})


def _words(text: str) -> list[str]:
    parts = (word.strip(_MARKS_AT_ENDS) for word in text.translate(_MARKS).split())
    return [part for part in parts if part]
