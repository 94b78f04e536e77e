"""A run in several processes, on this machine or as one of several, by torch's own launcher."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from finetune.errors import RecipeError
from finetune.stopping import RESUME_ME

_PR_SET_PDEATHSIG = 1
_SPEAKS_OF_ENDS = "torch.distributed.elastic.multiprocessing.api"

LAUNCHED = "FINETUNE_LAUNCHED"
"""In the environment of the processes, the launcher's process id."""


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run `python -m finetune` with these arguments in so many processes on this machine; 0, or the
    exit code of the first that failed, which torchrun keeps to itself.

    Several machines find each other by torchrun's own variables: PET_NNODES, PET_RDZV_ENDPOINT and
    PET_RDZV_ID. Signals go on to the processes, which end in good order by themselves. Raises
    `RecipeError` where the machines do not find each other, or lose each other.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not torch.cuda.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        os.environ.setdefault(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes))
        )
    os.environ[LAUNCHED] = str(os.getpid())
    endpoint = os.environ.get("PET_RDZV_ENDPOINT") or "localhost:0"
    try:
        parse_rendezvous_endpoint(endpoint, default_port=0)
    except ValueError as error:
        raise RecipeError(f"PET_RDZV_ENDPOINT: {error}") from error
    own_id = "finetune" if num_nodes() > 1 else str(os.getpid())
    config = LaunchConfig(
        min_nodes=num_nodes(),
        max_nodes=num_nodes(),
        nproc_per_node=num_processes,
        run_id=os.environ.get("PET_RDZV_ID") or own_id,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        max_restarts=0,
        signals_to_handle="SIGHUP,SIGQUIT",
    )
    if "LOGLEVEL" not in os.environ:
        # why a process ended it has said itself, or is said below
        logging.getLogger(_SPEAKS_OF_ENDS).setLevel(logging.CRITICAL)
    run: Callable[..., Any] = elastic_launch(config, sys.executable)
    with _signals_passed_on() as told:
        try:
            run("-m", "finetune", *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            code = failure.exitcode
            if code >= 0:
                return code
            if -code in told:  # before the process knew what to do with it
                return RESUME_ME if -code != signal.SIGINT else 128 - code
            name = failure.signal_name()
            why = ", most often for want of memory" if -code == signal.SIGKILL else ""
            print(
                f"error: process {rank} was killed by {name}{why}; go on with --resume",
                file=sys.stderr,
            )
            return 128 - code
        except RendezvousError as error:
            if told:  # and so were the others: the one that all met at has ended before
                return 128 + told[0] if told[0] == signal.SIGINT else RESUME_ME
            raise RecipeError(_why_not_met(error, endpoint)) from error
    return 0


def _why_not_met(error: Exception, endpoint: str) -> str:
    from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

    never_came = isinstance(error, RendezvousTimeoutError)
    reason = "not all came in time" if never_came else str(error) or type(error).__name__
    return (
        f"PET_RDZV_ENDPOINT: the {num_nodes()} machines of PET_NNODES have not met at {endpoint}, "
        f"or have lost each other ({reason}); start the same command on each, with the address of "
        "one of them and a port that the others reach; a run that had begun goes on with --resume"
    )


def num_nodes() -> int:
    """Machines that work on the run. Raises `RecipeError` where they could not find each other."""
    text = os.environ.get("PET_NNODES") or "1"
    if not text.isdecimal() or not int(text):
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
    """Have this process told to stop (SIGTERM) when the launcher that started it is killed, or
    at once where it has been: nobody could stop it otherwise, and a second run would write beside
    it. On Linux alone.
    """
    launcher = os.environ.get(LAUNCHED)
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(launcher):
            os.kill(os.getpid(), signal.SIGTERM)


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
