"""Metrics against the libraries that define them, or against their definitions written anew."""

import json
import random
import re
import string
from functools import cache
from typing import Any
from unicodedata import normalize

import jiwer
import pytest
import sacrebleu
from anls_star import anls_score
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider
from rouge_score.rouge_scorer import RougeScorer

from finetune.metrics import measure
from finetune.metrics.caption import cider, rouge_l
from finetune.metrics.chart import relaxed_accuracy
from finetune.metrics.fields import anls_star, nted
from finetune.metrics.text import anls, cer, token_f1, wer
from finetune.metrics.vqa import vqa_accuracy

few = settings(max_examples=100, deadline=None, derandomize=True)

# Composed and combining accents, letters of other scripts, one beyond 16 bits, and the space.
letters = st.text("abcé\u0301ßЖ漢字🙂 ", max_size=12)
sentences = st.lists(st.sampled_from(["a", "the", "cat", "Cat,", "naïve", "sat.", "漢字", "2_3"]))
spoken = sentences.map(" ".join)
ascii_text = st.text("abAB the_,.'-1\n", max_size=20)


# --- rates of errors


@few
@given(letters, letters)
def test_character_edits_are_those_of_jiwer(prediction: str, reference: str) -> None:
    prediction, reference = (normalize("NFC", each.strip()) for each in (prediction, reference))
    assume(reference)
    found = jiwer.process_characters(reference, prediction)
    edits = found.substitutions + found.insertions + found.deletions
    length = found.substitutions + found.deletions + found.hits
    assert cer(prediction, [reference]) == (edits, length)


@few
@given(letters | spoken, letters | spoken)
def test_word_edits_are_those_of_jiwer(prediction: str, reference: str) -> None:
    prediction, reference = (normalize("NFC", each.strip()) for each in (prediction, reference))
    assume(reference)
    found = jiwer.process_words(reference, prediction)
    edits = found.substitutions + found.insertions + found.deletions
    length = found.substitutions + found.deletions + found.hits
    assert wer(prediction, [reference]) == (edits, length)


@few
@given(st.lists(st.tuples(spoken, spoken.filter(str.strip)), min_size=1, max_size=5))
def test_the_rates_over_rows_are_those_of_jiwer(rows: list[tuple[str, str]]) -> None:
    predictions, references = (
        [normalize("NFC", each) for each in side] for side in zip(*rows, strict=True)
    )
    found = measure(predictions, [[each] for each in references], ["cer", "wer"]).figures()
    assert found == {
        "cer": pytest.approx(jiwer.cer(references, predictions)),
        "wer": pytest.approx(jiwer.wer(references, predictions)),
    }


# --- shared words


@few
@given(ascii_text | spoken.filter(str.isascii), ascii_text | spoken.filter(str.isascii))
def test_rouge_l_is_that_of_rouge_score(prediction: str, reference: str) -> None:
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = scorer.score(reference, prediction)["rougeL"].fmeasure
    assert rouge_l(prediction, [reference]) == pytest.approx(expected)


@few
@given(st.lists(st.tuples(spoken, spoken, spoken), min_size=1, max_size=4))
def test_bleu_is_that_of_sacrebleu(rows: list[tuple[str, str, str]]) -> None:
    predictions, *streams = ([row[k] for row in rows] for k in range(3))
    found = measure(predictions, [row[1:] for row in rows], ["bleu"])
    corpus = sacrebleu.corpus_bleu(predictions, streams, use_effective_order=True)
    assert found.figures()["bleu"] == pytest.approx(corpus.score / 100)
    by_row = [
        sacrebleu.sentence_bleu(each, row[1:]) for each, row in zip(predictions, rows, strict=True)
    ]
    assert [each["bleu"] for each in found.scores()] == pytest.approx(
        [each.score / 100 for each in by_row]
    )


def test_bleu_is_sacrebleu_s_default_from_one_answer_of_four_words_on() -> None:
    short = ["yes", "no", "two dogs"]
    long = [*short, "two dogs run here"]
    for answers, ours, default in ((short, 1.0, 0.0), (long, 1.0, 1.0)):
        assert measure(answers, [[each] for each in answers], ["bleu"]).figures()["bleu"] == ours
        assert sacrebleu.corpus_bleu(answers, [answers]).score / 100 == pytest.approx(default)


