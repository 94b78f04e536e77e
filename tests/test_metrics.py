"""Metrics on cases worked by hand."""

import json
import math
from typing import Any

import numpy as np
import pytest

from finetune.metrics import (
    METRICS,
    Measured,
    differences,
    lower_is_better,
    measure,
    title_of,
    with_interval,
)
from finetune.metrics.chart import count, relaxed_accuracy
from finetune.metrics.choice import multiple_choice
from finetune.metrics.fields import anls_star, json_f1, nted
from finetune.metrics.text import anls, cer, contains, exact_match, token_f1, wer
from finetune.metrics.vqa import vqa_accuracy
from finetune.recipe.fields import METRICS as NAMES

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_recipes_know_every_metric_of_answers() -> None:
    assert sorted(NAMES) == sorted(name for name, each in METRICS.items() if each.columns)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("12.50", ["12.50"], 1.0),
        (" 12.50\n", ["12.50"], 1.0),
        ("12.5", ["12.50"], 0.0),
        ("Total", ["total"], 0.0),  # letter by letter
        ("b", ["a", "b"], 1.0),
        ("", [""], 1.0),
        ("x", [], 0.0),
        (COMPOSED, [DECOMPOSED], 1.0),
    ],
)
def test_exact_match(prediction: str, references: list[str], expected: float) -> None:
    assert exact_match(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The total is 12.50 EUR", ["12.50"], 1.0),
        ("TOTAL", ["total"], 1.0),
        ("tot", ["total"], 0.0),
        ("anything", [""], 0.0),  # an empty reference would stand in every answer
        ("", [""], 1.0),
        ("STRASSE 5", ["stra\u00dfe"], 1.0),
    ],
)
def test_contains(prediction: str, references: list[str], expected: float) -> None:
    assert contains(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("abcd", ["abcd"], 1.0),
        ("ABCD", ["abcd"], 1.0),
        ("abcx", ["abcd"], 0.75),
        ("abxy", ["abcd"], 0.0),  # a similarity of exactly one half counts for nothing
        ("abcxy", ["abcde"], 0.6),
        ("", ["abcd"], 0.0),
        ("", [""], 1.0),
        ("abcx", ["zzzz", "abcd"], 0.75),  # the nearest reference
        (COMPOSED, [DECOMPOSED], 1.0),
        ("\u65e5\u672c\u8a9e", ["\u65e5\u672c\u4eba"], 2 / 3),
        ("x", [], 0.0),
    ],
)
def test_anls(prediction: str, references: list[str], expected: float) -> None:
    assert anls(prediction, references) == pytest.approx(expected)


