"""What is worked out from a file once and kept in a cache folder: row offsets, and copies that can
be read at any place.

Nothing here is ever needed: a cache file that is damaged, foreign or out of date is made again, and
where the folder cannot be written to, offsets stay in memory and copies go to a temporary folder.
"""

import atexit
import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

import data_formats
from finetune import __version__
from finetune.data.containers.cleaning import clean_once, note_use
from finetune.data.containers.files import FileStamp, shown_path
from finetune.errors import DataError

FREE_DISK_KEPT_BYTES = 1 << 30  # what a copy must leave free for everything else
_INDEX_MAGIC = 0x564C4D524F575331  # "VLMROWS1"; another layout gets another one
_CHECK_EVERY_BYTES = 64 << 20


class RowIndex:
    """Where each row lies: `spans` [rows, 3] holds the first byte, the byte after the last one, and
    the number that the row goes by (a line, or its place counted from 1).

    Pickles as the name of its file where there is one, so that loading processes share the pages.
    """

    def __init__(self, spans: np.ndarray, file: Path | None = None):
        self.spans = spans
        self.file = file

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "spans": None if self.file else np.asarray(self.spans)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.file, self.spans = state["file"], state["spans"]
        if self.file is not None:
            try:
                self.spans = np.asarray(np.lib.format.open_memmap(self.file, mode="r"))[2:]
            except (OSError, ValueError, EOFError) as error:
                raise DataError(
                    f"{shown_path(self.file)}: the row index has gone while it was in use; start "
                    "again, and leave the cache folder alone meanwhile"
                ) from error


def load_index(data: FileStamp, cache: Path) -> RowIndex | None:
    """The index kept for the file as it is now, or None."""
    file = _index_file(data, cache)
    try:
        table = np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError, EOFError):
        return None
    if (
        table.dtype != np.int64
        or table.ndim != 2
        or table.shape[1] != 3
        or len(table) < 2
        or not np.array_equal(table[:2], _header(data))
    ):
        return None
    spans = np.asarray(table)[2:]  # a plain view: memmap is slow to take single rows from
    starts, stops = spans[:, 0], spans[:, 1]
    orderly = len(spans) == 0 or (
        starts[0] >= 0
        and stops[-1] <= data.size
        and bool((starts <= stops).all())
        and bool((stops[:-1] <= starts[1:]).all())
    )
    if not orderly:
        return None
    if not _is_derived(data, cache):
        note_use(data, cache)
    return RowIndex(spans, file)


def keep_index(data: FileStamp, cache: Path, spans: np.ndarray) -> RowIndex:
    """The index, from its file in the cache where one could be written, else from memory."""
    file = _index_file(data, cache)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _aside(file) as part:
            with part.open("wb") as out:
                np.save(out, np.vstack([_header(data), spans]).astype(np.int64, copy=False))
            part.replace(file)
    except OSError:
        return RowIndex(spans)
    if not _is_derived(data, cache):
        clean_once(cache)
    return load_index(data, cache) or RowIndex(spans)


def _index_file(data: FileStamp, cache: Path) -> Path:
    path = Path(data.path)
    if _is_derived(data, cache):  # to go when the copy goes
        return path.with_name(path.name + ".npy")
    return cache.absolute() / f"{data.digest}.npy"


def _is_derived(data: FileStamp, cache: Path) -> bool:
    return Path(data.path).parent.parent in (cache.absolute(), _scratch.folder)


def _header(data: FileStamp) -> np.ndarray:
    half, code = int(data.digest[:15], 16), int(code_digest()[:15], 16)
    return np.array([[_INDEX_MAGIC, data.size, data.mtime_ns], [half, code, 0]], dtype=np.int64)


@lru_cache(maxsize=1)
def code_digest() -> str:
    """A digest of the code that finds rows and makes copies: a fault mended there must not live on
    in what is kept.
    """
    digest = hashlib.sha256(__version__.encode())
    formats = Path(data_formats.__path__[0])
    for file in (*sorted(Path(__file__).parent.glob("*.py")), formats / "coco_captions.py"):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class Sink(Protocol):
    """Where a copy is written."""

    def write(self, data: bytes, /) -> int: ...


