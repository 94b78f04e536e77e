"""Every metric on cases worked by hand, and what is made of its rows."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from finetune.metrics import (
    METRICS,
    Measured,
    differences,
    is_right,
    lower_is_better,
    measure,
    title_of,
    with_interval,
)
from finetune.metrics.bootstrap import interval, paired_interval
from finetune.metrics.caption import bleu, bleu_counts, cider, rouge_l
from finetune.metrics.chart import count, relaxed_accuracy
from finetune.metrics.choice import multiple_choice
from finetune.metrics.fields import anls_star, json_f1, nted
from finetune.metrics.text import anls, cer, contains, exact_match, token_f1, wer
from finetune.metrics.vqa import vqa_accuracy
from finetune.recipe.fields import METRICS as METRICS_OF_RECIPES

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
OF_ANSWERS = [name for name, metric in METRICS.items() if metric.columns]

# --- short answers


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("12.50", ["12.50"], 1.0),
        (" 12.50\n", ["12.50"], 1.0),
        ("12.5", ["12.50"], 0.0),
        ("Total", ["total"], 0.0),  # letter by letter
        ("b", ["a", "b"], 1.0),
        ("", [""], 1.0),
        ("", ["a"], 0.0),
        (COMPOSED, [DECOMPOSED], 1.0),
    ],
)
def test_exact_match(prediction: str, references: list[str], expected: float) -> None:
    assert exact_match(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The total is 12.50.", ["12.50"], 1.0),
        ("The TOTAL", ["total"], 1.0),
        ("12", ["12.50"], 0.0),  # the answer in the reference is the wrong way round
        ("a dog", ["cat", "dog"], 1.0),
        (f"the {DECOMPOSED} bar", [COMPOSED], 1.0),
        ("", [""], 1.0),
        ("anything", [""], 0.0),
        ("anything", [" \n"], 0.0),
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
        ("abcxy", ["abcde"], 0.6),
        ("", ["abcd"], 0.0),
        ("abcd", [""], 0.0),
        ("", [""], 1.0),
        ("abcx", ["zzzz", "abcd"], 0.75),  # the nearest reference
        (COMPOSED, [DECOMPOSED], 1.0),
        (" abcd\n", ["abcd"], 1.0),
        ("12  May", ["12 May"], 1.0),
    ],
)
def test_anls(prediction: str, references: list[str], expected: float) -> None:
    assert anls(prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize(("prediction", "reference"), [("abxy", "abcd"), ("a", "ab")])
def test_a_similarity_of_exactly_one_half_counts_for_nothing(
    prediction: str, reference: str
) -> None:
    assert anls(prediction, [reference]) == 0


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The cat!", ["cat"], 1.0),
        ("black cat", ["cat"], 2 / 3),
        ("cat cat", ["cat"], 2 / 3),  # a word counts as often as both have it
        ("cat the dog", ["Dog, a cat"], 1.0),  # in any order
        ("dog", ["cat"], 0.0),
        ("dog", ["cat", "dog house"], 2 / 3),
        ("theatre", ["atre"], 0.0),  # an article is a whole word
        ("the", ["a"], 1.0),
        ("the", ["cat"], 0.0),
        ("", [""], 1.0),
        (DECOMPOSED, [COMPOSED], 1.0),
    ],
)
def test_token_f1(prediction: str, references: list[str], expected: float) -> None:
    assert token_f1(prediction, references) == pytest.approx(expected)


# --- rates of errors


@pytest.mark.parametrize(
    ("prediction", "references", "edits", "length"),
    [
        ("abc", ["abc"], 0, 3),
        ("Abx", ["abc"], 2, 3),  # with case
        ("", ["abc"], 3, 3),
        ("abcdef", ["ab"], 4, 2),  # a rate of 2
        ("ab", [""], 2, 0),
        ("", [""], 0, 0),
        (DECOMPOSED, [COMPOSED], 0, 4),
        ("ab", ["a", "abcd"], 2, 4),  # 2 of 4 is nearer than 1 of 1
    ],
)
def test_cer(prediction: str, references: list[str], edits: int, length: int) -> None:
    assert cer(prediction, references) == (edits, length)


@pytest.mark.parametrize(
    ("prediction", "references", "edits", "length"),
    [
        ("the cat sat", ["the cat sat"], 0, 3),
        ("the dog sat", ["the cat sat"], 1, 3),
        ("cat sat", ["the cat sat"], 1, 3),
        (" the  cat\nsat ", ["the cat sat"], 0, 3),
        ("cat.", ["cat"], 1, 1),
        ("", ["the cat"], 2, 2),
        ("the cat", [""], 2, 0),
        ("the cat", ["a dog sat", "the dog"], 1, 2),
    ],
)
def test_wer(prediction: str, references: list[str], edits: int, length: int) -> None:
    assert wer(prediction, references) == (edits, length)


# --- VQA


def ten(num_alike: int, answer: str = "cat") -> list[str]:
    """Ten people's answers, of whom so many say the same."""
    return [answer] * num_alike + ["horse"] * (10 - num_alike)