@pytest.mark.parametrize("seed", range(5))
def test_cider_is_that_of_pycocoevalcap(seed: int) -> None:
    generator = random.Random(seed)

    def words() -> list[str]:
        kinds = ["cat", "dog", "red", "old", "sits", "on", "mat", "Б"]
        return generator.choices(kinds, k=generator.randint(1, 9))

    said = [words() for _ in range(12)]
    wanted = [[words() for _ in range(generator.randint(1, 3))] for _ in said]
    # Half of the answers are near a reference, or few would share four words in a row.
    said[::2] = [[*row[0][:5], "mat"] for row in wanted[::2]]
    _, expected = Cider().compute_score(
        {i: [" ".join(each).lower() for each in row] for i, row in enumerate(wanted)},
        {i: [" ".join(each).lower()] for i, each in enumerate(said)},
    )
    found = cider(
        [", ".join(each) + "." for each in said], [[" - ".join(r) for r in row] for row in wanted]
    )
    assert found == pytest.approx(expected)
    assert max(found) > 1


def squad_f1(prediction: str, reference: str) -> float:
    """Precision and recall of the words, each word as often as it stands there."""
    said, wanted = (
        [
            word
            for word in re.sub(f"[{re.escape(string.punctuation)}]", "", text).lower().split()
            if word not in {"a", "an", "the"}
        ]
        for text in (prediction, reference)
    )
    if not said or not wanted:
        return float(not said and not wanted)
    num_same = sum(min(said.count(word), wanted.count(word)) for word in set(said))
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(said), num_same / len(wanted)
    return 2 * precision * recall / (precision + recall)


@few
@given(ascii_text | spoken, st.lists(ascii_text | spoken, min_size=1, max_size=3))
def test_token_f1_is_squads(prediction: str, references: list[str]) -> None:
    expected = max(squad_f1(prediction, each) for each in references)
    assert token_f1(prediction, references) == pytest.approx(expected)


# --- short answers


@few
@given(st.text("abcdAé漢", max_size=8), st.text("abcdAé漢", max_size=8))
def test_anls_is_anls_star_of_two_texts_but_for_one_half(prediction: str, reference: str) -> None:
    expected = anls_score(reference, prediction)
    assert anls(prediction, [reference]) == pytest.approx(0 if expected == 0.5 else expected)


ANSWERS = ["red", "blue", "cat", "7"]


@few
@given(st.sampled_from(ANSWERS), st.lists(st.sampled_from(ANSWERS), min_size=10, max_size=10))
def test_vqa_accuracy_leaves_out_each_of_ten_in_turn(said: str, people: list[str]) -> None:
    rounds = [people[:k] + people[k + 1 :] for k in range(10)]
    expected = sum(min(1, others.count(said) / 3) for others in rounds) / 10
    assert vqa_accuracy(said, people) == pytest.approx(expected)


def within_5_percent(prediction: str, reference: str) -> bool:
    def number(text: str) -> float | None:
        found = re.fullmatch(r"(-?\d+(?:\.\d+)?)(%?)", text)
        return float(found[1]) / (100 if found[2] else 1) if found else None

    said, wanted = number(prediction), number(reference)
    if said is None or not wanted:
        return prediction.lower() == reference.lower()
    return abs(said - wanted) / abs(wanted) <= 0.05


figures = st.builds(
    "{}{}".format,
    st.integers(-30, 30) | st.sampled_from([0.01, 0.5, 1.05, 9.5, 9.4]),
    st.sampled_from(["", "%"]),
)


@settings(few, max_examples=400)  # few pairs are near
@given(figures | st.sampled_from(["Yes", "yes", "no"]), figures | st.sampled_from(["yes", "No"]))
def test_relaxed_accuracy_is_its_definition(prediction: str, reference: str) -> None:
    assert relaxed_accuracy(prediction, [reference]) == within_5_percent(prediction, reference)


