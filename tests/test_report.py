"""The report, from run directories built by hand."""

import html
import http.client
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from finetune import watching as watching_module
from finetune.charts import (
    ON_WHITE,
    Chart,
    Line,
    curve,
    histogram_chart,
    line_chart,
    smooth,
    thin,
)
from finetune.cli import main
from finetune.errors import RunDirError
from finetune.gallery import CARDS_PER_STATUS, differences, shortened
from finetune.report import gather, planned_steps, write_report
from finetune.rundir import RunDir, read_jsonl, write_json, write_jsonl
from finetune.verdict import judge
from finetune.watching import watching
from tests.browser import needs_browser, opened_in_chromium, run_chromium


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
    environment = {"device": "cpu", "versions": {"torch": "2.13.0"}}
    write_json(run.environment, environment | {"shares": [{"num_processes": 7}]})
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


@pytest.fixture
def whole(finished: RunDir) -> RunDir:
    """A run with a log of everything, its data counted, and an evaluation on other rows."""
    run = finished
    rows = [
        {
            "step": 10 * i,
            "loss": 2.0 / i,
            "learning_rate": 1e-3 / i,
            "grad_norm": 1.0,
            "seconds": 3.0 * i,
            "peak_memory_gib": 0.9,
        }
        for i in (1, 2, 3)
    ]
    rows += [{"step": step, "eval_loss": 1.0, "eval_exact_match": 0.5} for step in (10, 20)]
    write_jsonl(run.metrics, rows)
    spread = {"edges": [100, 200, 300], "counts": [4, 8]}
    counted = {"num_rows": 12, "num_images": 9, "num_views": 12, "num_tokens": 4800}
    counted |= {"num_learnt_tokens": 96, "tokens": spread}
    write_json(run.data, {"train": counted | {"views": {"edges": [1, 2], "counts": [12]}}})
    predictions = read_jsonl(run.predictions)
    halves = [[0, 0, 20, 20, 56, 42], [20, 0, 40, 20, 56, 42]]
    predictions[0]["views"] = [[*halves, [0, 0, 40, 20, 112, 84]]]
    predictions[1]["views"] = [["no", "view"], 3]
    write_jsonl(run.predictions, predictions)
    other: dict[str, Any] = {
        "adapter": {"anls": 0.5, "loss": 1.0},
        "base": {"anls": 0.25, "loss": 1.0},
    }
    other |= {"intervals": {"adapter": {"anls": [0.25, 0.75]}}, "num_eval_rows": 3}
    other["paper"] = {"metric": "anls", "figure": "0.740 of idefics2-8b"}
    (run.evaluations / "docvqa").mkdir(parents=True)
    write_json(run.evaluations / "docvqa" / "summary.json", other)
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
    shown = "ANLS 0.250 [0.200, 0.300] 0.750 [0.700, 0.800] +0.500 [+0.400, +0.600] better"
    assert shown in words
    assert "versions.torch2.13.0" in words
    assert "shares.1.num_processes7" in words


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
    assert page.count("<link") == page.count('<link rel="icon" href="data:,">') == 1
    assert all(source.startswith("data:") for source in re.findall(r'\bsrc="([^"]*)', page))
    assert all(link.startswith(("#", "data:")) for link in re.findall(r'\bhref="([^"]*)', page))
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


def test_rows_are_not_scored_by_a_metric_that_makes_none_right(finished: RunDir):
    row = prediction(1, base=False, adapter=True)
    row["scores"] = {"base": {"cider": 0.5, "anls": 0.0}, "adapter": {"cider": 1.5, "anls": 1.0}}
    write_jsonl(finished.predictions, [row])
    page = page_of(finished)
    assert page.count('class="card unscored"') == 1
    assert "right" not in re.findall(r'class="mark [^>]*>([^<]*)<', page)
    assert not re.search(r"✓|✗|of 1</b> right", page)
    row["scores"] = {"base": {"anls": 0.0, "cider": 0.5}, "adapter": {"anls": 1.0, "cider": 1.5}}
    write_jsonl(finished.predictions, [row])
    assert page_of(finished).count('class="card fixed"') == 1


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


def test_what_to_do_next_is_named(stopped: RunDir):
    resume = f"finetune train {stopped.path}/recipe.yaml --resume"
    assert f"go on with: {resume}" in words_of(page_of(stopped))
    write_json(stopped.summary, {})
    assert f"To measure both: finetune eval {stopped.path}," in words_of(page_of(stopped))


