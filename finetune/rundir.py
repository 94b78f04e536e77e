"""The run directory: where each thing stands, and how it is written whole or not at all."""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from finetune.errors import RunDirError

_TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp")  # as `replacing` names what it writes
PREDICTIONS = "predictions.jsonl"
THUMBNAILS = "images"


class RunDir:
    """Paths of one run, and the reading of its files; makes nothing by itself."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.skipped = self.path / "skipped.jsonl"
        self.changed = self.path / "changed.jsonl"
        self.data = self.path / "data.json"
        self.charts = self.path / "charts"
        self.bad_steps = self.path / "bad_steps"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.evaluation = self.path / "evaluation"
        self.predictions = self.evaluation / PREDICTIONS
        self.thumbnails = self.evaluation / THUMBNAILS
        self.partial = self.path / "evaluation.partial"
        self.evaluations = self.path / "evaluations"
        self.summary = self.path / "summary.json"
        self.ended = self.path / "ended.json"
        self.report = self.path / "report.html"
        self.lock = self.path / ".lock"

    def is_run(self) -> bool:
        """Whether a run was begun here: a user's own folder may hold a recipe.yaml, too."""
        return self.recipe.is_file() and self.environment.is_file()

    def strangers(self) -> list[Path]:
        """What stands in the folder and is no part of a run."""
        return [entry for entry in self._entries() if self._name_of(entry) is None]

    def leftovers(self) -> list[Path]:
        """What `replacing` was writing when its process was killed."""
        return [
            entry for entry in self._entries() if self._name_of(entry) not in (None, entry.name)
        ]

    def is_barely_begun(self) -> bool:
        """Whether a run was killed as it began: the recipe is written after the environment."""
        known = {self._name_of(entry) for entry in self._entries()}
        return (
            bool(known)
            and known <= {self.environment.name, self.recipe.name, self.lock.name}
            and (not self.recipe.is_file())
        )

    def _entries(self) -> list[Path]:
        return sorted(self.path.iterdir()) if self.path.is_dir() else []

    def _name_of(self, entry: Path) -> str | None:
        """Of the part of a run that an entry is, or was to become; None for a stranger."""
        temporary = _TEMPORARY.fullmatch(entry.name)
        name = temporary[1] if temporary else entry.name
        parts = (path.name for path in vars(self).values() if path != self.path)
        return name if name in parts else None


def check_run_dir(path: str | Path, *, resume: bool = False, overwrite: bool = False) -> RunDir:
    """Whether a run may be written there; touches nothing.

    A directory that holds anything is refused unless `resume` or `overwrite` is given, and then
    unless it holds a run, and for `overwrite` nothing else. Raises `RunDirError`.
    """
    run = RunDir(path)
    if run.path.exists() and not run.path.is_dir():
        raise RunDirError(f"{path}: is a file; set output.dir to a folder")
    taken = run.path.is_dir() and any(run.path.iterdir()) and not run.is_barely_begun()
    if resume and not run.is_run():
        raise RunDirError(f"{path}: nothing to resume: no run was begun there; omit --resume")
    if taken and not resume and not overwrite:
        raise RunDirError(
            f"{path}: already holds a run or other files; go on with it (--resume), "
            "replace it (--overwrite), or set output.dir to another folder"
        )
    if taken and overwrite and (not run.is_run() or run.strangers()):
        found = ", ".join(entry.name for entry in run.strangers()[:3]) or "no run"
        raise RunDirError(
            f"{path}: holds other things than a run ({found}) and is not overwritten; "
            "move them away, or set output.dir to another folder"
        )
    return run


