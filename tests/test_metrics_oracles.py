"""Metrics against the libraries that people know them from, and against their definitions."""

import random
import string
from collections import Counter

import jiwer
import numpy as np
import pytest
import sacrebleu
from anls_star import anls_score
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider
from rouge_score.rouge_scorer import RougeScorer

from finetune.metrics import measure
from finetune.metrics.caption import cider, rouge_l
from finetune.metrics.fields import anls_star, nted
from finetune.metrics.text import anls, cer, token_f1, wer
from finetune.metrics.vqa import vqa_accuracy

WORDS = ["the", "black", "cat", "sat", "on", "a", "mat", "and", "saw", "12.50", "euro", "in", "tea"]
ANSWERS = ("cat", "dog", "bird", "blue")
text = st.text(alphabet=string.ascii_letters + " \u00e9\u00df\u65e5", min_size=1, max_size=12)
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)


def sentences(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 10))) for _ in range(count)]


@given(text, text.filter(str.strip))
def test_character_errors_are_those_of_jiwer(said: str, wanted: str) -> None:
    edits, length = cer(said, [wanted])
    found = jiwer.process_characters(wanted.strip(), said.strip())
    assert edits / length == pytest.approx(found.cer)


@given(texts, texts)
def test_word_errors_are_those_of_jiwer(said: str, wanted: str) -> None:
    edits, length = wer(said, [wanted])
    assert edits / length == pytest.approx(jiwer.process_words(wanted, said).wer)


def test_error_rates_over_rows_are_those_of_jiwer() -> None:
    said, wanted = sentences(1, 50), sentences(2, 50)
    figures = measure(said, [[each] for each in wanted], ["cer", "wer"]).figures()
    assert figures["wer"] == pytest.approx(jiwer.wer(wanted, said))
    assert figures["cer"] == pytest.approx(jiwer.cer(wanted, said))


@given(texts, texts)
def test_rouge_is_that_of_google(said: str, wanted: str) -> None:
    expected = RougeScorer(["rougeL"]).score(wanted, said)["rougeL"].fmeasure
    assert rouge_l(said, [wanted]) == pytest.approx(expected)


def test_bleu_is_that_of_the_corpus_in_sacrebleu() -> None:
    first, second = sentences(1, 50), sentences(2, 50)
    said = [f"{each} and tea" for each in first]
    rows = list(map(list, zip(first, second, strict=True)))
    expected = sacrebleu.corpus_bleu(said, [first, second]).score / 100
    assert 0.05 < expected < 0.95
    assert measure(said, rows, ["bleu"]).figures()["bleu"] == pytest.approx(expected)
    assert measure(first, rows, ["bleu"]).figures()["bleu"] == 1.0


def test_captions_are_scored_as_by_coco() -> None:
    said, first, second = (
        [each.replace(".", "") for each in sentences(seed, 30)] for seed in (1, 2, 3)
    )
    rows = list(map(list, zip(first, second, strict=True)))
    known = dict(enumerate(rows))
    expected, by_row = Cider().compute_score(known, {i: [each] for i, each in enumerate(said)})
    assert cider(said, rows) == pytest.approx(by_row)
    assert measure(said, rows, ["cider"]).figures()["cider"] == pytest.approx(expected)
    assert expected > 0.1


@given(st.dictionaries(texts, texts, max_size=4), st.dictionaries(texts, texts, max_size=4))
@settings(max_examples=50)
def test_anls_star_is_that_of_its_authors(said: dict[str, str], wanted: dict[str, str]) -> None:
    dumped = str(said).replace("'", '"'), str(wanted).replace("'", '"')
    assert anls_star(dumped[0], [dumped[1]]) == pytest.approx(anls_score(wanted, said))


@given(st.sampled_from(ANSWERS), st.lists(st.sampled_from(ANSWERS), min_size=10, max_size=10))
def test_vqa_accuracy_is_the_mean_over_nine_others(said: str, votes: list[str]) -> None:
    shares = []
    for i in range(10):
        others = votes[:i] + votes[i + 1 :]
        shares.append(min(1, others.count(said) / 3))
    assert vqa_accuracy(said, votes) == pytest.approx(sum(shares) / 10)


@given(texts, texts)
def test_token_f1_is_the_harmonic_mean_of_precision_and_recall(said: str, wanted: str) -> None:
    plain = [
        [w for w in each.replace(".", "").split() if w not in ("a", "the")]
        for each in (said, wanted)
    ]
    shared = (Counter(plain[0]) & Counter(plain[1])).total()
    if not all(plain):
        expected = float(plain[0] == plain[1])
    elif not shared:
        expected = 0.0
    else:
        precision, recall = shared / len(plain[0]), shared / len(plain[1])
        expected = 2 * precision * recall / (precision + recall)
    assert token_f1(said, [wanted]) == pytest.approx(expected)


def edits(left: str, right: str) -> int:
    """Levenshtein's distance, by the table in his paper."""
    row = np.arange(len(right) + 1)
    for i, a in enumerate(left, start=1):
        before, row = row, np.full(len(right) + 1, i)
        for j, b in enumerate(right, start=1):
            row[j] = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
    return int(row[-1])


@given(text, text)
def test_anls_is_the_share_of_letters_kept(said: str, wanted: str) -> None:
    left, right = said.strip().lower(), wanted.strip().lower()
    length = max(len(left), len(right))
    rate = edits(left, right) / length if length else 0
    assert anls(said, [wanted]) == pytest.approx(1 - rate if rate < 0.5 else 0)


@given(texts, texts)
def test_one_field_costs_its_letters_in_the_tree(said: str, wanted: str) -> None:
    # of one key, 1, and the letters of its value; the key is the same, so that only letters change
    expected = max(0, 1 - edits(said, wanted) / (1 + len(wanted)))
    found = nted(f'{{"key": "{said}"}}', [f'{{"key": "{wanted}"}}'])
    assert found == pytest.approx(expected)
