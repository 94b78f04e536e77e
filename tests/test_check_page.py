"""The page of `finetune check`, from examinations built by hand."""

import html
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.check_page import (
    advice,
    with_code,
    write_check_page,
)
from finetune.checking import (
    PROBLEMS_COUNTED,
    PROBLEMS_LISTED,
    Duplicates,
    Entry,
    Part,
    find_duplicates,
    read_problems,
    summarise_part,
)
from finetune.data.examination import BAD, COUNTS, OVERLONG, Examination, Finding
from finetune.recipe import DataSection, DataSource, ModelSection, Recipe
from tests.browser import needs_browser, opened_in_chromium, run_chromium
from tests.test_report import words_of

HOSTILE = "</script><b>x</b> & \" ' <img src=x onerror=y> \u202e \udcff"
LIMIT = DataSection(train=(DataSource(path="t.jsonl"),)).max_tokens


@dataclass
class Found:
    """What `check` would give; `findings` reads the problems."""

    recipe: Recipe
    parts: list[Part]
    duplicates: Duplicates | None
    findings: Callable[[], Iterator[Finding]]
    examinations: list[Examination]
    recipe_name: str = "recipes/mine.yaml"
    seconds: float = 1.25

    def problems(self) -> Iterator[Finding]:
        return self.findings()

    @property
    def num_problems(self) -> int:
        return sum(part.num_bad + part.num_overlong for part in self.parts)

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)


def recipe_of(**data: Any) -> Recipe:
    settings: dict[str, Any] = {"train": (DataSource(path="data/train.jsonl"),)}
    settings |= {"eval": (DataSource(path="data/eval.jsonl"),)} | data
    return Recipe(model=ModelSection(name="nano"), data=DataSection(**settings))


