"""Drives that fail for a while or stall, and loading processes that die."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
from rich.console import Console

from finetune.data import images
from finetune.data.collate import Collator
from finetune.data.containers import open_stream, shards
from finetune.data.containers.files import FileStamp
from finetune.data.containers.tar_shards import read_sample
from finetune.data.images import ImageAccess, load_image
from finetune.data.patience import DriveError, read_patiently
from finetune.data.streaming import ExampleStream
from finetune.errors import DataError
from finetune.recipe import load_recipe
from finetune.train import train
from finetune.training import prepare

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
    return read_patiently(read, timeout_seconds=60, retries=retries, wait=waited.append), waited


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_an_error_that_may_pass_is_tried_again_after_longer_and_longer(number: int) -> None:
    drive = Drive(*(OSError(number, os.strerror(number)) for _ in range(3)))
    assert patiently(drive) == (b"here", [1.0, 2.0, 4.0])


def test_retries_are_bounded_and_what_the_drive_said_is_told() -> None:
    drive = Drive(*(OSError(errno.EIO, "Input/output error") for _ in range(9)))
    told = r"cannot be read \(Input/output error\) in each of 3 tries: the drive fails"
    with pytest.raises(DriveError, match=told):
        patiently(drive, retries=2)
    assert drive.num_reads == 3


def test_a_file_that_is_not_there_is_not_waited_for() -> None:
    drive = Drive(FileNotFoundError(errno.ENOENT, "No such file"))
    with pytest.raises(FileNotFoundError):
        patiently(drive)
    assert drive.num_reads == 1


class Stall:
    """What a read may hang in until the test ends."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.num_ended = 0

    def __call__(self, *_: object) -> bytes:
        self.is_over.wait(60)
        self.num_ended += 1
        return b""


@pytest.fixture
def stall() -> Iterator[Stall]:
    stall = Stall()
    yield stall
    stall.is_over.set()


def test_a_drive_that_does_not_answer_is_given_up_and_the_settings_named(stall: Stall) -> None:
    with pytest.raises(DriveError, match=r"not read within 0\.2 seconds in each of 2 tries"):
        read_patiently(stall, timeout_seconds=0.2, retries=1, wait=lambda _: None)
    assert not stall.num_ended


def test_a_picture_on_a_drive_that_stalls_once_is_read(
    tmp_path: Path,
    picture: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    stall: Stall,
) -> None:
    picture(28, 28).save(tmp_path / "a.png")
    stock, reading, stalled = images._read_regular, [], []

    def stalls(path: Path) -> bytes:
        reading.append(threading.current_thread())
        if len(reading) == 1:
            stalled.append(reading[0])
            stall()
        return stock(path)

    class Watched(threading.Thread):
        """Waited for until it has ended or stalls, so that no clock decides which read is late."""

        def join(self, timeout: float | None = None) -> None:
            assert timeout == 0.3
            while self.is_alive() and self not in stalled:
                super().join(0.01)

    monkeypatch.setattr(images, "_read_regular", stalls)
    monkeypatch.setattr(threading, "Thread", Watched)
    access = ImageAccess(tmp_path, read_timeout_seconds=0.3, read_retries=1)
    assert load_image("a.png", access).size == (28, 28)
    assert len(reading) == 2
    assert not stall.num_ended
    with pytest.raises(DataError, match=r"image 'b\.png' not found"):
        load_image("b.png", access)


def test_a_picture_that_stalls_for_good_is_named(
    tmp_path: Path, picture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, stall: Stall
) -> None:
    picture(28, 28).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "_read_regular", stall)
    access = ImageAccess(tmp_path, read_timeout_seconds=0.1, read_retries=0)
    with pytest.raises(DriveError, match=r"image 'a\.png' is not read within 0\.1 seconds: the"):
        load_image("a.png", access)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Has the drive of all pictures fail."""

    def fails(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    return lambda: monkeypatch.setattr(images, "_read_regular", fails)


LEFT_OUT = ["data.bad_rows=skip", "data.read_retries=0"]
STREAMED = [*LEFT_OUT, "data.train.0.streaming=true"]


def test_rows_on_a_drive_that_fails_are_not_left_out_as_bad(
    dataset: Callable[..., Path], failing: Callable[[], None]
) -> None:
    """It would leave out all of them."""
    recipe = load_recipe(dataset(num_eval=0), LEFT_OUT)
    failing()
    with pytest.raises(DriveError, match=r"image 'train\d+\.png' cannot be read \(Input/output"):
        prepare(recipe, Console(quiet=True))


def test_rows_of_a_stream_on_a_drive_that_fails_are_not_left_out_as_bad(
    dataset: Callable[..., Path], failing: Callable[[], None]
) -> None:
    prepared = prepare(load_recipe(dataset(num_eval=0), STREAMED), Console(quiet=True))
    stream = ExampleStream(
        prepared.streams, prepared.encoder, seed=0, skip_bad=True, skip_overlong=True
    )
    failing()
    with pytest.raises(DriveError, match=r"train\.jsonl:\d+: image 'train\d+\.png' cannot be read"):
        next(iter(stream))


def test_a_drive_that_fails_while_training_is_not_told_as_a_row_that_changed(
    dataset: Callable[..., Path], failing: Callable[[], None]
) -> None:
    prepared = prepare(load_recipe(dataset(num_eval=0), LEFT_OUT), Console(quiet=True))
    assert prepared.train
    failing()
    with pytest.raises(DriveError, match=r"train\.jsonl:1: image 'train0\.png' cannot") as error:
        Collator(prepared.encoder, prepared.train.rows)([{"row": 0}])
    assert "changed since" not in str(error.value)


def test_a_sample_of_an_archive_on_a_drive_that_fails_is_not_a_bad_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b'{"a": 1}')
    stamp, sample = FileStamp.of(path), {"key": "a", "members": [["a.json", 0, 8]]}
    assert read_sample(stamp, sample) == {"__key__": "a", "a": 1}

    def fails(*_: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(DriveError, match=r"a\.tar: cannot be read \(Input/output error\)"):
        read_sample(stamp, sample)


def test_a_drive_that_fails_below_a_stream_is_no_fault_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    rows = open_stream(path).iterate(0, 1)
    monkeypatch.setattr(shards, "open_plain", lambda _: Failing())
    with pytest.raises(DriveError, match=r"a\.jsonl: cannot be read .*: the drive fails"):
        next(rows)


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError("Connection reset by peer")])
def test_a_loading_process_that_is_killed_as_it_hands_over_a_batch_is_told_of(
    dataset: Callable[..., Path], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then torch may take it to be alive, and raises what its pipe does."""
    recipe = dataset(num_eval=0, training={"num_workers": 1})

    def broken(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr("finetune.training.VisionSFTTrainer.train", broken)
    with pytest.raises(DataError, match="a loading process was killed"):
        train(load_recipe(recipe), console=Console(quiet=True))


def test_a_loading_process_that_is_killed_ends_the_run_with_a_message(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    keys = {"max_steps": 5000, "save_steps": 5000, "num_workers": 1}
    recipe = dataset(num_eval=0, training=keys)
    process = subprocess.Popen(
        [FINETUNE, "train", str(recipe)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        workers = psutil.Process(process.pid).children(recursive=True)
        if metrics.is_file() and metrics.stat().st_size and workers:
            try:
                workers[-1].send_signal(signal.SIGKILL)
                break
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.05)
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 2, messages
    assert "a loading process was killed" in messages
    assert "Traceback" not in messages