def votes(**answers: int) -> list[str]:
    return [text for text, count in answers.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("cat", votes(cat=10), 1.0),
        ("dog", votes(cat=10), 0.0),
        # of the ten subsets of nine, those without one of the matching answers have one match less
        ("cat", votes(cat=4, dog=6), 1.0),
        ("cat", votes(cat=3, dog=7), (3 * 2 / 3 + 7 * 1) / 10),  # 0.9
        ("cat", votes(cat=2, dog=8), (2 * 1 / 3 + 8 * 2 / 3) / 10),  # 0.6
        ("cat", votes(cat=1, dog=9), (1 * 0 + 9 * 1 / 3) / 10),  # 0.3
        ("A cat", votes(cat=9, dog=1), 1.0),  # articles go
        ("Two", ["2"] * 9 + ["3"], 1.0),  # words up to ten are digits
        ("dont know", ["don't know"] * 9 + ["x"], 1.0),  # apostrophes come
        ("1,000", ["1000"] * 9 + ["x"], 1.0),  # a comma between digits vanishes
        ("yes.", votes(yes=9, no=1), 1.0),
        ("3.5", ["3.5"] * 9 + ["x"], 1.0),  # a period before a digit stays
        ("black/white", ["black white"] * 9 + ["x"], 1.0),
        ("black / white", ["black  white"] * 9 + ["x"], 0.0),  # nothing joins two spaces again
        ("cat", ["a cat"] * 5 + ["dog"] * 5, 0.0),  # references keep their articles
        ("yes!", ["yes!"] * 10, 0.0),  # and, all equal, their punctuation
        ("", votes(cat=10), 0.0),
        ("CAF\u00c9", ["caf\u00e9"] * 10, 1.0),
        ("cat", ["cat"], 1.0),  # with too few answers for three others, one is enough
        ("cat", ["dog", "a cat"], 1.0),
        ("cat", ["dog"], 0.0),
        ("cat", [], 0.0),
    ],
)
def test_vqa_accuracy(prediction: str, references: list[str], expected: float) -> None:
    assert vqa_accuracy(prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("105", ["100"], 1.0),  # exactly 5%
        ("95", ["100"], 1.0),
        ("105.1", ["100"], 0.0),
        ("-104", ["-100"], 1.0),
        ("104", ["-100"], 0.0),
        ("5%", ["0.05"], 1.0),
        ("5%", ["5"], 0.0),
        ("52%", ["50%"], 1.0),
        ("0", ["0"], 1.0),
        ("0.0", ["0"], 0.0),  # a reference of zero is compared as text
        ("0.01", ["0"], 0.0),
        ("Yes", ["yes"], 1.0),
        ("yes", ["no"], 0.0),
        ("1,000", ["1000"], 0.0),  # as the original, which knows no comma
        ("nan", ["nan"], 1.0),
        ("inf", ["100"], 0.0),
        ("", ["100"], 0.0),
        ("", [""], 1.0),
        ("%", ["%"], 1.0),
        ("102", ["7", "100"], 1.0),
    ],
)
def test_relaxed_accuracy(prediction: str, references: list[str], expected: float) -> None:
    assert relaxed_accuracy(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("3", ["3"], 1.0),
        ("There are three cats.", ["3"], 1.0),
        ("three, I count 3", ["three"], 1.0),
        ("3 or 4", ["3"], 0.0),  # two different numbers
        ("1,200", ["1200"], 1.0),
        ("minus 3", ["-3"], 0.0),
        ("-3", ["-3"], 1.0),
        ("3.0", ["3"], 1.0),
        ("item A3", ["3"], 0.0),  # a name and no number
        ("none", ["0"], 0.0),
        ("zero", ["0"], 1.0),
        ("", ["0"], 0.0),
        ("many", ["many"], 0.0),
    ],
)
def test_count(prediction: str, references: list[str], expected: float) -> None:
    assert count(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("B", ["B"], 1.0),
        ("(B)", ["B"], 1.0),
        ("B. a cat", ["B"], 1.0),
        ("The answer is B.", ["B"], 1.0),
        ("B", ["B. a cat"], 1.0),
        ("A or B", ["B"], 0.0),  # two letters
        ("a cat", ["B"], 0.0),
        ("b", ["B"], 0.0),  # small letters are words
        ("There is A cat there", ["A"], 0.0),  # an article
        ("A", ["A"], 1.0),
        ("A cat that sits there", ["A"], 1.0),
        ("", ["B"], 0.0),
        ("The Cat", ["the cat"], 1.0),  # a reference without a letter is compared as text
        ("C", ["B", "C"], 1.0),
    ],
)
def test_multiple_choice(prediction: str, references: list[str], expected: float) -> None:
    assert multiple_choice(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "edits", "length"),
    [
        ("abcd", ["abcd"], 0, 4),
        ("abxd", ["abcd"], 1, 4),
        ("", ["abcd"], 4, 4),
        ("abcdefgh", ["abcd"], 4, 4),
        ("ab", [""], 2, 0),
        ("", [""], 0, 0),
        (COMPOSED, [DECOMPOSED], 0, 4),
        ("abcx", ["zz", "abcd"], 1, 4),
    ],
)
def test_character_errors(prediction: str, references: list[str], edits: int, length: int) -> None:
    assert cer(prediction, references) == (edits, length)


@pytest.mark.parametrize(
    ("prediction", "references", "edits", "length"),
    [
        ("the black cat", ["the black cat"], 0, 3),
        ("the  black\ncat", ["the black cat"], 0, 3),
        ("the cat", ["the black cat"], 1, 3),
        ("The cat", ["the cat"], 1, 2),
        ("", ["the cat"], 2, 2),
        ("a b", [""], 2, 0),
    ],
)
def test_word_errors(prediction: str, references: list[str], edits: int, length: int) -> None:
    assert wer(prediction, references) == (edits, length)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("the black cat", ["a black dog"], 0.5),  # one of two and two
        ("Black, cat!", ["cat black"], 1.0),
        ("cat cat", ["cat"], 2 / 3),  # a word counts as often as it is shared
        ("", ["cat"], 0.0),
        ("the", ["a"], 1.0),  # no words on both sides
        ("", [""], 1.0),
        ("cat", ["dog", "cat"], 1.0),
    ],
)
def test_token_f1(prediction: str, references: list[str], expected: float) -> None:
    assert token_f1(prediction, references) == pytest.approx(expected)


