"""Loading processes, and the signals that reach them, too, where a terminal or a job sends them to
every process: the main one stops in good order, and needs its loaders until then.
"""

import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

GRACE_SECONDS = 60
"""That a loading process goes on for after SIGTERM, by which torch ends one that does not end by
itself."""

LEFT_TO_THE_MAIN_PROCESS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)


class LoadingProcess(ForkProcess):
    """Begins with the signals held back, as torch's own handlers would end it, until they are left
    to the main process.
    """

    def start(self) -> None:
        """The stock one; the new process has the mask of the one that starts it."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_MAIN_PROCESS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class LoadingContext(ForkContext):
    """For `DataLoader(multiprocessing_context=...)`."""

    Process = LoadingProcess


def loading(num_workers: int, seed: Callable[[int], None] | None = None) -> dict[str, Any]:
    """What a `DataLoader` is given beside `num_workers` for its processes to leave signals alone;
    `seed` is called in each with its number.

    On Linux they are forked, as is the default there up to Python 3.13: rows and encoder need not
    be sent to them. Elsewhere, where forking is not safe, they begin as torch has them.
    """
    if not num_workers:
        return {}
    return {
        "multiprocessing_context": LoadingContext() if sys.platform == "linux" else None,
        "worker_init_fn": partial(_begin, seed=seed),
    }


def _begin(worker: int, *, seed: Callable[[int], None] | None) -> None:
    """In a loading process, when torch has set its handlers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LEFT_TO_THE_MAIN_PROCESS)
    if seed:
        seed(worker)
