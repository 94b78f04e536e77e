"""Rows in their order, read once and from the start: for what is too large to be indexed or kept.

The rows are dealt out to consumers (a rank's loading process each), so that each row goes to
exactly one of them, whatever their number.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.data.containers import json_text
from finetune.data.containers.arrow import batch_rows, batch_size, not_parquet, parquet_file
from finetune.data.containers.compressed import compression, open_plain
from finetune.data.containers.container import shared_root
from finetune.data.containers.delimited import read_table
from finetune.data.containers.files import FileStamp, refuse_changed, shown_path
from finetune.data.containers.hub import hub_shards
from finetune.data.containers.json_rows import BOM
from finetune.data.containers.kinds import (
    Kind,
    expand_pattern,
    find_kind,
    kind_of,
    refuse_foreign,
    refuse_several_splits,
    suffix_of,
)
from finetune.data.containers.tar_shards import list_samples, read_sample
from finetune.data.patience import drive_error
from finetune.errors import DataError
from finetune.patterns import is_pattern

UNEVEN = 1.1  # shards are dealt out where no consumer gets more than this times the mean

Mark = tuple[int, int, int]
"""Where a row begins in a shard: its number, the lines before it, its first byte."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a consumer goes on: with its `row` of the `shard`, both by number, at the `mark` where
    the shard gave one. `before` are the rows of all consumers in the shards before.
    """

    shard: int
    before: int
    row: int
    mark: Mark | None = None

    def to_json(self) -> list[Any]:
        """As a checkpoint holds it."""
        return list(astuple(self))

    @classmethod
    def from_json(cls, value: Any) -> "Place":
        """What `to_json` gave."""
        shard, before, row, mark = value
        return cls(shard, before, row, tuple(mark) if mark else None)


class Shard(Protocol):
    """One file of a stream, or its like."""

    shown: str
    """Its name in messages."""

    @property
    def num_bytes(self) -> int | None:
        """For dealing out evenly; None where it is not known."""
        ...

    def num_rows(self) -> int | None:
        """The number of rows, where it is known without reading them."""
        ...

    def parts(self) -> "Sequence[Shard]":
        """What it can be cut into, so that nobody reads what others take; itself where it cannot.
        Raises `DataError`.
        """
        ...

    def entries(
        self, first: int, step: int, mark: Mark | None
    ) -> Generator[tuple[str, Any, Mark | None], None, int]:
        """Place and undecoded row of every `step`-th row from `first` on, and a mark behind it
        where reading can begin there; returns the number of all rows.

        `mark` is one that came before `first`.
        """
        ...

    def decode(self, entry: Any) -> Any:
        """The row. Raises `DataError` without the place."""
        ...


class Stream:
    """Rows of shards, one after the other."""

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        shown: str,
        root: Path,
        roots: tuple[Path, ...] = (),
        identity: list[Any],
    ):
        self.shown = shown
        self.root = root
        self.roots = roots
        self._shards = list(shards)
        self._identity = identity

    def identity(self) -> list[Any]:
        """What the rows depend on, as JSON: path, size and mtime_ns of every file."""
        return self._identity

    def iterate(
        self, consumer: int, num_consumers: int, skip: int = 0, start: Place | None = None
    ) -> "Reading":
        """Place and row, or the `DataError`, of this consumer's rows after the first `skip` ones,
        which are not decoded; from `start` on, which another reading gave for the same consumer.

        The order is fixed for each consumer. Whole shards are dealt out where that is even enough,
        else the parts of shards, else all consumers read all shards, and take rows in turn. Raises
        `DataError` where a shard cannot be read on.
        """
        if not 0 <= consumer < num_consumers:
            raise ValueError(f"consumer {consumer} of {num_consumers}")
        for shards in (self._shards, self._parts):
            if _is_even(shards, num_consumers):
                return Reading(shards[consumer::num_consumers], 1, start or Place(0, 0, 0), skip)
        return Reading(self._shards, num_consumers, start or Place(0, 0, consumer), skip)

    def deals_whole_shards(self, num_consumers: int) -> bool:
        """Whether each shard goes to one consumer, who alone reads it."""
        return _is_even(self._shards, num_consumers)

    @cached_property
    def _parts(self) -> list[Shard]:
        return [part for shard in self._shards for part in shard.parts()]


def _is_even(shards: Sequence[Shard], num_consumers: int) -> bool:
    """Whether each consumer gets about as much where they are dealt out; shards of which one does
    not know its size count as equal.
    """
    if len(shards) < num_consumers:
        return False
    sizes = [shard.num_bytes for shard in shards]
    known = [1 if None in sizes else size or 0 for size in sizes]
    largest = max(sum(known[i::num_consumers]) for i in range(num_consumers))
    return largest <= UNEVEN * sum(known) / num_consumers


class Reading(Iterator[tuple[str, Any]]):
    """The rows of one consumer: of each shard one in `step`."""

    def __init__(self, shards: Sequence[Shard], step: int, start: Place, skip: int):
        self.place = start
        """Where the next row is."""
        self._rows = self._read(shards, step, skip)

    def __next__(self) -> tuple[str, Any]:
        return next(self._rows)

    def _read(self, shards: Sequence[Shard], step: int, skip: int) -> Iterator[tuple[str, Any]]:
        start = self.place
        turn, before = (start.before + start.row) % step, start.before
        for number in range(start.shard, len(shards)):
            shard, row, mark = shards[number], (turn - before) % step, None
            if number == start.shard:
                row, mark = start.row, start.mark
            num_rows = shard.num_rows() if skip else None
            if num_rows is not None:  # skip without reading
                passed = min(skip, len(range(row, num_rows, step)))
                skip -= passed
                row += passed * step
                if row >= num_rows:
                    before += num_rows
                    continue
            entries = shard.entries(row, step, mark)
            while True:
                try:
                    where, entry, mark = next(entries)
                except StopIteration as end:
                    before += end.value
                    break
                except OSError as error:
                    if failing := drive_error(shard.shown, error):
                        raise failing from error
                    raise
                row += step
                self.place = Place(number, before, row, mark)
                if skip:
                    skip -= 1
                    continue
                try:
                    decoded = entry if isinstance(entry, DataError) else shard.decode(entry)
                except DataError as error:
                    decoded = error
                yield where, decoded


class _File:
    """What shards that are files share."""

    def __init__(self, stamp: FileStamp, shown: str):
        self.stamp = stamp
        self.shown = shown
        self.path = Path(stamp.path)
        self.num_bytes: int | None = stamp.size

    def num_rows(self) -> int | None:
        return None

    def parts(self) -> Sequence[Any]:
        return [self]

    def decode(self, entry: Any) -> Any:
        return entry

    def refuse_changed(self) -> None:
        """Raise `DataError` where the file is no longer the one that the stream was opened on: its
        rows would be others than those already passed over or dealt out.
        """
        try:
            refuse_changed(self.stamp, self.path.stat())
        except FileNotFoundError:
            return  # what is open is still read; what is not says so when it is opened
        except OSError as error:
            raise DataError(
                f"{self.shown}: cannot be read ({error.strerror}); check its permissions"
            ) from error
        except DataError as error:
            raise DataError(f"{self.shown}: {error}") from error


class LinesShard(_File):
    """JSON Lines, plain or compressed."""

    def entries(
        self, first: int, step: int, mark: Mark | None
    ) -> Generator[tuple[str, Any, Mark | None], None, int]:
        row, line_number, offset = mark or (0, 0, 0)
        with open_plain(self.path) as file:
            self.refuse_changed()
            can_seek = file.seekable()
            if offset:
                file.seek(offset)
            while text := file.readline(json_text.MAX_ROW_BYTES + 1):
                line_number += 1
                offset += len(text)
                if line_number == 1:
                    text = text.removeprefix(BOM)
                num_bytes, blank = len(text), not text.strip()
                rest = text
                while len(rest) > json_text.MAX_ROW_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(json_text.MAX_ROW_BYTES + 1)
                    num_bytes += len(rest)
                    offset += len(rest)
                    blank = blank and not rest.strip()
                if blank:
                    continue
                row += 1
                if row > first and (row - 1 - first) % step == 0:
                    where = f"{self.shown}:{line_number}"
                    behind = (row, line_number, offset) if can_seek else None
                    yield where, text if num_bytes == len(text) else _too_long(num_bytes), behind
        self.refuse_changed()
        return row

    def decode(self, entry: Any) -> Any:
        return json_text.parse_json(entry.rstrip(b"\r\n"))


def _too_long(num_bytes: int) -> DataError | None:
    try:
        json_text.refuse_long_row(num_bytes)
    except DataError as error:
        return error
    return None


class TableShard(_File):
    """CSV and TSV, plain or compressed."""

    def entries(
        self, first: int, step: int, mark: Mark | None
    ) -> Generator[tuple[str, Any, Mark | None], None, int]:
        row = 0
        with open_plain(self.path) as file:
            self.refuse_changed()
            table = read_table(file, self.shown, tabs=suffix_of(self.path) == ".tsv")
            for line_number, record in table:
                if row >= first and (row - first) % step == 0:
                    yield f"{self.shown}:{line_number}", record, None
                row += 1
        self.refuse_changed()
        return row


class ParquetShard(_File):
    """Parquet, a row group after the other; or one group alone, after so many rows of others."""

    def __init__(
        self, stamp: FileStamp, shown: str, group: int | None = None, rows_before: int = 0
    ):
        super().__init__(stamp, shown)
        self.group = group
        self.rows_before = rows_before

    def num_rows(self) -> int | None:
        self.refuse_changed()
        with parquet_file(self.path, self.shown) as file:
            return sum(file.metadata.row_group(i).num_rows for i in self._groups(file))

    def parts(self) -> Sequence[Shard]:
        found, rows_before = [], self.rows_before
        self.refuse_changed()
        with parquet_file(self.path, self.shown) as file:
            for i in self._groups(file):
                part = ParquetShard(self.stamp, self.shown, i, rows_before)
                part.num_bytes = file.metadata.row_group(i).total_byte_size
                rows_before += file.metadata.row_group(i).num_rows
                found.append(part)
        return found

    def _groups(self, file: pq.ParquetFile) -> Sequence[int]:
        return range(file.num_row_groups) if self.group is None else [self.group]

    def entries(
        self, first: int, step: int, mark: Mark | None
    ) -> Generator[tuple[str, Any, Mark | None], None, int]:
        self.refuse_changed()
        with parquet_file(self.path, self.shown) as file:
            begin, size = 0, batch_size(file)
            for group in self._groups(file):
                group_rows = file.metadata.row_group(group).num_rows
                if begin + group_rows <= first:
                    begin += group_rows
                    continue
                try:
                    for batch in file.iter_batches(size, row_groups=[group]):
                        start = max(first - begin, (first - begin) % step)
                        for k in range(start, batch.num_rows, step):
                            where = f"{self.shown}:{self.rows_before + begin + k + 1}"
                            yield where, batch.slice(k, 1), None
                        begin += batch.num_rows
                except (OSError, pa.ArrowException) as error:
                    self.refuse_changed()
                    raise not_parquet(self.shown, error) from error
        self.refuse_changed()
        return begin

    def decode(self, entry: Any) -> Any:
        [row] = batch_rows(entry)
        if isinstance(row, DataError):
            raise row
        return row


class TarFile(_File):
    """A tar archive; its members are looked up when its turn comes."""

    def entries(
        self, first: int, step: int, mark: Mark | None
    ) -> Generator[tuple[str, Any, Mark | None], None, int]:
        self.refuse_changed()
        samples = list_samples(self.stamp, self.shown)
        for sample in samples[first::step]:
            yield f"{self.shown}:{sample['key']}", sample, None
        return len(samples)

    def decode(self, entry: Any) -> Any:
        return read_sample(self.stamp, entry)


_SHARDS: dict[Kind, type[LinesShard | TableShard | ParquetShard | TarFile]] = {
    "lines": LinesShard,
    "table": TableShard,
    "parquet": ParquetShard,
    "tar": TarFile,
}


def open_stream(path: Path) -> Stream:
    """The rows of files in their order: JSON Lines and tables (plain, gzip, zstandard), Parquet and
    tar; a file, a folder, a glob or a brace range. Nothing is written. Raises `DataError`.
    """
    if path.is_dir():
        try:
            paths = sorted(
                file
                for file in path.iterdir()
                if not file.name.startswith(".") and find_kind(file) in _SHARDS
            )
        except OSError as error:
            raise DataError(
                f"{shown_path(path)}: cannot be read ({error.strerror}); check its permissions"
            ) from error
        if len({find_kind(file) for file in paths}) != 1:
            raise DataError(
                f"{shown_path(path)}: is no folder of JSON Lines, CSV, Parquet or tar files of one "
                "kind; give a pattern such as folder/*.jsonl"
            )
        refuse_several_splits(paths, shown_path(path))
    elif is_pattern(path):
        paths = expand_pattern(path)
    else:
        paths = [path]
    shards = [_shard(file) for file in paths]
    root, roots = shared_root([file.parent for file in paths])
    return Stream(
        shards,
        shown=shown_path(path),
        root=root,
        roots=roots,
        identity=[shard.stamp.as_list() for shard in shards],
    )


def _shard(path: Path) -> LinesShard | TableShard | ParquetShard | TarFile:
    stamp, kind, shown = FileStamp.of(path), kind_of(path), shown_path(path)
    if kind not in _SHARDS:
        raise DataError(
            f"{shown}: a {suffix_of(path)} file cannot be streamed; write it as JSON Lines, "
            "Parquet or tar shards, or read it without streaming"
        )
    refuse_foreign(path, shown, kind)
    if kind == "tar" and compression(path) is not None:
        raise DataError(
            f"{shown}: a compressed archive cannot be streamed; decompress it, or read it without "
            "streaming"
        )
    return _SHARDS[kind](stamp, shown)


def open_hub_stream(hub: str, *, config: str | None, split: str, revision: str) -> Stream:
    """The rows of a Hub dataset as they come over the network. Raises `DataError`."""
    shards = hub_shards(hub, config=config, split=split, revision=revision)
    return Stream(
        shards,
        shown=f"{hub}/{split}",
        root=Path(hub) if Path(hub).is_dir() else Path(),
        identity=[["hub", hub, config, split, revision]],
    )
