"""Evaluation in training and after it: against one row at a time, the library's own loss, and runs
that nothing interrupted.
"""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from data_formats.chat import parse_chat
from data_formats.formats import FORMATS
from finetune import evaluate, preparation
from finetune.arguments import training_arguments
from finetune.asking import HeldOut, KeptAnswers, ask_rows, batches_of, with_suffix
from finetune.cli import app
from finetune.data.collate import collate
from finetune.data.examples import Encoder
from finetune.data.images import ImageAccess
from finetune.data.render import Renderer
from finetune.data.sources import Row
from finetune.errors import DataError, RecipeError, RunDirError
from finetune.metrics import measure
from finetune.model.loss import sum_losses
from finetune.recipe import EvaluationSection, load_recipe
from finetune.resuming import out_of_patience
from finetune.rundir import RunDir, read_json, read_jsonl, write_jsonl
from finetune.sides import Side
from finetune.suites import SUITES
from finetune.train import train
from tests.commands import TORCHRUN, run
from tests.conftest import chat_row, noise, write_dataset, write_rows
from tests.hub_server import Hub, Repo
from tests.test_formats import TYPICAL

QUIET = Console(quiet=True)
EAGER = {"learning_rate": 0.02, "warmup_ratio": 0.0}  # so that a few steps change answers


def run_of(recipe: Path, overrides: Sequence[str] = (), **options: Any) -> RunDir:
    loaded = load_recipe(recipe, overrides)
    assert train(loaded, "it", console=QUIET, results=QUIET, **options) == 0
    return RunDir(loaded.output.dir)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of four steps, judged on four rows."""
    folder = tmp_path_factory.mktemp("made")
    return run_of(write_dataset(folder, training=EAGER))


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Seven questions of different lengths, every other one with a picture."""
    found = []
    for i in range(7):
        files = [f"{i}.png"] * (i % 2)
        for file in files:
            noise(56 + 28 * i, 56, seed=i).save(tmp_path / file)
        row = parse_chat(chat_row("What is written?" + " Or not?" * i, f"A{i}", *files))
        found.append(Row(f"rows.jsonl:{i + 1}", row, ImageAccess(tmp_path)))
    return found


def side_of(model: Any, encoder: Encoder, asked: list[int] | None = None, most: int = 99) -> Side:
    """A model that counts the batches it is asked, and dies after `most` of them."""

    class Opened:
        def __enter__(self) -> Any:
            return model

        def __exit__(self, *_: Any) -> None:
            return None

    def encode_prompt(row: Row, pictures: Any = None) -> Any:
        if asked is not None:
            if len(asked) == most:
                raise KeyboardInterrupt
            asked.append(int(row.where.rpartition(":")[2]))
        return Encoder.encode_prompt(encoder, row, pictures)

    watched = replace(encoder)
    object.__setattr__(watched, "encode_prompt", encode_prompt)
    return Side(lambda: Opened(), watched, "a side")


def held_out(rows: list[Row], encoder: Encoder) -> HeldOut:
    lengths = np.array([len(encoder.encode(row).input_ids) for row in rows])
    return HeldOut(rows, lengths, np.arange(len(rows)))


def ask(side: Side, asked: HeldOut, folder: Path | None = None, **settings: Any) -> Any:
    kept = KeptAnswers(folder, "question") if folder else None
    section = EvaluationSection(max_new_tokens=6, **settings)
    return ask_rows(side, asked, section, QUIET, "side", kept)


def test_answers_and_losses_of_batches_are_those_of_single_rows(
    nano_model: Any, encoder: Encoder, rows: list[Row]
) -> None:
    asked, side = held_out(rows, encoder), side_of(nano_model, encoder)
    alone = ask(side, asked, batch_size=1)
    several: list[dict[str, Any]] = [{"batch_size": 7}, {"batch_size": 3}, {"batch_tokens": 200}]
    for settings in several:
        together = ask(side, asked, **settings)
        assert [a.text for a in together] == [a.text for a in alone]
        assert [a.loss for a in together] == pytest.approx([a.loss for a in alone], abs=1e-4)
    assert len({answer.text for answer in alone}) > 2


def test_the_loss_is_that_of_the_library(
    nano_model: Any, encoder: Encoder, rows: list[Row]
) -> None:
    for row in rows[:4]:
        batch = collate([encoder.encode(row)], encoder.processor, encoder.family)
        with torch.inference_mode():
            expected = nano_model(**batch).loss
        ((loss, count),) = sum_losses(nano_model, batch).tolist()
        assert count == (batch["labels"][:, 1:] != -100).sum()
        assert loss / count == pytest.approx(float(expected), rel=1e-5)


