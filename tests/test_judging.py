"""Answers and figures, against generation one row at a time and against the untouched base."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from data_formats.chat import Conversation, parse_chat
from finetune import judging
from finetune.asking import Answer, HeldOut
from finetune.data.examples import Encoder
from finetune.data.images import ImageAccess
from finetune.data.sources import Row
from finetune.families import FAMILIES
from finetune.judging import Judgement, judge
from finetune.model.adapters import add_adapter
from finetune.model.generate import generate_answers
from finetune.recipe import AdapterSection, EvaluationSection, Recipe
from finetune.rundir import RunDir, read_jsonl
from finetune.sides import Side, sides_of_adapted
from tests.conftest import chat_row

QUESTIONS = [
    "What is written?",
    "Read line 1.",
    "And?",
    "What is the total of all of this, please?",
]


@pytest.fixture
def rows(tmp_path: Path, picture: Any) -> list[Row]:
    """Prompts of different lengths, with none, one and two pictures."""
    rows = []
    for i, question in enumerate(QUESTIONS):
        files = [f"{i}-{k}.png" for k in range(i % 3)]
        for k, file in enumerate(files):
            picture(56 + 28 * k, 42 + 14 * i, seed=i).save(tmp_path / file)
        row = parse_chat(chat_row(question, f"answer {i}", *files))
        rows.append(Row(f"eval.jsonl:{i + 1}", row, ImageAccess(tmp_path)))
    return rows


def sides_of(adapted: Any, encoder: Encoder, folder: Path) -> dict[str, Side]:
    recipe = {"model": {"name": "nano"}, "data": {"train": [{"hub": "user/name"}]}}
    sides = sides_of_adapted(adapted, encoder, Recipe.model_validate(recipe), folder)
    assert sides.adapter
    return {"base": sides.base, "adapter": sides.adapter}


@pytest.fixture
def sides(nano_model: Any, encoder: Encoder, tmp_path: Path) -> dict[str, Side]:
    """Base and an adapter that changes nothing yet."""
    adapted = add_adapter(nano_model, FAMILIES["idefics2"], AdapterSection(), "nano")
    return sides_of(adapted, encoder, tmp_path)


def judged(
    sides: dict[str, Side], rows: list[Row], settings: EvaluationSection, run: RunDir
) -> Judgement:
    lengths = np.array([len(sides["base"].encoder.encode(row).input_ids) for row in rows])
    asked = HeldOut(rows, lengths, np.arange(len(rows)))
    return judge(sides, asked, settings, run.evaluation, run.partial, Console(quiet=True))


def answering(*given: list[str]) -> Any:
    """In the place of `ask_rows`: the answers of each side, in the order of asking."""
    sides = iter(given)
    return lambda *_: [Answer(text, 2.0, 4, []) for text in next(sides)]


def test_answers_of_a_batch_are_those_given_one_by_one(
    nano_model: Any, encoder: Encoder, rows: list[Row]
) -> None:
    prompts = [encoder.encode_prompt(row) for row in rows]
    together, alone = (
        generate_answers(
            nano_model,
            encoder.processor,
            encoder.family,
            prompts,
            max_new_tokens=8,
            batch_size=batch_size,
        )
        for batch_size in (4, 1)
    )
    assert together == alone
    assert len(set(alone)) > 1


def test_the_base_answers_without_the_adapter_and_the_adapter_with_it(
    nano_model: Any, encoder: Encoder, rows: list[Row], tmp_path: Path
) -> None:
    prompts = [encoder.encode_prompt(row) for row in rows]
    options: dict[str, Any] = {"max_new_tokens": 8, "batch_size": 2}
    untouched = generate_answers(nano_model, encoder.processor, encoder.family, prompts, **options)
    adapted = add_adapter(nano_model, FAMILIES["idefics2"], AdapterSection(), "nano")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros, which would change nothing
            torch.nn.init.normal_(parameter, std=0.3)
    changed = generate_answers(adapted, encoder.processor, encoder.family, prompts, **options)
    assert changed != untouched
    run = RunDir(tmp_path / "run")
    settings = EvaluationSection(**options)
    judgement = judged(sides_of(adapted, encoder, tmp_path), rows, settings, run)
    lines = read_jsonl(run.predictions)
    assert [line["base"] for line in lines] == untouched
    assert [line["adapter"] for line in lines] == changed
    assert [line["question"] for line in lines] == QUESTIONS
    assert [len(line["images"]) for line in lines] == [0, 1, 2, 0]
    assert [[len(views) for views in line["views"]] for line in lines] == [[], [1], [1, 1], []]
    assert lines[1]["views"] == [[[0, 0, 56, 56, 56, 56]]]
    counts = [line["num_learnt_tokens"] for line in lines]
    for who in ("base", "adapter"):
        summed = sum(line["scores"][who]["loss"] * n for line, n in zip(lines, counts, strict=True))
        assert summed / sum(counts) == pytest.approx(judgement.figures()[who]["loss"])
    assert judgement.num_rows == 4


def test_every_figure_of_a_row_of_several_turns_is_of_its_last_answer(
    sides: dict[str, Side], rows: list[Row], tmp_path: Path
) -> None:
    first, last = chat_row("Read it.", '{"code": 7}'), chat_row("What is the total?", "5")
    several = parse_chat({"messages": first["messages"] + last["messages"]})
    last["messages"][-1]["train"] = False
    untrained = parse_chat({"messages": first["messages"] + last["messages"]})
    asked = [replace(rows[0], conversation=each) for each in (several, untrained)]
    run = RunDir(tmp_path / "run")
    judged(sides, asked, EvaluationSection(max_new_tokens=4), run)
    trained, shown = read_jsonl(run.predictions)
    assert trained == shown
    assert trained["references"] == ["5"]
    assert trained["num_learnt_tokens"] == 3  # a space, 5, the end of the turn


def test_figures_are_means_over_the_rows_judged(
    sides: dict[str, Side],
    rows: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = (["answer 0", "x", "x"], ["answer 0", "answer 1", "y"])
    monkeypatch.setattr("finetune.judging.ask_rows", answering(*given))
    settings = EvaluationSection(metrics=("exact_match",), max_rows=3)
    figures = judged(sides, rows, settings, RunDir(tmp_path)).figures()
    likely = {"loss": 0.5, "perplexity": pytest.approx(math.exp(0.5))}
    assert figures["base"] == {"exact_match": pytest.approx(1 / 3), **likely}
    assert figures["adapter"] == {"exact_match": pytest.approx(2 / 3), **likely}
    assert figures["num_eval_rows"] == 3
    assert figures["differences"]["exact_match"]["verdict"] == "cannot tell"


def test_any_of_the_references_counts_as_right(
    sides: dict[str, Side],
    rows: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    *before, last = rows[0].conversation.messages
    several = replace(last, references=("answer 0", "first answer"))
    row = replace(rows[0], conversation=Conversation((*before, several)))
    monkeypatch.setattr("finetune.judging.ask_rows", answering(["first answer"], ["another"]))
    run, settings = RunDir(tmp_path), EvaluationSection(metrics=("exact_match",))
    figures = judged(sides, [row], settings, run).figures()
    assert (figures["base"]["exact_match"], figures["adapter"]["exact_match"]) == (1.0, 0.0)
    assert read_jsonl(run.predictions)[0]["references"] == ["answer 0", "first answer"]


def test_pictures_are_kept_of_the_first_rows_of_each_kind(
    sides: dict[str, Side],
    rows: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All but the last wrong before and after: the report shows that one, too."""
    monkeypatch.setattr("finetune.judging.CARDS_PER_STATUS", 2)
    many = [rows[1]] * 5
    given = (["wrong"] * 4 + ["answer 1"], ["wrong"] * 5)
    monkeypatch.setattr("finetune.judging.ask_rows", answering(*given))
    run, settings = RunDir(tmp_path / "run"), EvaluationSection(metrics=("exact_match",))
    judged(sides, many, settings, run)
    kept = [len(line.get("images", [])) for line in read_jsonl(run.predictions)]
    assert kept == [1, 1, 0, 0, 1]


def test_a_picture_is_kept_as_it_is_unless_that_takes_more_room(picture: Any) -> None:
    drawn, photograph = Image.new("RGB", (300, 200), "white"), picture(300, 200)
    drawn.paste("black", (10, 10, 60, 20))
    ending, encoded = judging.encoded(drawn)
    assert ending == "png"
    assert Image.open(io.BytesIO(encoded)).tobytes() == drawn.tobytes()
    ending, encoded = judging.encoded(photograph)
    assert ending == "jpg"
    assert Image.open(io.BytesIO(encoded)).format == "JPEG"
