"""The report, from run directories built by hand."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from finetune.charts import curve, smooth, thin
from finetune.report import judge, wilson_interval, write_report
from finetune.rundir import RunDir, write_json, write_jsonl

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def prediction(line: int, *, base: bool, adapter: bool, **extra) -> dict:
    return {
        "where": f"data/eval.jsonl:{line}",
        "question": "What is the code?",
        "references": [f"JP{line}"],
        "base": f"JP{line}" if base else "no idea",
        "adapter": f"JP{line}" if adapter else "QX0",
        "scores": {
            "base": {"anls": 0.25, "exact_match": float(base)},
            "adapter": {"anls": 0.75, "exact_match": float(adapter)},
        },
        **extra,
    }


@pytest.fixture
def stopped(tmp_path: Path) -> RunDir:
    """A run that was killed while it logged step 30."""
    run = RunDir(tmp_path / "my-run")
    run.path.mkdir()
    run.recipe.write_text("model:\n  name: nano\nadapter: {method: lora, rank: 8}\n")
    rows = [
        {"step": 10, "loss": 2.5, "learning_rate": 1e-3, "samples_per_second": 20.5},
        {"step": 20, "loss": 1.25, "learning_rate": 5e-4, "samples_per_second": 21.5},
    ]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 30, "lo')
    return run


@pytest.fixture
def finished(stopped: RunDir) -> RunDir:
    """Ten held-out rows: eight fixed, one right both times, one still wrong."""
    run = stopped
    run.thumbnails.mkdir(parents=True)
    Image.new("RGB", (40, 20), "white").save(run.thumbnails / "0001.png")
    rows = [prediction(line, base=False, adapter=True) for line in range(1, 9)]
    rows[0] |= {"images": ["images/0001.png", "images/missing.png", "../../secret.png"]}
    rows[1] |= {"base": "<script>alert(1)</script>", "question": "</style><img src=x onerror=y>"}
    rows += [prediction(9, base=True, adapter=True), prediction(10, base=False, adapter=False)]
    write_jsonl(run.predictions, rows)
    write_jsonl(run.skipped, [{"where": "data/train.jsonl:3", "reason": "image '<b>' is missing"}])
    write_json(run.environment, {"device": "cpu", "versions": {"torch": "2.13.0"}})
    summary: dict = {"base": {"exact_match": 0.1, "anls": 0.25}, "adapter": {"exact_match": 0.9}}
    summary["adapter"]["anls"] = 0.75
    summary["intervals"] = {"base": {"anls": [0.2, 0.3]}, "adapter": {"anls": [0.7, 0.8]}}
    summary["differences"] = {
        "exact_match": {"interval": [0.5, 1.0], "verdict": "better"},
        "anls": {"interval": [0.4, 0.6], "verdict": "better"},
    }
    facts = {"first_loss": 2.5, "last_loss": 0.125, "peak_memory_gib": 0.914}
    counts = {"num_eval_rows": 10, "train_seconds": 131.2, "samples_per_second": 21.37}
    write_json(run.summary, {**summary, **facts, **counts, "trainable_parameters": 61_440})
    return run


def page_of(run: RunDir) -> str:
    return write_report(run).read_text(encoding="utf-8")


def words_of(page: str) -> str:
    """The page's text as a reader sees it, on one line."""
    body = re.sub(r"(?s)^.*<body>", "", page)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", body))


def test_the_answer_comes_first_with_its_figures_and_counts(finished: RunDir):
    words = words_of(page_of(finished))
    assert words.index("Better") < words.index("The run")
    assert (
        "On 10 rows held out from training, exact match rose from 0.100 to 0.900 (+0.800)" in words
    )
    assert "1 of 10 right" in words
    assert "9 of 10 right" in words
    assert "better on 8 rows and worse on 0" in words


def test_the_run_s_facts_and_every_metric_are_shown(finished: RunDir):
    words = words_of(page_of(finished))
    for fact in ("0.91 GiB", "2 min 11 s", "21.4", "0.125", "61,440", "nano · lora · rank 8"):
        assert fact in words
    assert "ANLS 0.250 [0.200, 0.300]0.750 [0.700, 0.800] +0.500 [+0.400, +0.600] better" in words
    assert "versions.torch2.13.0" in words


def test_text_from_outside_is_escaped(finished: RunDir):
    finished.recipe.write_text("note: '</pre><script>alert(2)</script>'")
    page = page_of(finished)
    assert "<script" not in page
    assert "onerror=y>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "image &#39;&lt;b&gt;&#39; is missing" in page


def test_nothing_is_fetched_from_outside_the_page(finished: RunDir):
    page = page_of(finished)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert "<link" not in page
    assert all(source.startswith("data:") for source in re.findall(r'\bsrc="([^"]*)', page))
    assert all(link.startswith("#") for link in re.findall(r'\bhref="([^"]*)', page))
    assert "default-src 'none'" in page


def test_pictures_stand_in_the_page_and_none_is_taken_from_outside_the_folder(finished: RunDir):
    (finished.path.parent / "secret.png").write_bytes(
        (finished.thumbnails / "0001.png").read_bytes()
    )
    page = page_of(finished)
    assert page.count('<img src="data:image/png;base64,') == page.count("<img") == 1
    assert 'alt="Picture 1 of 1, held-out row data/eval.jsonl:1"' in page


