import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import RunDirError
from finetune.rundir import (
    RunDir,
    RunLock,
    create_run_dir,
    read_jsonl,
    replacing,
    write_jsonl,
    write_text,
)


def test_what_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_text(file, "old")

    def fail_half_way() -> None:
        with replacing(file) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for name in ("old", "new"):
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_rows_with_any_line_separator_read_back(tmp_path: Path) -> None:
    rows = [{"answer": "a\u2028b\u2029c\u0085d\ne\r"}, {"answer": ""}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


def test_a_line_that_was_being_written_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_jsonl(file) == [{"step": 1}, {"step": 2}]
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunDirError, match=r"metrics\.jsonl:2: is not JSON"):
        read_jsonl(file)


def test_what_a_killed_process_was_writing_is_no_stranger_and_goes_with_a_resume(
    tmp_path: Path,
) -> None:
    run = RunDir(tmp_path)
    for file in (run.recipe, run.environment):
        file.write_text("")
    (tmp_path / ".adapter.123.tmp").mkdir()
    (tmp_path / ".metrics.jsonl.9.tmp").write_text("")
    assert run.strangers() == []
    create_run_dir(tmp_path, resume=True)
    assert {entry.name for entry in tmp_path.iterdir()} == {"recipe.yaml", "environment.json"}
    (tmp_path / ".notes.123.tmp").write_text("mine")
    assert [entry.name for entry in run.strangers()] == [".notes.123.tmp"]


def test_a_run_killed_as_it_began_is_begun_again_and_a_recipe_of_the_user_is_left(
    tmp_path: Path,
) -> None:
    run = RunDir(tmp_path)
    run.environment.write_text("{}")
    (tmp_path / ".recipe.yaml.7.tmp").write_text("half")
    create_run_dir(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["environment.json"]
    run.environment.unlink()
    run.recipe.write_text("the user's own")
    with pytest.raises(RunDirError, match="already holds"):
        create_run_dir(tmp_path)


HOLD = """
import os, sys, time
from finetune.rundir import RunDir, RunLock

with RunLock(RunDir(sys.argv[1])) as lock:
    lock.take()
    if os.fork() == 0:  # as loading processes are, which outlive their parent for some seconds
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_alone_holds_a_run_and_not_beyond_its_end(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        told = rf"is being written by process {holder.pid} on {socket.gethostname()}"
        for _ in range(2):  # the first refusal leaves the words for the second
            with RunLock(RunDir(tmp_path)) as lock, pytest.raises(RunDirError, match=told):
                lock.take()
        holder.kill()
        holder.wait()
        with RunLock(RunDir(tmp_path)) as lock:
            lock.take()
            lock.take()  # once more is no matter
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_disk_without_locks_lets_a_run_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", fail)
    with RunLock(RunDir(tmp_path)) as lock:
        lock.take()


def test_a_run_that_is_replaced_stays_locked(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for file in (run.recipe, run.environment, run.summary):
        file.write_text("")
    with RunLock(run) as lock:
        lock.take()
        create_run_dir(tmp_path, overwrite=True, lock=lock)
        assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]
    create_run_dir(tmp_path)  # what is left of a run that was killed by then


@pytest.mark.parametrize(
    ("resume", "helps"),
    [(False, "set output.dir to a folder that can"), (True, "make room or mend the folder")],
)
def test_where_nothing_can_be_written_what_helps_is_told(
    resume: bool, helps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = RunDir(tmp_path / "run")
    if resume:
        run.path.mkdir()
        for file in (run.recipe, run.environment):
            file.touch()
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(RunDirError, match=rf"\(No space left on device\); {helps}"):
        create_run_dir(run.path, resume=resume)