def turns(*said: str, trained: Sequence[bool] = (), **last: Any) -> Row:
    """Question and answer in turn; `trained` says of each answer whether it is learnt."""
    pairs = zip(said[::2], said[1::2], strict=True)
    messages = [message for pair in pairs for message in chat_row(*pair)["messages"]]
    for message, is_learnt in zip(messages[1::2], trained, strict=False):
        message["train"] = is_learnt
    messages[-1] |= last
    return Row("rows.jsonl:1", parse_chat({"messages": messages}), ImageAccess(Path()))


SAID = ("Read it.", "four and one", "The total?", "5")


def loss_after_prompt(model: Any, encoder: Encoder, row: Row) -> tuple[float, int]:
    """Summed over what follows the prompt up to the end of the turn, of the library's own logits;
    and how many tokens that is.
    """
    prompt, example = encoder.encode_prompt(row).input_ids, encoder.encode(row)
    ids, start = torch.tensor(example.input_ids), len(prompt)
    assert example.input_ids[:start] == prompt
    end_of_turn = encoder.processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    stop = example.input_ids.index(end_of_turn, start) + 1
    with torch.inference_mode():
        logits = model(input_ids=ids[None]).logits[0, start - 1 : stop - 1]
    return float(torch.nn.functional.cross_entropy(logits, ids[start:stop], reduction="sum")), (
        stop - start
    )


@pytest.mark.parametrize("trained", [(), (True, False), (False, True)])
def test_the_loss_is_of_the_last_answer_whichever_turns_are_learnt(
    nano_model: Any, encoder: Encoder, trained: Sequence[bool]
) -> None:
    row = turns(*SAID, trained=trained)
    (answer,) = ask(side_of(nano_model, encoder), held_out([row], encoder))
    loss, num_tokens = loss_after_prompt(nano_model, encoder, row)
    assert (answer.num_tokens, num_tokens) == (3, 3)  # a space, 5, the end of the turn
    assert answer.loss == pytest.approx(loss, rel=1e-4)


def test_the_loss_of_a_row_of_one_turn_is_that_of_its_learnt_tokens(
    nano_model: Any, encoder: Encoder, rows: list[Row]
) -> None:
    answers = ask(side_of(nano_model, encoder), held_out(rows, encoder), batch_size=1)
    for row, answer in zip(rows, answers, strict=True):
        batch = collate([encoder.encode(row)], encoder.processor, encoder.family)
        assert [[answer.loss, answer.num_tokens]] == sum_losses(nano_model, batch).tolist()


def test_the_loss_is_of_the_row_s_own_answer_where_others_count_as_right_too(
    nano_model: Any, encoder: Encoder
) -> None:
    row, several = turns(*SAID), turns(*SAID, references=["five", "5.0"])
    alone, beside = (
        ask(side_of(nano_model, encoder), held_out([each], encoder))[0] for each in (row, several)
    )
    assert beside == alone


@pytest.mark.parametrize("trained", [(), (True, True, False)])
def test_the_loss_is_of_the_last_answer_where_turns_were_dropped(
    nano_model: Any, encoder: Encoder, trained: Sequence[bool]
) -> None:
    row, left = turns("Long? " * 20, "yes", *SAID, trained=trained), turns(*SAID)
    whole = len(encoder.encode(row).input_ids)
    dropping = replace(encoder, max_tokens=whole - 1, overlong="drop_turns")
    (answer,) = ask(side_of(nano_model, dropping), held_out([row], dropping))
    (expected,) = ask(side_of(nano_model, encoder), held_out([left], encoder))
    assert answer == expected


