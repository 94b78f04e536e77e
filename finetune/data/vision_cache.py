"""Features of frozen vision parts, kept on disk from one epoch to the next and from run to run.

A file holds the features of one view. Its folder stands for all settings that shape them, and its
name says which view it is: the digest of the picture's file, the picture's upright size, and the
digest of how the view is cut from it. So a picture whose views are kept is never decoded.

Shape letters: P places of a view's features, D their width.
"""

import contextlib
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from xxhash import xxh3_128, xxh3_128_hexdigest

from finetune.data.packed_views import KeyedView
from finetune.data.signatures import image_format
from finetune.data.views import ImagePlan, Size
from finetune.rundir import write_text

SUFFIX = ".safetensors"
MAX_WAITING = 16  # views, of 11 MB for the largest of Idefics2
_NUM_WRITERS = 4  # digests and files leave the interpreter to others
_NAME = re.compile(rf"([0-9a-f]{{32}})-(\d+)x(\d+)-[0-9a-f]{{32}}{re.escape(SUFFIX)}")
# Files that a killed process left unfinished are taken away when they are this old
_UNFINISHED_SECONDS = 24 * 3600
_SURE_NS = 2 * 10**9  # no drive tells times more coarsely, FAT's two seconds among them
_SLACK = 20  # a twentieth of the limit is freed at once, since all files are looked at to free any