def examined(folder: Path, name: str, num_rows: int, findings: list[Finding]) -> Examination:
    """Rows of 100 to 2,000 tokens with a picture in 1 or 5 views; bad and overlong ones come
    first. Those of train and eval differ in picture, question and row.
    """
    rng = np.random.default_rng(0)
    left_out = [finding.kind for finding in findings if finding.kind != "changed"]
    states = [BAD if kind == "bad" else OVERLONG for kind in left_out]
    table = np.zeros(num_rows, COUNTS)
    table["state"][: len(states)] = states
    usable = table["state"] == 0
    num_usable = int(usable.sum())
    spread = np.clip(rng.lognormal(6.3, 0.5, num_usable), 100, 2000).astype(int)
    table["num_tokens"][usable] = spread
    table["num_learnt_tokens"][usable] = np.minimum(spread // 10, 40)
    table["num_turns"][usable] = 2
    table["num_images"][usable] = 1
    table["num_views"][usable] = rng.choice([1, 5], num_usable)
    table["num_view_pixels"][usable] = table["num_views"][usable] * 980 * 735
    keys = np.arange(num_rows, dtype=np.uint64) + np.uint64(10**6 if name == "eval" else 0)
    table["row_key"] = table["question_key"] = keys
    file = folder / f"{name}-findings.jsonl"
    kinds = ("kind", "where", "reason", "group")
    lines = [json.dumps({key: getattr(finding, key) for key in kinds}) for finding in findings]
    file.write_text("".join(line + "\n" for line in lines))
    return Examination(table, keys[usable], file, (num_rows,))


def found(
    folder: Path,
    train: list[Finding] | None = None,
    held_out: list[Finding] | None = None,
    num_rows: int = 1000,
    **data: Any,
) -> Found:
    """A check of `num_rows` to train and a fifth of them held out."""
    parts, examinations = [], []
    for name, count, findings in (
        ("train", num_rows, train or []),
        ("eval", num_rows // 5, held_out or []),
    ):
        shown = f"data/{name}.jsonl"
        entry = Entry(shown, count, "llava", ("sharegpt",) if name == "train" else ())
        examination = examined(folder, name, count, findings)
        place = f"{shown}:{{}}".format
        parts.append(summarise_part(name, [entry], examination, lambda n, p=place: p(n + 1)))
        examinations.append(examination)
    duplicates = find_duplicates(
        examinations[0], examinations[1], lambda n: f"data/eval.jsonl:{n + 1}"
    )
    return Found(
        recipe_of(**data),
        parts,
        duplicates,
        lambda: (f for e in examinations for f in e.findings("bad", "overlong")),
        examinations,
    )


def bad(line: int, reason: str) -> Finding:
    return Finding("bad", f"data/train.jsonl:{line}", reason)


def overlong(line: int, tokens: int) -> Finding:
    reason = f"{tokens:,} tokens, but data.max_tokens is {LIMIT:,}; raise it"
    return Finding("overlong", f"data/train.jsonl:{line}", reason)


def faulty(folder: Path, **data: Any) -> Found:
    """12 bad and 5 overlong rows of 1,200, 3 rows made to fit, and 2 seen in training."""
    train = [
        bad(i, f"image 'scans/{i:04}.png' is cut short ({i * 1000:,} of 40,960 bytes); mend it")
        for i in range(1, 11)
    ]
    train += [bad(11, "'messages' is missing (found 'text'); a chat row has a list of messages")]
    train += [overlong(12 + i, 3000 + i) for i in range(5)]
    train += [
        Finding("changed", f"data/train.jsonl:{20 + i}", "1 of 2", "oldest exchanges dropped")
        for i in range(3)
    ]
    held_out = [bad(1, f"image {HOSTILE} not found")]
    held_out = [replace(finding, where=f"data/{HOSTILE}.jsonl:1") for finding in held_out]
    result = found(folder, train, held_out, **data)
    for name in ("row_key", "question_key"):
        result.examinations[1].counts[name][1:3] = result.examinations[0].counts[name][100:102]
    result.examinations[1].image_keys[:2] = result.examinations[0].image_keys[84:86]
    result.duplicates = find_duplicates(
        result.examinations[0],
        result.examinations[1],
        lambda n: f"data/{HOSTILE}.jsonl:{n + 1}",
    )
    return result


def page_of(result: Found, folder: Path) -> str:
    return write_check_page(result, folder / "check.html").read_text(encoding="utf-8")


def test_when_all_is_well_the_page_says_so_first(tmp_path: Path):
    page = page_of(found(tmp_path), tmp_path)
    words = words_of(page)
    assert "All 1,200 rows can be used" in words
    assert words.index("All 1,200 rows") < words.index("Figures")
    assert 'class="answer good"' in page
    for absent in ("cannot", "Worth a look", "skipped.jsonl", "changed.jsonl"):
        assert absent not in words


def test_the_answer_counts_what_cannot_be_used_by_kind_and_says_what_to_do(tmp_path: Path):
    page = page_of(faulty(tmp_path), tmp_path)
    words = words_of(page)
    assert "17 of 1,200 rows cannot be used as they are" in words
    assert "12 are bad: they, or their pictures, cannot be read." in words
    assert "5 are too long: over 2,048 tokens. 1,183 can be used." in words
    assert "Mend them, or set data.bad_rows: skip" in words
    assert "Raise data.max_tokens (now 2,048), or set data.overlong to skip" in words
    assert 'class="answer bad"' in page


def test_one_row_is_spoken_of_as_one(tmp_path: Path):
    words = words_of(page_of(found(tmp_path, [bad(1, "is empty")]), tmp_path))
    assert "1 of 1,200 rows cannot be used as it is" in words
    assert "1 is bad: it, or its pictures, cannot be read. 1,199 can be used." in words
    assert "One fault. " in words


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["stops at bad rows", "stops at rows that are too long. Raise"]),
        ({"bad_rows": "skip"}, ["Bad rows are left out", "stops at rows that are too long."]),
        ({"overlong": "skip"}, ["stops at bad rows", "Rows that are too long are left out"]),
        (
            {"overlong": "drop_turns"},
            ["stops at bad rows", "too long even with `data.overlong: drop_turns`"],
        ),
    ],
)
def test_the_advice_is_what_the_recipe_s_policies_leave_to_do(settings, expected, tmp_path: Path):
    result = faulty(tmp_path, **settings)
    given = list(advice(result.recipe.data, result.parts))
    assert len(given) == len(expected)
    assert all(words in text for words, text in zip(expected, given, strict=True))


