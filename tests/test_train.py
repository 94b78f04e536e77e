"""`finetune train` and the verbs that read its run, end to end on a few steps."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from finetune.checkpoints import last_whole
from finetune.cli import app, main
from finetune.errors import DataError, FinetuneError, ModelError, RecipeError, RunDirError
from finetune.evaluate import evaluate
from finetune.judging import judge
from finetune.model.generate import generate_answers
from finetune.recipe import load_recipe
from finetune.recipe.copying import copy_recipe
from finetune.rundir import RunDir, read_jsonl, write_jsonl
from finetune.train import train as train_recipe
from finetune.trainer import VisionSFTTrainer
from tests.conftest import chat_row, write_dataset, write_rows

CLOCK = {
    *("seconds", "samples_per_second", "peak_memory_gib"),
    *("eval_runtime", "eval_samples_per_second", "eval_steps_per_second"),
}
FINETUNE = str(Path(sys.executable).parent / "finetune")


def train(recipe: str, overrides: Sequence[str] = (), **options: Any) -> int:
    return train_recipe(load_recipe(recipe, overrides), recipe, **options)


def run_cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FINETUNE, *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, str]:
    """A run by the command itself, and what it printed on standard output."""
    folder = tmp_path_factory.mktemp("finished")
    training = {"learning_rate": 0.02, "warmup_ratio": 0.0}  # so that a few steps change answers
    done = run_cli("train", write_dataset(folder, training=training))
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(RunDir(folder / "run").predictions)
    assert all(row["base"] != row["adapter"] for row in rows), rows
    return RunDir(folder / "run"), done.stdout


def test_a_run_leaves_the_whole_run_directory(finished: tuple[RunDir, str]) -> None:
    run, _ = finished
    left = {path.name for path in run.path.iterdir()}
    assert left == {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "skipped.jsonl",
        "data.json",
        "charts",
        "checkpoints",
        "adapter",
        "evaluation",
        "summary.json",
        "report.html",
        ".lock",
    }
    summary = json.loads(run.summary.read_text())
    assert summary["num_eval_rows"] == 4
    measured = {"anls", "exact_match", "loss", "perplexity"}
    assert set(summary["base"]) == set(summary["adapter"]) == measured
    assert set(summary["differences"]) == measured
    for name in ("first_loss", "last_loss", "train_seconds", "samples_per_second"):
        assert summary[name] > 0
    assert 0.2 < summary["peak_memory_gib"] < 20
    lines = read_jsonl(run.metrics)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    predictions = read_jsonl(run.predictions)
    assert [line["where"].rpartition("/")[2] for line in predictions] == [
        f"eval.jsonl:{i}" for i in (1, 2, 3, 4)
    ]
    assert predictions[1]["references"] == ["A17"]
    assert all((run.evaluation / image).is_file() for p in predictions for image in p["images"])
    assert (run.adapter / "processor_config.json").is_file()


def test_the_command_prints_one_table_and_what_to_try_next(finished: tuple[RunDir, str]) -> None:
    _, printed = finished
    for words in (
        "exact_match",
        "samples per second",
        "peak memory",
        "report.html",
        "finetune chat",
    ):
        assert words in printed


def test_the_adapter_works_in_plain_transformers_and_peft(
    finished: tuple[RunDir, str], tmp_path: Path
) -> None:
    """Loaded and asked without this package, it gives the answers of the run's own evaluation."""
    from finetune.model.load import model_location

    run, _ = finished
    script = Path(__file__).with_name("plain_inference.py")
    done = subprocess.run(
        [sys.executable, script, model_location("nano"), run.path, run.path.parent],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,  # outside the checkout
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert len(answers) == 4
    assert all(plain == ours for plain, ours in answers), answers


def test_eval_gives_the_figures_of_the_run_again(finished: tuple[RunDir, str]) -> None:
    run, _ = finished
    before = (json.loads(run.summary.read_text()), read_jsonl(run.predictions))
    done = run_cli("eval", run.path, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures == {name: before[0][name] for name in figures}
    assert read_jsonl(run.predictions) == before[1]


def test_chat_gives_the_answer_of_the_evaluation(finished: tuple[RunDir, str]) -> None:
    run, _ = finished
    row = read_jsonl(run.predictions)[2]
    done = run_cli("chat", run.path, row["question"], "--image", run.path.parent / "eval2.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == row["adapter"]


def test_report_writes_the_page_again(finished: tuple[RunDir, str]) -> None:
    run, _ = finished
    run.report.unlink()
    done = run_cli("report", run.path)
    assert done.returncode == 0, done.stderr
    assert run.report.is_file()


@pytest.mark.parametrize("whole", [2, 4])
def test_a_resumed_run_ends_as_the_unbroken_one(
    dataset: Callable[..., Path], tmp_path: Path, whole: int
) -> None:
    """Killed after step 5, where the checkpoint of step 4 is whole, or was just being written: it
    goes on in the middle of the second epoch of three steps, or of the first.
    """
    training = {"max_steps": 6, "keep_checkpoints": 9, "logging_steps": 3}
    recipe = dataset(adapter={"dropout": 0.2}, training=training)
    train(str(recipe), [f"output.dir={tmp_path / 'unbroken'}"])
    train(str(recipe))
    broken, unbroken = RunDir(tmp_path / "run"), RunDir(tmp_path / "unbroken")
    shutil.rmtree(broken.checkpoints / "checkpoint-6")
    if whole == 2:
        (broken.checkpoints / "checkpoint-4" / "trainer_state.json").unlink()
    (broken.adapter / "adapter_model.safetensors").unlink()
    write_jsonl(broken.metrics, [m for m in read_jsonl(broken.metrics) if m["step"] <= 5])
    assert train(str(recipe), resume=True) == 0
    assert_same_run(broken, unbroken)


def test_a_run_of_changing_rows_ends_the_same_when_resumed_and_with_more_processes(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    """Pictures enlarged and turns shuffled, each epoch otherwise, the heaviest rows first."""
    options = {"random_upscale": 2.0, "shuffle_turns": True}
    training = {"max_steps": 6, "keep_checkpoints": 9}
    recipe = dataset(adapter={"dropout": 0.2}, data=options, training=training)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["messages"] += [
            *chat_row("more?", "B1")["messages"],
            *chat_row("else?", "C")["messages"],
        ]
    write_rows(tmp_path / "train.jsonl", rows)
    runs = {name: RunDir(tmp_path / name) for name in ("unbroken", "run", "plain", "order")}
    train(str(recipe), [f"output.dir={runs['unbroken'].path}"], worst_first=True)
    train(str(recipe), ["training.num_workers=2"], worst_first=True)
    assert_same_run(runs["run"], runs["unbroken"])
    for step in (3, 4, 6):  # goes on from step 2, within the first epoch, without being told how
        shutil.rmtree(runs["run"].checkpoints / f"checkpoint-{step}", ignore_errors=True)
    write_jsonl(runs["run"].metrics, [m for m in read_jsonl(runs["run"].metrics) if m["step"] < 3])
    assert train(str(recipe), ["training.num_workers=2"], resume=True) == 0
    assert_same_run(runs["run"], runs["unbroken"])
    # and both make a difference
    as_it_is = ["data.random_upscale=1", "data.shuffle_turns=false"]
    train(str(recipe), [*as_it_is, f"output.dir={runs['plain'].path}"], worst_first=True)
    train(str(recipe), [*as_it_is, f"output.dir={runs['order'].path}"])
    last = {read_jsonl(run.metrics)[-2]["loss"] for run in (runs["run"], runs["plain"])}
    first = {read_jsonl(runs[name].metrics)[0]["loss"] for name in ("plain", "order")}
    assert len(last) == len(first) == 2
    # held-out rows are shown as they are: the base model answers them alike
    bases = [json.loads(run.summary.read_text())["base"] for run in runs.values()]
    assert all(base == bases[0] for base in bases)


def test_the_heaviest_rows_first_cannot_be_asked_of_a_begun_run_or_of_a_stream(
    dataset: Callable[..., Path],
) -> None:
    recipe = dataset(num_eval=0, training={"max_steps": 2})
    streamed = ["data.train.0.streaming=true"]
    with pytest.raises(RecipeError, match="--worst-first needs to know all rows"):
        train(str(recipe), streamed, worst_first=True)
    train(str(recipe))
    with pytest.raises(RunDirError, match=r"was begun without --worst-first.*resume without it"):
        train(str(recipe), resume=True, worst_first=True)


def test_a_run_that_was_killed_in_its_evaluation_is_not_trained_further(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = dataset()
    train(str(recipe), [f"output.dir={tmp_path / 'unbroken'}"])
    train(str(recipe))
    broken = RunDir(tmp_path / "run")
    shutil.rmtree(broken.adapter)
    broken.summary.unlink()
    assert train(str(recipe), resume=True) == 0
    assert_same_run(broken, RunDir(tmp_path / "unbroken"))


def assert_same_run(ours: RunDir, theirs: RunDir) -> None:
    file = "adapter_model.safetensors"
    assert (ours.adapter / file).read_bytes() == (theirs.adapter / file).read_bytes()
    keys = ("step", "loss", "eval_loss", "learning_rate", "grad_norm", "samples")
    figures = [
        [{k: line[k] for k in keys if k in line} for line in read_jsonl(run.metrics)]
        for run in (ours, theirs)
    ]
    assert figures[0] == figures[1]
    summaries = [json.loads(run.summary.read_text()) for run in (ours, theirs)]
    for key in ("first_loss", "last_loss", "base", "adapter", "steps"):
        assert summaries[0][key] == summaries[1][key]
    assert summaries[0]["train_seconds"] > 0


def test_resuming_with_another_recipe_is_refused_and_the_settings_named(
    finished: tuple[RunDir, str],
) -> None:
    run, _ = finished
    recipe = str(run.path.parent / "recipe.yaml")
    with pytest.raises(RunDirError, match=r"adapter\.rank"):
        train(recipe, ["adapter.rank=4"], resume=True)


def test_resuming_on_other_rows_is_refused(dataset: Callable[..., Path], tmp_path: Path) -> None:
    recipe = dataset(num_eval=0, training={"max_steps": 2})
    train(str(recipe))
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(RunDirError, match="the rows in the data files"):
        train(str(recipe), resume=True)


def test_brackets_in_questions_are_printed_as_they_are(
    dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = dataset(training={"max_steps": 1})
    row = chat_row("Read [/b] and :cat: 'now'", "A17", "eval0.png")
    write_rows(tmp_path / "eval.jsonl", [row])
    assert train(str(recipe)) == 0
    printed = capsys.readouterr().out
    assert shlex.quote("Read [/b] and :cat: 'now'") in printed


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(
    dataset: Callable[..., Path], tmp_path: Path, number: int, exit_code: int
) -> None:
    recipe = dataset(training={"max_steps": 3000, "save_steps": 1000, "num_workers": 1})
    process = subprocess.Popen(
        [FINETUNE, "train", str(recipe), "adapter.parts=[language,connector]"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (metrics.is_file() and len(read_whole(metrics)) > 2):
        time.sleep(0.1)
    os.killpg(process.pid, number)  # as terminals and jobs do: the loading process gets it, too
    _, messages = process.communicate(timeout=300)
    assert process.returncode == exit_code, messages
    assert "'adapter.parts=[language,connector]' --resume" in messages
    checkpoint = last_whole(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert int(checkpoint.name.rpartition("-")[2]) < 3000
    run = RunDir(tmp_path / "run")
    assert f"By {signal.Signals(number).name}, on" in run.report.read_text()
    assert (run.charts / "loss.png").is_file()


def tell_at(
    moment: str, step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGUSR1
) -> list[str]:
    """Has this process told to stop when training comes to a moment of a step; gives what was still
    done after that.
    """
    done: list[str] = []
    stock = {
        "loss": VisionSFTTrainer.prediction_step,
        "answers": generate_answers,
        "step": VisionSFTTrainer.training_step,
    }
    steps: list[int] = []

    def tell_then(self: Any, *args: Any, **kwargs: Any) -> Any:
        if moment == "step":
            is_there = self.state.global_step == step - 1
        elif moment == "loss":
            is_there = self.state.global_step == step
        else:
            is_there = steps[-1] == step
        if is_there:
            os.kill(os.getpid(), number)
        found = stock[moment](self, *args, **kwargs)
        if is_there:
            done.append(moment)
        return found

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        return stock_loop(self, *args, **kwargs)

    stock_loop = VisionSFTTrainer.evaluation_loop
    monkeypatch.setattr(VisionSFTTrainer, "evaluation_loop", note)
    if moment == "answers":
        monkeypatch.setattr("finetune.asking.generate_answers", tell_then)
    else:
        name = {"loss": "prediction_step", "step": "training_step"}[moment]
        monkeypatch.setattr(VisionSFTTrainer, name, tell_then)
    return done


@pytest.mark.parametrize(
    ("moment", "step", "num_done", "streams"),
    [
        ("answers", 2, 0, False),
        ("loss", 2, 1, False),
        ("step", 2, 1, False),
        ("answers", 6, 0, False),
        ("step", 6, 1, False),
        ("loss", 2, 1, True),
    ],
)
def test_an_evaluation_is_left_on_a_signal_and_made_again(
    dataset: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    step: int,
    num_done: int,
    streams: bool,
) -> None:
    """In its answers, in its losses (of which it has four batches), or just before; the last one of
    a run, too, after which there is no step.
    """
    training = {"max_steps": 6, "save_steps": 2, "keep_checkpoints": 1}
    evaluation = {"load_best": True, "batch_size": 1, "every_steps": 2, "best_metric": "loss"}
    recipe = dataset(adapter={"dropout": 0.2}, training=training, evaluation=evaluation)
    if streams:
        settings = json.loads(recipe.read_text())
        settings["data"]["train"][0]["streaming"] = True
        recipe.write_text(json.dumps(settings))
    train(str(recipe), [f"output.dir={tmp_path / 'unbroken'}"])
    run, unbroken = RunDir(tmp_path / "run"), RunDir(tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        done = tell_at(moment, step, patch)
        assert train(str(recipe)) == 75
        assert len(done) == num_done
    last = last_whole(run.checkpoints)
    assert last
    assert last.name == f"checkpoint-{step}"
    assert not any("eval_loss" in line and line["step"] == step for line in read_jsonl(run.metrics))
    with monkeypatch.context() as patch:  # and once more, while it is made again
        assert not tell_at("answers", step, patch)
        assert train(str(recipe), resume=True) == 75
    assert train(str(recipe), resume=True) == 0
    assert_same_run(run, unbroken)
    evaluated = [
        [{k: v for k, v in line.items() if k not in CLOCK} for line in read_jsonl(each.metrics)]
        for each in (run, unbroken)
    ]
    assert evaluated[0] == evaluated[1]
    best = [json.loads(each.summary.read_text())["best_step"] for each in (run, unbroken)]
    assert best[0] == best[1]


def test_patience_that_ends_in_an_evaluation_made_again_takes_no_further_step(
    dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"max_steps": 8, "save_steps": 2, "learning_rate": 1e-30}
    evaluation = {"patience": 1, "every_steps": 2, "best_metric": "loss"}
    recipe = dataset(training=training, evaluation=evaluation)
    train(str(recipe), [f"output.dir={tmp_path / 'unbroken'}"])
    run, unbroken = RunDir(tmp_path / "run"), RunDir(tmp_path / "unbroken")
    assert read_jsonl(unbroken.metrics)[-1]["step"] == 4
    with monkeypatch.context() as patch:
        tell_at("loss", 4, patch)
        assert train(str(recipe)) == 75
    assert train(str(recipe), resume=True) == 0
    assert_same_run(run, unbroken)


def test_a_run_that_a_bad_step_ends_leaves_a_report_that_says_so(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = dataset(training={"learning_rate": 1e30, "warmup_ratio": 0, "max_steps": 20})
    with pytest.raises(ModelError, match=r"step [23]: "):
        train(str(recipe))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Ended by an error" in page
    assert re.search(r'<p class="lines">step [23]: the loss is', page)
    (link,) = re.findall(r'<a href="(bad_steps/[^"]*)"', page)
    assert (tmp_path / "run" / link).is_file()


def test_a_signal_within_the_last_answers_leaves_a_report(
    dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*_args: Any, **_options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    recipe = dataset(training={"max_steps": 1}, evaluation={"rows_in_training": 0})
    with monkeypatch.context() as patch:
        patch.setattr("finetune.asking.generate_answers", told)
        with pytest.raises(SystemExit) as stop:
            train(str(recipe))
    assert stop.value.code == 75
    run = RunDir(tmp_path / "run")
    assert "By SIGTERM, on" in run.report.read_text()
    assert train(str(recipe), resume=True) == 0
    assert not run.ended.exists()


def test_a_finished_run_is_not_asked_again(
    dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataset(training={"max_steps": 2})
    assert train(str(recipe)) == 0
    run, weights = RunDir(tmp_path / "run"), "adapter_model.safetensors"

    def asks_again() -> tuple[bool, str]:
        """Whether it does, and what is told."""
        asked, told = [], io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr("finetune.train.judge", lambda *_: asked.append(1) or judge(*_))
            console = Console(file=told, width=400)
            assert train(str(recipe), resume=True, console=console, results=console) == 0
        return bool(asked), told.getvalue()

    run.report.unlink()  # killed before it was written
    asked, told = asks_again()
    assert not asked
    assert f"{run.path} is finished; its report: {run.report}" in told
    assert "exact_match" in told
    assert "loading nano" not in told
    assert run.report.is_file()
    evaluate(run.path)  # writes the summary anew
    assert not asks_again()[0]
    # killed before the answers were measured; after the weights were lost, or others took their
    # place; and before the figures were whole
    summary = run.summary.read_text()
    shutil.rmtree(run.evaluation)
    assert asks_again()[0]
    (run.adapter / weights).unlink()
    assert asks_again()[0]
    (run.adapter / weights).write_bytes(b"others")
    assert asks_again()[0]
    run.summary.write_text(summary[: len(summary) // 2])
    assert asks_again()[0]
    run.summary.write_bytes(b"\xff")
    assert asks_again()[0]
    run.summary.unlink()
    evaluate(run.path)  # of a run that was killed in its answers: these figures are not all
    assert asks_again()[0]
    assert not asks_again()[0]
    shutil.rmtree(run.checkpoints)  # for their room
    assert not asks_again()[0]
    lines = read_jsonl(run.metrics)
    write_jsonl(run.metrics, lines[:1])  # begun anew, and killed in its first step
    assert asks_again()[0]


def test_the_table_says_whose_weights_were_judged(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    evaluation = {"every_steps": 1, "load_best": True, "best_metric": "loss"}
    recipe = dataset(training={"max_steps": 2, "save_steps": 1}, evaluation=evaluation)
    told = io.StringIO()
    assert train(str(recipe), results=Console(file=told, width=400)) == 0
    step = json.loads((tmp_path / "run" / "summary.json").read_text())["best_step"]
    assert f"\nweights of step {step}, the best loss " in told.getvalue()


def read_whole(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_a_run_takes_it_over_asks_to_be_started_again(number: int) -> None:
    code = (
        "from finetune.stopping import stop_means_resume_me; stop_means_resume_me()\n"
        "import sys, time; assert 'torch' not in sys.modules; print('on', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept BaseException:\n    pass"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"on\n"
    process.send_signal(number)
    assert process.wait(timeout=120) == 75


def test_the_command_has_signals_ask_so_before_it_does_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("finetune.cli.stop_means_resume_me", lambda: asked.append("so"))
    missing = CliRunner().invoke(app, ["train", "missing.yaml"])
    assert missing.exit_code != 0
    assert asked == ["so"]
    CliRunner().invoke(app, ["train", "missing.yaml", "--dry-run"])
    assert asked == ["so"]


def test_a_run_that_another_process_writes_is_left_to_it(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = dataset(num_eval=0, training={"max_steps": 2})
    train(str(recipe))
    code = (
        "import sys, time; from finetune.rundir import RunDir, RunLock\n"
        "lock = RunLock(RunDir(sys.argv[1])); lock.take(); print('on', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE
    )
    assert holder.stdout
    assert holder.stdout.readline() == b"on\n"
    before = sorted((tmp_path / "run").rglob("*"))
    for resume in (True, False):
        with pytest.raises(RunDirError, match=f"is being written by process {holder.pid} on "):
            train(str(recipe), resume=resume, overwrite=not resume)
    assert sorted((tmp_path / "run").rglob("*")) == before
    holder.kill()
    holder.wait()
    assert train(str(recipe), resume=True) == 0


def test_an_existing_run_is_refused_then_replaced(dataset: Callable[..., Path]) -> None:
    recipe = dataset(num_eval=0, training={"max_steps": 1})
    assert train(str(recipe)) == 0
    with pytest.raises(RunDirError, match=r"--resume.*--overwrite"):
        train(str(recipe))
    assert train(str(recipe), overwrite=True) == 0


def test_only_a_run_and_nothing_else_is_overwritten(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = dataset(num_eval=0, training={"max_steps": 1})
    train(str(recipe))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(RunDirError, match=r"other things than a run \(notes\.txt\)"):
        train(str(recipe), overwrite=True)
    assert (tmp_path / "run" / "adapter").is_dir()


def test_a_dry_run_writes_nothing(dataset: Callable[..., Path], tmp_path: Path) -> None:
    done = run_cli("train", dataset(), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert re.search(r"train rows +. 12 ", done.stdout)
    assert re.search(r"steps +. 4 on one device", done.stdout)
    assert not (tmp_path / "run").exists()


def break_missing_image(folder: Path) -> None:
    (folder / "train3.png").unlink()


def break_truncated_image(folder: Path) -> None:
    data = (folder / "train3.png").read_bytes()
    (folder / "train3.png").write_bytes(data[: len(data) // 2])


def break_json(folder: Path) -> None:
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[3] = lines[3][:-5]
    (folder / "train.jsonl").write_text("\n".join(lines))


def break_no_assistant(folder: Path) -> None:
    lines = (folder / "train.jsonl").read_text().splitlines()
    row = json.loads(lines[3])
    lines[3] = json.dumps({"messages": row["messages"][:1]})
    (folder / "train.jsonl").write_text("\n".join(lines))


BAD_ROWS = {
    "missing image": (break_missing_image, r"train\.jsonl:4: image 'train3\.png' not found"),
    "truncated image": (break_truncated_image, r"train\.jsonl:4: image 'train3\.png' is cut short"),
    "malformed JSON": (break_json, r"train\.jsonl:4: is cut short after column"),
    "no assistant": (break_no_assistant, r"train\.jsonl:4: has no assistant turn"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_stops_the_run_before_anything_is_written(
    dataset: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    recipe = dataset()
    break_it, message = BAD_ROWS[kind]
    break_it(tmp_path)
    with pytest.raises(DataError, match=message):
        train(str(recipe))
    assert not (tmp_path / "run").exists()


def test_bad_rows_can_be_skipped_and_are_listed(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = dataset(num_eval=0, training={"max_steps": 1})
    for break_it in (break_missing_image, break_json):
        break_it(tmp_path)
    assert train(str(recipe), ["data.bad_rows=skip"]) == 0
    run = RunDir(tmp_path / "run")
    assert [row["where"].rpartition("/")[2] for row in read_jsonl(run.skipped)] == ["train.jsonl:4"]
    summary = json.loads(run.summary.read_text())
    assert (summary["num_train_rows"], summary["num_skipped_rows"]) == (11, 1)
    assert summary["train_rows_by_source"] == [11]


def test_an_overlong_row_is_never_cut(dataset: Callable[..., Path], tmp_path: Path) -> None:
    recipe = dataset(num_eval=0, training={"max_steps": 1})
    rows = [chat_row("What?", "A1", "train0.png"), chat_row("What?", "A" * 500, "train1.png")]
    write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"train\.jsonl:2: is too long \(\d+ > 200 tokens"):
        train(str(recipe), ["data.max_tokens=200"])
    assert train(str(recipe), ["data.max_tokens=200", "data.overlong=skip"]) == 0
    assert len(read_jsonl(RunDir(tmp_path / "run").skipped)) == 1


def test_a_dataset_with_no_rows_is_refused(dataset: Callable[..., Path], tmp_path: Path) -> None:
    recipe = dataset()
    (tmp_path / "train.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no rows"):
        train(str(recipe))


def test_all_rows_bad_is_an_error_even_where_they_are_skipped(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = dataset()
    (tmp_path / "train.jsonl").write_text("{}\n{}\n")
    with pytest.raises(DataError, match="no usable row is left"):
        train(str(recipe), ["data.bad_rows=skip", "data.train.0.format=chat"])


def test_a_model_folder_without_weights_is_refused_before_anything_is_written(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    from finetune.model.load import model_location

    folder = tmp_path / "empty-model"
    folder.mkdir()
    for file in Path(model_location("nano")).iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="weights"):
        train(str(dataset()), [f"model.name={folder}"])
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_named_with_what_to_install(
    dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.packages.find_spec", lambda _name: None)
    with pytest.raises(RecipeError, match=r"output\.trackers: wandb.*pip install wandb"):
        train(str(dataset()), ["output.trackers=[wandb]"])


@pytest.mark.parametrize("method", ["dora", "rslora"])
def test_other_adapters_train_too_on_a_bfloat16_base(
    dataset: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    recipe = dataset(model={"dtype": "bfloat16"}, adapter={"method": method})
    # one batch of all rows, so that the losses are of the same ones
    settings = ["training.gradient_checkpointing=true", "training.batch_size=12"]
    assert train(str(recipe), settings) == 0
    losses = [m["loss"] for m in read_jsonl(RunDir(tmp_path / "run").metrics) if "loss" in m]
    assert losses[-1] < losses[0]


def test_a_mistake_is_one_message_without_a_traceback(
    dataset: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = dataset()
    (tmp_path / "folder").mkdir()
    (tmp_path / "train3.png").write_bytes(b"")
    cases: list[tuple[list[str], str]] = [
        (["train", str(tmp_path / "no.yaml")], "no.yaml"),
        (["train", str(recipe), "adapter.rnk=4"], "did you mean 'rank'"),
        (["train", str(recipe), "--resume"], "nothing to resume"),
        (["train", str(recipe), "--resume", "--overwrite"], "exclude each other"),
        (["train", str(recipe), "--worst-first", "data.train.0.streaming=true"], "leave it out"),
        (["train", str(recipe)], "train.jsonl:4: image 'train3.png' is an empty file"),
        (["eval", str(tmp_path / "folder")], "recipe.yaml is missing"),
        (["chat", str(tmp_path / "nowhere"), "What?"], "no such run directory"),
        (["recipes", "show", "nowhere"], "no shipped recipe"),
        (["recipes", "copy", "quickstart", str(recipe)], "is there already"),
    ]
    for arguments, words in cases:
        monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capfd.readouterr()
        assert stop.value.code == 2, arguments
        assert words in printed.err
        assert "Traceback" not in printed.err
        assert printed.out == ""


def test_a_copied_recipe_runs_where_it_was_copied_to(tmp_path: Path) -> None:
    written = copy_recipe("quickstart", tmp_path / "mine.yaml")
    assert written == [tmp_path / "mine.yaml", tmp_path / "quickstart"]
    first_line = written[0].read_text().splitlines()[0]
    assert Path(first_line.partition("$schema=")[2]).is_file()
    copied = load_recipe(written[0])
    assert copied.data.train[0].path == str(tmp_path / "quickstart" / "train.jsonl")
    with pytest.raises(RunDirError, match="is there already"):
        copy_recipe("quickstart", tmp_path / "other.yaml")  # its data would be overwritten


def test_a_typing_error_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['finetune', 'train', 'quickstrat']\n"
        "from finetune.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 False"
    assert "quickstart" in done.stderr


@pytest.mark.parametrize(
    "taken", ["a file", "another folder's files", "a project with a recipe", "no permission"]
)
def test_an_output_folder_that_cannot_be_used_is_refused(
    dataset: Callable[..., Path], tmp_path: Path, taken: str
) -> None:
    recipe = dataset()
    output = tmp_path / "out"
    if taken == "a file":
        output.write_text("")
    elif taken == "another folder's files":
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")
    elif taken == "a project with a recipe":
        output = tmp_path  # recipe.yaml, data and pictures
    else:
        output = Path("/proc/run")  # not even root may write there
    overwrite = taken != "a file"
    with pytest.raises(FinetuneError, match=r"output\.dir"):
        train(str(recipe), [f"output.dir={output}"], overwrite=overwrite)
    assert recipe.is_file()
    if taken == "another folder's files":
        assert (output / "thesis.tex").read_text() == "years of work"


def test_a_disk_without_room_is_refused_before_the_run(
    dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(RunDirError, match=r"1 MiB free.*need about \d+ MiB"):
        train(str(dataset()))
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_metrics(dataset: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe = dataset(num_eval=0, training={"max_steps": 2}, output={"trackers": ["tensorboard"]})
    assert train(str(recipe)) == 0
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