@pytest.mark.parametrize(
    ("num_alike", "expected"),
    [
        (0, 0.0),
        (1, 0.3),  # nine see one other: 9 x 1/3
        (2, 0.6),  # two see one, eight see two: 2 x 1/3 + 8 x 2/3
        (3, 0.9),  # three see two, seven see three: 3 x 2/3 + 7
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_each_person_is_left_out_once(num_alike: int, expected: float) -> None:
    assert vqa_accuracy("cat", ten(num_alike)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "normalised"),
    [
        ("CAT", "cat"),
        ("the cat", "cat"),
        ("an  old\na cat", "old cat"),
        ("two", "2"),
        ("Ten cats", "10 cats"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # only one apostrophe may be missing
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the official table has this one the wrong way round
        ("twas", "'twas"),
        ("let's", "let's"),
        ("yes.", "yes"),
        ("e.g.", "eg"),
        ("1.5", "1.5"),
        ("v.2", "v.2"),  # a period before a digit stays
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # there all punctuation vanishes
        ("t-shirt", "t shirt"),
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("red - blue", "red blue"),
        ("3:15", "3:15"),
        ("cat\tdog", "cat dog"),
    ],
)
def test_answers_are_normalised_as_officially(prediction: str, normalised: str) -> None:
    assert vqa_accuracy(prediction, ten(4, normalised)) == 1


def test_at_most_32_periods_go() -> None:
    assert vqa_accuracy("x" + "." * 32, ten(4, "x")) == 1
    assert vqa_accuracy("x" + "." * 33, ten(4, "x")) == 0


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("t-shirt", ten(4, "t-shirt"), 1.0),
        ("t-shirt", ten(10, "t-shirt"), 0.0),  # all alike: left as they are
        ("yes", ten(10, " yes\n"), 1.0),  # except for white space
        ("two", ten(4, "two"), 0.0),  # said as 2, and references keep their words
        ("the cat", ten(4, "the cat"), 0.0),
    ],
)
def test_references_lose_their_punctuation_only_where_they_differ(
    prediction: str, references: list[str], expected: float
) -> None:
    assert vqa_accuracy(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("two", ["two"], 1.0),
        ("Yes.", ["no", "yes"], 1.0),
        ("the cat", ["A cat", "dog", "cow"], 1.0),
        ("maybe", ["no", "yes"], 0.0),
        ("yes", [], 0.0),
        ("yes", ["yes"] * 4, 1.0),
        ("yes", ["yes", "no", "no", "no"], 0.25),  # from four on, the formula: 3 x 1/3 of 4
    ],
)
def test_fewer_than_four_people_are_each_enough(
    prediction: str, references: list[str], expected: float
) -> None:
    assert vqa_accuracy(prediction, references) == pytest.approx(expected)


# --- numbers and choices


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("105", "100", 1),  # exactly 5%
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("100", "106", 0),  # 5% of the reference, not of the answer
        ("100", "105", 1),
        (" 42\n", "42", 1),
        ("42", "42.0", 1),
        ("5%", "0.05", 1),
        ("0.05", "5%", 1),
        ("5%", "5 %", 1),
        ("5", "5%", 0),
        ("-105", "-100", 1),
        ("100", "-100", 0),
        ("0", "0", 1),
        ("0.0", "0", 0),  # as text
        ("0.001", "0", 0),
        ("0", "1", 0),
        ("Blue", "blue", 1),
        ("blu", "blue", 0),
        (DECOMPOSED.upper(), COMPOSED, 1),
        ("1,000", "1000", 0),  # no number to the original
        ("nan", "NaN", 1),
        ("nan", "1", 0),
        ("1", "nan", 0),
        ("inf", "inf", 1),
        ("1e999", "inf", 0),
        ("inf", "1", 0),
        ("1", "inf", 0),
        ("", "", 1),
        ("", "1", 0),
        ("%", "%", 1),
    ],
)
def test_relaxed_accuracy(prediction: str, reference: str, expected: int) -> None:
    assert relaxed_accuracy(prediction, [reference]) == expected