def test_rows_are_sorted_into_fixed_still_wrong_and_right(finished: RunDir):
    page = page_of(finished)
    assert page.count('class="card fixed"') == 8
    assert page.count('class="card wrong"') == page.count('class="card right"') == 1
    assert 'id="show-fixed"' in page
    assert 'id="show-broken"' not in page


def test_a_run_that_was_stopped_gets_a_report_that_says_so(stopped: RunDir):
    words = words_of(page_of(stopped))
    assert "Not finished" in words
    assert "It has logged up to step 20." in words
    assert "metrics.jsonl: unreadable lines left out: 1, the first is line 3." in words
    assert "Better" not in words


def test_an_empty_run_directory_gets_a_report_too(tmp_path: Path):
    words = words_of(page_of(RunDir(tmp_path)))
    assert "It has logged no step yet." in words


def test_a_finished_run_without_evaluation_says_so(stopped: RunDir):
    write_json(stopped.summary, {"last_loss": 1.25, "base": {}, "adapter": None})
    assert "Not evaluated" in words_of(page_of(stopped))


@pytest.mark.parametrize("broken", ["[]", "{", '{"base": 3, "adapter": {"anls": "high"}}'])
def test_a_summary_of_the_wrong_shape_costs_no_page(finished: RunDir, broken: str):
    finished.summary.write_text(broken)
    assert "Held-out rows" in words_of(page_of(finished))


def test_an_answer_with_a_line_separator_stays_one_row(finished: RunDir):
    write_jsonl(finished.predictions, [prediction(1, base=False, adapter=True, note="a\u2028b")])
    assert page_of(finished).count('class="card fixed"') == 1


@pytest.mark.parametrize(
    ("verdict", "base", "adapter", "word"),
    [
        ("better", 0.0, 0.6, "Better"),
        ("worse", 0.6, 0.0, "Worse"),
        ("cannot tell", 0.0, 0.5, "Cannot tell at n = 10"),
        (None, 0.1, 0.2, "Better, it seems"),  # no interval was kept
        (None, 0.2, 0.2, "No change"),
    ],
)
def test_the_verdict_is_that_of_the_paired_interval(verdict, base, adapter, word):
    summary = {"base": {"exact_match": base}, "adapter": {"exact_match": adapter}}
    summary |= {"num_eval_rows": 10}
    if verdict:
        summary["differences"] = {"exact_match": {"interval": [-0.1, 0.1], "verdict": verdict}}
    found = judge(summary, [])
    assert found is not None
    assert found.word == word


def test_a_lower_error_rate_is_better():
    row = {"scores": {"base": {"cer": 0.5}, "adapter": {"cer": 0.0}}}
    verdict = judge({"base": {"cer": 0.5}, "adapter": {"cer": 0.0}}, [row] * 8)
    assert verdict is not None
    assert verdict.word == "Better, it seems"
    assert (verdict.num_better, verdict.num_worse) == (8, 0)
    assert verdict.shares is not None
    assert [share.right for share in verdict.shares] == [0, 8]


def test_the_intervals_agree_with_published_figures():
    low, high = wilson_interval(81, 263)  # Newcombe 1998, table I, method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = wilson_interval(0, 20)
    assert (round(low, 4), round(high, 4)) == (0.0, 0.1611)


def test_a_step_run_again_after_a_resume_counts_once():
    log = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 9.0}, {"step": 20, "loss": 2.0}]
    assert curve([*log, {"step": 30, "loss": float("nan")}], "loss") == [(10, 3.0), (20, 2.0)]


def test_smoothing_keeps_a_straight_line_and_thinning_keeps_a_spike():
    line = [(float(step), 2.0 * step) for step in range(5000)]
    assert [value for _, value in smooth(line)] == pytest.approx([value for _, value in line])
    spiked = [(step, 1e6 if step == 3210 else value) for step, value in line]
    thinned = thin(spiked, 600)
    assert len(thinned) <= 602
    assert (3210, 1e6) in thinned


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
def test_a_browser_renders_the_figures_and_the_filter_needs_no_script(finished: RunDir):
    report = write_report(finished)
    html = report.read_text(encoding="utf-8")
    # The dumped DOM does not carry styles, so visibility shows in the height of a printed page.
    checked = html.replace(' id="show-all" checked', ' id="show-all"')
    assert checked != html
    filtered = report.with_name("filtered.html")
    filtered.write_text(checked.replace(' id="show-wrong"', ' id="show-wrong" checked'))
    dom = run_chromium("--dump-dom", report)
    assert "9 of 10" in dom
    assert dom.count("<svg") == 2
    assert dom.count('class="card ') == 10
    assert len(printed_pages(filtered)) < len(printed_pages(report))


def printed_pages(page: Path) -> list[bytes]:
    pdf = page.with_suffix(".pdf")
    run_chromium(f"--print-to-pdf={pdf}", page)
    return re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())


def run_chromium(action: str, page: Path) -> str:
    """What Chromium prints; a profile of its own, so that tests side by side do not meet."""
    assert CHROMIUM is not None
    profile = page.parent / "profile"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command = [CHROMIUM, *flags, action, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