def create_run_dir(
    path: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    needed_bytes: int = 0,
    lock: "RunLock | None" = None,
) -> RunDir:
    """The run directory, writable and with room: kept as it is with `resume`, emptied with
    `overwrite`, which happens last.

    `needed_bytes` is what the run will write; its `lock` is taken before anything is emptied.
    Raises `RunDirError`, also for what `check_run_dir` refuses, and leaves nothing new behind.
    """
    run = check_run_dir(path, resume=resume, overwrite=overwrite)
    was_there = run.path.is_dir()
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run.path) as probe:
            probe.write(b"0")
            probe.flush()
        _check_free_space(run, needed_bytes)
        if lock:
            lock.take()
        emptied = run.path.iterdir() if overwrite and not resume else run.leftovers()
        for entry in emptied:
            if entry != run.lock:  # this process may hold it
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    except OSError as error:
        if not was_there:
            with suppress(OSError):  # another run may be there by now
                run.path.rmdir()
        if isinstance(error, RunDirError):
            raise
        helps = "make room or mend the folder" if resume else "set output.dir to a folder that can"
        raise RunDirError(f"{path}: cannot be written to ({error.strerror}); {helps}") from error
    return run


def _check_free_space(run: RunDir, needed_bytes: int) -> None:
    """Raise `RunDirError` where the disk under the run cannot take what the run will write."""
    free_bytes = shutil.disk_usage(run.path).free
    if free_bytes < needed_bytes:
        raise RunDirError(
            f"{run.path}: {free_bytes / 2**20:,.0f} MiB free, but checkpoints and adapter need "
            f"about {needed_bytes / 2**20:,.0f} MiB; make room, lower training.keep_checkpoints, "
            "or set output.dir to another disk"
        )


class RunLock:
    """Keeps a second `train` out of a run directory: a job that is queued again may start while the
    one before is still saving.

    The system's lock of a file, which ends with the process, whatever ends that. Not filelock's:
    loading processes would inherit it, and hold it for some seconds after the run was killed. On a
    disk that knows no locks there is none.
    """

    def __init__(self, run: RunDir):
        self.run = run
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Hold it until the block ends. Raises `RunDirError`, with who holds it."""
        if self._file:
            return
        try:
            file = self.run.lock.open("a+", encoding="utf-8")
        except OSError as error:
            raise RunDirError(
                f"{self.run.lock}: cannot be written ({error.strerror}); mend the folder"
            ) from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return
            raise RunDirError(
                f"{self.run.path}: is being written by {holder}; wait until that has ended, or end "
                "it"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file:
            self._file.close()  # and the lock with it
            self._file = None


def open_run_dir(path: str | Path) -> RunDir:
    """An existing run. Raises `RunDirError` where there is none."""
    run = RunDir(path)
    if not run.path.is_dir():
        raise RunDirError(
            f"{path}: no such run directory; give the output.dir of a `finetune train`"
        )
    if not run.recipe.is_file():
        raise RunDirError(f"{path}: is no run directory: recipe.yaml is missing")
    return run


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, file or folder, when the block ends
    without an error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, indented, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a line of JSON a row, whole or not at all."""
    # a file's name may hold bytes that are no text, and stands in `where`
    errors = "backslashreplace"
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors=errors) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add a line of JSON a row to a file of such lines, after cutting off a last line that was not
    written to its end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        for row in rows:
            text = json.dumps(row, ensure_ascii=False) + "\n"
            file.write(text.encode(errors="backslashreplace"))


def read_json(path: Path) -> Any:
    """One JSON document. Raises `RunDirError` where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunDirError(f"{path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise RunDirError(f"{path}:{error.lineno}: is not JSON: {error.msg}") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file of ours; an empty list where there is no file.

    A last line without its line feed was being written when the process was killed, and does not
    count. Raises `RunDirError` where any other line is broken.
    """
    if not path.is_file():
        return []
    # not splitlines(), which also breaks at U+2028 and others that answers may hold
    *lines, _unfinished = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:  # of JSON, and of bytes that are no text
            raise RunDirError(f"{path}:{number}: is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise RunDirError(f"{path}:{number}: is no object")
        rows.append(row)
    return rows
