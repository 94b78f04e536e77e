"""Figures for longer texts, by the words and word sequences they share with references. Composed
letters are decomposed ones.
"""

from collections.abc import Sequence
from unicodedata import category

import numpy as np
from rapidfuzz.distance import LCSseq

from finetune.metrics.text import composed

_MARKS = ("Mn", "Mc")
"""Categories of unicode: accents and vowel signs, without a width of their own and with one."""


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words with the nearest reference, without case.

    Words are runs of letters and digits of any script with the marks on them, such as Devanagari's
    vowel signs, unstemmed; 0 where one side has none. Source: Lin 2004 (W04-1013, section 3.1) with
    beta 1, as google-research/rouge, which knows the letters of ASCII alone.
    """
    said = _words(prediction)
    return max((_lcs_f1(said, _words(reference)) for reference in references), default=0.0)


def _lcs_f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    if not said or not wanted:
        return 0.0
    return 2 * LCSseq.similarity(said, wanted) / (len(said) + len(wanted))


def bleu_counts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """What corpus BLEU is made of, by row [N, 10]: length, nearest reference's length, n-grams
    found for n of 1 to 4, n-grams there are. Source: sacrebleu 2.6, tokenizer 13a: words of any
    script end at white space, and at punctuation of ASCII.
    """
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True)
    found = (
        bleu.sentence_score(composed(prediction), [composed(each) for each in row])
        for prediction, row in zip(predictions, references, strict=True)
    )
    rows = [[each.sys_len, each.ref_len, *each.counts, *each.totals] for each in found]
    return np.array(rows, np.float64).reshape(-1, 10)


def bleu(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU, 0 to 1, of sums of counts [B, 10] -> [B]; smoothed as sacrebleu does.

    With sacrebleu's `effective_order`, which its `corpus_bleu` does not set: where no answer has
    four words there are no sequences of four, and BLEU is of those that there are. Without it right
    answers of a word or two ("yes", "two dogs") have 0. From one answer of four words on it is the
    same as the default.
    """
    from sacrebleu.metrics.bleu import BLEU

    def one(row: list[int]) -> float:
        counts = row[2:6], row[6:], row[0], row[1]
        found = BLEU.compute_bleu(*counts, smooth_method="exp", effective_order=True)
        return min(found.score / 100, 1.0)  # it may be 100.00000000000004

    return np.array([one(row) for row in sums.round().astype(int).tolist()])


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of each row [N], 0 to 10; 1 is what papers call 100.

    The weights of words come from the references of all rows: on few rows, or of one sentence for
    all, every score is near 0. Words are parted as in `rouge_l`, not by the original's Java
    tokenizer. Source: Vedantam 2015 (arXiv 1411.5726), pycocoevalcap 1.2, cider_scorer.
    """
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    wanted = [[" ".join(_words(each)) for each in row] for row in references]
    if not any(text for row in wanted for text in row):
        return np.zeros(len(wanted))  # the scorer takes the maximum of no words
    scorer = CiderScorer(n=4, sigma=6.0)
    for prediction, row in zip(predictions, wanted, strict=True):
        scorer += (" ".join(_words(prediction)), row)
    return np.asarray(scorer.compute_score()[1], np.float64)


def _words(text: str) -> list[str]:
    words = [""]
    for letter in composed(text).lower():
        if letter.isalnum() or (words[-1] and category(letter) in _MARKS):
            words[-1] += letter
        elif words[-1]:
            words.append("")
    return words if words[-1] else words[:-1]
