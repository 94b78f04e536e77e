"""Loading processes, told to stop with the process that they load for."""

import multiprocessing
import os
import signal
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from finetune.data.loaders import (
    LEFT_TO_THE_MAIN_PROCESS,
    LoadingContext,
    LoadingProcess,
    leave_signals_to_the_main_process,
    loading_context,
)


def told_at_once(process: type[ForkProcess], context: type[ForkContext], number: int) -> Any:
    """A context whose processes get a signal in their first moment, not from the one that starts
    them: torch takes that for the end of the work.
    """

    class Told(process):
        def start(self) -> None:
            super().start()
            if os.fork() == 0:
                os.kill(self.pid or 0, number)
                os._exit(0)
            os.wait()

    class Context(context):
        Process = Told

    return Context()


def collate(rows: list[int]) -> torch.Tensor:
    leave_signals_to_the_main_process()
    return torch.tensor(rows)


def load(context: Any) -> list[int]:
    loader = DataLoader(
        range(6),  # type: ignore[arg-type]  # has all that is asked of a dataset
        num_workers=2,
        collate_fn=collate,
        multiprocessing_context=context,
    )
    return [int(batch) for batch in loader]


@pytest.mark.parametrize("number", LEFT_TO_THE_MAIN_PROCESS)
def test_a_signal_in_the_first_moment_does_not_end_a_loading_process(number: int) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert load(told_at_once(LoadingProcess, LoadingContext, number)) == list(range(6))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_it_ends_one_of_torch_s_own() -> None:
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
        load(told_at_once(ForkProcess, ForkContext, signal.SIGTERM))


def test_a_signal_while_one_loads_does_not_end_it_at_once() -> None:
    def tell(rows: list[int]) -> torch.Tensor:
        leave_signals_to_the_main_process()
        if multiprocessing.parent_process():
            for number in LEFT_TO_THE_MAIN_PROCESS:
                os.kill(os.getpid(), number)
        return torch.tensor(rows)

    loader = DataLoader(
        range(3),  # type: ignore[arg-type]
        num_workers=1,
        collate_fn=tell,
        multiprocessing_context=loading_context(1),
    )
    assert [int(batch) for batch in loader] == [0, 1, 2]


def test_it_ends_when_it_is_told_to_by_the_one_it_loads_for() -> None:
    before = set(psutil.Process().children())
    loading = iter(
        DataLoader(
            range(100),  # type: ignore[arg-type]
            num_workers=1,
            collate_fn=collate,
            multiprocessing_context=loading_context(1),
        )
    )
    next(loading)
    begun = set(psutil.Process().children()) - before
    assert begun
    del loading
    assert not psutil.wait_procs(begun, timeout=60)[1]


def test_without_loading_processes_torch_takes_no_context() -> None:
    assert loading_context(0) is None
