"""A run in several processes on this machine, by torch's own launcher."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_PR_SET_PDEATHSIG = 1
RESUME_ME = 75  # as in finetune.callbacks, which needs torch

LAUNCHED = "FINETUNE_LAUNCHED"
"""Set in the environment of the processes."""


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run `python -m finetune` with these arguments in so many processes; 0, or the exit code of
    the first that failed.

    Signals go on to the processes, which end in good order by themselves.
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
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
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