def test_any_reference_may_be_near() -> None:
    assert relaxed_accuracy("21", ["10", "20"]) == 1
    assert relaxed_accuracy("21", ["10", "30"]) == 0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("3", "3", 1),
        ("3.", "3", 1),
        ("There are Three cats.", "3", 1),
        ("3 cats", "three", 1),
        ("3, yes, three", "3", 1),  # one number, said twice
        ("3 or 4", "3", 0),
        ("3,four", "4", 0),
        ("2,3", "23", 0),  # no thousands
        ("12,345,678", "12345678", 1),
        ("9" * 400, "8" * 400, 0),
        ("4", "3", 0),
        ("1,000", "1000", 1),
        ("3.0", "3", 1),
        ("3.5", "3", 0),
        ("3.5kg", "3", 0),
        ("1,000x", "1", 0),
        ("-2", "-2", 1),
        ("2", "-2", 0),
        ("item-3", "3", 1),  # no minus there
        ("v3", "3", 0),
        ("twenty-one", "20", 0),
        ("someone", "1", 0),
        ("one\u0301", "1", 0),  # as on\u00e9
        ("many", "3", 0),
        ("many", "many", 0),
        ("", "", 0),
    ],
)
def test_count(prediction: str, reference: str, expected: int) -> None:
    assert count(prediction, [reference]) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("B", "B", 1),
        ("(B)", "B", 1),
        ("B. cat", "B", 1),
        ("B) A cat", "B", 1),  # marked at the beginning: the A behind it is an article
        ("It is B.", "B", 1),
        ("B", "B. cat", 1),
        ("C", "Answer: C", 1),
        ("C", "B", 0),
        ("A or B", "B", 0),
        ("A", "A", 1),
        ("I say A", "A", 1),
        ("A man rides", "A", 1),  # an article, which is taken for the letter
        ("This is A man", "A", 1),
        ("A man is riding a horse on the beach", "A", 0),
        ("I think that it is B in my view", "B", 1),  # the fourth word from the end
        ("I think that it is B in my own view", "B", 0),
        ("I say B, and once more B", "B", 0),  # where it first stands
        ("B. cat on a mat and so on", "B", 1),  # marked at the beginning, wherever it ends
        ("(B) cat on a mat and so on", "B", 1),
        ("**B.** cat on a mat and so on", "B", 1),
        ("Answer: B. cat on a mat and so on", "B", 1),
        ("B\ncat on a mat and so on", "B", 1),
        ("B cat on a mat and so on", "B", 0),
        ("B. cat on a mat and so on", "A", 0),
        ("B. cat on A mat and so on", "B", 1),
        ("B. cat on A mat and so on", "A", 0),
        ("The answer is A", "A", 1),
        ("(I)", "I", 1),
        ("J", "I", 0),
        ("Hepatitis C", "Vitamin C", 0),
        ("b", "B", 0),
        ("", "B", 0),
        ("Cats", "B", 0),
        ("I", "I", 1),  # no letter but a text
        ("Cat ", "cat", 1),
        ("dog", "cat", 0),
        ("a cat", "A cat", 1),
        ("A dog", "A cat", 0),  # a reference's A is an article
        ("A", "A. cat", 1),
        (DECOMPOSED, COMPOSED, 1),
        ("A", "A\u0301", 0),  # no A but a text, as \u00c1 is
        ("B. A cat", "B. A cat", 1),  # the reference itself
        ("C. Vitamin D", "C. Vitamin D", 1),
        ("c) vitamin D.", "C. Vitamin D", 1),
        ("B. E. coli", "B. E. coli", 1),
        ("B. A cat", "B", 1),
        ("B. A cat", "A", 0),
        ("(B) A cat", "B", 1),
        ("B: A cat", "B", 1),
        ("B\nA cat", "B", 1),
        ("B - A cat on a mat and so on", "B", 1),
        ('"B" A cat on a mat and so on', "B", 1),
        ("**B** A cat on a mat and so on", "B", 1),
        ("B. 20 \u00b0C.", "B", 1),  # no word of its own
        ("B. cat. The answer is (B).", "B", 1),
        ("B", "B. A cat", 1),
        ("A", "B. A cat", 0),
        ("B. A dog", "B. A cat", 1),  # by its letter
        ("C. Vitamin D.", "C", 1),  # the end of a sentence
        ("C. Vitamin D. It is so", "C", 0),
        ("A. or B.", "A", 0),  # both marked
        ("A. cat, or B.", "A", 0),
        ("A. or B.", "B", 0),
        ("A) and C)", "A", 0),
        ("A\nB", "A", 0),
        ("A. cat, (C) dog", "A", 0),
        ("A. cat or 'C' dog", "A", 0),
        ("A. or B", "A", 0),  # nothing else behind it
        ("A: B", "A", 0),
        ('"B"', "B", 1),
        ("'A'", "A", 1),
        ("`B`", "B", 1),
        ("$B$", "B", 1),
        ("<B>", "B", 1),
        ("B-", "B", 1),
        ("\u201cB\u201d", "B", 1),
        ("It is 'B'", "B", 1),
        ("It is `B`", "B", 1),
        ("I say $B$", "B", 1),
        ("It is 'A' or 'B'", "B", 0),
        ("It is B-flat", "B", 0),  # marks within a word part none
        ("It is B's", "B", 0),
        ("A' B' and others in a row", "A", 0),  # no pair of marks
        ("b. a cat", "B. A cat", 1),
        ("A* Search", "A* search", 1),  # no choice but a text
        ("A", "A* search", 0),
    ],
)
def test_multiple_choice(prediction: str, reference: str, expected: int) -> None:
    assert multiple_choice(prediction, [reference]) == expected