def test_the_steps_to_come_are_told():
    by_epoch = {"training": {"epochs": 3.0, "max_steps": None}}
    assert planned_steps(by_epoch, [{"step": 10, "epoch": 0.4}]) == "about 75"
    assert planned_steps({"training": {"max_steps": 3000}}, []) == "3,000"
    assert planned_steps({}, [{"step": 10}]) == planned_steps(by_epoch, []) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"intervals": {"base": 3, "adapter": [1]}},
        {"intervals": [0, 1]},
        {"differences": {"exact_match": [0.5, 1.0], "anls": 3}},
        {"differences": {"exact_match": {"interval": {"low": 0}, "verdict": ["better"]}}},
        {"differences": {"cer": {"interval": [0.5, 1.0], "verdict": "better"}}},
        {"adapter": {"exact_match": 0.9}},  # and a difference in ANLS
        {"base": {}},
    ],
)
def test_entries_of_the_wrong_shape_cost_no_page(finished: RunDir, change: dict):
    change_summary(finished, **change)
    assert "Held-out rows" in words_of(page_of(finished))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("recipe.yaml", "when: 2001-99-99"),
        ("metrics.jsonl", f'{{"step": 1, "loss": {"9" * 400}}}'),
        ("metrics.jsonl", f'{{"step": 1, "loss": {"9" * 5000}}}'),
        ("summary.json", f'{{"steps": {"9" * 5000}}}'),
        ("environment.json", b'{"device": "\xff"}'),
        ("evaluation/predictions.jsonl", '{"images": ["a\\u0000b.png"]}'),
        ("evaluation/predictions.jsonl", json.dumps({"images": ["a" * 5000]})),
        ("evaluation/predictions.jsonl", '{"question": "\\ud800"}'),
    ],
)
def test_what_no_file_of_ours_holds_costs_no_page(finished: RunDir, file: str, text: str | bytes):
    content = text if isinstance(text, bytes) else text.encode()
    (finished.path / file).write_bytes(content + b"\n")
    assert "To do it again" in words_of(page_of(finished))


def test_names_in_the_data_s_counts_become_neither_markup_nor_files(whole: RunDir):
    counted = json.loads(whole.data.read_text())
    names = ('"><img src=x onerror=y>', "../../../evil")
    write_json(whole.data, counted | dict.fromkeys(names, counted["train"]))
    page = page_of(whole)
    assert "<img src=x" not in page
    assert not [*whole.path.parent.rglob("*evil*"), *whole.path.parent.parent.glob("evil*")]
    assert {path.name for path in whole.charts.glob("*tokens*")} == {"train_tokens.png"}
    chart = histogram_chart([0, 1, 2], [1, 1], xlabel="", name="a", title="", label='"><img src=x>')
    assert "<img" not in chart.svg()


def test_a_filter_says_how_many_it_shows(finished: RunDir):
    rows = [prediction(i, base=False, adapter=True) for i in range(CARDS_PER_STATUS + 2)]
    write_jsonl(finished.predictions, [*rows, prediction(99, base=True, adapter=True)])
    words = words_of(page_of(finished))
    assert "All: 49 of 51" in words
    assert "Fixed: wrong before, right now: 48 of 50" in words
    assert "Right both times: 1 " in words


def test_a_question_keeps_its_lines_and_its_direction_to_itself(whole: RunDir):
    rows = read_jsonl(whole.predictions)
    rows[0]["question"] = "מה\nכתוב?"
    write_jsonl(whole.predictions, rows)
    page = page_of(whole)
    assert "<bdi>מה\nכתוב?</bdi> <small>Shown in" in page
    assert re.search(r"\.card :is\(dd, bdi\) { white-space: pre-wrap; }", page)


def test_numbers_of_the_data_stand_at_the_right(whole: RunDir):
    table = re.search(
        r'<table class="([^"]*)"[^>]*>\s*<thead[^>]*><tr[^>]*><th[^>]*>part<', page_of(whole)
    )
    assert table
    assert table[1] == "figures stacked numbers"


def ticks_of(chart: Chart) -> list[float]:
    """Those of the value axis that are to be seen."""
    axes = chart.paint(ON_WHITE).axes[0]
    low, high = axes.get_ylim()
    return [round(tick, 6) for tick in axes.get_yticks() if low <= tick <= high]


@pytest.mark.parametrize("highest", [0.8, 0.97, 1.3, 1.5, 2.9, 3.5, 7.7])
def test_ticks_are_round_numbers(highest: float):
    line = Line("loss", "smooth", [(0, 0.0), (10, highest)])
    ticks = ticks_of(line_chart([line], name="loss", title="", label=""))
    step = f"{ticks[1] - ticks[0]:e}"
    assert float(step.partition("e")[0]) in (1, 2, 2.5, 5)