def test_rows_that_a_recipe_lets_pass_are_no_alarm(tmp_path: Path):
    page = page_of(faulty(tmp_path, bad_rows="skip", overlong="skip"), tmp_path)
    assert 'class="answer unsure"' in page


def test_a_recipe_without_rows_is_not_praised(tmp_path: Path):
    page = page_of(found(tmp_path, num_rows=0), tmp_path)
    words = words_of(page)
    assert "There are no rows" in words
    assert "data/train.jsonl (train) has no rows." in words
    assert 'class="answer bad"' in page
    assert "<svg" not in page


def test_a_part_without_a_usable_row_is_told(tmp_path: Path):
    result = found(tmp_path, [bad(i, "is empty") for i in range(1, 11)], num_rows=10)
    words = words_of(page_of(result, tmp_path))
    assert "No usable row is left in train, so that training cannot start." in words


def test_what_is_often_a_mistake_is_worth_a_look(tmp_path: Path):
    result = faulty(tmp_path)
    words = words_of(page_of(result, tmp_path))
    assert "2 held-out rows ask what training asks of the same picture." in words
    train, held_out = result.parts
    result.parts = [
        replace(train, num_repeated=1, num_learnt_tokens=train.num_tokens // 200),
        replace(held_out, num_images=0, num_views=0),
    ]
    words = words_of(page_of(result, tmp_path))
    assert "1 train row is the same as a row before, and so learnt more often" in words
    assert "Only 0.50% of the tokens in train are learnt" in words
    assert "No usable row in eval has a picture." in words
    assert "Nothing is held out" not in words


@pytest.mark.parametrize(("fraction", "told"), [(0, True), (0.1, False)])
def test_nothing_held_out_is_worth_a_look(tmp_path: Path, fraction: float, told: bool):
    result = found(tmp_path, eval=(), eval_fraction=fraction)
    result.parts, result.duplicates = result.parts[:1], None
    words = words_of(page_of(result, tmp_path))
    assert ("Nothing is held out" in words) == told
    assert ("holds out about 10% of the usable train rows" in words) != told


def test_pictures_seen_with_other_questions_are_told_apart_from_whole_rows(tmp_path: Path):
    result = found(tmp_path)
    result.duplicates = Duplicates(1, 4, 0, [])
    words = words_of(page_of(result, tmp_path))
    assert "1 held-out row shows a picture that training shows, too, with other questions" in words
    result.duplicates = Duplicates(0, 4, 0, [])
    assert "Worth a look" not in words_of(page_of(result, tmp_path))


def test_every_part_shows_its_entries_figures_and_costly_rows(tmp_path: Path):
    result = found(tmp_path)
    page = page_of(result, tmp_path)
    words = words_of(page)
    assert "data/train.jsonl llava (sharegpt reads it the same) 1,000".replace(" ", "") in (
        words.replace(" ", "")
    )
    for part in result.parts:
        assert f"{part.num_tokens:,}" in words
        assert f"up to {part.longest[0].num_tokens:,} tokens" in words
        assert page.count(f"<code>{part.longest[0].where}</code>") >= 1
    assert page.count('<table class="stacked extremes"') == 4


def test_distributions_are_drawn_and_told_in_words_to_those_who_do_not_see_them(tmp_path: Path):
    result = found(tmp_path)
    page = page_of(result, tmp_path)
    labels = re.findall(r'<svg [^>]*role="img" aria-label="([^"]*)"', page)
    assert len(labels) == page.count("<svg") == 4
    counts = result.examinations[0].counts
    low, high = counts["num_tokens"].min(), counts["num_tokens"].max()
    assert f"1,000 rows in train. From {low} to {high:,} tokens; half of the rows" in labels[0]
    share = (counts["num_views"] == 5).mean()
    assert share > 0.5
    assert f"From 1 to 5 views; most often 5 ({share:.0%} of the rows)." in labels[1]
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_the_middle_is_where_half_of_the_rows_are(tmp_path: Path):
    result = found(tmp_path)
    halves = int(
        re.findall(r"half of the rows have at most ([\d,]+)", page_of(result, tmp_path))[0]
    )
    tokens = result.examinations[0].counts["num_tokens"]
    assert (tokens <= halves).mean() >= 0.5
    assert (tokens <= halves - 60).mean() < 0.5  # a bin is narrower than that


@pytest.mark.parametrize(("max_tokens", "in_sight"), [(2048, True), (20480, False)])
def test_the_limit_is_drawn_where_it_is_within_sight(tmp_path: Path, max_tokens, in_sight):
    page = page_of(found(tmp_path, max_tokens=max_tokens), tmp_path)
    assert (f">data.max_tokens: {max_tokens:,}</text>" in page) == in_sight
    assert (f"{max_tokens:,}, is far to the right" in page) != in_sight


def test_rows_that_are_all_alike_are_told_in_words_alone(tmp_path: Path):
    result = found(tmp_path)
    for part, examination in zip(result.parts, result.examinations, strict=True):
        examination.counts["num_views"] = 1
        summed = summarise_part(part.name, part.entries, examination, str)
        result.parts[result.parts.index(part)] = summed
    page = page_of(result, tmp_path)
    assert page.count("<svg") == 2
    assert "Each of the 1,000 usable rows has 1 view." in words_of(page)


def test_rows_made_to_fit_are_counted_by_kind(tmp_path: Path):
    words = words_of(page_of(faulty(tmp_path, overlong="drop_turns"), tmp_path))
    assert "3 of the rows that can be used are made to fit" in words
    assert "oldest exchanges dropped30" in words
    assert "changed.jsonl" in words


def test_one_fault_in_many_rows_is_seen_as_one(tmp_path: Path):
    words = words_of(page_of(faulty(tmp_path), tmp_path))
    # what differs is left out, and what all rows have in common stays
    assert "10bad image … is cut short (… of 40,960 bytes); mend it data/train.jsonl:1" in (
        words.replace("mend itdata", "mend it data").replace("badimage", "bad image")
    )
    assert "4 different faults, the commonest first. Where rows with the same" in words


def test_reasons_are_alike_but_for_quoted_names_and_numbers():
    reasons = [
        "image 'it''s.png' is cut short (5 of 9 bytes)",
        'image "it\'s 3.png" is cut short (1,024.5 of 9 bytes)',
        "messages[3].role is 'bot'; the row's role",
        "messages[3].role is 'tool'; the row's role",
        "messages[3].role is 'bot'; another row's role",
    ]
    _, faults, counted = read_problems(bad(i, reason) for i, reason in enumerate(reasons))
    assert counted == 5
    assert {fault.reason: fault.count for fault in faults} == {
        "image 'it''s.png' is cut short (5 of 9 bytes)": 1,
        'image "it\'s 3.png" is cut short (1,024.5 of 9 bytes)': 1,
        "messages[3].role is …; the row's role": 2,
        "messages[3].role is 'bot'; another row's role": 1,
    }


def test_a_million_problems_are_not_read_to_their_end(tmp_path: Path):
    num_read = 0

    def problems() -> Iterator[Finding]:
        nonlocal num_read
        for num_read in range(1, 1_000_001):
            yield bad(num_read, f"image 'scans/{num_read}.png' not found; mend the path")

    result = found(tmp_path)
    result.parts[0] = replace(result.parts[0], num_rows=1_000_500, num_bad=1_000_000)
    result.findings = problems
    page = page_of(result, tmp_path)
    assert num_read == PROBLEMS_COUNTED
    assert page.count("<code>data/train.jsonl:") == PROBLEMS_LISTED + 1 + 20  # fault, costly rows
    words = words_of(page)
    assert "One fault, 1,000,000 times. Counted over the first 100,000" in words
    assert "The first 500 rows of 1,000,000; all are in skipped.jsonl" in words
    assert len(page) < 500_000


def test_text_from_outside_is_escaped(tmp_path: Path):
    result = faulty(tmp_path)
    result.recipe_name = HOSTILE
    entry = replace(result.parts[0].entries[0], shown=HOSTILE, format_name=HOSTILE)
    longest = [replace(result.parts[0].longest[0], where=HOSTILE)]
    result.parts[0] = replace(
        result.parts[0], entries=[entry], longest=longest, changes={HOSTILE: 1}
    )
    page = page_of(result, tmp_path)
    assert "<script" not in page
    assert "</script" not in page
    assert "<b>x" not in page
    assert "onerror=y>" not in page
    assert page.count("&lt;/script&gt;&lt;b&gt;x") >= 8
    assert "\u202e" not in page
    assert "\\u202e \\udcff" in page
    assert with_code("a `<b>` <i>") == "a <code>&lt;b&gt;</code> &lt;i&gt;"


def test_nothing_is_fetched_from_outside_the_page(tmp_path: Path):
    page = page_of(faulty(tmp_path), tmp_path)
    for outside in ("http://", "https://", "@import", "<link", "src=", "url(h"):
        assert outside not in re.sub(r"&lt;img src=x", "", page)
    assert all(link.startswith("#") for link in re.findall(r'\bhref="([^"]*)', page))
    assert "default-src 'none'" in page


def test_every_link_leads_somewhere(tmp_path: Path):
    page = page_of(faulty(tmp_path), tmp_path)
    links = re.findall(r'\bhref="#([^"]*)', page)
    assert links
    assert all(page.count(f'id="{link}"') == 1 for link in links)


PROBE = """
<script>
const rgb = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (colour) => {
  const [r, g, b] = rgb(colour).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (node) => {
  const colour = getComputedStyle(node).backgroundColor;
  return rgb(colour)[3] === 0 && node.parentElement ? behind(node.parentElement) : colour;
};
document.querySelectorAll("details").forEach((node) => { node.open = true; });
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let lowest = 21;
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || node.closest("script, style")) continue;
  const style = getComputedStyle(node);
  const ink = node.closest("svg") ? style.fill : style.color;
  const [a, b] = [light(ink), light(behind(node))].sort((x, y) => y - x);
  lowest = Math.min(lowest, (a + 0.05) / (b + 0.05));
}
document.title = lowest.toFixed(2);
</script>"""


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_all_text_stands_out_from_what_is_behind_it(tmp_path: Path, scheme: str, policy: str):
    page = page_of(faulty(tmp_path, bad_rows=policy, overlong=policy), tmp_path)
    if scheme == "dark":  # the system's wish cannot be set by a flag that every version knows
        page = page.replace("(prefers-color-scheme: dark)", "all")
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("default-src 'none'", "default-src 'unsafe-inline'") + PROBE)
    title = re.search(r"<title>([\d.]+)</title>", run_chromium("--dump-dom", probed))
    assert title
    assert float(title.group(1)) >= 4.5  # WCAG 2.1 AA