# --- captions


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("the cat sat", ["The cat sat."], 1.0),
        ("cat the sat", ["the cat sat"], 2 / 3),  # two words in order, of three and three
        ("the cat", ["the cat sat on"], 2 / 3),  # two of two and of four
        ("the cat", ["a dog", "cat"], 2 / 3),
        ("dog", ["cat"], 0.0),
        ("a_b", ["a b"], 1.0),
        ("Кот спит", ["кот сидит"], 0.5),
        (DECOMPOSED, [COMPOSED], 1.0),
        ("हिन्दी में", ["हिन्दी से"], 0.5),  # vowel signs part no words
        ("हिन्दी", ["हिन्द"], 0.0),
        ("x\u0304", ["x"], 0.0),  # a letter that has no composed form
        ("\u2764\ufe0fcat", ["cat"], 1.0),  # the mark of a sign is no word's
        ("", ["cat"], 0.0),
        ("...", ["..."], 0.0),
    ],
)
def test_rouge_l(prediction: str, references: list[str], expected: float) -> None:
    assert rouge_l(prediction, references) == pytest.approx(expected)


def test_bleu_counts_words_and_sequences_of_up_to_four() -> None:
    (counts,) = bleu_counts(["a b c d e"], [["a b c d", "x"]])
    assert counts.tolist() == [5, 4, 4, 3, 2, 1, 5, 4, 3, 2]


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("a b c d", ["a b c d"], 1.0),
        ("a b", ["a b"], 1.0),  # of as many words as there are
        ("a b c d e", ["a b c d"], (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)),
        ("a b c d", ["a b c d e"], math.exp(1 - 5 / 4)),  # too short
        ("a b c d", ["x", "a b c d"], 1.0),
        ("a b x", ["a b y"], (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3)),  # smoothed: none of one is 1/2
        ("x", ["y"], 0.0),
        ("", ["y"], 0.0),
    ],
)
def test_bleu(prediction: str, references: list[str], expected: float) -> None:
    assert bleu(bleu_counts([prediction], [references])) == pytest.approx(expected)


def test_bleu_of_a_corpus_is_of_the_sums() -> None:
    found = measure(["a b", "x y"], [["a b"], ["p q"]], ["bleu"])
    assert [each["bleu"] for each in found.scores()] == pytest.approx([1, 0])
    assert found.figures()["bleu"] == pytest.approx((2 / 4 * 1 / 2) ** (1 / 2))


@pytest.mark.parametrize(
    ("predictions", "references", "expected"),
    [
        (
            ["red cat on mat", "old dog in box"],
            [["Red cat, on mat."], ["old dog in box"]],
            [10, 10],
        ),
        (["old dog in box", "red cat on mat"], [["red cat on mat"], ["old dog in box"]], [0, 0]),
        (["red cat here", "old dog in box"], [["red cat here"], ["old dog in box"]], [7.5, 10]),
        (["p q r s", "old dog in box"], [["p q r s", "t u v w"], ["old dog in box"]], [5, 10]),
        (["cat", "cat"], [["cat"], ["cat"]], [0, 0]),  # what all rows say weighs nothing
        (["red cat on mat"], [["red cat on mat"]], [0]),
        (["cat", ""], [["?"], [""]], [0, 0]),
        (
            [f"red {DECOMPOSED} on mat", "old dog in box"],
            [[f"red {COMPOSED} on mat"], ["old dog in box"]],
            [10, 10],
        ),
        (["हिन्दी में", "b"], [["हिन्दी में"], ["a"]], [5, 0]),  # two words, not six
    ],
)
def test_cider(predictions: list[str], references: list[list[str]], expected: list[float]) -> None:
    assert cider(predictions, references) == pytest.approx(expected)


# --- fields

