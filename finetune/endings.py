"""`ended.json`: why a run ended before its end. The report tells of it until the run goes on."""

import re
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

from rich.console import Console

from finetune.callbacks import StopOnSignal
from finetune.data.images import without_secrets
from finetune.errors import FinetuneError, message_of
from finetune.processes import is_first, is_of_a_lost_process
from finetune.report import write_report
from finetune.rundir import RunDir, write_json

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


class Ending(AbstractContextManager["Ending"]):
    """Where an error ends the block, or a signal at once, why is kept, and the report written: of a
    run that this process has begun or gone on with, and not of one that it found.
    """

    def __init__(self, run: RunDir, stop: StopOnSignal, console: Console):
        self.run = run
        self.stop = stop
        self.console = console
        self._has_begun = False

    def begin(self) -> None:
        """From now on the run is this process's; how it ended before is forgotten."""
        self._has_begun = True
        self.run.ended.unlink(missing_ok=True)

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if error is not None and self._has_begun:
            self.write(error)

    def write(self, error: BaseException | None = None) -> None:
        """Why the run ends: the error, or else the signal. Where that cannot be written it is told,
        and does not take the place of what ended the run.
        """
        if not is_first():
            return
        try:
            write_json(self.run.ended, self._told(error))
            write_report(self.run)
        except Exception as fault:
            self.console.print(
                f"warning: {self.run.report} was not written: {fault}",
                style="yellow",
                soft_wrap=True,
            )

    def _told(self, error: BaseException | None) -> dict[str, Any]:
        is_error, resume_with = isinstance(error, Exception), ()
        if is_of_a_lost_process(error):
            is_error = False
            why = "the loss of another of its processes, whose own words are in the run's output"
        elif isinstance(error, FinetuneError):
            why, resume_with = message_of(error), error.resume_with
        elif isinstance(error, Exception):
            why = f"{type(error).__name__}: {error}"
            if not isinstance(error, OSError):  # a fault of ours, to which it would come again
                resume_with = None
        else:
            why = "SIGINT" if isinstance(error, KeyboardInterrupt) else self.stop.signal_name
        why = _URL.sub(lambda url: without_secrets(url[0]), why)
        return {
            "by": "error" if is_error else "signal",
            "why": why.encode(errors="backslashreplace").decode(),  # a file's name may be no text
            "resume_with": resume_with,
            "at": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
