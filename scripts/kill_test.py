"""Kill runs at random moments and go on with them: do they end as one that was never killed?

    python -m scripts.kill_test                             # 50 kills
    python -m scripts.kill_test --out docs/resuming.md      # the table into the page, too
    python -m scripts.kill_test --kills 6                   # two of each kind

Small runs of nano, of rows read beforehand, packed, and streamed. Each is killed (SIGKILL, loading
processes and all) once at a random moment, some on purpose while a checkpoint is written, while
held-out rows are answered, or in an evaluation between steps, and gone on with until it ends. One
that ended before it could be killed is begun again. Then the adapter's bytes, the log
without its clock, and the answers must be those of the run that nobody killed. Exit code 1 where
they are not.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from finetune.checkpoints import ASIDE, last_whole
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.files import recipes_dir
from finetune.rundir import RunDir, read_jsonl
from finetune.train import train
from scripts.bench_results import machine
from scripts.marked_page import fill, row, table

STEPS, SAVE_EVERY, ASK_EVERY = 12, 3, 4
ROWS = {"train": 40, "eval": 6}
CLOCK = {
    *("seconds", "samples_per_second", "peak_memory_gib"),
    *("eval_runtime", "eval_samples_per_second", "eval_steps_per_second"),
}

KINDS: dict[str, dict[str, Any]] = {
    "read beforehand": {},
    "packed": {"training.packing": True},
    "streamed": {"data.train.0.streaming": True},
}
AIMS = ("checkpoint", "evaluation", "evaluation between steps", "anywhere", "anywhere")
"""What is killed, turn by turn, of another kind each time: a moment of a certain kind, or any."""
MEANT = {
    "checkpoint": "a checkpoint was written",
    "evaluation": "held-out rows were answered",
    "evaluation between steps": "was evaluated",
}
"""Words of the moment that is aimed at."""
TRIES = 5
"""Of a kill that may come too late, or at another moment than was aimed at."""


@dataclass(frozen=True)
class Kill:
    """One, and what became of the run."""

    kind: str
    after_seconds: float
    moment: str
    went_on_from: str
    difference: str
    """What is not as in the unbroken run; empty for nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, kill, print a table; the exit code."""
    parser = argparse.ArgumentParser(description="Kill runs and see that they end the same.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a page with a place for the table")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    kills = []
    lines = table("", "run", "killed after", "while", "went on from", "ended")
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, kill in enumerate(kill_runs(Path(folder), args.kills, args.seed), start=1):
            kills.append(kill)
            ended = kill.difference or "the same"
            seconds = f"{kill.after_seconds:.2f} s"
            lines.append(row(number, kill.kind, seconds, kill.moment, kill.went_on_from, ended))
            print(lines[-1], flush=True)
    num_same = sum(not kill.difference for kill in kills)
    told = f"{num_same} of {len(kills)} ended as the run that was not killed"
    print(f"\n{told}")
    if args.out:
        text = args.out.read_text(encoding="utf-8")
        lines += ["", f"{told}. {machine(1)}."]
        args.out.write_text(fill(text, "kills", lines), encoding="utf-8")
    return int(num_same < len(kills))


def kill_runs(folder: Path, num_kills: int, seed: int) -> Iterator[Kill]:
    """Runs of every kind in turn, all in `folder`."""
    rng = random.Random(seed)
    unbroken, seconds = {}, {}
    for kind in KINDS:
        started = time.monotonic()
        recipe = recipe_of(kind, folder, "unbroken")
        assert in_own_process(lambda recipe=recipe: train(recipe, **quiet()))() == 0
        seconds[kind] = time.monotonic() - started
        unbroken[kind] = RunDir(recipe.output.dir)
    for number in range(num_kills):
        kind = list(KINDS)[number % len(KINDS)]
        aim = AIMS[number % len(AIMS)]
        recipe = recipe_of(kind, folder, "killed")
        run = RunDir(recipe.output.dir)
        after = kill_one(recipe, run, aim, rng, seconds[kind])
        moment, whole = moment_of(run), last_whole(run.checkpoints)
        begun = run.is_run()
        go_on = in_own_process(lambda r=recipe, b=begun: train(r, resume=b, **quiet()))
        assert go_on() == 0, f"{kind}: did not go on"
        from_ = whole.name if whole else "its beginning"
        yield Kill(kind, after, moment, from_, difference(run, unbroken[kind]))


def kill_one(recipe: Recipe, run: RunDir, aim: str, rng: random.Random, seconds: float) -> float:
    """Begin a run and kill it; the seconds after which it was."""
    after = None
    for _ in range(TRIES):
        shutil.rmtree(run.path, ignore_errors=True)
        started = time.monotonic()
        stop = in_own_process(lambda: train(recipe, **quiet()))
        wait_for(aim, run, rng, seconds)
        code = stop(kill=True)
        after = time.monotonic() - started if code is None else None
        if after and MEANT.get(aim, "") in moment_of(run):
            return after
        assert not code, f"{run.path}: ended with {code} before it was killed"
    if after is None:
        raise RuntimeError(f"{run.path}: had ended {TRIES} times before it was killed")
    return after


def recipe_of(kind: str, folder: Path, name: str) -> Recipe:
    """A run of some seconds on some rows of the quickstart."""
    data = folder / "data"
    if not data.is_dir():
        shutil.copytree(recipes_dir() / "quickstart", data)
        for part, count in ROWS.items():
            lines = (data / f"{part}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (data / f"{part}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    settings = {
        "data.train.0.path": str(data / "train.jsonl"),
        "data.eval.0.path": str(data / "eval.jsonl"),
        "output.dir": str(folder / f"{name}-{kind.replace(' ', '-')}"),
        "adapter.dropout": 0.2,
        "data.random_upscale": 1.5,
        "training.max_steps": STEPS,
        "training.batch_size": 2,
        "training.gradient_accumulation": 2,
        "training.logging_steps": 2,
        "training.save_steps": SAVE_EVERY,
        "training.num_workers": 1,
        "evaluation.every_steps": ASK_EVERY,
        "evaluation.rows_in_training": 4,
        "evaluation.max_new_tokens": 16,
        **KINDS[kind],
    }
    changes = [
        f"{key}={yaml.safe_dump(value).removesuffix('...' + chr(10)).strip()}"
        for key, value in settings.items()
    ]
    return load_recipe("quickstart", changes)


def quiet() -> dict[str, Any]:
    """So that the table alone is printed."""
    return {"console": Console(quiet=True), "results": Console(quiet=True)}


def in_own_process(work: Callable[[], int]) -> Callable[..., int | None]:
    """Begin work in a process of its own, with a copy of all that is imported here; gives what
    waits for its exit code, or, with `kill`, ends it and all that it started, and gives the code
    only where it had ended before.
    """
    pid = os.fork()
    with suppress(OSError):  # here and there: whichever is first, or it is killed before
        os.setpgid(pid, 0)
    if pid == 0:
        code = 1
        try:
            code = work()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def end(kill: bool = False) -> int | None:
        if kill:
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return None if kill and code == -signal.SIGKILL else code

    return end


def wait_for(aim: str, run: RunDir, rng: random.Random, seconds: float) -> None:
    """Until a random moment of a run that takes so long, or within what is aimed at, if it
    comes.
    """
    deadline = time.monotonic() + rng.random() * seconds
    if aim == "anywhere":
        time.sleep(max(0.0, deadline - time.monotonic()))
        return
    earliest = rng.choice((SAVE_EVERY, 2 * SAVE_EVERY, 3 * SAVE_EVERY))
    last = time.monotonic() + 2 * seconds
    while time.monotonic() < last and not run.summary.is_file():
        if aim == "evaluation" and run.partial.is_dir():
            time.sleep(rng.random() * 0.3)
            return
        if aim == "evaluation between steps" and evaluated_step(run):
            time.sleep(rng.random() * 0.1)
            return
        if aim == "checkpoint" and any(
            int(path.name.rpartition("-")[2]) >= earliest
            for path in (run.checkpoints / ASIDE).glob("checkpoint-*")
        ):
            time.sleep(rng.random() * 0.02)
            return
        time.sleep(0.001)


def moment_of(run: RunDir) -> str:
    """What a killed run was doing, by what it left."""
    if run.adapter.is_dir():
        return "held-out rows were answered"
    if any((run.checkpoints / ASIDE).glob("checkpoint-*")):
        return "a checkpoint was written"
    lines = read_jsonl(run.metrics)
    if not lines:
        return "the run began"
    if step := evaluated_step(run):
        return f"step {step} was evaluated"
    return f"steps went on after {lines[-1]['step']}"


def evaluated_step(run: RunDir) -> int | None:
    """The one that is evaluated at the moment, by the log, which has its loss before."""
    last = next(reversed(read_jsonl(run.metrics)), None)
    if last is None or "eval_loss" in last or last["step"] % ASK_EVERY:
        return None
    return last["step"]


def first_difference(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> str:
    """Where two logs part."""
    for one, other in zip(ours, theirs, strict=False):
        for key in one.keys() | other.keys():
            if one.get(key) != other.get(key):
                return f"step {one['step']}, {key}: {one.get(key)} and {other.get(key)}"
    return f"{len(ours)} and {len(theirs)} lines"


def difference(run: RunDir, unbroken: RunDir) -> str:
    """What of a run is not as in the other; empty for nothing."""
    logs = [
        [{key: line[key] for key in line if key not in CLOCK} for line in read_jsonl(each.metrics)]
        for each in (run, unbroken)
    ]
    if logs[0] != logs[1]:
        return f"with another log ({first_difference(*logs)})"
    weights = "adapter_model.safetensors"
    if (run.adapter / weights).read_bytes() != (unbroken.adapter / weights).read_bytes():
        return "with another adapter"
    if run.predictions.read_bytes() != unbroken.predictions.read_bytes():
        return "with other answers"
    return ""


if __name__ == "__main__":
    sys.exit(main())