RECEIPT = '{"shop": "Ann", "total": "12"}'
FENCED = "```json\n%s\n```"


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (RECEIPT, RECEIPT, (4, 4)),
        ('{"total": 12, "shop": " Ann"}', RECEIPT, (4, 4)),  # in any order, as trimmed texts
        (FENCED % RECEIPT, RECEIPT, (4, 4)),
        (RECEIPT, FENCED % RECEIPT, (4, 4)),
        ('{"total": "12"}', RECEIPT, (2, 3)),
        ('{"shop": "Ann", "total": "12", "tax": "1"}', RECEIPT, (4, 5)),
        ('{"shop": "Ann", "total": "13"}', RECEIPT, (2, 4)),
        ('{"total": "Ann", "shop": "12"}', RECEIPT, (0, 4)),
        ('{"shop": "Ann", "tot', RECEIPT, (0, 2)),
        ("Ann", RECEIPT, (0, 2)),
        ("", RECEIPT, (0, 2)),
        ("{}", RECEIPT, (0, 2)),
        ('{"m": ["y", "x"]}', '{"m": ["x", "y"]}', (4, 4)),
        ('{"m": ["x"]}', '{"m": ["x", "x"]}', (2, 3)),
        ('{"m": {"n": "x"}}', '{"m": [{"n": "x"}, {"n": "y"}]}', (2, 3)),
        ('{"n": "x"}', '{"m": {"n": "x"}}', (0, 2)),
        ("{}", "{}", (2, 2)),
        ('{"a": "", "b": []}', "{}", (2, 2)),
        (RECEIPT, "{}", (0, 2)),
        ("12 ", "12", (2, 2)),  # as text
        ("{}", '{"tax": 0}', (0, 1)),  # zero is no nothing
        ('{"tax": 0}', '{"tax": "0"}', (2, 2)),
        ('{"paid": true}', '{"paid": "true"}', (2, 2)),
        ('{"paid": true}', '{"paid": false}', (0, 2)),
        ('{"t": [[1, 2]]}', '{"t": [[3, 4]]}', (0, 4)),
        ('{"t": ["x", {"n": "y"}]}', '{"t": ["x", {"n": "z"}]}', (2, 4)),
        ("13", "12", (0, 2)),
        (f'{{"{DECOMPOSED}": "{COMPOSED}"}}', f'{{"{COMPOSED}": "{DECOMPOSED}"}}', (2, 2)),
        ('{"m": ["cafe\\u0301"]}', '{"m": ["caf\\u00e9"]}', (2, 2)),  # as JSON may write them
        (DECOMPOSED, COMPOSED, (2, 2)),
    ],
)
def test_json_f1(prediction: str, reference: str, expected: tuple[int, int]) -> None:
    assert json_f1(prediction, [reference]) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ('{"total": "12"}', '{"total": "12"}', 1.0),
        (FENCED % '{"total": 12}', '{"total": "12"}', 1.0),
        ('{"total": "13"}', '{"total": "12"}', 2 / 3),  # a letter, of a key and two letters
        ('{"sum": "12"}', '{"total": "12"}', 2 / 3),  # a key
        ('{"total": "12", "x": "y"}', '{"total": "12"}', 1 / 3),  # a key and a letter too many
        ('{"a": "1"}', '{"a": "1", "b": "2"}', 1 / 2),
        ('{"m": ["cd", "ab"]}', '{"m": ["ab", "cd"]}', 1 / 5),  # four letters of a key and four
        ('{"b": "2", "a": "1"}', '{"a": "1", "b": "2"}', 1.0),  # keys have no order
        ('{"a": "123456"}', '{"a": "x"}', 0.0),  # not below 0
        ('{"total": "12', '{"total": "12"}', 0.0),
        ("", '{"total": "12"}', 0.0),
        ("{}", "{}", 1.0),
        ('{"a": "b"}', "{}", 0.0),
        ("abcx", "abcd", 3 / 4),
        ('{"cafe\\u0301": "x"}', f'{{"{COMPOSED}": "x"}}', 1.0),
        (f'{{"a": "{DECOMPOSED}s"}}', f'{{"a": "{COMPOSED}"}}', 4 / 5),  # of a key and four letters
    ],
)
def test_nted(prediction: str, reference: str, expected: float) -> None:
    assert nted(prediction, [reference]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (RECEIPT, RECEIPT, 1.0),
        (FENCED % RECEIPT, RECEIPT, 1.0),
        ('{"total": 12, "shop": "ann"}', RECEIPT, 1.0),
        ('{"shop": "Anm", "total": "12"}', RECEIPT, (2 / 3 + 1) / 2),
        ('{"shop": "Ann"}', RECEIPT, 1 / 2),
        ('{"shop": "Ann", "total": "12", "tax": "1"}', RECEIPT, 2 / 3),
        ('{"shop": "Ann", "tot', RECEIPT, 0.0),
        ("", RECEIPT, 0.0),
        ('["dog", "cat"]', '["cat", "dog"]', 1.0),
        ('["cat"]', '["cat", "dog"]', 1 / 2),
        ('"cat"', '["cat", "dog"]', 0.0),  # a list is no choice
        ('""', "[]", 1.0),
        ("{}", "{}", 1.0),
        ("abcx", "abcd", 3 / 4),
        ("abxy", "abcd", 1 / 2),  # its threshold keeps one half
        ('{"cafe\\u0301": "x"}', f'{{"{COMPOSED}": "x"}}', 1.0),
        (DECOMPOSED, COMPOSED, 1.0),
    ],
)
def test_anls_star(prediction: str, reference: str, expected: float) -> None:
    assert anls_star(prediction, [reference]) == pytest.approx(expected)


