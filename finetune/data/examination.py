"""Every row read, decoded, rendered and counted, on all cores, in memory that does not grow with
what the rows hold: what `check` reports and what `train` stands on.

What is kept of a row is one line of a table (some 60 bytes); what is wrong goes to a file.
"""

import collections
import gc
import heapq
import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from finetune.data.examples import Encoder, OverlongError, RowCounts
from finetune.data.sources import Row, Source, StreamSource
from finetune.data.stamps import stamp_files
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
        ("prefix_key", "u8"),
        ("num_files", "u4"),
        ("files_key", "u8"),
    ]
)
_MEASURED = ("state", "num_files", "files_key")  # of a row whether or not it can be counted
USABLE, BAD, OVERLONG = 0, 1, 2
_counted = attrgetter(*(name for name in COUNTS.names or () if name not in _MEASURED))
Result = TypeVar("Result")
Kind = Literal["bad", "overlong", "changed"]
LEFT_OUT: tuple[Kind, ...] = ("bad", "overlong")
CHANGED: tuple[Kind, ...] = ("changed",)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to tell about a row: `bad` and `overlong` rows are left out, `changed` ones are
    trained shorter.

    `row` is its number over all sources; `group` is what findings are counted by: the reason for a
    change.
    """

    kind: Kind
    where: str
    reason: str
    group: str = ""
    row: int = -1

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"

    def to_json(self) -> dict[str, str]:
        """The line in `skipped.jsonl` or `changed.jsonl`."""
        return {"where": self.where, "reason": self.reason, "kind": self.group or self.kind}


@dataclass(frozen=True)
class Examination:
    """What was found in some sources, in the order of their rows.

    `counts` has one line a row [rows of all sources], `image_keys` one a usable image, in order.
    `findings_file` holds a JSON line a finding. `rows` are the numbers of the rows, where they are
    only some; `places` tells where the longest and heaviest rows of a stream stood.
    """

    counts: np.ndarray
    image_keys: np.ndarray
    findings_file: Path
    num_rows_of: tuple[int, ...]
    rows: np.ndarray | None = None
    places: Mapping[int, str] = field(default_factory=dict)

    def findings(self, *kinds: Kind) -> Iterator[Finding]:
        """The findings of these kinds, in the order of the rows; all of them without any."""
        wanted = None if self.rows is None else set(self.rows.tolist())
        with self.findings_file.open(encoding="utf-8") as lines:
            for line in lines:
                finding = Finding(**json.loads(line))
                if wanted is not None and finding.row not in wanted:
                    continue
                if not kinds or finding.kind in kinds:
                    yield finding

    def of_rows(self, rows: np.ndarray) -> "Examination":
        """What was found in some of the rows, by their numbers, rising."""
        shown = np.zeros(len(self.counts), bool)
        shown[rows] = True
        of_image = np.repeat(np.arange(len(self.counts)), self.counts["num_images"])
        keys = self.image_keys[shown[of_image]]
        return replace(self, counts=self.counts[rows], image_keys=keys, rows=rows)

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
            keys.append(block.image_keys)
            _write_findings(file, block.findings, done)
            done += len(block.counts)
            on_progress(done, total)
    image_keys = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
    return Examination(table, image_keys, findings_file, tuple(len(s) for s in sources))


def is_stale(
    kept: Examination,
    sources: Sequence[Source],
    encoder: Encoder,
    *,
    num_processes: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> bool:
    """Whether a picture of a usable row is another by now, or a row was bad that has pictures:
    they may have been mended, or what reads them installed. Rows without pictures cost nothing.
    """
    size = _block_size(len(kept.counts))
    tasks = []
    first = 0
    for number, source in enumerate(sources):
        for start in range(0, len(source), size):
            stop = min(start + size, len(source))
            counts = kept.counts[first + start : first + stop]
            if counts["num_files"].any():
                tasks.append((number, start, np.array(counts)))
        first += len(source)
    for _, _, counts in tasks:
        if (counts["num_files"][counts["state"] == BAD] > 0).any():
            return True
    work = _Work(tuple(sources), encoder)
    results = _in_order(work.stale, work, tasks, _num_processes(num_processes, tasks))
    for done, stale in enumerate(results):
        if stale:
            results.close()  # type: ignore[attr-defined]  # a generator, which stops its processes
            return True
        on_progress(done + 1, len(tasks))
    return False


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
    costly = {"num_tokens": _Costliest(), "num_view_pixels": _Costliest()}
    findings_file.parent.mkdir(parents=True, exist_ok=True)
    with findings_file.open("w", encoding="utf-8") as file:
        for block in _in_order(work.given, work, blocks, _num_processes(num_processes, None)):
            tables.append(block.counts)
            keys.append(block.image_keys)
            _write_findings(file, block.findings, done)
            for name, rows_kept in costly.items():
                rows_kept.add(done, block.counts[name], block.wheres)
            done += len(block.counts)
            on_progress(done, 0)
    counts = np.concatenate(tables) if tables else np.zeros(0, COUNTS)
    image_keys = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
    places = {number: where for kept in costly.values() for _, number, where in kept.rows}
    return Examination(counts, image_keys, findings_file, tuple(num_rows_of), places=places)


class _Costliest:
    """The rows that cost most so far, as (cost, number, where)."""

    def __init__(self, count: int = 16):
        self.count = count
        self.rows: list[tuple[int, int, str]] = []

    def add(self, first: int, costs: np.ndarray, wheres: Sequence[str]) -> None:
        new = [(int(c), first + i, w) for i, (c, w) in enumerate(zip(costs, wheres, strict=True))]
        # of equally costly rows the later stays, as an order by cost turned round has it
        self.rows = heapq.nlargest(self.count, [*self.rows, *new])


@dataclass(frozen=True, slots=True)
class _Block:
    counts: np.ndarray
    image_keys: np.ndarray
    findings: list[Finding]
    wheres: list[str]


@dataclass(frozen=True, slots=True)
class _Work:
    """What a worker process needs."""

    sources: tuple[Source, ...]
    encoder: Encoder

    def block(self, place: tuple[int, int, int]) -> _Block:
        """Rows start to stop of a source."""
        number, start, stop = place
        block = self.given(list(self.sources[number].rows(start, stop)))
        return replace(block, wheres=[])  # rows of a source can be asked for theirs

    def stale(self, task: tuple[int, int, np.ndarray]) -> bool:
        """Whether a picture of a row that was counted is another one by now."""
        number, start, counts = task
        rows = self.sources[number].rows(start, start + len(counts))
        for (_, row), line in zip(rows, counts, strict=True):
            if line["num_files"]:
                now = stamp_files(row.conversation, row.image_access) if isinstance(row, Row) else 0
                if now != (line["num_files"], line["files_key"]):
                    return True
        return False

    def given(self, rows: Sequence[tuple[str, Row | DataError]]) -> _Block:
        """Rows that were read already."""
        table = np.zeros(len(rows), COUNTS)
        keys: list[int] = []
        findings: list[Finding] = []
        readable = [row for _, row in rows if isinstance(row, Row)]
        # before the pictures are read, so that one changed meanwhile counts as changed
        stamps = [
            stamp_files(row.conversation, row.image_access) if isinstance(row, Row) else (0, 0)
            for _, row in rows
        ]
        counted = iter(self.encoder.count_many(readable))
        for i, (where, row) in enumerate(rows):
            result = next(counted) if isinstance(row, Row) else row
            files = stamps[i]
            if isinstance(result, RowCounts):
                table[i] = (USABLE, *_counted(result), *files)
                keys += result.image_keys
                if result.kind:
                    findings.append(Finding("changed", where, result.change, result.kind, i))
            else:
                overlong = isinstance(result, OverlongError)
                table[i]["state"] = OVERLONG if overlong else BAD
                table[i]["num_files"], table[i]["files_key"] = files
                kind: Kind = "overlong" if overlong else "bad"
                findings.append(Finding(kind, where, str(result), row=i))
        return _Block(table, np.array(keys, np.uint64), findings, [where for where, _ in rows])


def _write_findings(file: Any, findings: Sequence[Finding], first_row: int) -> None:
    for finding in findings:
        line = asdict(finding) | {"row": first_row + finding.row}
        file.write(json.dumps(line, ensure_ascii=True) + "\n")


def _block_size(num_rows: int) -> int:
    """Rows a task: few enough that no process waits long for the last one, many enough that the
    hand-over costs nothing beside them.
    """
    return min(max(num_rows // 400, 8), 256)


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
    # These are the main process's to handle; SIGTERM is what ends a pool
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _do(method: str, task: Any) -> Any:
    assert _work is not None
    return getattr(_work, method)(task)


def _in_order(
    method: Callable[[Any], Result], work: _Work, tasks: Any, num_processes: int
) -> Iterator[Result]:
    """Results in the order of the tasks; a few tasks are under way at a time, so that neither they
    nor their results pile up.
    """
    # Or the tokenizer's own threads, once started here, leave its locks held in a forked process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if num_processes <= 1:
        yield from map(method, tasks)
        return
    # Forked where that is safe, so that workers share the indexes and the tokenizer's memory
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(num_processes, context, _start_worker, (work,))
    pending: collections.deque[Future[Any]] = collections.deque()
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
