"""`finetune compare`, on runs written by hand."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finetune.cli import app
from finetune.compare import compare
from finetune.errors import DataError, RunDirError
from finetune.rundir import RunDir, read_jsonl, write_jsonl

RECIPE = """
model: {name: nano}
data: {train: [{hub: user/name}], eval: [{hub: user/name}]}
evaluation: {metrics: [exact_match]}
"""


def run_with(folder: Path, answers: list[str], *, file: str = "eval.jsonl") -> RunDir:
    """Judged on rows whose right answer is `right`; the base never has it."""
    run = RunDir(folder)
    run.evaluation.mkdir(parents=True)
    run.recipe.write_text(RECIPE)
    rows = [
        {
            "where": f"/somewhere/{folder.name}/{file}:{i}",
            "question": "What?",
            "references": ["right"],
            "base": "wrong",
            "adapter": answer,
        }
        for i, answer in enumerate(answers)
    ]
    write_jsonl(run.predictions, rows)
    return run


def test_runs_are_compared_on_the_rows_they_share(tmp_path: Path) -> None:
    first = run_with(tmp_path / "first", ["right"] * 10 + ["wrong"] * 10)
    run_with(tmp_path / "better", ["right"] * 18 + ["wrong"] * 2 + ["right"] * 5)
    run_with(tmp_path / "alike", ["wrong"] * 2 + ["right"] * 10 + ["wrong"] * 8)
    names = ["first", "better", "alike"]
    paths = [str(tmp_path / name) for name in names]
    found = json.loads(CliRunner().invoke(app, ["compare", *paths, "--json"]).stdout)
    assert found["num_rows"] == 20
    assert found["left_out"] == {"first": 0, "better": 5, "alike": 0}
    shares = {name: figures["exact_match"] for name, figures in found["figures"].items()}
    assert shares == {"base": 0.0, "first": 0.5, "better": 0.9, "alike": 0.5}
    verdicts = {name: each["exact_match"]["verdict"] for name, each in found["differences"].items()}
    assert verdicts == {"base": "worse", "better": "better", "alike": "cannot tell"}
    shown = CliRunner().invoke(app, ["compare", *paths]).stdout
    assert "base of first" in shown
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    low, high = found["differences"]["better"]["exact_match"]["interval"]
    between = "[{:.3f}, {:.3f}]".format(*found["intervals"]["better"]["exact_match"])
    assert f"better 0.900 {between} +0.400 [{low:+.3f}, {high:+.3f}] better" in rows
    at = rows.index("exact_match")
    assert [row.split()[0] for row in rows[at + 1 : at + 5]] == ["base", *names]
    assert "better: 5 rows left out" in shown
    by_letters = compare([first.path, paths[1]], ["cer"])
    assert set(by_letters.measured["first"].columns) == {"cer"}


def with_losses(run: RunDir, losses: list[float | None], num_tokens: list[int]) -> None:
    rows = [
        row
        | {"num_learnt_tokens": count}
        | {"scores": {"base": {"loss": 2.0}, "adapter": {} if loss is None else {"loss": loss}}}
        for row, loss, count in zip(read_jsonl(run.predictions), losses, num_tokens, strict=True)
    ]
    write_jsonl(run.predictions, rows)


def test_loss_and_perplexity_stand_beside_where_tokens_are_as_many(tmp_path: Path) -> None:
    names = ["first", "better", "diverged", "other"]
    runs = {name: run_with(tmp_path / name, ["right", "wrong"]) for name in names}
    with_losses(runs["first"], [1.0, 0.5], [1, 3])
    with_losses(runs["better"], [0.5, 0.25], [1, 3])
    with_losses(runs["diverged"], [0.5, None], [1, 3])
    with_losses(runs["other"], [0.5, 0.25], [2, 3])
    paths = {name: str(run.path) for name, run in runs.items()}
    found = compare([paths[name] for name in names[:3]]).to_json()
    assert found["figures"]["base"]["loss"] == 2.0
    assert found["figures"]["first"]["loss"] == (1.0 + 3 * 0.5) / 4
    assert found["figures"]["better"]["loss"] == (0.5 + 3 * 0.25) / 4
    assert found["figures"]["better"]["perplexity"] == pytest.approx(math.exp(0.3125))
    assert found["figures"]["diverged"].keys() == {"exact_match"}
    for order in (["better", "diverged"], ["diverged", "better"]):
        done = CliRunner().invoke(app, ["compare", *(paths[name] for name in order)])
        assert done.exit_code == 0
        assert "0.312" in done.stdout
    assert set(compare([paths["first"], paths["other"]]).measured["first"].columns) == {
        "exact_match"
    }


def test_rows_that_are_told_apart_by_nothing_are_all_counted(tmp_path: Path) -> None:
    one, other = (run_with(tmp_path / name, ["right", "wrong"]) for name in ("one", "other"))
    for run in (one, other):
        rows = [row | {"where": "/a/eval.jsonl:1"} for row in read_jsonl(run.predictions)]
        write_jsonl(run.predictions, rows)
    found = compare([one.path, other.path])
    assert found.num_rows == 2
    assert found.measured["one"].figures()["exact_match"] == 0.5


def test_evaluations_on_other_rows_are_compared_by_their_name(tmp_path: Path) -> None:
    runs = [run_with(tmp_path / name, ["wrong"] * 3) for name in ("one", "other")]
    for run in runs:
        elsewhere = run.evaluations / "receipts"
        elsewhere.mkdir(parents=True)
        rows = [row | {"adapter": "right"} for row in read_jsonl(run.predictions)]
        write_jsonl(elsewhere / "predictions.jsonl", rows)
    arguments = ["compare", *(str(run.path) for run in runs), "--name", "receipts", "--json"]
    found = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert found["figures"]["one"] == {"exact_match": 1.0}
    with pytest.raises(RunDirError, match=r"--data FILE --name elsewhere"):
        compare([run.path for run in runs], name="elsewhere")


def asked_with(run: RunDir, **settings: Any) -> None:
    words = ", ".join(f"{key}: {value}" for key, value in settings.items())
    run.recipe.write_text(RECIPE.replace("[exact_match]", f"[exact_match], {words}"))


def test_runs_that_were_asked_in_different_ways_are_told_with_the_setting(tmp_path: Path) -> None:
    runs = [run_with(tmp_path / name, ["right", "wrong"]) for name in ("one", "two", "three")]
    asked_with(runs[0], max_new_tokens=24)
    asked_with(runs[1], max_new_tokens=6, prompt_suffix="Briefly.", batch_size=1)
    asked_with(runs[2], max_new_tokens=24, max_rows=2)
    arguments = ["compare", *(str(run.path) for run in runs)]
    shown = CliRunner().invoke(app, arguments)
    told = "evaluation.max_new_tokens is 24 in one, 6 in two, 24 in three; a difference may come"
    assert f"warning: runs were asked in different ways: {told}" in shown.stderr
    assert 'prompt_suffix is null in one, "Briefly." in two, null in three' in shown.stderr
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["asked_otherwise"] == {
        "evaluation.max_new_tokens": {"one": 24, "two": 6, "three": 24},
        "evaluation.prompt_suffix": {"one": None, "two": "Briefly.", "three": None},
    }
    assert compare([runs[0].path, runs[2].path]).asked_otherwise == {}


def test_evaluations_by_name_were_asked_as_they_say_themselves(tmp_path: Path) -> None:
    runs = [run_with(tmp_path / name, ["right"]) for name in ("one", "two", "older")]
    for run, suffix in zip(runs, ("Briefly.", None, None), strict=True):
        elsewhere = run.evaluations / "receipts"
        elsewhere.mkdir(parents=True)
        write_jsonl(elsewhere / "predictions.jsonl", read_jsonl(run.predictions))
        if run != runs[2]:
            asked = {"evaluation": {"max_new_tokens": 6, "prompt_suffix": suffix}}
            (elsewhere / "summary.json").write_text(json.dumps(asked))
    asked_with(runs[1], max_new_tokens=24)  # of its own evaluation
    found = compare([run.path for run in runs], name="receipts")
    assert found.asked_otherwise == {"evaluation.prompt_suffix": {"one": "Briefly.", "two": None}}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"[1]", "predictions.jsonl:2: is no object"),
        (b'{"where": "\xff"}', "predictions.jsonl:2: is not JSON"),
        (b'{"where": "a:1", "question": "", "references": [], "base": ""}', "'adapter'"),
    ],
)
def test_a_broken_line_of_answers_is_told_by_its_number(
    line: bytes, told: str, tmp_path: Path
) -> None:
    one, other = (run_with(tmp_path / name, ["right"]) for name in ("one", "other"))
    with other.predictions.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(RunDirError, match=re.escape(told)):
        compare([one.path, other.path])


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    one = run_with(tmp_path / "one", ["right"]).path
    other = run_with(tmp_path / "other", ["right"], file="elsewhere.jsonl").path
    with pytest.raises(RunDirError, match="two runs or more"):
        compare([one])
    with pytest.raises(RunDirError, match="given twice"):
        compare([one, one])
    with pytest.raises(DataError, match="judged on no row in common"):
        compare([one, other])
    (other / "evaluation" / "predictions.jsonl").unlink()
    with pytest.raises(RunDirError, match="holds no answers; get them with: finetune eval"):
        compare([one, other])
    with pytest.raises(RunDirError, match="no such run"):
        compare([one, tmp_path / "nowhere"])


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = [run_with(tmp_path / part / "run", ["right"]).path for part in ("a", "b")]
    assert list(compare(paths).measured) == ["base", *map(str, paths)]
