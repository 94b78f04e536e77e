"""Budgets, grouping by cost and gathered pictures in a whole run, end to end on nano."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune.data.collate import Collator
from finetune.data.gathering import Limits
from finetune.errors import RecipeError
from finetune.fitting import smaller_batches
from finetune.planning import Planner
from finetune.recipe import Recipe, TrainingSection, load_recipe, recipe_warnings
from finetune.rundir import RunDir, read_jsonl, write_jsonl
from finetune.train import train
from finetune.training import epoch_batches, prepare
from tests.conftest import chat_row, noise, write_rows

SETTINGS: dict[str, list[str]] = {
    "tokens": ["batch_tokens=400", "group_by_cost=true"],
    "patches": ["batch_patches=60", "share_images=off"],
    "rows of one picture": ["batch_size=3", "group_by_cost=true"],
    "packed": ["batch_tokens=400", "packing=true", "group_by_cost=true"],
}


@pytest.fixture
def pages(dataset: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    """Two epochs of eight pictures of two sizes with one to four questions each, 20 rows, answered
    at unequal length; the third question shows the next picture, too.
    """

    def make(*training: str) -> Recipe:
        recipe = dataset(adapter={"dropout": 0.2})
        rows = []
        for page in range(8):
            noise(28 * (2 + page % 2), 56, seed=page).save(tmp_path / f"page{page}.png")
            for question in range(page % 4 + 1):
                asked, answer = f"Line {question}?", "word " * (page * 3 + question)
                others = [f"page{(page + 1) % 8}.png"] if question == 2 else []
                rows.append(chat_row(asked, answer + "end", f"page{page}.png", *others))
        write_rows(tmp_path / "train.jsonl", rows)
        settings = ["epochs=2", "gradient_accumulation=2", *training]
        return load_recipe(recipe, [f"training.{setting}" for setting in settings])

    return make


def losses(run: RunDir) -> list[tuple[int, float, int]]:
    return [(m["step"], m["loss"], m["samples"]) for m in read_jsonl(run.metrics) if "loss" in m]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_takes_the_steps_that_were_planned_and_ends_the_same_when_resumed(
    pages: Callable[..., Recipe], tmp_path: Path, name: str
) -> None:
    """From the first step of the second epoch on; every row is counted."""
    planner = Planner.of_recipe(pages(*SETTINGS[name]), Console(quiet=True), "cpu")
    steps = planner.num_steps()
    recipe = pages(f"save_steps={steps // 2 + 1}", "keep_checkpoints=9", *SETTINGS[name])
    quiet: dict[str, Any] = {"console": Console(quiet=True), "results": Console(quiet=True)}
    train(recipe, **quiet)
    run = RunDir(tmp_path / "run")
    whole = losses(run)
    assert whole[-1][::2] == (steps, 40)
    adapter = (run.adapter / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run.checkpoints / f"checkpoint-{steps}")
    write_jsonl(run.metrics, [m for m in read_jsonl(run.metrics) if m["step"] <= steps // 2 + 1])
    assert train(recipe, resume=True, **quiet) == 0
    assert losses(run) == whole
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == adapter


def test_rows_of_one_picture_are_in_one_batch(pages: Callable[..., Recipe]) -> None:
    """20 rows of 8 pictures: in batches of 4, each picture is in one batch alone."""
    for share, gathered in (("auto", True), ("off", False)):
        recipe = pages("batch_size=4", f"share_images={share}")
        prepared = prepare(recipe, Console(quiet=True))
        assert prepared.train
        batches = epoch_batches(prepared)
        rows = prepared.train.rows
        for epoch in range(3):
            pictures = [
                (next(iter(rows[row].conversation.images())).source, number)
                for number, batch in enumerate(batches.of_epoch(epoch))
                for row in batch
            ]
            assert (len(set(pictures)) == 8) == gathered


@pytest.mark.parametrize("picture_first", [True, False])
def test_a_batch_holds_what_its_budget_says_wherever_the_picture_stands(
    dataset: Callable[..., Path], tmp_path: Path, picture_first: bool
) -> None:
    """Questions before the picture differ, so that its rows have nothing in common to share."""
    recipe_path = dataset()
    noise(112, 84).save(tmp_path / "page.png")
    rows = []
    for number in range(24):
        question = {"type": "text", "text": f"{number} " * (1 + number % 5) + "?"}
        content = [{"type": "image", "image": "page.png"}, question]
        user = {"role": "user", "content": content if picture_first else content[::-1]}
        rows.append({"messages": [user, {"role": "assistant", "content": f"A{number}"}]})
    write_rows(tmp_path / "train.jsonl", rows)
    recipe = load_recipe(recipe_path, ["training.batch_tokens=600"])
    prepared = prepare(recipe, Console(quiet=True))
    assert prepared.train
    collate = Collator(prepared.encoder, prepared.train.rows)
    batches = epoch_batches(prepared).of_epoch(0)
    sizes = [collate([{"row": row} for row in batch])["input_ids"].numel() for batch in batches]
    assert max(sizes) <= 600
    assert (len(batches) == 1) == picture_first  # which shares what all rows begin with


@pytest.mark.parametrize("name", SETTINGS)
def test_a_dry_run_and_a_plan_tell_of_as_many_rows_a_step(
    pages: Callable[..., Recipe], name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = pages(*SETTINGS[name])
    planner = Planner.of_recipe(recipe, Console(quiet=True), "cpu")
    train(recipe, dry_run=True, console=Console(quiet=True))
    printed = capfd.readouterr().out
    assert f"{planner.rows_per_batch() * 2:.1f} in the mean per device" in printed
    assert f"{planner.num_steps()} on one device" in printed
    assert planner.rows_per_batch() * len(planner.batches) == pytest.approx(20)


def test_the_heaviest_planned_batch_is_as_heavy_as_any_of_an_epoch(
    pages: Callable[..., Recipe],
) -> None:
    recipe = pages("batch_tokens=400", "share_images=off")
    planner = Planner.of_recipe(recipe, Console(quiet=True), "cpu")
    sizes = planner.rows.sizes
    assert sizes
    heaviest = planner.rows.heaviest(Limits(tokens=400))

    def padded(batch: list[int]) -> int:
        return int(sizes.tokens[batch].max()) * len(batch)

    most = max(padded(batch) for epoch in range(9) for batch in planner.batches.of_epoch(epoch))
    assert max(map(padded, heaviest)) >= most


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.batch_tokens=99", "training.batch_size=2"], "set either batch_size, or"),
        (["training.batch_size="], "set batch_size, or batch_tokens or batch_patches"),
        (
            ["training.batch_tokens=99", "data.train.0.streaming=true"],
            "training.batch_tokens: needs the cost of all rows",
        ),
        (
            ["training.batch_patches=99", "data.train.0.streaming=true"],
            "training.batch_patches: needs the cost of all rows",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    dataset: Callable[..., Path], settings: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message.replace(".", r"\.")):
        load_recipe(dataset(), settings)


def test_grouping_is_left_out_of_a_stream_and_told_where_it_was_asked_for(
    dataset: Callable[..., Path],
) -> None:
    settings = ["training.max_steps=2", "data.train.0.streaming=true"]
    told = "training.group_by_cost has no effect on streamed rows"
    assert not [w for w in recipe_warnings(load_recipe(dataset(), settings)) if told in w]
    asked = load_recipe(dataset(), [*settings, "training.group_by_cost=true"])
    assert [w for w in recipe_warnings(asked) if told in w]


def test_a_budget_on_the_command_line_replaces_the_batch_size_of_the_file(
    dataset: Callable[..., Path],
) -> None:
    training = load_recipe(dataset(), ["training.batch_tokens=99"]).training
    assert (training.batch_size, training.batch_tokens) == (None, 99)
    recipe = dataset(training={"batch_size": None, "batch_patches": 9, "batch_tokens": 9})
    training = load_recipe(recipe, ["training.batch_size=3"]).training
    assert (training.batch_size, training.batch_tokens, training.batch_patches) == (3, None, None)


def test_smaller_budgets_take_as_many_more_passes_a_step() -> None:
    training = TrainingSection(batch_tokens=1000, batch_patches=5, gradient_accumulation=3)
    ways = [dict(saving.settings) for saving in smaller_batches(training)]
    assert ways == [
        {
            "training.batch_tokens": 500,
            "training.batch_patches": 2,
            "training.gradient_accumulation": 6,
        },
        {
            "training.batch_tokens": 250,
            "training.batch_patches": 1,
            "training.gradient_accumulation": 12,
        },
    ]