def content_key(data: bytes, page: int | None, pdf_dpi: int) -> str:
    """A name for what a file shows; of a PDF, for one of its pages as it is drawn."""
    digest = xxh3_128(data)
    if image_format(data) == "PDF":
        digest.update(repr((page, pdf_dpi)).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class VisionCache:
    """Tells which views are kept, and reads them, in any process.

    `settings` names what shapes the features beside the picture and its plan; caches of other
    settings stand beside it in `root`.
    """

    root: Path
    settings: str
    _sizes: dict[str, Size] = field(default_factory=dict, compare=False, repr=False)
    _looked_at: dict[Path, int] = field(default_factory=dict, compare=False, repr=False)

    def path_of(self, key: str) -> Path:
        """Where a view's features are, if they are kept."""
        return self.root / self.settings / key[:2] / f"{key}{SUFFIX}"

    def size_of(self, content: str) -> Size | None:
        """Upright width and height of a picture of which a view is or was kept, else None."""
        if content not in self._sizes:
            self._look_at(self.path_of(content).parent)
        return self._sizes.get(content)

    def _look_at(self, folder: Path) -> None:
        """Learn the sizes from the names in a folder, if it has changed."""
        with contextlib.suppress(OSError):
            changed = folder.stat().st_mtime_ns
            if self._looked_at.get(folder) == changed:
                return
            # or another file may still come within one tick of the clock that times are told by
            is_sure = time.time_ns() - changed > _SURE_NS
            for path in folder.iterdir():
                if match := _NAME.fullmatch(path.name):
                    self._sizes[match[1]] = int(match[2]), int(match[3])
            if is_sure:
                self._looked_at[folder] = changed

    def views(
        self, content: str, size_px: Size, plan: ImagePlan, reduction: int = 1
    ) -> list[KeyedView]:
        """The views of a picture, each with its features where they are kept, without pixels.

        `reduction` is what its edges are divided by before they are cut, which shapes the pixels.
        """
        keyed = []
        for view in plan.views:
            cut = xxh3_128_hexdigest(repr((view, plan.resizes, plan.canvas, reduction)).encode())
            key = f"{content}-{size_px[0]}x{size_px[1]}-{cut}"
            shape = (3, view.height_px, view.width_px)
            keyed.append(KeyedView(key, shape, features=self.find(key)))
        return keyed

    def find(self, key: str) -> torch.Tensor | None:
        """A view's features, bfloat16 [P, D], on pages of the file that are read when they are
        used; None where they are not kept. A damaged file is removed.
        """
        path = self.path_of(key)
        try:
            with safe_open(path, framework="pt") as file:
                features = file.get_tensor("features")
                digest = (file.metadata() or {}).get("xxh3_128")
        except OSError:
            return None
        except SafetensorError:
            features = digest = None
        if features is None or digest != _digest(features):
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # perhaps the folder may only be read
            os.utime(path)  # the time that eviction goes by
        return features


def _digest(features_PD: torch.Tensor) -> str:
    return xxh3_128_hexdigest(features_PD.view(torch.int16).numpy().data)


class CacheWriter:
    """Writes views to a cache that several processes write to, in threads of its own.

    All files in `root` together are never more than `limit_bytes`; each process has one more on its
    way. Where there is no room, the files go that were unused for longest, but none that was used
    since this writer was made: an epoch uses each view once, so to evict those that come back next
    epoch for those that came last would leave nothing to be found. When only such files are left,
    `is_full`, and nothing more is written.
    """

    def __init__(
        self,
        cache: VisionCache,
        limit_bytes: int,
        on_problem: Callable[[str], None] = lambda problem: None,
    ):
        """`on_problem` hears at most once why nothing can be written. Raises nothing: a cache that
        cannot be written to is none.
        """
        self.cache = cache
        self.limit_bytes = limit_bytes
        self.on_problem = on_problem
        self.num_kept = 0
        self.is_full = False
        self._fault: Exception | None = None
        self._lock = FileLock(cache.root / ".lock")  # between threads as well
        self._counting = threading.Lock()
        self._total = cache.root / ".total"
        self._waiting: queue.Queue[tuple[str, torch.Tensor] | None] = queue.Queue(MAX_WAITING)
        self._threads = [
            threading.Thread(target=self._write_all, daemon=True) for _ in range(_NUM_WRITERS)
        ]
        self._started_ns = 0
        try:
            self._started_ns = self._now_ns()
            with self._lock:
                self._make_room(0)  # the limit may have been larger before
        except OSError as error:
            self._give_up(error)
        for thread in self._threads:
            thread.start()

    def put(self, key: str, features_PD: torch.Tensor) -> None:
        """Have a view's features written, bfloat16, from any device; waits while the writer is far
        behind.
        """
        if not self._is_idle():
            self._waiting.put((key, features_PD))

    def write(self, key: str, features_PD: torch.Tensor) -> bool:
        """Write a view's features whole or not at all; whether they are there then.

        Raises `OSError`.
        """
        path = self.cache.path_of(key)
        features_PD = features_PD.detach().cpu().contiguous()
        data = save({"features": features_PD}, metadata={"xxh3_128": _digest(features_PD)})
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            with self._lock:
                if not path.exists():
                    if not self._make_room(len(data)):
                        return False
                    temporary.replace(path)
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def wait(self) -> None:
        """Until all that was put is written, or given up."""
        self._waiting.join()

    def close(self) -> None:
        """Write what still waits, and end the threads. Raises what went wrong there for no reason
        of the disk's.
        """
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()
        if self._fault:
            raise self._fault

    def num_bytes(self) -> int:
        """Of all files in `root` at one moment, by other processes and of other settings, too."""
        try:
            with self._lock:  # one evicted and one written while they are counted would both count
                return self._sum()
        except OSError:  # the folder may only be read
            return self._sum()

    def _sum(self) -> int:
        return sum(size for _, _, size in self._files())

    def _write_all(self) -> None:
        while waiting := self._waiting.get():
            try:
                if not self._is_idle():
                    self._write_one(*waiting)
            except Exception as error:  # without a reader the queue would stop the training
                self._fault = error
            finally:
                self._waiting.task_done()

    def _write_one(self, key: str, features_PD: torch.Tensor) -> None:
        try:
            is_kept = self.write(key, features_PD)
            with self._counting:
                self.is_full |= not is_kept
                self.num_kept += is_kept
        except OSError as error:
            self._give_up(error)

    def _is_idle(self) -> bool:
        return self.is_full or self._fault is not None

    def _give_up(self, error: OSError) -> None:
        with self._counting:
            is_told, self.is_full = self.is_full, True
        if is_told:
            return
        self.on_problem(
            f"vision cache: {self.cache.root} cannot be written to ({error.strerror or error}); "
            "training goes on, and computes what is not kept"
        )

    def _make_room(self, num_bytes: int) -> bool:
        """Whether there is room for this many, which are then counted; the lock is held."""
        total = self._read_total()
        if total is None or total + num_bytes > self.limit_bytes:
            total = self._evict(num_bytes)
        if total + num_bytes > self.limit_bytes:
            return False
        # Before the file is there: a process that ends in between leaves the sum too high, and it
        # is made again when it reaches the limit
        write_text(self._total, str(total + num_bytes))
        return True

    def _read_total(self) -> int | None:
        try:
            return int(self._total.read_text())
        except (OSError, ValueError):
            return None

    def _evict(self, num_bytes: int) -> int:
        """Remove what was unused for longest, if there is too much; bytes left."""
        files = sorted(self._files())
        total = sum(size for _, _, size in files)
        if total + num_bytes > self.limit_bytes:
            enough = self.limit_bytes - self.limit_bytes // _SLACK - num_bytes
            for used_ns, path, size in files:
                if total <= enough or used_ns >= self._started_ns:
                    break
                path.unlink(missing_ok=True)
                total -= size
        write_text(self._total, str(total))
        return total

    def _files(self) -> Iterator[tuple[int, Path, int]]:
        """Time of last use in nanoseconds, path and bytes of each; old unfinished ones go."""
        day_ago = time.time() - _UNFINISHED_SECONDS
        for path in self.cache.root.rglob("*"):
            with contextlib.suppress(OSError):  # gone since
                stat = path.stat()
                if path.suffix == SUFFIX:
                    yield stat.st_mtime_ns, path, stat.st_size
                elif path.suffix == ".tmp" and stat.st_mtime < day_ago:
                    path.unlink()

    def _now_ns(self) -> int:
        """By the clock that the times of files there are taken from."""
        self.cache.root.mkdir(parents=True, exist_ok=True)
        file = self.cache.root / f".{uuid.uuid4().hex}.tmp"
        try:
            file.touch()
            return file.stat().st_mtime_ns
        finally:
            file.unlink(missing_ok=True)
