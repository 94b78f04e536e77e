"""Loading processes, and the signals that reach them, too, where a terminal or a job sends them to
every process: the main one stops in good order, and needs its loaders until then.
"""

import signal
import sys
from multiprocessing.context import BaseContext, ForkContext, ForkProcess

from torch.utils.data import get_worker_info

GRACE_SECONDS = 60
"""That a loading process goes on for after SIGTERM, by which torch ends one that does not end by
itself."""

LEFT_TO_THE_MAIN_PROCESS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)


class LoadingProcess(ForkProcess):
    """Starts with the signals held back, as torch's own handlers would end it, until
    `leave_signals_to_the_main_process`.
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


def loading_context(num_workers: int) -> BaseContext | None:
    """None, which is torch's own, without loading processes and where these are not forked."""
    return LoadingContext() if num_workers and sys.platform == "linux" else None


def leave_signals_to_the_main_process() -> None:
    """In a loading process, before it does anything that may take long; nothing elsewhere."""
    if get_worker_info() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, LEFT_TO_THE_MAIN_PROCESS)
