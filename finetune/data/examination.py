"""Every row read, decoded, rendered and counted, on all cores, in memory that does not grow with
what the rows hold: what `check` reports and what `train` stands on.

What is kept of a row is one line of a table (some 60 bytes); what is wrong goes to a file.
"""

import collections
import gc
import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import sha256
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from finetune.data.examples import Encoder, OverlongError, RowCounts
from finetune.data.sources import Row, Source, StreamSource
from finetune.errors import DataError

# A row of the table. `state` is one of the constants below.
COUNTS = np.dtype(
    [
        ("state", "u1"),
        ("num_tokens", "u4"),
        ("num_learnt_tokens", "u4"),
        ("num_turns", "u4"),
        ("num_images", "u4"),
        ("num_views", "u4"),
        ("num_view_pixels", "u8"),
        ("row_key", "u8"),
        ("question_key", "u8"),
    ]
)
USABLE, BAD, OVERLONG = 0, 1, 2
_counted = attrgetter(*(name for name in COUNTS.names or () if name != "state"))
Kind = Literal["bad", "overlong", "changed"]
LEFT_OUT: tuple[Kind, ...] = ("bad", "overlong")
CHANGED: tuple[Kind, ...] = ("changed",)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to tell about a row: `bad` and `overlong` rows are left out, `changed` ones are
    trained shorter.

    `group` is what findings are counted by: the reason for a change.
    """

    kind: Kind
    where: str
    reason: str
    group: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"

    def to_json(self) -> dict[str, str]:
        """The line in `skipped.jsonl` or `changed.jsonl`."""
        return {"where": self.where, "reason": self.reason, "kind": self.group or self.kind}


@dataclass(frozen=True)
class Examination:
    """What was found in some sources, in the order of their rows.

    `counts` has one line a row [rows of all sources], `image_keys` one a usable image, in order.
    `findings_file` holds a JSON line a finding.
    """

    counts: np.ndarray
    image_keys: np.ndarray
    findings_file: Path
    num_rows_of: tuple[int, ...]

    def findings(self, *kinds: Kind) -> Iterator[Finding]:
        """The findings of these kinds, in the order of the rows; all of them without any."""
        with self.findings_file.open(encoding="utf-8") as lines:
            for line in lines:
                finding = Finding(**json.loads(line))
                if not kinds or finding.kind in kinds:
                    yield finding

    def usable(self) -> np.ndarray:
        """Numbers of the rows that can be trained, over all sources [usable rows]."""
        return np.flatnonzero(self.counts["state"] == USABLE)

    def num_of(self, state: int) -> int:
        """How many rows are in this state."""
        return int(np.count_nonzero(self.counts["state"] == state))

    def digest(self) -> str:
        """SHA-256 over what the model sees of every row, pictures included, in their order."""
        return sha256(self.counts[["state", "row_key"]].tobytes()).hexdigest()


def examine(
    sources: Sequence[Source],
    encoder: Encoder,
    *,
    findings_file: Path,
    num_processes: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Examination:
    """Examine every row of the sources. `findings_file` is written anew; `on_progress` is told of
    the rows done and of all.

    Raises `DataError` where a worker process died.
    """
    total = sum(len(source) for source in sources)
    size = _block_size(total)
    blocks = [
        (number, start, min(start + size, len(source)))
        for number, source in enumerate(sources)
        for start in range(0, len(source), size)
    ]
    work = _Work(tuple(sources), encoder)
    table = np.zeros(total, COUNTS)
    keys: list[np.ndarray] = []
    done = 0
    findings_file.parent.mkdir(parents=True, exist_ok=True)
    with findings_file.open("w", encoding="utf-8") as file:
        for block in _in_order(work.block, work, blocks, _num_processes(num_processes, blocks)):
            table[done : done + len(block.counts)] = block.counts
            done += len(block.counts)
            keys.append(block.image_keys)
            _write_findings(file, block.findings)
            on_progress(done, total)
    image_keys = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
    return Examination(table, image_keys, findings_file, tuple(len(s) for s in sources))


def examine_streams(
    sources: Sequence[StreamSource],
    encoder: Encoder,
    *,
    findings_file: Path,
    num_processes: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Examination:
    """As `examine`, for rows that come one after the other; the total told is 0."""
    work = _Work((), encoder)
    num_rows_of = [0] * len(sources)

    def rows() -> Iterator[tuple[str, Row | DataError]]:
        for number, source in enumerate(sources):
            for row in source.iterate():
                num_rows_of[number] += 1
                yield row

    tables: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    done = 0
    blocks = _blocks_of(rows(), 32)
    findings_file.parent.mkdir(parents=True, exist_ok=True)
    with findings_file.open("w", encoding="utf-8") as file:
        for block in _in_order(work.given, work, blocks, _num_processes(num_processes, None)):
            tables.append(block.counts)
            keys.append(block.image_keys)
            done += len(block.counts)
            _write_findings(file, block.findings)
            on_progress(done, 0)
    counts = np.concatenate(tables) if tables else np.zeros(0, COUNTS)
    image_keys = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
    return Examination(counts, image_keys, findings_file, tuple(num_rows_of))


@dataclass(frozen=True, slots=True)
class _Block:
    counts: np.ndarray
    image_keys: np.ndarray
    findings: list[Finding]


@dataclass(frozen=True, slots=True)
class _Work:
    """What a worker process needs."""

    sources: tuple[Source, ...]
    encoder: Encoder

    def block(self, place: tuple[int, int, int]) -> _Block:
        """Rows start to stop of a source."""
        number, start, stop = place
        return self.given(list(self.sources[number].rows(start, stop)))

    def given(self, rows: Sequence[tuple[str, Row | DataError]]) -> _Block:
        """Rows that were read already."""
        table = np.zeros(len(rows), COUNTS)
        keys: list[int] = []
        findings: list[Finding] = []
        readable = [row for _, row in rows if isinstance(row, Row)]
        counted = iter(self.encoder.count_many(readable))
        for i, (where, row) in enumerate(rows):
            result = next(counted) if isinstance(row, Row) else row
            if isinstance(result, RowCounts):
                table[i] = (USABLE, *_counted(result))
                keys += result.image_keys
                if result.kind:
                    findings.append(Finding("changed", where, result.change, result.kind))
            else:
                overlong = isinstance(result, OverlongError)
                table[i]["state"] = OVERLONG if overlong else BAD
                findings.append(Finding("overlong" if overlong else "bad", where, str(result)))
        return _Block(table, np.array(keys, np.uint64), findings)


def _write_findings(file: Any, findings: Sequence[Finding]) -> None:
    for f in findings:
        line = {"kind": f.kind, "where": f.where, "reason": f.reason, "group": f.group}
        file.write(json.dumps(line, ensure_ascii=True) + "\n")


def _block_size(num_rows: int) -> int:
    """Rows a task: few enough that no process waits long for the last one, many enough that the
    hand-over costs nothing beside them.
    """
    return min(max(num_rows // 400, 4), 256)


def _blocks_of(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while block := list(itertools.islice(rows, size)):
        yield block


def _num_processes(wanted: int | None, blocks: Sequence[Any] | None) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    most = wanted or cores or 1
    return most if blocks is None else min(most, len(blocks))


_work: _Work | None = None  # in a worker process: what it works on


def _start_worker(work: _Work) -> None:
    global _work
    _work = work
    # Rows make many short-lived objects, and every full collection would go through the libraries'
    # hundreds of thousands: a third of the time
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle


def _do(method: str, task: Any) -> _Block:
    assert _work is not None
    return getattr(_work, method)(task)


def _in_order(
    method: Callable[[Any], _Block], work: _Work, tasks: Any, num_processes: int
) -> Iterator[_Block]:
    """Results in the order of the tasks; a few tasks are under way at a time, so that neither they
    nor their results pile up.
    """
    if num_processes <= 1:
        yield from map(method, tasks)
        return
    # Forked where that is safe, so that workers share the indexes and the tokenizer's memory
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(num_processes, context, _start_worker, (work,))
    pending: collections.deque[Future[_Block]] = collections.deque()
    try:
        for task in tasks:
            pending.append(pool.submit(_do, method.__name__, task))
            if len(pending) > 4 * num_processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that read the rows was killed, most often for want of memory; lower "
            "data.max_megapixels, or free some"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
