"""Checkpoints on disk: written aside, sealed with checksums, renamed; read again only if whole."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from xxhash import xxh3_128

from finetune.errors import RunDirError
from finetune.rundir import write_json

MANIFEST = "manifest.json"
ASIDE = ".writing"
WEIGHTS = (".safetensors", ".safetensors.index.json")
_PREFIX = "checkpoint-"
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

    Raises `RunDirError` where one cannot be read.
    """
    steps = {step: path for path in checkpoints.glob(f"{_PREFIX}*") if (step := _step(path)) >= 0}
    for step in sorted(steps, reverse=True):
        fault = fault_of(steps[step])
        if not fault:
            return steps[step]
        tell(f"{steps[step]}: is damaged ({fault})")
    return None


def move_newer_aside(checkpoints: Path, kept: Path | None) -> None:
    """Give what stands of checkpoints after the one that a run goes on from, all of them damaged,
    another name (`damaged-checkpoint-STEP`): they would count as its newest.
    """
    for path in checkpoints.glob(f"{_PREFIX}*"):
        if _step(path) > (_step(kept) if kept else -1):
            aside = path.with_name(f"damaged-{path.name}")
            if aside.is_dir():
                shutil.rmtree(aside)
            path.rename(aside)


def _step(path: Path) -> int:
    """Of a checkpoint, by its name; -1 for what is none."""
    step = path.name.removeprefix(_PREFIX)
    return int(step) if step.isdecimal() else -1


def fault_of(checkpoint: Path, *, only: tuple[str, ...] = ("",)) -> str | None:
    """What of a checkpoint is not as it was written, or of its files with `only` these endings;
    None for nothing.

    Raises `RunDirError` where it cannot be read, which need not be so the next time.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        if not manifest:
            return f"{MANIFEST} lists no files"
        for name, wanted in manifest.items():
            if not name.endswith(only):
                continue
            file = checkpoint / name
            if (size := file.stat().st_size) != wanted["bytes"]:
                return f"{name} has {size:,} bytes instead of {wanted['bytes']:,}"
            if _digest(file) != wanted["xxh3_128"]:
                return f"{name} holds other bytes than were written"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except OSError as error:
        raise RunDirError(
            f"{error.filename or checkpoint}: cannot be read ({error.strerror}): mend the drive or "
            "folder and start again"
        ) from error
    except (AttributeError, KeyError, TypeError):
        return f"{MANIFEST} is no list of files"
    except ValueError:  # of JSON, and of bytes that are no text
        return f"{MANIFEST} is not JSON"
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
