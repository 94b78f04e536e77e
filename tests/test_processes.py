"""Training in two processes: as in one, with half of the batch each."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from finetune.data.collate import collate
from finetune.data.streaming import ExampleStream
from finetune.errors import RecipeError
from finetune.model.load import load_model
from finetune.recipe import Recipe, load_recipe
from finetune.requirements import refuse_a_lonely_launch
from finetune.rundir import RunDir, read_json, read_jsonl
from finetune.training import prepare
from tests.conftest import chat_row, noise, write_rows

FINETUNE = [sys.executable, "-m", "finetune"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FIGURES = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "samples")


def run(*command: str, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """A command in a group of its own, ended whole where it hangs."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def figures(run: RunDir) -> list[dict[str, Any]]:
    return [{k: line[k] for k in FIGURES if k in line} for line in read_jsonl(run.metrics)]


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
def test_texts_in_one_process_and_pictures_in_the_other_end_and_learn_alike(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    """Steps of a picture and a text, of two texts, and a last one that is short."""
    training = {"max_steps": 5, "batch_size": 1, "logging_steps": 1}
    recipe = dataset(num_train=5, num_eval=0, adapter={"dropout": 0.0}, training=training)
    noise(56, 56, seed=3).save(tmp_path / "only.png")
    rows = [
        chat_row(f"Read it, {i}.", f"A{i}", *(["only.png"] if i == 2 else [])) for i in range(5)
    ]
    write_rows(tmp_path / "train.jsonl", rows)
    two, one = RunDir(tmp_path / "two"), RunDir(tmp_path / "one")
    done = run(*FINETUNE, "train", str(recipe), f"output.dir={two.path}", "--processes", "2")
    assert done.returncode == 0, done.stderr
    done = run(*FINETUNE, "train", str(recipe), f"output.dir={one.path}", "training.batch_size=2")
    assert done.returncode == 0, done.stderr
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


@pytest.mark.slow
def test_a_signal_ends_all_processes_with_a_checkpoint(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    training = {"max_steps": 3000, "batch_size": 1, "logging_steps": 1, "save_steps": 1000}
    recipe = dataset(num_eval=0, training=training)
    process = subprocess.Popen(
        [*FINETUNE, "train", str(recipe), "--processes", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = RunDir(tmp_path / "run").metrics
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 75, messages
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert 0 < state["global_step"] < 3000


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
    done = run(*FINETUNE, "train", str(recipe), *settings, "--processes", "2", timeout=120)
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
