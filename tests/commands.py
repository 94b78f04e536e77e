"""The command started as users start it, in processes of its own."""

import itertools
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune.recipe import load_recipe
from finetune.rundir import RunDir, read_jsonl
from finetune.train import train
from tests.conftest import chat_row, noise, write_rows

FINETUNE = [sys.executable, "-m", "finetune"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# Below those that the system gives to whoever asks for any, and of this process alone: until a
# command listens at one, seconds after, nobody else has taken it
_PORTS = itertools.count(20_000 + 8 * os.getpid() % 12_000)
FIGURES = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "samples")


def free_port() -> int:
    """A port on loopback for a command that is yet to start."""
    while True:
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port := next(_PORTS)))
            return port


def run(*command: str, timeout: int = 600) -> subprocess.CompletedProcess[str]:
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


def train_here(recipe: Path, *settings: str) -> None:
    """What to compare with: the same in this process, which has imported all that takes seconds."""
    quiet = Console(quiet=True)
    assert train(load_recipe(recipe, settings), console=quiet, results=quiet) == 0


def figures(run: RunDir) -> list[dict[str, Any]]:
    """What metrics.jsonl says that two equal runs have in common."""
    return [{k: line[k] for k in FIGURES if k in line} for line in read_jsonl(run.metrics)]


def write_texts_and_one_picture(folder: Path) -> None:
    """Five training rows of which one has a picture: of two processes one sees it while the other
    has a text, then both have texts, and the last step is short.
    """
    noise(56, 56, seed=3).save(folder / "only.png")
    rows = [
        chat_row(f"Read it, {i}.", f"A{i}", *(["only.png"] if i == 2 else [])) for i in range(5)
    ]
    write_rows(folder / "train.jsonl", rows)