def test_the_title_of_a_file_and_its_legend_do_not_overlap(monkeypatch: pytest.MonkeyPatch):
    drawn: list[Figure] = []
    stock = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *_, **__: drawn.append(self) or stock(self, *_, **__)
    )
    names = ("each logging step", "smoothed", "held-out rows", "step 3,000, judged")
    lines = [Line(name, "held", [(0, 1.0), (10, 2.0)]) for name in names]
    line_chart(lines, name="loss", title="Loss", label="").png()
    (figure,) = drawn
    figure.draw_without_rendering()  # at the size that it has again
    (title,) = [each for each in figure.findobj(Text) if each.get_text() == "Loss"]
    legend = figure.legends[0].get_window_extent()
    assert not title.get_window_extent().overlaps(legend)
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.x1


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_metric_that_stays_as_it_is_has_ticks_between_0_and_1(value: float):
    line = Line("ANLS", "held", [(10, value), (20, value)], marker="o")
    ticks = ticks_of(line_chart([line], name="anls", title="", label="", is_share=True))
    assert (ticks[0], ticks[-1]) == (0, 1)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ((1.0, 0.975), 0.8, 1.0),  # one of forty rows became wrong
        ((0.0, 0.025), 0.0, 0.2),
        ((0.5, 0.51), 0.405, 0.605),
        ((0.1, 0.9), 0.1, 0.9),
        ((1.4, 1.45), 1.4, 1.45),  # an error rate of more than one is no share
    ],
)
def test_a_share_that_hardly_moves_does_not_fill_the_height(
    values: tuple[float, float], low: float, high: float
):
    line = Line("ANLS", "held", list(enumerate(values)), marker="o")
    chart = line_chart([line], name="anls", title="", label="", is_share=True)
    bottom, top = chart.paint(ON_WHITE).axes[0].get_ylim()
    margin = 0.05 * (high - low)
    assert bottom == pytest.approx(low, abs=1.01 * margin)
    assert top == pytest.approx(high, abs=1.01 * margin)
    assert bottom < min(values)
    assert top > max(values)


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


@pytest.mark.parametrize(
    ("evaluation", "metric"),
    [
        ({"metrics": ["anls", "exact_match"], "best_metric": "loss"}, "anls"),
        ({"metrics": ["anls", "exact_match"], "best_metric": "exact_match"}, "exact_match"),
        ({"metrics": ["cider", "anls"]}, "anls"),  # the first that was measured
        ({"metrics": "anls", "best_metric": 3}, "exact_match"),
        (None, "exact_match"),
    ],
)
def test_the_headline_is_of_the_metric_that_the_recipe_puts_first(
    finished: RunDir, evaluation: dict | None, metric: str
):
    finished.recipe.write_text(json.dumps({"evaluation": evaluation}))
    found = gather(finished)["verdict"]
    assert found.metric == metric


def test_no_change_by_one_metric_does_not_hide_what_changed_by_others(finished: RunDir):
    finished.recipe.write_text("evaluation: {metrics: [exact_match, anls], best_metric: loss}")
    figures: dict[str, Any] = {"base": {"exact_match": 0.0, "anls": 0.0, "loss": 9.0}}
    figures["adapter"] = {"exact_match": 0.0, "anls": 0.98, "loss": 9.5}
    for side in figures.values():
        side["perplexity"] = 2.0 ** side["loss"]
    verdicts = {"exact_match": "no change", "anls": "better", "loss": "worse"}
    verdicts["perplexity"] = "worse"  # as the loss, and not said twice
    differences = {name: {"interval": None, "verdict": each} for name, each in verdicts.items()}
    change_summary(finished, **figures, differences=differences)
    words = words_of(page_of(finished))
    assert words.index("No change by exact match, better by ANLS, worse by loss") < 200
    differences["exact_match"]["verdict"] = "better"
    change_summary(finished, differences=differences)
    assert "Better by exact match, worse by loss" in words_of(page_of(finished))
    differences["loss"]["verdict"] = differences["perplexity"]["verdict"] = "cannot tell"
    change_summary(finished, differences=differences)
    assert "Better On 10 rows held out" in words_of(page_of(finished))


def test_right_says_by_what_where_the_headline_is_of_another_metric(finished: RunDir):
    finished.recipe.write_text("evaluation: {metrics: [anls, exact_match]}")
    words = words_of(page_of(finished))
    assert "ANLS rose from 0.250 to 0.750" in words
    assert "9 of 10 right by exact match" in words


def test_the_step_whose_weights_were_judged_is_told_and_marked(whole: RunDir):
    whole.recipe.write_text("evaluation: {load_best: true, best_metric: cer}")
    assert "judged" not in words_of(page_of(whole))
    change_summary(whole, best_step=20)
    page = page_of(whole)
    assert "The weights are those of step 20, the best CER of the run." in words_of(page)
    marked = [each for each in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if "judged" in each]
    charts = [re.findall('label="(Loss|Held-out [a-z ]+)', each) for each in marked]
    assert charts == [["Loss"], ["Held-out exact match"]]
    assert all(">step 20, judged</text>" in each for each in marked)


