"""Reading from drives that may fail or stall for a while, as those on a network do."""

import errno
import threading
import time
from collections.abc import Callable

from finetune.errors import DataError

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

    Raises `DataError` where it still has not answered, and what `read` raises.
    """
    for attempt in range(retries + 1):
        if attempt:
            wait(2.0 ** (attempt - 1))
        try:
            # a thread for every file takes a millisecond where all cores compute
            return read() if timeout_seconds is None else _within(timeout_seconds, read)
        except _StalledError:
            if attempt == retries:
                tries = f" in each of {retries + 1} tries" if retries else ""
                raise DataError(
                    f"is not read within {timeout_seconds:g} seconds{tries}: the drive stalls; "
                    "mend it, or raise data.read_timeout_seconds or data.read_retries"
                ) from None
        except OSError as error:
            if error.errno not in PASSING or attempt == retries:
                raise
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
