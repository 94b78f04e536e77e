"""Checkpoints on disk: written aside, sealed with checksums, renamed; read again only if whole."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from xxhash import xxh3_128

from finetune.errors import RunDirError
from finetune.rundir import read_json, write_json

MANIFEST = "manifest.json"
ASIDE = ".writing"
_CHUNK = 1 << 22


def settle(written: Path, place: Path) -> None:
    """Give a checkpoint that was `written` aside its manifest, bring all of it to the disk, and
    move it to its `place`: whatever ends the process or the machine, a folder there is whole.
    """
    files = sorted(path for path in written.rglob("*") if path.is_file())
    write_json(
        written / MANIFEST,
        {
            path.relative_to(written).as_posix(): {
                "bytes": path.stat().st_size,
                "xxh3_128": _digest(path),
            }
            for path in files
        },
    )
    folders = [path for path in written.rglob("*") if path.is_dir()]
    for path in (*files, written / MANIFEST, *folders, written):
        _sync(path)
    if place.exists():  # damaged, or gone back behind: another run of the same step takes its place
        shutil.rmtree(place)
    written.rename(place)
    _sync(place.parent)


def last_whole(
    checkpoints: Path, tell: Callable[[str], None] = lambda message: None
) -> Path | None:
    """The newest `checkpoint-STEP` that is as it was written, or None; `tell` is given a message
    for each newer one that is not.
    """
    steps = {
        int(path.name.rpartition("-")[2]): path
        for path in checkpoints.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit()
    }
    for step in sorted(steps, reverse=True):
        fault = fault_of(steps[step])
        if not fault:
            return steps[step]
        tell(f"{steps[step]}: is damaged ({fault}), so the one before is taken")
    return None


def drop_newer(checkpoints: Path, kept: Path | None) -> None:
    """Delete what stands of checkpoints after the one that a run goes on from, all of them damaged:
    they would count as its newest.
    """
    last = int(kept.name.rpartition("-")[2]) if kept else -1
    for path in checkpoints.glob("checkpoint-*"):
        step = path.name.rpartition("-")[2]
        if step.isdigit() and int(step) > last:
            shutil.rmtree(path)


def fault_of(checkpoint: Path) -> str | None:
    """What of a checkpoint is not as it was written; None for nothing."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        for name, wanted in manifest.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if (size := file.stat().st_size) != wanted["bytes"]:
                return f"{name} has {size:,} bytes instead of {wanted['bytes']:,}"
            if _digest(file) != wanted["xxh3_128"]:
                return f"{name} holds other bytes than were written"
    except RunDirError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (AttributeError, KeyError, TypeError):
        return f"{MANIFEST} is no list of files"
    return None


def _digest(path: Path) -> str:
    digest = xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, from the system's memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