def test_a_last_answer_that_cannot_be_told_from_its_prompt_has_no_loss(
    nano_model: Any, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a tokenizer makes one token of both: only `train: false` lets such a row be used."""
    stock = Renderer._start_of_answer  # pyright: ignore[reportPrivateUsage]

    def start_of_answer(self: Any, conversation: Any, plans: Any, i: int, *others: Any) -> Any:
        return None if i == 3 else stock(self, conversation, plans, i, *others)

    monkeypatch.setattr(Renderer, "_start_of_answer", start_of_answer)
    row = turns(*SAID, trained=(True, False))
    (answer,) = ask(side_of(nano_model, encoder), held_out([row], encoder))
    assert (answer.loss, answer.num_tokens) == (0.0, 0)
    changed = replace(row, conversation=turns(*SAID).conversation)
    with pytest.raises(DataError, match="are one token"):
        ask(side_of(nano_model, encoder), replace(held_out([row], encoder), rows=[changed]))


def test_the_longest_are_asked_first_and_never_more_than_the_budget_holds() -> None:
    num_tokens = np.array([10, 90, 50, 50, 10, 10])
    settings = EvaluationSection(max_new_tokens=10, batch_size=3, batch_tokens=120)
    order = np.argsort(-num_tokens, kind="stable").tolist()
    # 100 leave no room for another; two of 60 fill it; of 20 there would be six
    assert list(batches_of(order, num_tokens, settings)) == [[1], [2, 3], [0, 4, 5]]
    alone = EvaluationSection(max_new_tokens=10, batch_tokens=5)
    assert [len(batch) for batch in batches_of(order, num_tokens, alone)] == [1] * 6


def test_answers_of_a_killed_process_are_not_asked_for_again(
    nano_model: Any, encoder: Encoder, rows: list[Row], tmp_path: Path
) -> None:
    asked = held_out(rows, encoder)
    expected = ask(side_of(nano_model, encoder), asked, batch_size=2)
    first: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        ask(side_of(nano_model, encoder, first, most=5), asked, tmp_path / "kept", batch_size=2)
    (file,) = (tmp_path / "kept").iterdir()
    with file.open("a") as torn:
        torn.write('{"key": "a side:question", "row": 0, "te')
    again: list[int] = []
    found = ask(side_of(nano_model, encoder, again), asked, tmp_path / "kept", batch_size=2)
    assert sorted(first[:4] + again) == [1, 2, 3, 4, 5, 6, 7]  # the fifth row's batch was lost
    assert found == expected
    nothing: list[int] = []
    assert ask(side_of(nano_model, encoder, nothing), asked, tmp_path / "kept") == expected
    assert nothing == []
    other = replace(side_of(nano_model, encoder, nothing), key="another")
    ask(other, asked, tmp_path / "kept")
    assert len(nothing) == 7


def test_answers_of_a_version_whose_loss_was_of_every_learnt_turn_are_not_mixed_in(
    nano_model: Any, encoder: Encoder, rows: list[Row], tmp_path: Path
) -> None:
    kept = {"key": "a side:question", "text": "", "loss": 9.0, "num_tokens": 37, "views": []}
    write_rows(tmp_path / "0.jsonl", [kept | {"row": number} for number in range(len(rows))])
    asked: list[int] = []
    ask(side_of(nano_model, encoder, asked), held_out(rows, encoder), tmp_path)
    assert len(asked) == len(rows)


def test_a_suffix_stands_at_the_end_of_the_last_question(encoder: Encoder, rows: list[Row]) -> None:
    brief = "Give a very brief answer."
    row = with_suffix(rows[3], brief)
    prompt = encoder.processor.tokenizer.decode(encoder.encode_prompt(row).input_ids)
    plain = encoder.processor.tokenizer.decode(encoder.encode_prompt(rows[3]).input_ids)
    question = rows[3].conversation.messages[0].text
    assert prompt == plain.replace(question, f"{question}\n{brief}")
    assert prompt != plain
    assert with_suffix(rows[3], None) is rows[3]
    two = parse_chat({"messages": chat_row("One?", "1")["messages"] * 2})
    changed = with_suffix(replace(rows[0], conversation=two), brief).conversation
    assert [brief in message.text for message in changed.messages] == [False, False, True, False]


def test_training_logs_what_the_judging_finds(made: RunDir) -> None:
    last = [line for line in read_jsonl(made.metrics) if "eval_loss" in line][-1]
    adapter = read_json(made.summary)["adapter"]
    assert last["eval_loss"] == pytest.approx(adapter["loss"], rel=1e-4)
    assert last["eval_perplexity"] == pytest.approx(math.exp(last["eval_loss"]))
    for name in ("anls", "exact_match"):
        assert last[f"eval_{name}"] == pytest.approx(adapter[name])
    losses = [row["scores"]["adapter"]["loss"] for row in read_jsonl(made.predictions)]
    assert len(set(losses)) == 4


def test_the_held_out_loss_is_of_tokens_and_not_of_batches(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = dataset(num_eval=3, evaluation={"batch_size": 2, "rows_in_training": 0})
    lines = read_jsonl(tmp_path / "eval.jsonl")
    lines[2]["messages"][1]["content"] = "an answer that is much longer than the others are"
    write_jsonl(tmp_path / "eval.jsonl", lines)
    run = run_of(recipe)
    last = [line for line in read_jsonl(run.metrics) if "eval_loss" in line][-1]
    assert last["eval_loss"] == pytest.approx(read_json(run.summary)["adapter"]["loss"], rel=1e-4)
    assert "eval_anls" not in last


def weights_of(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


DIVERGING = {"learning_rate": 3.0, "warmup_ratio": 0.0, "scheduler": "constant"}


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_ends_with_the_weights_of_its_best_evaluation(
    dataset: Callable[..., Path], tmp_path: Path, finished: bool
) -> None:
    training = EAGER | {"max_steps": 3, "save_steps": 1, "keep_checkpoints": 3}
    evaluation = {"every_steps": 1, "load_best": True, "rows_in_training": 0}
    recipe = dataset(training=training, evaluation=evaluation)
    lines = read_jsonl(tmp_path / "eval.jsonl")
    for line in lines:  # what is learnt makes it ever less likely
        line["messages"][1]["content"] = "something else altogether"
    write_jsonl(tmp_path / "eval.jsonl", lines)
    run = run_of(recipe)
    losses = {m["step"]: m["eval_loss"] for m in read_jsonl(run.metrics) if "eval_loss" in m}
    best = min(losses, key=lambda step: losses[step])
    assert best != 3, losses
    assert read_json(run.summary)["best_step"] == best
    assert weights_of(run.adapter) == weights_of(run.checkpoints / f"checkpoint-{best}")
    assert read_json(run.summary)["adapter"]["loss"] == pytest.approx(losses[best], rel=1e-4)
    if finished:  # killed in its evaluation
        before = weights_of(run.adapter)
        (run.adapter / "adapter_model.safetensors").unlink()
        run_of(recipe, resume=True)
        assert weights_of(run.adapter) == before
        assert read_json(run.summary)["best_step"] == best


def test_a_run_without_a_better_evaluation_stops(dataset: Callable[..., Path]) -> None:
    training = DIVERGING | {"max_steps": 9, "save_steps": 1}
    evaluation = {"every_steps": 1, "patience": 2, "best_metric": "exact_match"}
    recipe = dataset(training=training, evaluation=evaluation)
    run = run_of(recipe)
    steps = [m["step"] for m in read_jsonl(run.metrics) if "eval_loss" in m]
    assert steps == [1, 2, 3]  # nothing is ever right, so the first stays the best
    run_of(recipe, resume=True)
    assert [m["step"] for m in read_jsonl(run.metrics) if "eval_loss" in m] == steps


RISING, FALLING = [0.1, 0.2, 0.3], [0.3, 0.2, 0.1]


@pytest.mark.parametrize(
    ("metric", "figures", "ends"),
    [
        ("anls", RISING, False),
        ("anls", FALLING, True),
        ("anls", [0.2, 0.3, 0.1], False),  # one evaluation since the best
        ("anls", [0.3, 0.3, 0.3], True),  # as good is no better
        ("cer", RISING, True),
        ("cer", FALLING, False),
        ("loss", RISING, True),
        ("loss", FALLING, False),
        ("loss", [], False),
    ],
)
def test_patience_ends_with_two_evaluations_that_are_no_better(
    metric: str, figures: list[float], ends: bool
) -> None:
    log: list[dict[str, float]] = [{f"eval_{metric}": figure} for figure in figures]
    log[1:1] = [{"loss": 9.0}, {"eval_wer": 9.0}]  # lines of training and of other metrics
    settings: dict[str, Any] = {"metrics": ["anls", "cer"], "best_metric": metric}
    assert out_of_patience(log, EvaluationSection(**settings, patience=2)) is ends
    assert not out_of_patience(log, EvaluationSection(**settings))


@pytest.mark.parametrize(("metric", "greater"), [("anls", True), ("cer", False), ("loss", False)])
def test_the_best_checkpoint_is_sought_where_the_metric_points(
    dataset: Callable[..., Path], tmp_path: Path, metric: str, greater: bool
) -> None:
    evaluation = {"metrics": ["anls", "cer"], "best_metric": metric, "load_best": True}
    recipe = load_recipe(dataset(evaluation=evaluation))
    found = training_arguments(recipe, RunDir(tmp_path / "run"), num_eval_rows=4)
    assert (found.metric_for_best_model, found.greater_is_better) == (metric, greater)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["evaluation.load_best=true"], r"set training\.save_steps: 2, as evaluation\.every_steps"),
        (["evaluation.patience=1", "evaluation.best_metric=cer"], "cer is not measured"),
        (
            [
                "evaluation.patience=1",
                "evaluation.best_metric=anls",
                "evaluation.rows_in_training=0",
            ],
            "asks for none",
        ),
        (["evaluation.patience=1", "data.eval=[]"], "needs held-out rows"),
        (["evaluation.metrics=[anl]"], "did you mean 'anls'"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(
    dataset: Callable[..., Path], settings: list[str], told: str
) -> None:
    recipe = dataset(training={"save_steps": 3})
    with pytest.raises(RecipeError, match=told):
        load_recipe(recipe, settings)


def test_figures_on_other_rows_leave_those_of_the_run_alone(made: RunDir, tmp_path: Path) -> None:
    before = made.summary.read_bytes(), made.predictions.read_bytes()
    noise(56, 56).save(tmp_path / "x.png")
    write_rows(tmp_path / "other.jsonl", [chat_row("What?", "A1", "x.png")] * 2)
    asked = evaluate.Asked(data=[tmp_path / "other.jsonl"], metrics=["cer"])
    done = evaluate.evaluate(made.path, asked, console=QUIET)
    assert done.folder == made.evaluations / "other"
    assert set(done.figures["adapter"]) == {"cer", "loss", "perplexity"}
    assert done.figures["num_eval_rows"] == 2
    assert read_json(done.folder / "summary.json")["name"] == "other"
    assert len(read_jsonl(done.folder / "predictions.jsonl")) == 2
    assert (made.summary.read_bytes(), made.predictions.read_bytes()) == before
    assert sorted(path.name for path in made.evaluations.iterdir()) == ["other"]
    asked = evaluate.Asked(settings=["evaluation.max_rows=1"], name="one")
    assert evaluate.evaluate(made.path, asked, console=QUIET).figures["num_eval_rows"] == 1


def test_all_rows_are_those_that_the_training_has_checked(
    made: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are not checked again, as the first ones of them alone are."""
    cut: list[int] = []
    stock = preparation._first_rows  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(
        preparation, "_first_rows", lambda *given: cut.append(given[1]) or stock(*given)
    )
    for number, asked in ((4, "4"), (9, "9"), (3, "3")):
        settings = [f"evaluation.max_rows={number}"]
        evaluate.evaluate(made.path, evaluate.Asked(settings=settings, name=asked), console=QUIET)
    assert cut == [3]


@pytest.mark.parametrize(
    ("metrics", "told"),
    [("anls,foo", "--metrics: foo: no such metric"), (" , ", "--metrics: no metric given")],
)
@pytest.mark.parametrize("verb", ["eval", "compare", "score"])
def test_metrics_that_the_command_line_names_are_refused_as_its_own(
    made: RunDir, verb: str, metrics: str, told: str
) -> None:
    before = made.predictions.read_bytes()
    files = {"eval": [made.path], "compare": [made.path] * 2, "score": [made.predictions]}
    arguments = [verb, *map(str, files[verb]), "--metrics", metrics]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, RecipeError)
    assert str(error).startswith(told)
    assert made.predictions.read_bytes() == before


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change every row of a file in its place."""
    rows = read_jsonl(path)
    for row in rows:
        change(row)
    write_rows(path, rows)


def reword(row: dict[str, Any]) -> None:
    row["messages"][0]["content"][-1]["text"] = "And what is this?"


def allow_more(row: dict[str, Any]) -> None:
    row["messages"][-1]["references"] = ["A1", "another"]


@pytest.mark.parametrize("change", [reword, allow_more])
def test_figures_of_rows_that_have_changed_are_not_written_over(
    made: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]
) -> None:
    """In the same file, or in one of the same name in another folder."""
    asked = evaluate.Asked(data=["other.jsonl"], base_only=True, name=f"rows-{change.__name__}")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "other.jsonl", [chat_row("What?", "A1")] * 2)
        monkeypatch.chdir(tmp_path / name)
        evaluate.evaluate(made.path.resolve(), asked, console=QUIET)  # the same rows, so again
    rewrite(tmp_path / "there" / "other.jsonl", change)
    with pytest.raises(RecipeError, match="holds figures of other rows; give these a folder"):
        evaluate.evaluate(made.path.resolve(), asked, console=QUIET)


def test_figures_of_a_version_that_knew_no_digest_of_rows_are_written_anew(made: RunDir) -> None:
    asked = evaluate.Asked(base_only=True, name="older")
    file = evaluate.evaluate(made.path, asked, console=QUIET).folder / "summary.json"
    digest = (summary := read_json(file)).pop("rows_sha256")
    file.write_text(json.dumps(summary))
    evaluate.evaluate(made.path, asked, console=QUIET)
    assert read_json(file)["rows_sha256"] == digest


BROKEN = chat_row("What is this?", "A", "nowhere.png")


def with_bad_rows(folder: Path, *numbers: int) -> str:
    """Seven held-out rows of which those of these numbers, from 1, cannot be used."""
    rows = [chat_row(f"What is {i}?", f"A{i}") for i in range(1, 8)]
    for number in numbers:
        rows[number - 1] = BROKEN
    write_rows(folder / "rows.jsonl", rows)
    return str(folder / "rows.jsonl")


def asked_rows(run: RunDir, file: str, *settings: str) -> list[str]:
    asked = evaluate.Asked(data=[file], base_only=True, name="few", settings=settings)
    shutil.rmtree(run.evaluations / "few", ignore_errors=True)
    done = evaluate.evaluate(run.path, asked, console=QUIET)
    return [row["question"] for row in read_jsonl(done.folder / "predictions.jsonl")]


def test_rows_after_the_last_one_asked_are_not_looked_at(made: RunDir, tmp_path: Path) -> None:
    file, few = with_bad_rows(tmp_path, 5), "evaluation.max_rows=3"
    assert asked_rows(made, file, few) == ["What is 1?", "What is 2?", "What is 3?"]
    with pytest.raises(DataError, match=r"rows\.jsonl:5"):
        asked_rows(made, file, "evaluation.max_rows=5")
    with pytest.raises(DataError, match=r"rows\.jsonl:5"):
        asked_rows(made, file)


def test_as_many_usable_rows_are_asked_where_bad_ones_are_left_out(
    made: RunDir, tmp_path: Path
) -> None:
    skip = ["evaluation.max_rows=3", "data.bad_rows=skip"]
    file = with_bad_rows(tmp_path, 1, 2, 3, 5)
    assert asked_rows(made, file, *skip) == ["What is 4?", "What is 6?", "What is 7?"]
    file = with_bad_rows(tmp_path, 2, 3, 4, 5, 7)
    assert asked_rows(made, file, *skip) == ["What is 1?", "What is 6?"]


def test_the_first_rows_of_several_files_are_those_of_the_first_file(
    made: RunDir, tmp_path: Path
) -> None:
    file = with_bad_rows(tmp_path, 7)
    write_rows(tmp_path / "more.jsonl", [chat_row("More?", "yes"), BROKEN])
    asked = evaluate.Asked(
        data=[tmp_path / "more.jsonl", file],
        settings=["evaluation.max_rows=4", "data.bad_rows=skip"],
        name="several",
    )
    done = evaluate.evaluate(made.path, asked, console=QUIET)
    questions = [row["question"] for row in read_jsonl(done.folder / "predictions.jsonl")]
    assert questions == ["More?", "What is 1?", "What is 2?", "What is 3?"]


def test_merged_weights_are_judged_beside_base_and_adapter(made: RunDir) -> None:
    done = evaluate.evaluate(made.path, evaluate.Asked(merged=True), console=QUIET)
    rows = read_jsonl(made.predictions)
    assert [row["merged"] for row in rows] == [row["adapter"] for row in rows]
    merged, adapter = done.figures["merged"], done.figures["adapter"]
    assert merged == pytest.approx(adapter, rel=1e-4)
    assert merged["loss"] != done.figures["base"]["loss"]
    assert "merged" in read_json(made.summary)
    evaluate.evaluate(made.path, console=QUIET)
    summary, (row, *_) = read_json(made.summary), read_jsonl(made.predictions)
    for sides in (summary, summary["intervals"], row, row["scores"]):
        assert "adapter" in sides
        assert "merged" not in sides  # figures without answers, of another evaluation


def test_the_base_is_judged_alone(made: RunDir) -> None:
    done = evaluate.evaluate(made.path, evaluate.Asked(base_only=True), console=QUIET)
    assert done.figures["base"] == pytest.approx(read_json(made.summary)["base"], rel=1e-5)
    assert done.figures["adapter"] == {}
    assert [sorted(row["scores"]) for row in read_jsonl(done.folder / "predictions.jsonl")] == [
        ["base"]
    ] * 4


@pytest.mark.parametrize(
    ("asked", "error", "told"),
    [
        (evaluate.Asked(suite="docvq"), RecipeError, "none of docvqa, textvqa"),
        (evaluate.Asked(suite="docvqa", data=["x.jsonl"]), RecipeError, "exclude each other"),
        (evaluate.Asked(data=["nowhere.jsonl"]), DataError, r"nowhere\.jsonl"),
        (evaluate.Asked(metrics=["anl"]), RecipeError, "did you mean 'anls'"),
        (evaluate.Asked(settings=["training.seed=1"]), RecipeError, "only settings of evaluation"),
        (evaluate.Asked(settings=["data.eval_seed=1"]), RecipeError, "trained ones among them"),
        (evaluate.Asked(settings=["data.eval_fraction=0.5"]), RecipeError, "give other rows with"),
        (
            evaluate.Asked(data=["x.csv"], settings=["data.eval=[{path: x.csv}]"]),
            RecipeError,
            r"^data\.eval and --data exclude each other",
        ),
        (
            evaluate.Asked(suite="docvqa", settings=["data.eval.0.format=columns"]),
            RecipeError,
            r"^data\.eval\.0\.format and --suite exclude each other",
        ),
        (evaluate.Asked(name="../x"), RecipeError, "the name of one folder"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    made: RunDir, asked: evaluate.Asked, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        evaluate.evaluate(made.path, asked, console=QUIET)
    with pytest.raises(RunDirError, match="no such run"):
        evaluate.evaluate(made.path / "nowhere", console=QUIET)


def write_table(folder: Path) -> Path:
    """Of columns that only a setting can give their meaning."""
    noise(56, 56).save(folder / "x.png")
    file = folder / "table.csv"
    file.write_text("picture,asked,answers\nx.png,What?,A1\n")
    return file


COLUMNS = "format: columns, columns: {image: picture, question: asked, answer: answers}"


@pytest.mark.parametrize("drawn", [False, True])
def test_rows_of_a_table_are_named_by_a_setting(made: RunDir, tmp_path: Path, drawn: bool) -> None:
    """Also where the run's own held-out rows were drawn from those trained on."""
    run, file = RunDir(shutil.copytree(made.path, tmp_path / "run")), write_table(tmp_path)
    recipe = yaml.safe_load(run.recipe.read_text())
    if drawn:
        recipe["data"] |= {"eval": [], "eval_fraction": 0.5}
        run.recipe.write_text(json.dumps(recipe))
    setting = f"data.eval=[{{path: {file}, {COLUMNS}}}]"
    asked = evaluate.Asked(settings=[setting], base_only=True, name="table")
    done = evaluate.evaluate(run.path, asked, console=QUIET)
    (row,) = read_jsonl(done.folder / "predictions.jsonl")
    assert (row["question"], row["references"]) == ("What?", ["A1"])


