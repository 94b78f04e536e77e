"""`ended.json`: why a run ended before its end. The report tells of it until the run goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from rich.console import Console

from finetune.callbacks import StopOnSignal
from finetune.errors import FinetuneError, message_of
from finetune.processes import is_first, is_of_a_lost_process
from finetune.report import write_report
from finetune.rundir import RunDir, write_json


@contextmanager
def told_in_the_report(run: RunDir, stop: StopOnSignal, console: Console) -> Iterator[None]:
    """Where an error ends the block, or a signal at once, keep why, and write the report of a run
    that has begun; what ended it is not lost where that fails.
    """
    try:
        yield
    except BaseException as error:
        if is_first() and run.is_run():
            try:
                write_end(run, stop.signal_name or "SIGINT", error)
            except Exception as fault:
                console.print(
                    f"warning: {run.report} was not written: {fault}",
                    style="yellow",
                    soft_wrap=True,
                )
        raise


def write_end(run: RunDir, signal_name: str, error: BaseException | None = None) -> None:
    """Keep why the run ended, a signal where it is no error, and write the report."""
    is_error = isinstance(error, Exception) and not is_of_a_lost_process(error)
    if is_of_a_lost_process(error):
        why = "the loss of another of its processes"
    else:
        why = _told(error) if isinstance(error, Exception) else signal_name
    write_json(
        run.ended,
        {
            "by": "error" if is_error else "signal",
            "why": why.encode(errors="backslashreplace").decode(),  # a file's name may be no text
            "resume_with": error.resume_with if isinstance(error, FinetuneError) else (),
            "at": datetime.now().astimezone().isoformat(timespec="seconds"),
        },
    )
    write_report(run)


def _told(error: Exception) -> str:
    if isinstance(error, FinetuneError):
        return message_of(error)
    return f"{type(error).__name__}: {error}"