@pytest.mark.parametrize(
    "prediction",
    [
        FENCED.replace("json", "JSON") % RECEIPT,
        FENCED.replace("json", "json5") % RECEIPT,
        FENCED.replace("json", "") % RECEIPT,
        "Here it is:\n" + FENCED % RECEIPT,
        FENCED % RECEIPT + "\nI hope that this helps.",
        f"So: ```{RECEIPT}``` and no more.",
        f"```json{RECEIPT}```",
        FENCED % RECEIPT + "\nor\n" + FENCED % "{}",  # the first
    ],
)
def test_text_around_a_code_fence_and_its_language_do_not_count(prediction: str) -> None:
    assert json_f1(prediction, [RECEIPT]) == (4, 4)
    assert nted(prediction, [RECEIPT]) == 1
    assert anls_star(prediction, [RECEIPT]) == 1


@pytest.mark.parametrize(
    "prediction",
    [
        f"Here it is: {RECEIPT}",
        FENCED % "none" + "\nor\n" + FENCED % RECEIPT,
        FENCED % f"{RECEIPT} and",
    ],
)
def test_json_among_text_without_a_fence_of_its_own_is_none(prediction: str) -> None:
    assert json_f1(prediction, [RECEIPT]) == (0, 2)


@pytest.mark.parametrize("text", ['{"code": "```x```"}', FENCED % '{"code": "```x```"}'])
def test_a_fence_within_a_value_is_text(text: str) -> None:
    assert json_f1(text, ['{"code": "```x```"}']) == (2, 2)


def test_fields_are_held_against_the_nearest_reference() -> None:
    references = ['{"shop": "Bob"}', RECEIPT]
    assert json_f1(RECEIPT, references) == (4, 4)
    assert nted(RECEIPT, references) == 1
    assert anls_star(RECEIPT, references) == 1


@pytest.mark.parametrize(("opening", "closing"), [('{"a":', "}"), ("[", "]")])
def test_an_answer_that_nests_without_end_is_no_json(opening: str, closing: str) -> None:
    deep = opening * 900 + "1" + closing * 900
    assert json_f1(deep, [RECEIPT]) == (0, 2)
    assert nted(deep, [RECEIPT]) == 0
    assert anls_star(deep, [RECEIPT]) == 0


# --- what is made of the rows


def test_recipes_know_every_metric_of_answers() -> None:
    assert sorted(OF_ANSWERS) == sorted(METRICS_OF_RECIPES)
    assert set(METRICS) - set(OF_ANSWERS) == {"loss", "perplexity"}


def test_only_errors_are_better_when_lower() -> None:
    assert {name for name in METRICS if lower_is_better(name)} == {
        *("loss", "perplexity", "cer", "wer")
    }
    assert not lower_is_better("unheard_of")


@pytest.mark.parametrize("name", [name for name in OF_ANSWERS if name != "cider"])
def test_an_answer_that_is_its_reference_is_the_best_there_is(name: str) -> None:
    best = 0 if lower_is_better(name) else 1
    found = measure(["7", "7"], [["7"], ["8", "7"]], [name])
    assert found.figures() == {name: pytest.approx(best)}
    assert found.scores() == [{name: pytest.approx(best)}] * 2
    worse = measure(["7", ""], [["7"], ["8"]], [name])
    assert worse.figures()[name] != pytest.approx(best)


@pytest.mark.parametrize("name", [name for name in OF_ANSWERS if name not in ("cider", "count")])
def test_a_composed_letter_is_the_decomposed_one_but_for_vqa_s_own_rules(name: str) -> None:
    best = 0 if lower_is_better(name) else 1
    for said, wanted in ((COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)):
        figure = measure([said], [[wanted]], [name]).figures()[name]
        assert (figure == pytest.approx(best)) is (name != "vqa_accuracy")


