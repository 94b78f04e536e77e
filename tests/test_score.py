"""`finetune score`: files of predictions, good and bad."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from finetune.cli import app
from finetune.errors import DataError, FinetuneError, RecipeError
from finetune.metrics import measure
from finetune.rundir import write_jsonl
from finetune.score import metrics_named, score


def written(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_predictions_made_anywhere_are_scored(tmp_path: Path) -> None:
    rows = [{"prediction": "12.5", "references": ["12.50"]}]
    rows += [{"prediction": "12.50", "references": ["12.50"], "more": 1}] * 3
    file = written(tmp_path, *rows)
    file.write_text(file.read_text().replace("\n", "\n\n") + "  ")  # blank lines are nothing
    done = CliRunner().invoke(app, ["score", str(file), "--metrics", "exact_match,cer", "--json"])
    found = json.loads(done.stdout)
    assert found["num_rows"] == 4
    assert found["figures"] == {"exact_match": 0.75, "cer": 1 / 20}
    assert found["intervals"]["exact_match"] == [0.25, 1.0]
    shown = CliRunner().invoke(app, ["score", str(file), "--metrics", " anls ,anls"])
    assert "0.950 [0.8" in shown.stdout


def test_a_line_separator_within_an_answer_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_jsonl(path, [{"prediction": "a\u2028b", "references": ["a\u2028b"]}])
    assert score(path, ["exact_match"]).measured.figures() == {"exact_match": 1.0}


def test_a_field_of_predictions_of_a_run_is_scored(tmp_path: Path) -> None:
    path = written(tmp_path, {"base": "x", "adapter": "y", "references": ["y"]})
    assert score(path, ["exact_match"], "adapter").measured.figures() == {"exact_match": 1.0}
    with pytest.raises(DataError, match=r"'prediction' is missing; .*base, adapter \(--field\)"):
        score(path, ["exact_match"])


def test_predictions_of_a_run_that_diverged_are_scored(tmp_path: Path) -> None:
    (scores,) = measure(["3"], [["3"]], ["anls"], np.array([[np.nan, 1]])).scores()
    row = {"adapter": "3", "references": ["3"], "scores": {"adapter": scores}}
    path = written(tmp_path, row)
    assert score(path, ["anls"], "adapter").measured.figures() == {"anls": 1.0}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"prediction": 3, "references": ["3"]}, "'prediction' is no text"),
        ({"prediction": "3"}, "'references' is no list of texts"),
        ({"prediction": "3", "references": "3"}, "'references' is no list of texts"),
        ({"prediction": "3", "references": []}, "'references' is no list of texts"),
        ({"prediction": "3", "references": [3]}, "'references' holds what is no text"),
        (["3"], "is no object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, told: str) -> None:
    good = {"prediction": "3", "references": ["3"]}
    path = written(tmp_path, good, line)
    with pytest.raises(DataError, match=rf"predictions\.jsonl:2: {told}"):
        score(path, ["anls"])


def test_what_cannot_be_scored_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = written(tmp_path, {"prediction": "3", "references": ["3"]})
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prediction": ')
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    cases: list[tuple[Path, list[str], type[FinetuneError], str]] = [
        (good, ["anl"], RecipeError, "anl: no such metric; expected some of exact_match"),
        (good, [], RecipeError, "no metric given"),
        (good, ["loss"], RecipeError, "loss: no such metric"),
        (broken, ["anls"], DataError, "broken.jsonl:1: is not JSON"),
        (empty, ["anls"], DataError, "has no rows"),
        (tmp_path / "nowhere", ["anls"], DataError, "cannot be read"),
        (tmp_path, ["anls"], DataError, "cannot be read"),
    ]
    for path, metrics, error, told in cases:
        with pytest.raises(error, match=told):
            score(path, metrics)
    monkeypatch.setattr("finetune.packages.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"--metrics: cider: .* pip install pycocoevalcap"):
        score(good, ["cider"])


def test_metrics_are_refused_by_where_they_were_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "runs/first/recipe.yaml: evaluation.metrics"
    assert metrics_named(["anls", "cer", "anls"], source) == ["anls", "cer"]
    with pytest.raises(RecipeError, match=f"^{source}: anl: no such metric"):
        metrics_named(["anl"], source)
    monkeypatch.setattr("finetune.packages.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=rf"^compare: 1 problem\n  {source}: cider: needs"):
        metrics_named(["cider"], source, verb="compare")
