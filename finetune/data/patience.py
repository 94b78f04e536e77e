"""Reading from drives that may fail or stall for a while, as those on a network do."""

import errno
import threading
import time
from collections.abc import Callable

from finetune.errors import FinetuneError

# What may be over a moment later. A file that is not there, or not to be read, stays so.
PASSING = frozenset(
    getattr(errno, name)
    for name in (
        "EIO",
        "EAGAIN",
        "EINTR",
        "EBUSY",
        "ESTALE",
        "ETIMEDOUT",
        "ECONNRESET",
        "ECONNABORTED",
        "ENOTCONN",
        "EHOSTDOWN",
        "EHOSTUNREACH",
        "ENETDOWN",
        "ENETUNREACH",
        "EREMOTEIO",
    )
    if hasattr(errno, name)
)


class DriveError(FinetuneError, OSError):
    """A drive that fails or stalls. It is no fault of a row, and so no `DataError`, of which
    `data.bad_rows` may leave out the rows.
    """


def drive_error(file: str, error: OSError) -> DriveError | None:
    """What to raise where a file of rows could not be read and the drive is to blame; None where
    the file is.
    """
    if isinstance(error, DriveError) or error.errno not in PASSING:
        return None
    return DriveError(
        f"{file}: cannot be read ({error.strerror}): the drive fails; mend it, and start again"
    )


class _StalledError(Exception):
    """No answer in time."""


def read_patiently(
    read: Callable[[], bytes],
    *,
    timeout_seconds: float | None,
    retries: int,
    wait: Callable[[float], None] = time.sleep,
) -> bytes:
    """What `read` gives; tried again so many times, after 1, 2, 4 ... seconds, where the drive
    fails in a way that may pass, or does not answer in time, where there is one.

    Raises `DriveError` where it still has not answered, and what else `read` raises.
    """
    tries = f" in each of {retries + 1} tries" if retries else ""
    for attempt in range(retries + 1):
        if attempt:
            wait(2.0 ** (attempt - 1))
        try:
            # a thread for every file takes a millisecond where all cores compute
            return read() if timeout_seconds is None else _within(timeout_seconds, read)
        except _StalledError:
            if attempt == retries:
                raise DriveError(
                    f"is not read within {timeout_seconds:g} seconds{tries}: the drive stalls; "
                    "mend it, or raise data.read_timeout_seconds or data.read_retries"
                ) from None
        except OSError as error:
            if error.errno not in PASSING:
                raise
            if attempt == retries:
                raise DriveError(
                    f"cannot be read ({error.strerror}){tries}: the drive fails; mend it, or raise "
                    "data.read_retries"
                ) from error
    raise AssertionError("the last attempt returns or raises")


def _within(seconds: float, read: Callable[[], bytes]) -> bytes:
    """Raises `_StalledError` past that. A read that hangs in the system cannot be broken off: its
    thread is left behind.
    """
    found: list[bytes] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(read())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if thread.is_alive() or not found:
        raise _StalledError
    return found[0]