@pytest.mark.parametrize(
    ("name", "at", "short_of"),
    [("exact_match", 1.0, 0.9), ("vqa_accuracy", 1.0, 0.9), ("cer", 0.0, 0.1), ("new", 1.0, 0.9)],
)
def test_an_answer_is_right_at_the_best_score_there_is(
    name: str, at: float, short_of: float
) -> None:
    assert is_right(name, at) is True
    assert is_right(name, short_of) is False


@pytest.mark.parametrize("name", ["cider", "bleu", "rouge_l", "loss", "perplexity"])
def test_no_score_of_these_makes_an_answer_right_or_wrong(name: str) -> None:
    assert [is_right(name, score) for score in (0.0, 1.0, 10.0)] == [None] * 3


def test_means_are_over_rows() -> None:
    found = measure(["a", "b", "b", "b"], [["a"]] * 4, ["exact_match", "anls"])
    assert found.figures() == {"exact_match": 0.25, "anls": 0.25}
    assert found.scores()[:2] == [
        {"exact_match": 1.0, "anls": 1.0},
        {"exact_match": 0.0, "anls": 0.0},
    ]


def test_the_character_error_rate_is_all_edits_over_all_characters() -> None:
    found = measure(["xy", "abcdefgh"], [["ab"], ["abcdefgh"]], ["cer"])
    assert found.scores() == [{"cer": 1.0}, {"cer": 0.0}]
    assert found.figures() == {"cer": pytest.approx(2 / 10)}  # and not 1/2, the mean


def test_field_f1_is_over_the_fields_of_all_rows() -> None:
    found = measure(["{}", RECEIPT], [['{"a": "1"}'], [RECEIPT]], ["json_f1"])
    assert found.figures() == {"json_f1": pytest.approx(4 / 5)}


def test_edits_of_an_empty_reference_count_as_of_one_character() -> None:
    assert measure(["abc"], [[""]], ["cer"]).figures() == {"cer": 3.0}
    assert measure([""], [[""]], ["cer"]).figures() == {"cer": 0.0}


def test_no_rows_give_no_figures() -> None:
    found = measure([], [], OF_ANSWERS, np.zeros((0, 2)))
    assert found.figures() == {}
    assert found.scores() == []
    assert set(found.intervals().values()) == {None}


def test_no_metrics_give_no_figures() -> None:
    found = measure(["a"], [["a"]], [])
    assert (found.figures(), found.scores(), found.intervals()) == ({}, [], {})


def test_loss_is_by_token_and_perplexity_its_exponential() -> None:
    found = measure(["a", "b"], [["a"], ["a"]], ["exact_match"], np.array([[3.0, 1], [1.0, 3]]))
    assert found.figures() == {
        "exact_match": 0.5,
        "loss": 1.0,  # 4 over 4 tokens, where the mean of rows is 5/3
        "perplexity": pytest.approx(math.e),
    }
    assert [each["loss"] for each in found.scores()] == pytest.approx([3, 1 / 3])
    assert found.scores()[0]["perplexity"] == pytest.approx(math.exp(3))


# --- how sure


