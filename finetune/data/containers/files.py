"""Files as they lie on disk: their names in messages, their stamps, their bytes at an offset."""

import difflib
import hashlib
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from finetune.data.patience import drive_error
from finetune.errors import DataError

Opened = TypeVar("Opened")


def shown_path(path: Path) -> str:
    """The path as a person standing in the current folder would write it."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return os.fspath(path)


@dataclass(frozen=True, slots=True)
class FileStamp:
    """A file at one moment; the same path, size and time mean the same content."""

    path: str  # absolute
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """Raises `DataError` for what is not there, or is no regular file."""
        try:
            found = path.stat()
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError)
            todo = near_name(path) if is_missing else "check its permissions"
            raise DataError(
                f"{shown_path(path)}: cannot be read ({error.strerror}); {todo}"
            ) from error
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{shown_path(path)}: is no regular file; save its rows to one")
        return cls(str(path.absolute()), found.st_size, found.st_mtime_ns)

    @property
    def digest(self) -> str:
        """A file name for the path, safe in any folder."""
        return hashlib.blake2b(os.fsencode(self.path), digest_size=16).hexdigest()

    def as_list(self) -> list[str | int]:
        return [self.path, self.size, self.mtime_ns]


def near_name(path: Path) -> str:
    """What to try instead of a path that is not there."""
    with suppress(OSError):
        names = [entry.name for entry in os.scandir(path.parent)]
        near = difflib.get_close_matches(path.name, names, n=1)
        if near:
            return f"did you mean {shown_path(path.parent / near[0])!r}?"
        return f"{shown_path(path.parent)!r} does not hold it; mend the path"
    return f"there is no folder {shown_path(path.parent)!r}; mend the path"


class RecentlyOpened(Generic[Opened]):
    """Open things of this process by the stamp of their file, the oldest let go beyond a limit.

    A thousand shards must not exhaust the file descriptors. What is let go closes itself once
    nobody uses it any more, so no lock is needed, and none can be left taken by a fork.
    """

    def __init__(self, limit: int, opener: Callable[[FileStamp], Opened]):
        self._limit = limit
        self._opener = opener
        self._opened: dict[FileStamp, Opened] = {}

    def get(self, stamp: FileStamp) -> Opened:
        opened = self._opened.get(stamp)
        if opened is None:
            opened = self._opened[stamp] = self._opener(stamp)
            if len(self._opened) > self._limit:
                with suppress(RuntimeError, StopIteration):  # another thread was faster
                    self._opened.pop(next(iter(self._opened)), None)
        return opened


def refuse_changed(stamp: FileStamp, found: os.stat_result) -> None:
    """Raise `DataError`, without the place, where offsets no longer belong to the file."""
    if (found.st_size, found.st_mtime_ns) != (stamp.size, stamp.mtime_ns):
        raise DataError("the file has changed since it was indexed; start again")


class _Descriptor:
    """A file descriptor that closes itself. `pread` moves no position, so forks may share it."""

    def __init__(self, stamp: FileStamp):
        self.number = -1
        self.number = os.open(stamp.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


_DESCRIPTORS = RecentlyOpened(64, _Descriptor)


def read_bytes(stamp: FileStamp, start: int, length: int) -> bytes:
    """`length` bytes from `start`. Raises `DataError`, without the place, and `DriveError`."""
    try:
        descriptor = _DESCRIPTORS.get(stamp)
        refuse_changed(stamp, os.fstat(descriptor.number))
        data = os.pread(descriptor.number, length, start)
        while 0 < len(data) < length:  # Linux gives at most 2 GiB at a time
            more = os.pread(descriptor.number, length - len(data), start + len(data))
            if not more:
                break
            data += more
    except OSError as error:
        if failing := drive_error(shown_path(Path(stamp.path)), error):
            raise failing from error
        raise DataError(
            f"the file cannot be read ({error.strerror}); check it, and start again"
        ) from error
    if len(data) < length:
        raise DataError("the file has become shorter since it was indexed; start again")
    return data
