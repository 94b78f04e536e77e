"""What a training took: time, memory, and what it computed."""

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


@dataclass
class Figures:
    """What it took. Seconds are of all steps, from the loading of the first batch on."""

    samples: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    weights_mib: float = 0.0
    """Resident set just before the first step, weights read in."""
    peak_mib: float = 0.0
    """The most there was during the steps."""
    tensors_mib: float = 0.0
    """The most that tensors held of what the steps allocated, where they were counted."""
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    """Places that the language model computed, padding included."""
    pixels: int = 0
    """Pixels that the vision tower computed, padding included."""
    num_rows: int = 0
    row_tokens: int = 0
    row_pixels: int = 0
    """What the rows themselves hold, those of an epoch together; of ours alone."""
    trainable: int = 0


class Clock(TrainerCallback):
    """Time before the first step and after each one, the loading of its batch included."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._tick()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._tick()

    def _tick(self) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def fill_in(self, figures: Figures) -> None:
        """What was measured."""
        figures.seconds = self.wall[-1] - self.wall[0]
        figures.cpu_seconds = self.cpu[-1] - self.cpu[0]
        pairs = zip(self.wall, self.wall[1:], strict=False)
        figures.step_seconds = [round(after - before, 4) for before, after in pairs]


@contextmanager
def peak_memory(figures: Figures) -> Iterator[None]:
    """Fill in the resident set before, and its peak meanwhile; nothing where there is no /proc."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        yield
        return
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading left free is not the training's
    reset.write_text("5")
    figures.weights_mib = _resident(status, "VmRSS")
    yield
    figures.peak_mib = _resident(status, "VmHWM")


@contextmanager
def tensor_memory(figures: Figures) -> Iterator[None]:
    """Fill in the most that tensors held over what they held before."""
    with torch.profiler.profile(profile_memory=True) as profiled:
        yield
    assert profiled.profiler
    assert profiled.profiler.kineto_results
    events: Any = profiled.profiler.kineto_results.events()
    allocated = [(each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]"]
    held = accumulate(num_bytes for _, num_bytes in sorted(allocated))
    figures.tensors_mib = max(held) / 2**20


def _resident(status: Path, name: str) -> float:
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))