def test_a_table_whose_columns_data_cannot_name_is_told_with_the_command_that_can(
    made: RunDir, tmp_path: Path
) -> None:
    file = write_table(tmp_path)
    with pytest.raises(DataError) as told:
        evaluate.evaluate(made.path, evaluate.Asked(data=[file]), console=QUIET)
    assert "set format: columns, columns: {image: picture" in str(told.value)
    assert str(told.value).endswith(
        f"\n--data takes no such setting; give it with the rows: finetune eval {made.path} "
        f"'data.eval=[{{path: \"{file}\", ...}}]' --name table"
    )
    with pytest.raises(DataError) as told:
        evaluate.evaluate(made.path, evaluate.Asked(data=["nowhere.jsonl"]), console=QUIET)
    assert "data.eval=" not in str(told.value)


def test_a_metric_whose_package_is_missing_is_refused_before_a_row_is_asked(
    made: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(shutil.copytree(made.path, tmp_path / "copied"))
    text = run.recipe.read_text()
    run.recipe.write_text(text.replace("- anls\n", "- anls\n  - cider\n"))
    assert "cider" in load_recipe(run.recipe).evaluation.metrics
    monkeypatch.setattr("finetune.packages.find_spec", lambda name: None)
    monkeypatch.setattr(evaluate, "judge", lambda *_: pytest.fail("asked"))
    with pytest.raises(RecipeError, match=r"evaluation\.metrics: cider: needs the package pycoco"):
        evaluate.evaluate(run.path, console=QUIET)
    with pytest.raises(RecipeError, match="--metrics: cider: needs the package pycocoevalcap"):
        evaluate.evaluate(run.path, evaluate.Asked(metrics=["cider"]), console=QUIET)


def test_figures_of_other_settings_are_not_written_over(made: RunDir) -> None:
    asked = evaluate.Asked(metrics=["cer"], base_only=True, name="kept")
    first = evaluate.evaluate(made.path, asked, console=QUIET)
    again = evaluate.evaluate(made.path, asked, console=QUIET)
    assert again.figures == first.figures
    with pytest.raises(RecipeError, match="holds figures of other evaluation settings"):
        evaluate.evaluate(made.path, replace(asked, metrics=["wer"]), console=QUIET)
    assert "cer" in read_json(first.folder / "summary.json")["base"]


def test_rows_as_long_as_are_allowed_are_asked_with_a_suffix(
    nano_model: Any, encoder: Encoder, rows: list[Row]
) -> None:
    longest = max(len(encoder.encode(row).input_ids) for row in rows)
    encoder = replace(encoder, max_tokens=longest)
    suffix = "Give a very brief answer, in a word or two."
    answers = ask(side_of(nano_model, encoder), held_out(rows, encoder), prompt_suffix=suffix)
    assert len(answers) == len(rows)


# The first process looks late at what is known, when the other could have answered already
LATE = """
import os, sys, time
from finetune import asking
from finetune.cli import main
known = asking.KeptAnswers.known
def late(self, side):
    time.sleep(2 * (os.environ["RANK"] == "0"))
    return known(self, side)
asking.KeptAnswers.known = late
main()
"""


@pytest.mark.slow
def test_two_processes_write_what_one_does(made: RunDir, tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    evaluate.evaluate(made.path, console=QUIET)
    before = [made.summary.read_text(), made.predictions.read_text()]
    done = run(*TORCHRUN, str(tmp_path / "late.py"), "eval", str(made.path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("difference") == 1  # one process prints
    figures = [json.loads(before[0]), read_json(made.summary)]
    for who in ("base", "adapter"):
        assert figures[1][who] == pytest.approx(figures[0][who], rel=1e-5)
    answers = [[json.loads(line)["adapter"] for line in text.splitlines()] for text in before[1:]]
    assert [row["adapter"] for row in read_jsonl(made.predictions)] == answers[0]
    assert not made.partial.exists()


CARD = """---
configs:
- config_name: DocVQA
  data_files:
  - split: validation
    path: DocVQA/validation-*
---
"""


@pytest.mark.slow
def test_a_suite_is_fetched_asked_and_stood_beside_the_paper(made: RunDir, tmp_path: Path) -> None:
    pictures = []
    for seed in range(3):
        file = io.BytesIO()
        noise(84, 56, seed).save(file, format="PNG")
        pictures.append({"bytes": file.getvalue(), "path": None})
    rows = [
        {
            "questionId": str(i),
            "question": "What?",
            "image": each,
            "docId": i,
            "answers": ["A", "B"],
        }
        for i, each in enumerate(pictures)
    ]
    out = io.BytesIO()
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(out)
    files = {"README.md": CARD.encode()}
    files["DocVQA/validation-00000-of-00001.parquet"] = out.getvalue()
    with Hub() as hub:
        hub.repos["datasets/lmms-lab/DocVQA"] = Repo(private=False, branches={"main": files})
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-m", "finetune", "eval", str(made.path), "--suite", "docvqa"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0.740 of idefics2-8b on test" in done.stdout
    found = read_json(made.evaluations / "docvqa" / "summary.json")
    assert found["num_eval_rows"] == 3
    assert found["evaluation"]["prompt_suffix"] == "Give a very brief answer."
    assert "anls" in found["adapter"]


# Of each suite a row as its dataset on the Hub has them, a right answer and a wrong one.
ASKED = {
    "docvqa": (TYPICAL["docvqa"][0], "1.8.93", "1969"),
    "textvqa": (TYPICAL["textvqa"][0] | {"answers": ["nokia"] * 9 + ["x"]}, "Nokia", "x"),
    "vqav2": (TYPICAL["vqav2"][0], "at table", "up"),
    "chartqa": (TYPICAL["chartqa, by lmms-lab"][0], "14.5", "15"),
    "mmmu": (TYPICAL["mmmu"][0], "(B) it's not", "A"),
}


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_s_metric_is_for_its_rows(name: str) -> None:
    suite, (row, right, wrong) = SUITES[name], ASKED[name]
    references = FORMATS[suite.source.format].parse(row).references()
    figures = measure([right, wrong], [references] * 2, [suite.metric]).scores()
    assert figures[0][suite.metric] == 1
    assert figures[1][suite.metric] < 1


# huggingface.co/blog/idefics2, the line of 8B with split images: 43.0 MMMU, 73.0 TextVQA, 81.2
# VQAv2 and 74.0 DocVQA, of the splits that the columns name.
@pytest.mark.parametrize(
    ("name", "split", "paper", "paper_split"),
    [
        ("docvqa", "validation", 0.740, "test"),
        ("textvqa", "validation", 0.730, "val"),
        ("vqav2", "validation", 0.812, "test-dev"),
        ("chartqa", "test", None, ""),
        ("mmmu", "validation", 0.430, "val"),
    ],
)
def test_a_suite_stands_beside_the_figure_of_the_paper(
    name: str, split: str, paper: float | None, paper_split: str
) -> None:
    suite = SUITES[name]
    assert (suite.source.split, suite.paper, suite.paper_split) == (split, paper, paper_split)
    said = f"{suite.metric} {paper:.3f} of idefics2-8b on {paper_split}" if paper else "no figure"
    assert said in suite.beside()