@pytest.mark.slow
@needs_browser
def test_the_page_fits_a_phone(tmp_path: Path):
    result = faulty(tmp_path)
    longest = [replace(result.parts[0].longest[0], where="d" * 90, num_tokens=10**9)]
    result.parts[0] = replace(result.parts[0], longest=longest, num_tokens=10**12)
    page = page_of(result, tmp_path).replace("<details>", "<details open>")
    # A window of headless Chromium is 500 px wide at least; a frame may be as narrow as a phone
    frame = f'<iframe width="390" height="800" srcdoc="{html.escape(page)}"></iframe>'
    script = "document.title = frames[0].document.documentElement.scrollWidth"
    probed = tmp_path / "probed.html"
    probed.write_text(f'<body onload="{script}">{frame}', encoding="utf-8")
    title = re.search(r"<title>(\d+)</title>", run_chromium("--dump-dom", probed))
    assert title
    assert 0 < int(title.group(1)) <= 390


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_page_without_a_complaint(tmp_path: Path):
    page = write_check_page(faulty(tmp_path), tmp_path / "check.html")
    ran = opened_in_chromium("--dump-dom", page, "--enable-logging=stderr")
    assert "CONSOLE" not in ran.stderr  # errors, and requests that the policy refused
    assert "17 of 1,200 rows cannot be used" in ran.stdout
    assert ran.stdout.count("<svg") == 4
    assert ran.stdout.count("<b>x") == ran.stdout.count("<img") == 0
