"""A run in several processes, on this machine or as one of several, by torch's own launcher."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from finetune.errors import RecipeError

_PR_SET_PDEATHSIG = 1
RESUME_ME = 75  # as in finetune.callbacks, which needs torch

LAUNCHED = "FINETUNE_LAUNCHED"
"""Set in the environment of the processes."""


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run `python -m finetune` with these arguments in so many processes on this machine; 0, or the
    exit code of the first that failed, which torchrun keeps to itself.

    Several machines find each other by torchrun's own variables: PET_NNODES, PET_RDZV_ENDPOINT and
    PET_RDZV_ID. Signals go on to the processes, which end in good order by themselves.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not torch.cuda.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        os.environ.setdefault(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes))
        )
    os.environ[LAUNCHED] = "1"
    own_id = "finetune" if num_nodes() > 1 else str(os.getpid())
    config = LaunchConfig(
        min_nodes=num_nodes(),
        max_nodes=num_nodes(),
        nproc_per_node=num_processes,
        run_id=os.environ.get("PET_RDZV_ID") or own_id,
        rdzv_backend="c10d",
        rdzv_endpoint=os.environ.get("PET_RDZV_ENDPOINT") or "localhost:0",
        max_restarts=0,
        signals_to_handle="SIGHUP,SIGQUIT",
    )
    run: Callable[..., Any] = elastic_launch(config, sys.executable)
    with _signals_passed_on() as told:
        try:
            run("-m", "finetune", *arguments)
        except ChildFailedError as error:
            code = error.get_first_failure()[1].exitcode
            if code >= 0:
                return code
            # a signal that came before a process knew what to do with it
            return RESUME_ME if -code in told and -code != signal.SIGINT else 128 - code
    return 0


def num_nodes() -> int:
    """Machines that work on the run. Raises `RecipeError` where they could not find each other."""
    text = os.environ.get("PET_NNODES") or "1"
    if not text.isdigit() or not int(text):
        raise RecipeError(
            f"PET_NNODES: {text!r}; expected a number of machines, which stays the same all "
            "through a run"
        )
    if int(text) > 1 and not os.environ.get("PET_RDZV_ENDPOINT"):
        raise RecipeError(
            f"PET_NNODES: {text} machines find each other at the address of one of them; set "
            "PET_RDZV_ENDPOINT, such as node-1:29500"
        )
    return int(text)


def end_with_the_launcher() -> None:
    """Have this process told to stop (SIGTERM) when the launcher that started it is killed: nobody
    could stop it otherwise, and a second run would write beside it. On Linux alone.
    """
    if os.environ.get(LAUNCHED) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _signals_passed_on() -> Iterator[list[int]]:
    """Gives those that came."""
    import psutil

    told: list[int] = []

    def pass_on(number: int, _frame: Any) -> None:
        told.append(number)
        for child in psutil.Process().children():
            child.send_signal(number)

    passed_on = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, pass_on) for number in passed_on}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
