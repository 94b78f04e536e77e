"""Loading processes, told to stop with the process that they load for."""

import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from finetune.data.loaders import (
    LEFT_TO_THE_MAIN_PROCESS,
    LoadingContext,
    LoadingProcess,
    loading,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="loading processes are forked")


def told_at_once(process: type[ForkProcess], context: type[ForkContext], number: int) -> Any:
    """A context whose processes get a signal in their first moment, not from the one that starts
    them: torch takes that for the end of the work.
    """

    class Told(process):
        def start(self) -> None:
            super().start()
            teller = os.fork()
            if teller == 0:
                os.kill(self.pid or 0, number)
                os._exit(0)
            os.waitpid(teller, 0)

    class Context(context):
        Process = Told

    return Context()


def loader(num_rows: int, collate: Callable[[list[int]], Any] = torch.tensor, **others: Any) -> Any:
    return DataLoader(
        range(num_rows),  # type: ignore[arg-type]  # has all that is asked of a dataset
        num_workers=2,
        collate_fn=collate,
        **(loading(2) | others),
    )


def rows_of(loader: Any) -> list[int]:
    return [int(batch) for batch in loader]


@pytest.mark.parametrize("number", LEFT_TO_THE_MAIN_PROCESS)
def test_a_signal_in_the_first_moment_does_not_end_a_loading_process(number: int) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    told = told_at_once(LoadingProcess, LoadingContext, number)
    assert rows_of(loader(6, multiprocessing_context=told)) == list(range(6))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_it_ends_one_of_torch_s_own() -> None:
    told = told_at_once(ForkProcess, ForkContext, signal.SIGTERM)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
        rows_of(loader(6, multiprocessing_context=told, worker_init_fn=None))


def test_a_signal_while_one_loads_does_not_end_it_at_once() -> None:
    def tell(rows: list[int]) -> torch.Tensor:
        assert get_worker_info()
        for number in LEFT_TO_THE_MAIN_PROCESS:
            os.kill(os.getpid(), number)
        return torch.tensor(rows)

    assert rows_of(loader(3, tell)) == [0, 1, 2]


@pytest.mark.parametrize("num_rows", [1, 100])  # so that one has nothing to load, or all go on
def test_they_end_with_the_loader(num_rows: int) -> None:
    before = set(psutil.Process().children())
    begun = iter(loader(num_rows))
    next(begun)
    processes = set(psutil.Process().children()) - before
    assert len(processes) == 2
    until = time.monotonic() + 60
    while any(map(holds_back, processes)) and time.monotonic() < until:  # one may still begin
        time.sleep(0.01)
    assert not any(map(holds_back, processes))
    del begun
    assert not psutil.wait_procs(processes, timeout=60)[1]


def holds_back(process: psutil.Process) -> bool:
    """A signal that has to come through where torch ends a process that does not end by itself."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (mask,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigBlk:"))
    return any(mask >> (number - 1) & 1 for number in LEFT_TO_THE_MAIN_PROCESS)


def test_each_is_seeded_by_its_number() -> None:
    def number(_: list[int]) -> torch.Tensor:
        return torch.tensor(torch.initial_seed())

    def seed(worker: int) -> None:
        torch.manual_seed(worker)

    assert set(rows_of(loader(4, number, **loading(2, seed)))) == {0, 1}


def test_without_loading_processes_torch_is_given_nothing() -> None:
    assert loading(0) == {}
