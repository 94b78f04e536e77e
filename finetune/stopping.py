"""How a process that is told to stop ends; without torch, so that it is known from the first moment
of a command.
"""

import os
import signal
from types import FrameType

INTERRUPTED = 130
"""Exit code of what SIGINT ended, as a shell expects it."""

RESUME_ME = 75
"""Exit code of a run that SIGTERM or SIGUSR1 ended, as job managers and spot machines send them: a
temporary failure (EX_TEMPFAIL), to be started again with --resume.
"""

STOPS = (signal.SIGTERM, signal.SIGUSR1)


def stop_means_resume_me() -> None:
    """Have the signals end this process at once with `RESUME_ME`, until a run takes them over: the
    imports that come first take seconds, and by default they would end it as a failure.
    """
    for number in STOPS:
        signal.signal(number, _end)


def _end(_number: int, _frame: FrameType | None) -> None:
    os._exit(RESUME_ME)  # an import may catch what is raised
