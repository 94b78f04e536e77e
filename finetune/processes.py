"""This process among those that work on one run together, as torchrun starts them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

_Found = TypeVar("_Found")


def process() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return 0, 1
    state = _state()
    return state.process_index, state.num_processes


def processes_here() -> int:
    """How many there are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or process()[1])


def is_first() -> bool:
    """Whether this is the one process that writes and prints."""
    return process()[0] == 0


def engine() -> str:
    """What accelerate trains several processes with, as the environment tells it: ddp, fsdp, or
    zero with its stage.
    """
    if _is_set("ACCELERATE_USE_FSDP"):
        return "fsdp"
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', 2)}"
    return "ddp"


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


def wait_for_all() -> None:
    """Until every process has come here."""
    if process()[1] > 1:
        _state().wait_for_everyone()


def is_of_a_lost_process(error: BaseException | None) -> bool:
    """Whether it is what a process meets that waits for one which has ended: torch's own error, or
    gloo's words.
    """
    if not torch.distributed.is_available() or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or "by peer" in str(error)


def part() -> None:
    """Close what joins the processes, when the work is done. Left to the interpreter's end, one of
    its threads may ask for the interpreter by then, is ended by force, and the process aborts.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def first_before_others() -> Iterator[None]:
    """The block is run by the first process, then by the others, which find what it kept."""
    if process()[1] == 1:
        yield
        return
    with _state().main_process_first():
        yield


def any_of_all(flag: bool, device: torch.device) -> bool:
    """Whether it is true in one process at least; all have to ask."""
    if process()[1] == 1:
        return flag
    told = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return bool(told)


def sum_of_all(number: int, device: torch.device) -> int:
    """Over all processes; all have to ask."""
    if process()[1] == 1:
        return number
    told = torch.tensor(number, device=device)
    torch.distributed.all_reduce(told)
    return int(told)


def mean_of_all(number: float, device: torch.device) -> float:
    """Over all processes; all have to ask."""
    if process()[1] == 1:
        return number
    told = torch.tensor(number, device=device)
    torch.distributed.all_reduce(told)
    return float(told) / process()[1]


def lists_of_all(mine: list[Any]) -> list[Any]:
    """What every process has, one list after the other; all have to ask."""
    if process()[1] == 1:
        return mine
    told: list[Any] = [None] * process()[1]
    torch.distributed.all_gather_object(told, mine)
    return [each for one in told for each in one]


def as_the_first_finds(look: Callable[[], _Found]) -> _Found:
    """What the first process finds, for all: on a shared disk another may find another."""
    return lists_of_all([look()] if is_first() else [])[0]


def _state() -> Any:
    from accelerate import PartialState

    # the others wait while the first checks the rows, of which there may be many
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=4))