TOTAL = json.dumps({"total": "12.50", "items": [{"name": "tea"}, {"name": "cake"}]})


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (TOTAL, (6, 6)),  # three fields on each side, all shared
        (f"```json\n{TOTAL}\n```", (6, 6)),
        (json.dumps({"items": [{"name": "cake"}, {"name": "tea"}], "total": 12.5}), (4, 6)),
        (json.dumps({"total": "12.50"}), (2, 4)),
        (json.dumps(json.loads(TOTAL) | {"date": "1 May"}), (6, 7)),
        ("no JSON", (0, 3)),
        ("", (0, 3)),
        ("{}", (0, 3)),
    ],
)
def test_fields_are_shared_by_path_and_value(prediction: str, expected: tuple[int, int]) -> None:
    assert json_f1(prediction, [TOTAL]) == expected


def test_two_empty_objects_agree() -> None:
    assert json_f1("{}", ["{}"]) == (2, 2)
    assert nted("{}", ["{}"]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # the tree of {"total": "12.50"}: total 1 and its text 5, so that the empty one is 6 away
        ({"total": "12.50"}, {"total": "12.50"}, 1.0),
        ({"total": "12.55"}, {"total": "12.50"}, 5 / 6),  # one letter
        ({"sum": "12.50"}, {"total": "12.50"}, 5 / 6),  # one key
        ({}, {"total": "12.50"}, 0.0),
        ({"total": "12.50", "tip": "1"}, {"total": "12.50"}, 4 / 6),  # one key, one letter more
        ({"total": "12.50"}, {"total": "12.50", "tip": "1"}, 6 / 8),
        ({"b": "1", "a": "2"}, {"a": "2", "b": "1"}, 1.0),  # keys have no order
        ({"total": "a long text that is far from it"}, {"total": "x"}, 0.0),  # never below
    ],
)
def test_tree_similarity_is_of_edits(
    prediction: dict[str, Any], reference: dict[str, Any], expected: float
) -> None:
    assert nted(json.dumps(prediction), [json.dumps(reference)]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ('{"a": "tea", "b": "cake"}', '{"a": "tea", "b": "cake"}', 1.0),
        ('{"a": "tea"}', '{"a": "tea", "b": "cake"}', 0.5),
        ('["cake", "tea"]', '["tea", "cake"]', 1.0),  # lists are matched at their best
        ("no JSON", '{"a": "tea"}', 0.0),
        ("abcx", "abcd", 0.75),  # no JSON on both sides: ANLS
        ("", '{"a": "tea"}', 0.0),
    ],
)
def test_anls_star(prediction: str, reference: str, expected: float) -> None:
    assert anls_star(prediction, [reference]) == pytest.approx(expected)


def test_an_error_rate_is_of_all_letters_and_no_mean_over_rows() -> None:
    measured = measure(["x", "aaaaaaaaa"], [["a"], ["aaaaaaaaa"]], ["cer"])
    assert measured.figures() == {"cer": 0.1}
    assert [row["cer"] for row in measured.scores()] == [1.0, 0.0]


def test_a_corpus_says_as_much_as_its_references_in_bleu() -> None:
    text = "the black cat sat on the mat"
    assert measure([text] * 2, [[text]] * 2, ["bleu"]).figures() == {"bleu": 1.0}
    # all seven words, six pairs, five triples and four quadruples, with a penalty for brevity
    cut = measure([text], [[f"{text} today"]], ["bleu"]).figures()["bleu"]
    assert cut == pytest.approx(math.exp(1 - 8 / 7))
    assert measure([""], [[text]], ["bleu"]).figures() == {"bleu": 0.0}