def find_derived(source: FileStamp, cache: Path, kind: str) -> FileStamp | None:
    """The copy of this `kind` kept for the file as it is now, or None. Its own size is part of its
    name, so that one cut short is not taken.
    """
    for folder in (cache, _scratch.folder):
        if folder is None:
            continue
        for path in (folder / source.digest).glob(f"{_stem(source, kind)}.*"):
            with suppress(DataError):
                stamp = FileStamp.of(path)
                if path.name.endswith(f".{kind}.{stamp.size:x}"):
                    note_use(source, folder)
                    return stamp
    return None


def write_derived(
    source: FileStamp, cache: Path, kind: str, write: Callable[[Sink], object]
) -> FileStamp:
    """Make the copy by `write`, and put it in place once it is complete; older ones are removed.

    Raises `DataError` where the disk has no room for it.
    """
    folder = _writable(cache) / source.digest
    stem = _stem(source, kind)
    try:
        clean_once(folder.parent)
        folder.mkdir(exist_ok=True)
        with _aside(folder / stem) as part:
            with part.open("wb") as out:
                write(_BoundedSink(out, source, folder))
            final = folder / f"{stem}.{part.stat().st_size:x}"
            for old in folder.glob(f"*.{kind}.*"):
                if old.suffix != ".part" and not old.name.startswith(final.name):
                    old.unlink(missing_ok=True)
            _put_in_place(part, final)
        note_use(source, folder.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(source, folder) from error
        raise DataError(
            f"{shown_path(Path(source.path))}: no copy of it could be written to "
            f"{shown_path(folder)} ({error.strerror}); see to that folder"
        ) from error
    return FileStamp.of(final)


def _put_in_place(part: Path, final: Path) -> None:
    """Keep the copy of another process that was faster: its readers know it by its time."""
    try:
        os.link(part, final)
    except FileExistsError:
        if final.stat().st_size != part.stat().st_size:
            part.replace(final)
    except OSError:  # a file system without hard links
        part.replace(final)


def _stem(source: FileStamp, kind: str) -> str:
    return f"{source.size:x}.{source.mtime_ns:x}.{code_digest()[:16]}.{kind}"


class _BoundedSink:
    """Writes on as long as the disk keeps some room: a small archive may hold endless zeros."""

    closed = False  # pyarrow asks

    def __init__(self, out: IO[bytes], source: FileStamp, folder: Path):
        self._out = out
        self._source = source
        self._folder = folder
        self._unchecked = _CHECK_EVERY_BYTES

    def write(self, data: bytes, /) -> int:
        self._unchecked += len(data)
        if self._unchecked >= _CHECK_EVERY_BYTES:
            self._unchecked = 0
            if shutil.disk_usage(self._folder).free - len(data) < FREE_DISK_KEPT_BYTES:
                raise _no_room(self._source, self._folder)
        return self._out.write(data)

    def flush(self) -> None:
        self._out.flush()


def _no_room(source: FileStamp, folder: Path) -> DataError:
    kept_gib = FREE_DISK_KEPT_BYTES / (1 << 30)
    return DataError(
        f"{shown_path(Path(source.path))}: an uncompressed copy of it does not fit on the disk of "
        f"{shown_path(folder)} ({kept_gib:.0f} GiB must stay free); free some room, or put the "
        "cache folder on a larger disk"
    )


@contextmanager
def _aside(file: Path) -> Iterator[Path]:
    """A name beside the file to write to first; what is still there in the end is removed."""
    part = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield part
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@dataclass
class _Scratch:
    """A folder for copies where the cache cannot be written to; gone when this process ends."""

    folder: Path | None = None

    def make(self) -> Path:
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="vlm-recipes-"))
            atexit.register(_remove_own, self.folder, os.getpid())
        return self.folder


_scratch = _Scratch()


def _remove_own(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # not from a fork
        shutil.rmtree(folder, ignore_errors=True)


def _writable(cache: Path) -> Path:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except OSError:
        return _scratch.make()
