"""Training in two processes: as in one, with half of the batch each."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from finetune.data.collate import collate
from finetune.data.streaming import ExampleStream
from finetune.errors import RecipeError, RunDirError
from finetune.model.load import load_model
from finetune.recipe import Recipe, dump_recipe, load_recipe
from finetune.requirements import refuse_a_lonely_launch
from finetune.resuming import (
    Share,
    and_now,
    other_processes,
    refuse_another_run,
    refuse_other_processes,
    shares_of,
)
from finetune.rundir import RunDir, read_json, read_jsonl, write_json, write_text
from finetune.training import prepare
from tests.commands import FINETUNE, TORCHRUN, figures, run, train_here, write_texts_and_one_picture
from tests.conftest import chat_row, write_rows


@pytest.mark.slow
def test_two_processes_with_half_the_batch_each_train_as_one_with_all_of_it(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    training = {"max_steps": 6, "batch_size": 2, "logging_steps": 1, "save_steps": 2}
    choice = {"load_best": True, "rows_in_training": 0}
    recipe = dataset(
        num_train=9, num_eval=3, adapter={"dropout": 0.0}, training=training, evaluation=choice
    )
    one, two = RunDir(tmp_path / "one"), RunDir(tmp_path / "two")
    alone = run(*FINETUNE, "train", str(recipe), f"output.dir={one.path}", "training.batch_size=4")
    assert alone.returncode == 0, alone.stderr
    both = run(*FINETUNE, "train", str(recipe), f"output.dir={two.path}", "--processes", "2")
    assert both.returncode == 0, both.stderr
    ours, theirs = figures(two), figures(one)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
    weights = [load_file(each.adapter / "adapter_model.safetensors") for each in (one, two)]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 1e-4, name
    for side in ("base", "adapter"):
        assert read_json(two.summary)[side] == pytest.approx(read_json(one.summary)[side], rel=1e-3)
    assert both.stdout.count("report:") == 1  # one process prints
    assert both.stderr.count("training ") == alone.stderr.count("training ")


@pytest.mark.slow
def test_torchrun_and_processes_are_the_same_and_go_on_with_each_other(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    training = {"max_steps": 4, "batch_size": 1, "logging_steps": 1, "save_steps": 2}
    recipe = dataset(num_train=9, num_eval=2, adapter={"dropout": 0.2}, training=training)
    unbroken, broken = RunDir(tmp_path / "unbroken"), RunDir(tmp_path / "run")
    done = run(*TORCHRUN, "-m", "finetune", "train", str(recipe), f"output.dir={unbroken.path}")
    assert done.returncode == 0, done.stderr
    done = run(*TORCHRUN, "-m", "finetune", "train", str(recipe))
    assert done.returncode == 0, done.stderr
    for path in sorted((broken.checkpoints / "checkpoint-4").rglob("*"), reverse=True):
        path.unlink()
    done = run(*FINETUNE, "train", str(recipe), "--processes", "2", "--resume")
    assert done.returncode == 0, done.stderr
    assert "checkpoint-4: is damaged" in done.stderr
    assert figures(broken) == figures(unbroken)
    file = "adapter_model.safetensors"
    assert (broken.adapter / file).read_bytes() == (unbroken.adapter / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_in_another_number_of_processes_with_the_same_steps(
    dataset: Callable[..., Path], tmp_path: Path, before: int, after: int
) -> None:
    """Begun, and gone on with from the middle of its second epoch, of three: by the recipe's rows a
    step, each step has the rows of the unbroken run.
    """
    training = {"max_steps": None, "epochs": 3, "batch_size": 4, "keep_checkpoints": 9}
    recipe = dataset(num_train=11, num_eval=0, adapter={"dropout": 0.0}, training=training)
    broken, unbroken = RunDir(tmp_path / "run"), RunDir(tmp_path / "unbroken")
    train_here(recipe, f"output.dir={unbroken.path}")
    settings = {1: [], 2: ["training.batch_size=2", "--processes", "2"]}
    if before == 1:
        train_here(recipe)
    else:
        done = run(*FINETUNE, "train", str(recipe), *settings[before])
        assert done.returncode == 0, done.stderr
    for step in (6, 8, 9):
        shutil.rmtree(broken.checkpoints / f"checkpoint-{step}")
    done = run(*FINETUNE, "train", str(recipe), *settings[after], "--resume")
    assert done.returncode == 0, done.stderr
    words = {1: "1 process", 2: "2 processes"}
    assert f"was begun in {words[before]} and goes on in {after}: from where" in done.stderr
    assert "dropout draws anew, and sums are made in another order" in done.stderr
    assert "checkpoints/checkpoint-4" in done.stderr
    ours, theirs = figures(broken), figures(unbroken)
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert ours[-1]["samples"] == 33
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)


def begun(recipe: Recipe, folder: Path, *numbers: int) -> RunDir:
    """A run directory of a run in so many processes, and then in others."""
    found = RunDir(folder / "begun")
    for number in numbers:
        go_on(recipe, found, number)
    return found


def go_on(recipe: Recipe, run: RunDir, num_processes: int) -> None:
    """Write what `train` does."""
    before = shares_of(run) if run.environment.is_file() else []
    shares = and_now(before, Share.of(recipe, num_processes))
    write_json(
        run.environment, {"shares": [asdict(each) for each in shares], "rows_sha256": "rows"}
    )
    write_text(run.recipe, dump_recipe(recipe))


EPOCHS = ("training.max_steps=null", "training.epochs=2")


@pytest.mark.parametrize(
    ("settings", "before", "after", "told"),
    [
        ([], 1, 2, r"begun in 1 process with 4 rows a step.* in 2 processes set .*batch_size=2"),
        (["training.batch_size=2"], 2, 1, "in 1 process set training.gradient_accumulation=2"),
        (["training.batch_size=3"], 2, 4, r"with 6 rows a step, .*: resume in 2$"),
        (
            ["training.batch_size=2", "training.gradient_accumulation=3"],
            1,
            2,
            r"in 2 processes set training\.batch_size=1",
        ),
        (
            ["training.batch_size=1", "training.gradient_accumulation=6"],
            4,
            3,
            r"in 3 processes set training\.gradient_accumulation=8",
        ),
        (
            ["training.batch_size=3", "training.gradient_accumulation=2"],
            2,
            6,
            r"set training\.batch_size=1$",
        ),
        (
            ["training.batch_size=2", "training.gradient_accumulation=2"],
            2,
            8,
            r"set training\.batch_size=1 training\.gradient_accumulation=1",
        ),
        (
            ["training.batch_size=null", "training.batch_tokens=500"],
            1,
            2,
            "another number of steps",
        ),
    ],
)
def test_epochs_go_on_in_as_many_rows_a_step_alone_and_the_settings_are_named(
    dataset: Callable[..., Path],
    tmp_path: Path,
    settings: list[str],
    before: int,
    after: int,
    told: str,
) -> None:
    recipe = load_recipe(dataset(), [*EPOCHS, *settings])
    with pytest.raises(RunDirError, match=told):
        refuse_other_processes(
            recipe, begun(recipe, tmp_path, before), after, same_number_of_steps=True
        )
    steps = load_recipe(dataset(), settings)  # max_steps
    refuse_other_processes(steps, begun(steps, tmp_path, before), after, same_number_of_steps=False)


def test_a_process_has_another_share_of_a_step_in_another_number_of_them_alone(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    whole, half = (load_recipe(dataset(), [*EPOCHS, f"training.batch_size={n}"]) for n in (4, 2))
    doubled = load_recipe(
        dataset(), [*EPOCHS, "training.batch_size=2", "training.gradient_accumulation=2"]
    )
    run_of_one = begun(whole, tmp_path, 1)
    refuse_another_run(whole, "rows", run_of_one, 1)
    refuse_another_run(half, "rows", run_of_one, 2)
    for recipe, number in ((half, 1), (doubled, 1), (doubled, 2)):
        with pytest.raises(RunDirError, match=r"other settings \(training\.batch_size"):
            refuse_another_run(recipe, "rows", run_of_one, number)
    # killed between the two files that tell what it goes on with
    go_on(half, run_of_one, 2)
    write_text(run_of_one.recipe, dump_recipe(whole))
    refuse_another_run(half, "rows", run_of_one, 2)
    refuse_another_run(whole, "rows", run_of_one, 1)


def test_a_run_remembers_all_numbers_of_processes_that_it_went_on_in(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = load_recipe(dataset())
    (warning,) = other_processes(recipe, begun(recipe, tmp_path, 2, 1, 1), 1, same_rows=True)
    assert "was begun in 2 processes and goes on in 1: from where" in warning
    assert "more or fewer rows" in warning  # by max_steps, with the same batch_size
    (warning,) = other_processes(recipe, RunDir(tmp_path / "begun"), 2, same_rows=True)
    assert "was begun in 2 processes, went on in 1 and goes on in 2: from where" in warning
    half = load_recipe(dataset(), ["training.batch_size=2"])
    (warning,) = other_processes(half, begun(recipe, tmp_path / "x", 1), 2, same_rows=False)
    assert "was begun in 1 process and goes on in 2" in warning
    assert "steps have other rows" in warning
    assert not list(other_processes(recipe, begun(recipe, tmp_path / "y", 1), 1, same_rows=True))


@pytest.mark.slow
def test_texts_in_one_process_and_pictures_in_the_other_end_and_learn_alike(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    training = {"max_steps": 5, "batch_size": 1, "logging_steps": 1}
    recipe = dataset(num_train=5, num_eval=0, adapter={"dropout": 0.0}, training=training)
    write_texts_and_one_picture(tmp_path)
    two, one = RunDir(tmp_path / "two"), RunDir(tmp_path / "one")
    done = run(*FINETUNE, "train", str(recipe), f"output.dir={two.path}", "--processes", "2")
    assert done.returncode == 0, done.stderr
    train_here(recipe, f"output.dir={one.path}", "training.batch_size=2")
    losses = [[line["loss"] for line in figures(each)] for each in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_what_all_processes_find_is_told_once(dataset: Callable[..., Path], tmp_path: Path) -> None:
    recipe = dataset(training={"max_steps": 2})
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("{\n")
    done = run(*FINETUNE, "train", str(recipe), "--processes", "2")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "train.jsonl:" in done.stderr
    assert "Traceback" not in done.stderr


def begun_in_two(recipe: Path, metrics: Path) -> subprocess.Popen[str]:
    """A training in two processes that has logged a step."""
    process = subprocess.Popen(
        [*FINETUNE, "train", str(recipe), "--processes", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.1)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("num_eval", [0, 60])
def test_a_signal_ends_all_processes_with_a_checkpoint(
    dataset: Callable[..., Path], tmp_path: Path, num_eval: int
) -> None:
    """Between steps, or where most of the time goes into evaluations, in the middle of one."""
    training = {"max_steps": 3000, "batch_size": 1, "logging_steps": 1, "save_steps": 1000}
    evaluation = {"every_steps": 1, "batch_size": 1, "rows_in_training": 0}
    recipe = dataset(num_eval=num_eval, training=training, evaluation=evaluation)
    metrics = RunDir(tmp_path / "run").metrics
    process = begun_in_two(recipe, metrics)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 75, messages
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert 0 < state["global_step"] < 3000
    last = read_jsonl(metrics)[-1]
    assert last["step"] == state["global_step"]
    assert "eval_loss" not in last


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a picture vanishes", "one is killed"])
def test_what_ends_one_process_is_all_that_is_told(
    dataset: Callable[..., Path], tmp_path: Path, fault: str
) -> None:
    """The other meets a lost connection, and ends without a word of its own."""
    training = {"max_steps": 3000, "batch_size": 1, "logging_steps": 1, "save_steps": 1000}
    recipe = dataset(num_eval=0, training=training)
    process = begun_in_two(recipe, RunDir(tmp_path / "run").metrics)
    if fault == "a picture vanishes":
        (tmp_path / "train3.png").unlink()
        code, told = 2, "train3.png"
    else:
        psutil.Process(process.pid).children()[1].kill()
        code, told = 137, "was killed by SIGKILL"
    _, messages = process.communicate(timeout=300)
    assert process.returncode == code, messages
    assert messages.count("error: ") == 1, messages
    assert told in messages
    assert "Traceback" not in messages
    if code == 2:  # or perhaps the one is killed that writes it
        # by the first process its own error is told, or that the other was lost
        page = RunDir(tmp_path / "run").report.read_text()
        ends = ("Ended by an error", "By the loss of another of its processes", "By SIGTERM")
        assert any(end in page for end in ends)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "x"], "for 2 proc"),
        (["python", "/bin/accelerate-launch", "--num_processes=4", "-m", "x"], "for 4 processes"),
        (["/bin/accelerate", "launch", "--num_processes", "1", "-m", "x"], None),
        (["/bin/accelerate", "launch", "-m", "x"], None),
        (["/bin/bash"], None),
    ],
)
def test_a_launch_that_started_one_process_of_several_is_refused(
    words: list[str], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Parent:
        def cmdline(self) -> list[str]:
            return words

    monkeypatch.setattr("psutil.Process.parent", lambda self: Parent())
    if told is None:
        refuse_a_lonely_launch()
        return
    with pytest.raises(RecipeError, match=told):
        refuse_a_lonely_launch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse_a_lonely_launch()


def shards(folder: Path) -> str:
    """The dataset's training rows in two files, the third row of each broken, as a setting that
    streams them.
    """
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    half = len(lines) // 2
    for number, part in enumerate((lines[:half], lines[half:])):
        part[2] = "{\n"
        (folder / f"part-{number}.jsonl").write_text("".join(part))
    return f"data.train=[{{path: {folder}/part-*.jsonl, streaming: true}}]"


def loss_of_first_step(recipe: Recipe, num_processes: int) -> float:
    """On the rows that come first in each process."""
    prepared = prepare(recipe, Console(quiet=True))
    examples = []
    for rank in range(num_processes):
        stream = ExampleStream(
            prepared.streams,
            prepared.encoder,
            seed=recipe.training.seed,
            skip_bad=True,
            skip_overlong=True,
            rank=rank,
            num_ranks=num_processes,
        )
        examples += [item.example for item in islice(stream, recipe.training.batch_size)]
    batch = collate(examples, prepared.encoder.processor, prepared.encoder.family)
    with torch.no_grad():
        return load_model(recipe.model)[0](**batch).loss.item()


@pytest.mark.slow
def test_streams_in_two_processes_have_rows_of_their_own_and_go_on_mid_shard(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    training = {
        **{"max_steps": 5, "batch_size": 2, "logging_steps": 1, "save_steps": 3},
        "num_workers": 1,
    }
    recipe = dataset(num_train=14, num_eval=2, adapter={"dropout": 0.2}, training=training)
    settings = [shards(tmp_path), "data.bad_rows=skip"]
    command = [*FINETUNE, "train", str(recipe), *settings, "--processes", "2"]
    both = run(*command)
    assert both.returncode == 0, both.stderr
    found, file = RunDir(tmp_path / "run"), "adapter_model.safetensors"
    unbroken, lines = figures(found), read_jsonl(found.skipped)
    weights = (found.adapter / file).read_bytes()
    assert [line["samples"] for line in unbroken if "loss" in line] == [4, 8, 12, 16, 20]
    expected = loss_of_first_step(load_recipe(recipe, settings), num_processes=2)
    assert unbroken[0]["loss"] == pytest.approx(expected, rel=1e-4)
    wheres = sorted(line["where"].rpartition("/")[2] for line in lines)
    assert wheres == ["part-0.jsonl:3", "part-1.jsonl:3"]
    summary = read_json(found.summary)
    assert summary["num_train_rows"] == 20
    num_left_out = summary["num_skipped_rows"]
    assert f"{20 + num_left_out} rows taken = 20 trained + {num_left_out} left" in both.stderr

    for path in sorted((found.checkpoints / "checkpoint-5").rglob("*"), reverse=True):
        path.unlink()
    done = run(*command, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    assert (found.adapter / file).read_bytes() == weights
    assert figures(found) == unbroken
    assert read_jsonl(found.skipped) == lines
    assert read_json(found.summary)["num_train_rows"] == 20
    assert read_json(found.summary)["num_skipped_rows"] == num_left_out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad_rows", "rows", "told"),
    [
        ("skip", ["good", "bad"] * 4, "no usable row for loading process 1 of 2"),
        ("skip", ["good"], "the stream has no row for process 1 of 2; train in fewer processes"),
        ("stop", ["good", "good", "good", "bad"], "train.jsonl:4: "),
    ],
)
def test_a_process_that_cannot_go_on_with_a_stream_ends_all_with_its_words(
    dataset: Callable[..., Path], tmp_path: Path, bad_rows: str, rows: list[str], told: str
) -> None:
    recipe = dataset(num_eval=0, training={"max_steps": 50, "batch_size": 1})
    good, bad = chat_row("What?", "A"), {"messages": []}
    write_rows(tmp_path / "train.jsonl", [good if row == "good" else bad for row in rows])
    settings = ["data.train.0.streaming=true", "data.train.0.format=chat"]
    settings.append(f"data.bad_rows={bad_rows}")
    done = run(*FINETUNE, "train", str(recipe), *settings, "--processes", "2")
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    # the others say it, too, where the first takes long to end
    (error,) = {line.removeprefix("error: ").removeprefix("process 1: ") for line in errors}
    assert told in error
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_read_what_either_has_put_into_the_vision_cache(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    training = {"max_steps": None, "epochs": 2, "batch_size": 2, "vision_cache": "1GiB"}
    recipe = dataset(num_train=12, num_eval=0, adapter={"dropout": 0.0}, training=training)
    one, two = RunDir(tmp_path / "a" / "one"), RunDir(tmp_path / "b" / "two")
    alone = run(*FINETUNE, "train", str(recipe), f"output.dir={one.path}", "training.batch_size=4")
    assert alone.returncode == 0, alone.stderr
    both = run(*FINETUNE, "train", str(recipe), f"output.dir={two.path}", "--processes", "2")
    assert both.returncode == 0, both.stderr
    for done in (alone, both):
        assert "vision cache: 12 views read, 12 computed and kept" in done.stderr
    for line, expected in zip(figures(two), figures(one), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