def of_rows(name: str, scores: Sequence[float]) -> Measured:
    return Measured({name: np.array([(score, 1) for score in scores], np.float64)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_no_number_is_no_better(value: float) -> None:
    good, broken = of_rows("loss", [2] * 20), of_rows("loss", [value] + [1] * 19)
    assert broken.figures() == {}
    assert broken.intervals() == {"loss": None}
    assert differences(good, broken) == {"loss": {"interval": None, "verdict": "cannot tell"}}


@pytest.mark.parametrize("value", [np.nan, np.inf, 1000.0])  # e to the 1000 is no number, either
def test_scores_of_rows_leave_out_what_is_no_number(value: float) -> None:
    found = measure(["a", "b"], [["a"], ["a"]], ["anls"], np.array([[value, 1], [0, 1]]))
    broken, whole = found.scores()
    assert set(broken) == {"anls", "loss"} - ({"loss"} if value != 1000 else set())
    assert whole == {"anls": 0.0, "loss": 0.0, "perplexity": 1.0}


@pytest.mark.parametrize(
    ("name", "base", "adapter", "verdict"),
    [
        ("anls", [0] * 20, [1] * 6 + [0] * 14, "better"),
        ("anls", [1] * 20, [0] * 6 + [1] * 14, "worse"),
        ("cer", [0] * 20, [1] * 6 + [0] * 14, "worse"),  # lower is better
        ("cer", [1] * 20, [0] * 6 + [1] * 14, "better"),
        ("loss", [1] * 20, [0.5] * 20, "better"),
        ("perplexity", [1] * 20, [2] * 20, "worse"),
        ("anls", [0] * 20, [1] * 5 + [0] * 15, "cannot tell"),  # too few rows changed
        ("anls", [0] * 5, [1] * 5, "cannot tell"),
        ("anls", [0] * 6, [1] * 6, "better"),
        ("anls", [0, 1] * 10, [1, 0] * 10, "cannot tell"),
        ("anls", [1] * 20, [1] * 20, "no change"),
        ("anls", [0], [1], "cannot tell"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero_and_six_changed_rows(
    name: str, base: list[float], adapter: list[float], verdict: str
) -> None:
    found = differences(of_rows(name, base), of_rows(name, adapter))
    assert found[name]["verdict"] == verdict


def test_too_few_changed_rows_cannot_tell_even_where_the_interval_has_no_zero() -> None:
    found = differences(of_rows("anls", [0] * 20), of_rows("anls", [1] * 5 + [0] * 15))["anls"]
    assert found["interval"][0] > 0
    assert found["verdict"] == "cannot tell"


def test_a_difference_is_adapter_less_base_and_of_what_both_have() -> None:
    base, adapter = of_rows("anls", [0.25] * 6), of_rows("anls", [1] * 6)
    base.columns["cer"] = np.ones((6, 2))
    assert differences(base, adapter) == {"anls": {"interval": (0.75, 0.75), "verdict": "better"}}


def test_one_row_has_no_interval() -> None:
    assert of_rows("anls", [1]).intervals() == {"anls": None}
    assert differences(of_rows("anls", [1]), of_rows("anls", [1]))["anls"]["interval"] is None


def test_rows_that_score_the_same_have_an_interval_without_width() -> None:
    assert of_rows("anls", [0.5] * 3).intervals() == {"anls": (0.5, 0.5)}


def test_intervals_are_the_same_each_time() -> None:
    def found() -> dict[str, tuple[float, float] | None]:
        predictions = ["cat", "dog", "black cat", "a horse runs", ""]
        references = [["cat"], ["cat"], ["cat"], ["the horse ran"], ["x"]]
        return measure(predictions, references, ["token_f1", "cer", "bleu"]).intervals()

    first = found()
    assert first == found()
    assert all(each and each[0] < each[1] for each in first.values())


# 3,000 rows are drawn in more than one block.
@pytest.mark.parametrize(("num_rows", "half_width"), [(400, 0.049), (3000, 0.0179)])
def test_the_interval_of_a_share_is_near_the_normal_one(num_rows: int, half_width: float) -> None:
    half = of_rows("anls", [0, 1] * (num_rows // 2))
    between = half.intervals()["anls"]
    assert between == pytest.approx((0.5 - half_width, 0.5 + half_width), abs=half_width / 5)


def test_the_interval_of_a_ratio_draws_both_its_sums_together() -> None:
    columns = np.array([(1, 2), (10, 20), (50, 100)], np.float64)
    assert interval(columns, METRICS["cer"].figure) == pytest.approx((0.5, 0.5))


def test_a_paired_interval_of_models_that_answer_alike_is_the_narrower() -> None:
    figure = METRICS["anls"].figure
    base = of_rows("anls", [0, 1] * 100).columns["anls"]
    alike, unlike = base.copy(), base[::-1]
    alike[:10, 0] = 1  # five of these were 0
    paired, crossed = paired_interval(base, alike, figure), paired_interval(base, unlike, figure)
    alone = interval(base, figure)
    assert paired
    assert crossed
    assert alone
    unpaired_width = math.sqrt(2) * (alone[1] - alone[0])
    assert paired[1] - paired[0] < unpaired_width / 2
    assert crossed[1] - crossed[0] > unpaired_width  # each row right in one model alone
    assert paired_interval(base, base, figure) == (0, 0)


# --- in print


@pytest.mark.parametrize(
    ("figure", "between", "sign", "expected"),
    [
        (0.9667, (0.9333, 0.9917), "", "0.967 [0.933, 0.992]"),
        (0.1, (-0.05, 0.25), "+", "+0.100 [-0.050, +0.250]"),
        (0.5, None, "", "0.500"),
        (0.0, (0.0, 0.0), "", "0.000"),
        (None, None, "", ""),
        (None, (0.1, 0.2), "", ""),
    ],
)
def test_a_figure_stands_with_its_interval(
    figure: float | None, between: tuple[float, float] | None, sign: str, expected: str
) -> None:
    assert with_interval(figure, between, sign) == expected


def test_an_unknown_metric_is_called_by_its_name() -> None:
    assert title_of("anls") == "ANLS"
    assert title_of("unheard_of") == "unheard of"