def list_bad_steps(run: RunDir, *steps: int, why: str = "the loss is nan") -> None:
    rows = [{"where": f"data/<b>.jsonl:{i}", "num_tokens": 9, "num_views": 1} for i in range(12)]
    write_jsonl(
        run.bad_steps / "steps.jsonl",
        [{"step": step, "loss": "nan", "why": why, "rows": rows} for step in steps],
    )
    (run.bad_steps / f"step-{steps[-1]}.html").write_text("its <b>rows</b>")


def end_run(run: RunDir, **told: Any) -> None:
    end = {"by": "error", "why": "row <7>\nis gone", "resume_with": [], "at": "2026-01-02T03:04:05"}
    write_json(run.ended, end | told)


def test_a_run_that_an_error_ended_tells_which(stopped: RunDir):
    stopped.recipe.write_text("training: {max_steps: 40}")
    assert "was killed, or is still going" in words_of(page_of(stopped))
    end_run(stopped)
    words = words_of(page_of(stopped))
    assert "Ended by an error row &lt;7&gt; is gone On 2026-01-02 03:04:05. It has" in words
    assert "up to step 20 of 40. Base and adapter have not been compared." in words
    assert "still going" not in words
    assert f"That mended, go on with: finetune train {stopped.path}/recipe.yaml --resume" in words
    end_run(stopped, resume_with=None)
    assert "--resume" not in words_of(page_of(stopped))
    end_run(stopped, by="signal", why="SIGTERM")
    words = words_of(page_of(stopped))
    assert "Stopped By SIGTERM, on 2026-01-02 03:04:05. It has logged" in words
    assert f" Go on with: finetune train {stopped.path}/recipe.yaml --resume" in words
    write_json(stopped.summary, {})
    assert "Stopped" not in words_of(page_of(stopped))


def test_bad_steps_are_shown_with_their_rows_and_what_goes_on_without_them(stopped: RunDir):
    list_bad_steps(stopped, 25, why="its gradient holds <no> number")
    end_run(stopped, resume_with=["training.bad_loss=skip"])
    page = page_of(stopped)
    words = words_of(page)
    assert f"Go on with: finetune train {stopped.path}/recipe.yaml training.bad_loss=skip" in words
    assert "/recipe.yaml --resume" not in words  # alone it comes to the same step again
    assert '<a href="#bad-steps">' in page
    assert "1 step was bad" in words
    assert "Step 25: its gradient holds &lt;no&gt; number" in words.replace("</a>", "")
    assert "data/&lt;b&gt;.jsonl:0" in words
    assert "data/&lt;b&gt;.jsonl:4 and 7 more" in words
    assert '<a href="bad_steps/step-25.html">' in page


def test_steps_left_out_are_counted_from_their_list(stopped: RunDir):
    stopped.recipe.write_text("training: {max_steps: 40, bad_loss: skip}")
    with stopped.metrics.open("w") as log:
        log.write('{"step": 20, "loss": 1.0, "skipped_steps": 8}\n')
    list_bad_steps(stopped, *range(11, 21))
    words = words_of(page_of(stopped))
    assert "10 steps were bad" in words
    assert "8 steps" not in words
    assert "No weight knows of them" in words


@pytest.mark.parametrize("text", ["3", '{"step": "x", "rows": 3}', '{"rows": [3]}', "{"])
def test_a_broken_list_of_bad_steps_costs_no_page(stopped: RunDir, text: str):
    stopped.bad_steps.mkdir()
    (stopped.bad_steps / "steps.jsonl").write_text(f"{text}\n")
    assert "Not finished" in words_of(page_of(stopped))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3", "Not finished This run has not finished: it was killed, or is still going."),
        ("{", "Not finished This run has not finished: it was killed, or is still going."),
        ("[]", "Not finished This run has not finished: it was killed, or is still going."),
        ('{"why": 3, "resume_with": 3, "at": []}', "Stopped By 3"),
    ],
)
def test_a_broken_record_of_the_end_costs_no_page(stopped: RunDir, text: str, words: str):
    stopped.ended.write_text(text)
    assert words in words_of(page_of(stopped))


def test_a_run_in_several_processes_goes_on_in_as_many(stopped: RunDir):
    write_json(stopped.environment, {"num_processes": 4, "num_processes_here": 4})
    words = words_of(page_of(stopped))
    assert "recipe.yaml --resume --processes 4" in words
    assert "each machine" not in words
    write_json(stopped.environment, {"num_processes": 4, "num_processes_here": 2})
    assert "--resume --processes 2, on each machine" in words_of(page_of(stopped))
    write_json(stopped.environment, {"num_processes": 1, "num_processes_here": 1})
    assert "--processes" not in words_of(page_of(stopped))


def test_a_row_left_out_in_every_epoch_counts_as_one(finished: RunDir):
    change_summary(finished, num_skipped_rows=20)
    words = words_of(page_of(finished))
    assert "1 row, left out 20 times" in words
    assert "all in skipped.jsonl" not in words
    change_summary(finished, num_skipped_rows=1)
    assert "1 row left out." in words_of(page_of(finished))


