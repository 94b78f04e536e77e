"""Drives that fail for a while or stall, and loading processes that die."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune.data import images
from finetune.data.images import ImageAccess, load_image
from finetune.data.patience import read_patiently
from finetune.errors import DataError

FINETUNE = str(Path(sys.executable).parent / "finetune")


class Drive:
    """Fails so often, then answers."""

    def __init__(self, *errors: OSError):
        self.errors = list(errors)
        self.num_reads = 0

    def __call__(self) -> bytes:
        self.num_reads += 1
        if self.errors:
            raise self.errors.pop(0)
        return b"here"


def patiently(read: Callable[[], bytes], retries: int = 3) -> tuple[bytes, list[float]]:
    waited: list[float] = []
    return read_patiently(read, timeout_seconds=5, retries=retries, wait=waited.append), waited


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_an_error_that_may_pass_is_tried_again_after_longer_and_longer(number: int) -> None:
    drive = Drive(*(OSError(number, os.strerror(number)) for _ in range(3)))
    assert patiently(drive) == (b"here", [1.0, 2.0, 4.0])


def test_retries_are_bounded_and_the_error_is_the_drives_own() -> None:
    drive = Drive(*(OSError(errno.EIO, "Input/output error") for _ in range(9)))
    with pytest.raises(OSError, match="Input/output error"):
        patiently(drive, retries=2)
    assert drive.num_reads == 3


def test_a_file_that_is_not_there_is_not_waited_for() -> None:
    drive = Drive(FileNotFoundError(errno.ENOENT, "No such file"))
    with pytest.raises(FileNotFoundError):
        patiently(drive)
    assert drive.num_reads == 1


def test_a_drive_that_does_not_answer_is_given_up_and_the_settings_named() -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=r"not read within 0\.2 seconds in each of 2 tries"):
        read_patiently(
            lambda: time.sleep(30) or b"", timeout_seconds=0.2, retries=1, wait=lambda _: None
        )
    assert time.monotonic() - began < 10


def test_a_picture_on_a_drive_that_stalls_once_is_read(
    tmp_path: Path, picture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(28, 28).save(tmp_path / "a.png")
    stock, calls = images._read_regular, []

    def stalls(path: Path) -> bytes:
        calls.append(path)
        if len(calls) == 1:
            time.sleep(5)
        return stock(path)

    monkeypatch.setattr(images, "_read_regular", stalls)
    access = ImageAccess(tmp_path, read_timeout_seconds=0.3, read_retries=1)
    assert load_image("a.png", access).size == (28, 28)
    assert len(calls) == 2
    with pytest.raises(DataError, match=r"image 'b\.png' not found"):
        load_image("b.png", access)


def test_a_picture_that_stalls_for_good_is_named(
    tmp_path: Path, picture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(28, 28).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "_read_regular", lambda path: time.sleep(5))
    access = ImageAccess(tmp_path, read_timeout_seconds=0.1, read_retries=0)
    with pytest.raises(DataError, match=r"image 'a\.png' is not read within 0\.1 seconds: the"):
        load_image("a.png", access)


def test_a_loading_process_that_is_killed_ends_the_run_with_a_message(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    keys = {"max_steps": 5000, "save_steps": 5000, "num_workers": 1}
    recipe = dataset(num_eval=0, training=keys)
    process = subprocess.Popen(
        [FINETUNE, "train", str(recipe)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        workers = psutil.Process(process.pid).children(recursive=True)
        if metrics.is_file() and metrics.stat().st_size and workers:
            try:
                workers[-1].send_signal(signal.SIGKILL)
                break
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.05)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 2, messages
    assert "a loading process was killed" in messages
    assert "Traceback" not in messages