def test_rouge_is_of_words_in_order() -> None:
    figures = measure(["the cat sat"], [["the black cat sat"]], ["rouge_l"]).figures()
    assert figures["rouge_l"] == pytest.approx(2 * 3 / (3 + 4))
    turned = measure(["sat cat the"], [["the black cat sat"]], ["rouge_l"]).figures()
    assert turned["rouge_l"] == pytest.approx(2 * 1 / (3 + 4))
    assert measure([""], [[""]], ["rouge_l"]).figures() == {"rouge_l": 0.0}


def test_captions_count_by_the_words_that_are_rare() -> None:
    captions = ["a cat on a mat", "a dog in a park", "a bird over a house"]
    said = measure(captions, [[text] for text in captions], ["cider"])
    assert [row["cider"] > 5 for row in said.scores()] == [True] * 3
    common = measure(["a", "a", "a"], [[text] for text in captions], ["cider"])
    assert common.figures()["cider"] == pytest.approx(0.0)  # `a` stands in every reference


def test_loss_is_of_all_tokens_and_perplexity_of_it() -> None:
    measured = measure(["", ""], [[""], [""]], [], np.array([[6.0, 2.0], [0.0, 2.0]]))
    assert measured.figures() == {"loss": 1.5, "perplexity": pytest.approx(math.exp(1.5))}


def test_no_rows_have_no_figures() -> None:
    every = [name for name, each in METRICS.items() if each.columns]
    measured = measure([], [], every)
    assert measured.figures() == {}
    assert measured.scores() == []
    assert set(measured.intervals().values()) == {None}


def of_shares(*rights: float) -> Measured:
    return Measured({"exact_match": np.array([(right, 1) for right in rights], float)})


def test_an_interval_is_near_that_of_the_normal_distribution() -> None:
    (between,) = of_shares(*[0, 1] * 200).intervals().values()
    assert between is not None
    half = 1.96 * math.sqrt(0.25 / 400)
    assert between == pytest.approx((0.5 - half, 0.5 + half), abs=0.01)
    assert of_shares(*[0, 1] * 200).intervals() == {"exact_match": between}  # the same every time
    assert of_shares(1.0).intervals() == {"exact_match": None}


def test_models_that_fail_on_the_same_rows_are_told_apart_by_few() -> None:
    before, after = of_shares(*[0] * 100, *[1] * 100), of_shares(*[1] * 8, *[0] * 92, *[1] * 100)
    found = differences(before, after)["exact_match"]
    assert found["verdict"] == "better"
    assert found["interval"] == pytest.approx((0.015, 0.07), abs=0.011)
    # by themselves their intervals overlap
    low, high = before.intervals()["exact_match"], after.intervals()["exact_match"]
    assert low is not None
    assert high is not None
    assert low[1] > high[0]


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        (6, 0, "better"),
        (5, 0, "cannot tell"),  # one way, and yet chance
        (0, 6, "worse"),
        (8, 6, "cannot tell"),
        (0, 0, "no change"),
    ],
)
def test_the_verdict_on_sixty_rows(better: int, worse: int, verdict: str) -> None:
    same = 60 - better - worse
    before = of_shares(*[0] * better, *[1] * worse, *[1] * same)
    after = of_shares(*[1] * better, *[0] * worse, *[1] * same)
    assert differences(before, after)["exact_match"]["verdict"] == verdict


def test_fewer_errors_are_better() -> None:
    many, few = (Measured({"cer": np.array([(each, 10)] * 20, float)}) for each in (5, 1))
    assert differences(many, few)["cer"]["verdict"] == "better"
    assert differences(few, many)["cer"]["verdict"] == "worse"
    assert [name for name in METRICS if lower_is_better(name)] == [
        "loss",
        "perplexity",
        "cer",
        "wer",
    ]


def test_a_difference_is_of_what_both_were_measured_by() -> None:
    both = of_shares(0, 1)
    likely = Measured(both.columns | {"loss": np.ones((2, 2))})
    assert list(differences(both, likely)) == ["exact_match"]


def test_figures_are_written_with_their_interval() -> None:
    assert with_interval(0.5, (0.25, 0.75)) == "0.500 [0.250, 0.750]"
    assert with_interval(0.5, None, "+") == "+0.500"
    assert with_interval(222190.55, (1e5, 3e5)) == "222k [100k, 300k]"
    assert with_interval(123.456, None, "+") == "+123.5"
    assert with_interval(None, None) == ""
    assert title_of("vqa_accuracy") == "VQA accuracy"
    assert title_of("of_another_version") == "of another version"