def test_merged_weights_asked_on_other_rows_are_shown(whole: RunDir):
    page = page_of(whole)
    assert page.count(">merged</th>") == 0
    path = whole.evaluations / "docvqa" / "summary.json"
    found = json.loads(path.read_text())
    found["merged"] = {"anls": 0.375, "cer": 0.5}
    write_json(path, found)
    page = page_of(whole)
    assert page.count(">merged</th>") == 1
    assert ">0.375</td>" in page
    assert "CER" in words_of(page)


def test_a_lower_error_rate_is_better():
    row = {"scores": {"base": {"cer": 0.5}, "adapter": {"cer": 0.0}}}
    figures = {"base": {"cer": 0.5}, "adapter": {"cer": 0.0}}
    verdict = judge(figures, [row] * 8)
    assert verdict is not None
    assert verdict.word == "Better, it seems"
    assert (verdict.num_better, verdict.num_worse) == (8, 0)
    assert verdict.shares is not None
    assert [share.right for share in verdict.shares] == [0, 8]


def test_two_sentences_do_not_run_into_one(finished: RunDir):
    change_summary(finished, base={"cer": 0.5}, adapter={"cer": 0.0})
    assert "(−0.500). Lower is better." in words_of(page_of(finished))


def change_summary(run: RunDir, **changes) -> None:
    write_json(run.summary, json.loads(run.summary.read_text()) | changes)


def test_bars_and_table_show_the_same_interval(finished: RunDir):
    bars = {"base": {"exact_match": [0.0, 0.3]}, "adapter": {"exact_match": [0.7, 1.0]}}
    change_summary(finished, intervals=bars)
    words = words_of(page_of(finished))
    assert "1 of 10 right 95% interval 0 to 30%" in words
    assert "9 of 10 right 95% interval 70 to 100%" in words
    assert "exact match 0.100 [0.000, 0.300] 0.900 [0.700, 1.000]" in words
    assert "95% interval of the difference: +0.500 to +1.000." in words


def test_an_interval_of_no_width_is_not_taken_for_certainty(finished: RunDir):
    change_summary(
        finished,
        intervals={"base": {"exact_match": [0.1, 0.1]}},
        differences={"exact_match": {"interval": [0.8, 0.8], "verdict": "better"}},
    )
    words = words_of(page_of(finished))
    assert "95% interval of the difference cannot be estimated from these rows" in words
    assert "right 95% interval" not in words


@pytest.mark.parametrize(
    ("asked", "title"),
    [
        ("{rows_in_training: 4, max_rows: null}", "Held-out exact match, first 4 rows"),
        ("{rows_in_training: 10, max_rows: null}", "Held-out exact match"),
        ("{rows_in_training: 8, max_rows: 6}", "Held-out exact match"),  # those that are judged
    ],
)
def test_a_curve_of_fewer_rows_than_were_judged_says_so(whole: RunDir, asked: str, title: str):
    whole.recipe.write_text(f"evaluation: {asked}")
    assert f"<figcaption>{title}</figcaption>" in page_of(whole)


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


def test_a_run_with_everything_shows_everything(whole: RunDir):
    page = page_of(whole)
    words = words_of(page)
    for shown in (
        "Held-out exact match",
        "Seconds a step",
        "Peak memory so far, GiB",
        "Norm of the gradient",
        "Training rows: tokens",
        "Shown in 3 views: 2 of 56 × 42, 1 of 112 × 84 px.",
        "docvqa 3 rows; beside it: 0.740 of idefics2-8b",
        "training 12 9 12 4,800 96",
    ):
        assert shown in words, shown
    assert ">0.500 [0.250,\u00a00.750]</td>" in page
    files = {path.name for path in whole.charts.iterdir()}
    assert {"loss.png", "learning_rate.png", "eval_exact_match.png", "train_tokens.png"} <= files
    for path in whole.charts.iterdir():
        with Image.open(path) as image:
            assert min(image.size) > 300
    assert page.count("<svg") == len(files)
    cut = 'style="left: 50.00%; top: 0.00%; width: 50.00%; height: 100.00%"'
    assert (page.count("<i "), page.count(cut)) == (2, 1)
    assert 'http-equiv="refresh"' not in page


def test_what_differs_is_marked():
    pieces = differences("12.60 E", ["7.10", "12.50"])
    assert [(each.kind, each.text) for each in pieces] == [
        ("same", "12."),
        ("cut", "6"),
        ("missing", "5"),
        ("same", "0"),
        ("cut", " E"),
    ]
    kept = "".join(each.text for each in pieces if each.kind != "cut")
    assert kept == "12.50"
    assert differences("12.50", ["12.50"]) == []  # the same
    assert differences("nothing like it", ["12.50"]) == []  # all of it is wrong
    assert differences("", ["12.50"]) == differences("12.50", []) == []