# --- fields

leaves = st.text("ab1 ", max_size=3) | st.integers(0, 20) | st.booleans() | st.none()
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=6,
)
roots = values.filter(lambda value: isinstance(value, dict | list))


@few
@given(roots, roots)
def test_anls_star_is_that_of_its_authors(said: Any, wanted: Any) -> None:
    found = anls_star(json.dumps(said), [json.dumps(wanted)])
    assert found == pytest.approx(anls_score(wanted, said))


# As Donut writes fields: under each key texts, or objects.
texts = st.lists(st.text("xyz", min_size=1, max_size=2), min_size=1, max_size=2)
keys = st.sampled_from(["a", "b", "cc"])
plain = st.dictionaries(keys, texts, min_size=1, max_size=2)
sections = texts | st.lists(plain, min_size=1, max_size=2)
filled = st.dictionaries(keys, sections, min_size=1, max_size=2)
receipts = st.just({}) | filled


def fields_of(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [field for key in value for field in fields_of(value[key], f"{path}.{key}")]
    if isinstance(value, list):
        return [field for item in value for field in fields_of(item, path)]
    return [(path, value)]


@few
@given(st.lists(st.tuples(receipts, filled), min_size=1, max_size=3))
def test_json_f1_is_donuts_count_over_all_fields(rows: list[tuple[Any, Any]]) -> None:
    num_right = num_wrong = 0
    for said, wanted in rows:
        missing = fields_of(wanted)
        for field in fields_of(said):
            if field in missing:
                missing.remove(field)
                num_right += 1
            else:
                num_wrong += 1
        num_wrong += len(missing)
    predictions, references = (
        [json.dumps(each) for each in side] for side in zip(*rows, strict=True)
    )
    figure = measure(predictions, [[each] for each in references], ["json_f1"]).figures()
    assert figure["json_f1"] == pytest.approx(num_right / (num_right + num_wrong / 2))


def tree_of(value: Any, label: str = "root") -> tuple[Any, ...]:
    """(label, is a leaf, children), keys by length and then by letter."""
    if isinstance(value, str):
        return value, True, ()
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: (len(key), key))
        return label, False, tuple(tree_of(value[key], key) for key in keys)
    return label, False, tuple(tree_of(item, "object") for item in value)


def cost(node: tuple[Any, ...]) -> int:
    return len(node[0]) if node[1] else 1


@cache
def letters_apart(left: str, right: str) -> int:
    if not left or not right:
        return len(left) + len(right)
    return min(
        letters_apart(left[1:], right) + 1,
        letters_apart(left, right[1:]) + 1,
        letters_apart(left[1:], right[1:]) + (left[0] != right[0]),
    )


def exchange(left: tuple[Any, ...], right: tuple[Any, ...]) -> int:
    if left[1] and right[1]:
        return letters_apart(left[0], right[0])
    if left[1] or right[1]:
        return 1 + len(left[0] if left[1] else right[0])
    return int(left[0] != right[0])


@cache
def forests_apart(left: tuple[Any, ...], right: tuple[Any, ...]) -> int:
    """The cheapest of: drop the last root of one side, or of the other, or pair the two."""
    ways = []
    if left:
        ways.append(forests_apart((*left[:-1], *left[-1][2]), right) + cost(left[-1]))
    if right:
        ways.append(forests_apart(left, (*right[:-1], *right[-1][2])) + cost(right[-1]))
    if left and right:
        below = forests_apart(left[-1][2], right[-1][2])
        ways.append(below + forests_apart(left[:-1], right[:-1]) + exchange(left[-1], right[-1]))
    return min(ways, default=0)


@few
@given(receipts, filled)
def test_nted_is_a_tree_edit_distance_by_brute_force(said: Any, wanted: Any) -> None:
    whole = forests_apart((tree_of({}),), (tree_of(wanted),))
    expected = 1 - forests_apart((tree_of(said),), (tree_of(wanted),)) / whole
    assert nted(json.dumps(said), [json.dumps(wanted)]) == pytest.approx(max(0, expected))
