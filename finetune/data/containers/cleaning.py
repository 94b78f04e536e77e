"""What is taken out of the cache folder again: leftovers of killed processes, and what belongs to
files that are gone or have long not been read.

A file `used/DIGEST` holds the path of the source that an index `DIGEST.npy` and the copies in the
folder `DIGEST/` were made from; its time is that of their last use, about to the day.
"""

import os
import re
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path

from finetune.data.containers.files import FileStamp

DAY_SECONDS = 86_400
UNUSED_DAYS = 30

_PART = r"\.\d+-[0-9a-f]{8}\.part"
_LEFTOVER = re.compile(rf"\..+\.\d+\.tmp|[0-9a-f]{{32}}\.npy{_PART}")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_COPY = re.compile(rf"[0-9a-f]+\.[0-9a-f]+\.[a-z0-9.]+?(?:\.npy)?(?P<part>{_PART})?")

_cleaned: set[Path] = set()


def note_use(source: FileStamp, cache: Path) -> None:
    """Let the index and the copies of the file stay for another while."""
    note = cache / "used" / source.digest
    with suppress(OSError):
        if not note.exists():
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_bytes(os.fsencode(source.path))
        elif _age_seconds(note) > DAY_SECONDS:
            os.utime(note)


def clean_once(cache: Path) -> None:
    """As `clean`, the first time in this process."""
    if cache.absolute() not in _cleaned:
        _cleaned.add(cache.absolute())
        clean(cache)


def clean(cache: Path) -> None:
    """Remove what nobody needs any more, by names that only we give. Never raises."""
    with suppress(OSError):
        for entry in list(os.scandir(cache)):
            with suppress(OSError, ValueError):
                _clean_entry(Path(entry.path), cache / "used")
        for note in list((cache / "used").iterdir()):
            with suppress(OSError):
                kept = (cache / f"{note.name}.npy", cache / note.name)
                is_empty = _is_ours(note) and not any(map(os.path.lexists, kept))
                if is_empty and _age_seconds(note) > DAY_SECONDS:
                    note.unlink()


def _clean_entry(path: Path, notes: Path) -> None:
    if _LEFTOVER.fullmatch(path.name):
        if _age_seconds(path) > DAY_SECONDS:
            _remove(path)
        return
    if not _is_ours(path):
        return
    unneeded = _is_unneeded(path, notes / path.name.removesuffix(".npy"))
    if path.suffix == ".npy":
        if unneeded:
            path.unlink()
        return
    for file in list(path.iterdir()):
        match = _COPY.fullmatch(file.name)
        if match and (unneeded or (match["part"] and _age_seconds(file) > DAY_SECONDS)):
            file.unlink()
    if unneeded:
        path.rmdir()


def _is_ours(path: Path) -> bool:
    """Whether it is called as we would call it, and is no link."""
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode):
        return bool(_DIGEST.fullmatch(path.name))
    return stat.S_ISREG(mode) and bool(_DIGEST.fullmatch(path.name.removesuffix(".npy")))


def _is_unneeded(path: Path, note: Path) -> bool:
    """Even where the source has gone, a run that has begun may read its copy for a while."""
    try:
        source, age_seconds = Path(os.fsdecode(note.read_bytes())), _age_seconds(note)
    except FileNotFoundError:  # of an older version
        return _age_seconds(path) > UNUSED_DAYS * DAY_SECONDS
    if age_seconds > UNUSED_DAYS * DAY_SECONDS:
        return True
    return age_seconds > DAY_SECONDS and _is_gone(source)


def _is_gone(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _age_seconds(path: Path) -> float:
    """Since the file, or the newest one in the folder, was written."""
    times = [path.lstat().st_mtime]
    if stat.S_ISDIR(path.lstat().st_mode):
        times += [inner.lstat().st_mtime for inner in path.rglob("*")]
    return time.time() - max(times)


def _remove(path: Path) -> None:
    """A file, or a folder with all that it holds; links are not followed."""
    if stat.S_ISDIR(path.lstat().st_mode):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()