def test_two_long_answers_are_compared_to_their_ends(finished: RunDir):
    same = "word " * 200
    row = prediction(1, base=False, adapter=False)
    row |= {"base": f"{same}end", "adapter": f"{same}bad", "references": [f"{same}end"]}
    write_jsonl(finished.predictions, [row])
    page = page_of(finished)
    assert re.search(r"word word  … \S?[ word]+<del>.*?</span>ba</del><ins>", page)
    assert page.count("word ") < 250
    pieces = differences("abb" * 2000, ["abc" * 2000])
    assert len(pieces) > 5000
    assert len("".join(each.text for each in shortened(pieces))) < 1100


def test_a_run_that_goes_on_is_watched(whole: RunDir):
    def asked(path: str = "/", host: str = "") -> tuple[int, str]:
        address = f"127.0.0.1:{server.server_port}"
        connection = http.client.HTTPConnection(address, timeout=120)
        connection.request("GET", path, headers={"Host": host or address})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    before = whole.summary.read_bytes()
    whole.summary.unlink()
    with watching(whole, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        status, page = asked()
        assert (status, 'http-equiv="refresh"' in page) == (200, True)
        assert "up to step 30" in words_of(page)
        assert re.search(r"metrics.jsonl was last written \d+ s ago", words_of(page))
        with whole.metrics.open("a") as log:
            log.write('{"step": 40, "loss": 0.5}\n')
        assert "up to step 40" in words_of(asked()[1])
        assert 'href="/still"' in page
        still = asked("/still")[1]
        assert 'http-equiv="refresh"' not in still
        assert 'href="/"' in still
        assert "up to step 40" in words_of(still)
        whole.summary.write_bytes(before)
        assert 'http-equiv="refresh"' not in asked()[1]
        assert asked("/recipe.yaml")[0] == 404
        list_bad_steps(whole, 7)
        assert asked("/bad_steps/step-7.html") == (200, "its <b>rows</b>")
        assert asked("/bad_steps/step-8.html")[0] == 404
        assert asked("/bad_steps/../recipe.yaml")[0] == asked("/bad_steps/steps.jsonl")[0] == 404
        assert asked(host="elsewhere.example:80")[0] == asked(host="elsewhere.example")[0] == 403
        assert asked(host="127.0.0.1")[0] == asked(host="localhost")[0] == 200  # at port 80
        with pytest.raises(RunDirError, match="cannot be listened at"):
            watching(whole, server.server_port)
        server.shutdown()


@contextmanager
def being_watched(run: RunDir) -> Iterator[tuple[str, int]]:
    """Its host and port."""
    with watching(run, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield "127.0.0.1", server.server_port
        server.shutdown()


def test_a_page_that_cannot_be_made_is_tried_again(whole: RunDir, monkeypatch: pytest.MonkeyPatch):
    def fails(_: RunDir):
        raise ValueError("<torn>")

    monkeypatch.setattr(watching_module, "gather", fails)
    with being_watched(whole) as address:
        connection = http.client.HTTPConnection(*address, timeout=120)
        connection.request("GET", "/")
        answer = connection.getresponse()
        page = answer.read().decode()
    assert answer.status == 500
    assert 'http-equiv="refresh"' in page
    assert "ValueError: &lt;torn&gt;" in page


def test_a_tab_that_is_closed_is_no_fault(whole: RunDir, monkeypatch: pytest.MonkeyPatch):
    closed, ended, faults = threading.Event(), threading.Event(), []

    def end(_, request: socket.socket) -> None:
        request.close()
        ended.set()

    def slow(_: RunDir, *, still: bool):
        closed.wait(120)
        return 200, "x" * 10_000_000

    monkeypatch.setattr(watching_module, "_page", slow)
    monkeypatch.setattr(ThreadingHTTPServer, "shutdown_request", end)
    monkeypatch.setattr(ThreadingHTTPServer, "handle_error", lambda *_: faults.append(_))
    with being_watched(whole) as address:
        connection = socket.create_connection(address, timeout=120)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        reset = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        connection.close()
        closed.set()
        assert ended.wait(120)
    assert not faults


def test_a_port_without_watch_is_refused(
    finished: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["finetune", "report", str(finished.path), "--port", "0"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "--port 0: is for --watch" in capsys.readouterr().err
    assert not finished.report.exists()


def luminance(colour: str) -> float:
    """Source: WCAG 2.2, relative luminance."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_text_stands_out_from_what_is_behind_it(finished: RunDir):
    page = page_of(finished)
    light, dark = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    for theme in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", theme))
        pairs = [(ink, back) for ink in ("ink", "soft", "accent") for back in ("page", "card")]
        pairs += [(tone, "card") for tone in ("good", "bad", "unsure")]
        pairs += [
            (ink, f"{tone}-wash") for tone in ("good", "bad", "unsure") for ink in ("ink", tone)
        ]
        pairs += [("chart-ink", "page")]
        for front, back in pairs:
            low, high = sorted(luminance(colours[name]) for name in (front, back))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)


def test_every_picture_has_a_text(whole: RunDir):
    page = page_of(whole)
    assert page.count("<img") > 0
    assert all('alt="' in each for each in re.findall(r"<img[^>]*>", page))
    drawn = re.findall(r"<svg[^>]*>", page)
    assert all(re.search(r'role="img" aria-label="[^"]{10,}"', each) for each in drawn)
    assert re.search(r'<html lang="en">', page)


# Clicks every filter as a person would, and says what is to be seen then.
LOOK = """
<script>
const seen = {errors: []};
window.addEventListener("error", event => seen.errors.push(event.message));
const visible = each => each.getClientRects().length > 0;
const count = () => [...document.querySelectorAll(".card")].filter(visible).length;
seen.all = count();
for (const radio of document.querySelectorAll("input[name=show]")) {
  radio.closest("label").click();
  seen[radio.id] = count();
}
document.getElementById("show-all").focus();
seen.focused = document.activeElement.id;
seen.width = window.innerWidth;
seen.page = getComputedStyle(document.body).backgroundColor;
seen.wide = document.documentElement.scrollWidth > window.innerWidth;
const size = each => [each.getBoundingClientRect().height, getComputedStyle(each).lineHeight];
const lines = each => size(each).reduce((height, line) => height / parseFloat(line));
seen.lines = Math.max(...[...document.querySelectorAll(".figures th:first-child")].map(lines));
const tall = each => each.getBoundingClientRect().height > 100;
seen.drawn = [...document.querySelectorAll("svg")].filter(tall).length;
seen.shown = [...document.images].filter(each => each.complete && each.naturalWidth > 0).length;
parent.postMessage(JSON.stringify(seen), "*");
</script>
"""
# Chromium makes no window narrower than 500 px, but a frame.
FRAME = """
<!doctype html>
<pre id="seen"></pre>
<script>addEventListener("message", event => seen.textContent = event.data)</script>
<iframe src="{page}" style="width: {width}px; height: 2000px; border: 0"></iframe>
"""


def seen_by(script: str, page: str, folder: Path, width: int, *flags: str) -> dict[str, Any]:
    """What a script that stands at the page's end tells, the page being `width` px wide."""
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page)
    assert policy  # which would not let the test look
    lazy = page.replace(policy[0], "").replace(' loading="lazy"', "")
    (folder / "looked.html").write_text(lazy.replace("</body>", f"{script}</body>"))
    framed = folder / "framed.html"
    framed.write_text(FRAME.format(page="looked.html", width=width))
    dom = run_chromium("--dump-dom", framed, "--virtual-time-budget=5000", *flags)
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom)
    assert found
    return json.loads(html.unescape(found[1]))


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(("width", "theme"), [(390, "light"), (390, "dark"), (1280, "light")])
def test_a_browser_shows_the_figures_and_the_filter_works(whole: RunDir, width: int, theme: str):
    dark = ["--blink-settings=preferredColorScheme=0"] * (theme == "dark")
    page = page_of(whole)
    seen = seen_by(LOOK, page, whole.path, width, *dark)
    statuses = {"show-fixed": 8, "show-wrong": 1, "show-right": 1}
    assert {name: seen[name] for name in statuses} == statuses
    assert seen["all"] == seen["show-all"] == 10
    assert seen["focused"] == "show-all"
    assert seen["errors"] == []
    assert seen["width"] == width
    assert seen["page"] == {"light": "rgb(251, 251, 250)", "dark": "rgb(20, 21, 23)"}[theme]
    assert seen["wide"] is False  # nothing is cut off on a phone
    assert seen["lines"] < 4  # and names stand there in words, not in letters
    assert seen["drawn"] == page.count("<svg")
    assert seen["shown"] == 1


# Says what lies outside the window or needs scrolling to, and what each line of a table reads.
READ = """
<script>
const seen = {};
const all = (what, within = document) => [...within.querySelectorAll(what)];
all("details").forEach(each => each.open = true);
const text = document.createRange();
const reaches = each => {
  text.selectNodeContents(each);
  const right = Math.max(each.getBoundingClientRect().right, text.getBoundingClientRect().right);
  return right > innerWidth + .5 || each.scrollWidth > each.clientWidth + 1;
};
const tables = "table, tbody, tbody *, .scroll, .pairs, .pairs *, pre";
seen.beyond = all(tables).filter(reaches).map(each => each.textContent.trim().slice(0, 40));
const shown = each => each.getClientRects().length ? each.textContent.replace(/\\s+/g, " ") : "";
const labelled = each => getComputedStyle(each, "::before").content + shown(each);
seen.rows = all("tbody tr").map(row => [...row.children].map(labelled));
seen.letters = all(".pairs dd").filter(each => each.clientWidth < 150).length;
parent.postMessage(JSON.stringify(seen), "*");
</script>
"""


@pytest.fixture
def widest(whole: RunDir) -> RunDir:
    """A run with long figures in all columns that its tables may have."""
    found = json.loads(whole.summary.read_text())
    found["base"]["loss"], found["adapter"]["loss"] = 11.25, 0.125
    found["intervals"]["base"]["loss"] = [10.5, 12.5]
    found["differences"]["loss"] = {"interval": [-12.5, -10.5], "verdict": "cannot tell"}
    change_summary(whole, **found)
    path = whole.evaluations / "docvqa" / "summary.json"
    other = json.loads(path.read_text()) | {"merged": {"anls": 0.5}}
    other["intervals"] |= {"base": {"anls": [0.0, 0.5]}, "merged": {"anls": [0.25, 0.75]}}
    other["differences"] = {"anls": {"interval": [0.125, 0.5], "verdict": "cannot tell"}}
    write_json(path, other)
    counted = json.loads(whole.data.read_text())
    write_json(whole.data, counted | {"eval": dict.fromkeys(counted["train"], 10**8)})
    whole.recipe.write_text(f"data: {{train: [{'folder/' * 20}]}}\n")
    environment = json.loads(whole.environment.read_text())
    write_json(whole.environment, environment | {"a_name_of_many_words" * 3: "cu" * 40})
    return whole


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [360, 768, 769, 1280])
def test_no_figure_is_cut_off_or_has_to_be_scrolled_to(widest: RunDir, width: int):
    seen = seen_by(READ, page_of(widest), widest.path, width)
    assert seen["beyond"] == []
    assert seen["letters"] == 0
    if width > 768:
        assert seen["rows"][0][1] == "none0.100"
        return
    assert seen["rows"][1:6] == [
        [
            "noneANLS",
            '"base"0.250 [0.200, 0.300]',
            '"adapter"0.750 [0.700, 0.800]',
            '"difference"+0.500 [+0.400, +0.600]',
            '"verdict"better',
        ],
        [
            "noneloss lower is better",
            '"base"11.250 [10.500, 12.500]',
            '"adapter"0.125',
            '"difference"−11.125 [−12.500, −10.500]',
            '"verdict"cannot tell',
        ],
        [
            "nonedocvqa 3 rows; beside it: 0.740 of idefics2-8b",
            '"metric"ANLS',
            '"base"0.250 [0.000, 0.500]',
            '"adapter"0.500 [0.250, 0.750]',
            '"merged"0.500 [0.250, 0.750]',
            '"verdict"cannot tell',
        ],
        [
            "nonedocvqa 3 rows",
            '"metric"loss',
            '"base"1.000',
            '"adapter"1.000',
            '"merged"–',
            '"verdict"–',
        ],
        [
            "nonetraining",
            '"rows"12',
            '"pictures"9',
            '"views"12',
            '"tokens"4,800',
            '"learnt"96',
        ],
    ]


def test_rows_and_cells_that_a_phone_stacks_say_that_they_are_a_table_s(whole: RunDir):
    page = page_of(whole)
    tags = re.findall(r"<(?:table|thead|tbody|tr|th|td)\b[^>]*>", page)
    roles = {(re.split(r"\W", tag)[1], *re.findall(r'(?:scope|role)="(\w+)"', tag)) for tag in tags}
    assert roles == {
        ("table", "table"),
        ("thead", "rowgroup"),
        ("tbody", "rowgroup"),
        ("tr", "row"),
        ("th", "col", "columnheader"),
        ("th", "row", "rowheader"),
        ("td", "cell"),
    }


@pytest.mark.slow
@needs_browser
def test_a_browser_asks_nobody_and_complains_of_nothing(whole: RunDir):
    page_of(whole)
    blank = whole.path / "blank.html"
    blank.write_text("<!doctype html><title>blank</title>")
    of_itself, _ = asked_for(blank)  # Chromium asks its maker, whatever page it opens
    asked, complaints = asked_for(whole.report)
    assert "CONSOLE" not in complaints, complaints
    assert asked <= of_itself


def asked_for(page: Path) -> tuple[set[str], str]:
    """Scheme and host of all that Chromium asks for at a page but the page itself, and what it
    prints.
    """
    log = page.with_suffix(".network.json")
    flags = (f"--log-net-log={log}", "--enable-logging=stderr", "--v=0", "--disable-sync")
    flags += ("--disable-component-update", "--disable-background-networking", "--no-first-run")
    done = opened_in_chromium("--dump-dom", page, *flags)
    asked = set(re.findall(r'"url":"(\w+://[^"]*)', log.read_text(errors="replace")))
    asked.discard(page.as_uri())
    return {url if url.startswith("file:") else origin(url) for url in asked}, done.stderr


def origin(url: str) -> str:
    """Scheme and host."""
    return "/".join(url.split("/")[:3])
