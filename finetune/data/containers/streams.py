"""Rows in their order, read once and from the start: for what is too large to be indexed or kept.

The rows are dealt out to consumers (a rank's loading process each), so that each row goes to
exactly one of them, whatever their number.
"""

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

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
from finetune.errors import DataError
from finetune.patterns import is_pattern

UNEVEN = 1.1  # whole files are dealt out where no consumer gets more than this times the mean


class Shard(Protocol):
    """One file of a stream, or its like."""

    @property
    def num_bytes(self) -> int | None:
        """For dealing out evenly; None where it is not known."""
        ...

    def num_rows(self) -> int | None:
        """The number of rows, where it is known without reading them."""
        ...

    def entries(self, first: int, step: int) -> Generator[tuple[str, Any], None, int]:
        """Place and undecoded row of every `step`-th row from `first` on; returns the number of all
        rows.
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
        self, consumer: int, num_consumers: int, skip: int = 0
    ) -> Iterator[tuple[str, Any]]:
        """Place and row, or the `DataError`, of this consumer's rows after the first `skip` ones,
        which are not decoded.

        The order is fixed for each consumer. Whole shards are dealt out where that is even enough,
        else all consumers read all shards, and take rows in turn. Raises `DataError` where a shard
        cannot be read on.
        """
        if not 0 <= consumer < num_consumers:
            raise ValueError(f"consumer {consumer} of {num_consumers}")
        shards, share, turn = self._shards, num_consumers, consumer
        if self.deals_whole_shards(num_consumers):
            shards, share, turn = self._shards[consumer::num_consumers], 1, 0
        before = 0  # rows of the shards read so far, of all consumers
        for shard in shards:
            first = (turn - before) % share
            num_rows = shard.num_rows() if skip else None
            if num_rows is not None:  # skip without reading
                passed = min(skip, len(range(first, num_rows, share)))
                skip -= passed
                first += passed * share
                if first >= num_rows:
                    before += num_rows
                    continue
            entries = shard.entries(first, share)
            while True:
                try:
                    where, entry = next(entries)
                except StopIteration as end:
                    before += end.value
                    break
                if skip:
                    skip -= 1
                    continue
                try:
                    row = entry if isinstance(entry, DataError) else shard.decode(entry)
                except DataError as error:
                    row = error
                yield where, row

    def deals_whole_shards(self, num_consumers: int) -> bool:
        """Whether each shard goes to one consumer, who alone reads it."""
        sizes = [shard.num_bytes for shard in self._shards]
        if len(sizes) < num_consumers:
            return False
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes):
            return len(sizes) % num_consumers == 0
        largest = max(sum(known[i::num_consumers]) for i in range(num_consumers))
        return largest <= UNEVEN * sum(known) / num_consumers


class _File:
    """What shards that are files share."""

    def __init__(self, stamp: FileStamp, shown: str):
        self.stamp = stamp
        self.shown = shown
        self.path = Path(stamp.path)
        self.num_bytes: int | None = stamp.size

    def num_rows(self) -> int | None:
        return None

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

    def entries(self, first: int, step: int) -> Generator[tuple[str, Any], None, int]:
        row, line_number = 0, 0
        with open_plain(self.path) as file:
            self.refuse_changed()
            while text := file.readline(json_text.MAX_ROW_BYTES + 1):
                line_number += 1
                if line_number == 1:
                    text = text.removeprefix(BOM)
                num_bytes, blank = len(text), not text.strip()
                rest = text
                while len(rest) > json_text.MAX_ROW_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(json_text.MAX_ROW_BYTES + 1)
                    num_bytes += len(rest)
                    blank = blank and not rest.strip()
                if blank:
                    continue
                if row >= first and (row - first) % step == 0:
                    where = f"{self.shown}:{line_number}"
                    yield where, text if num_bytes == len(text) else _too_long(num_bytes)
                row += 1
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

    def entries(self, first: int, step: int) -> Generator[tuple[str, Any], None, int]:
        row = 0
        with open_plain(self.path) as file:
            self.refuse_changed()
            table = read_table(file, self.shown, tabs=suffix_of(self.path) == ".tsv")
            for line_number, record in table:
                if row >= first and (row - first) % step == 0:
                    yield f"{self.shown}:{line_number}", record
                row += 1
        self.refuse_changed()
        return row


class ParquetShard(_File):
    """Parquet, a row group after the other."""

    def num_rows(self) -> int | None:
        self.refuse_changed()
        with parquet_file(self.path, self.shown) as file:
            return file.metadata.num_rows

    def entries(self, first: int, step: int) -> Generator[tuple[str, Any], None, int]:
        self.refuse_changed()
        with parquet_file(self.path, self.shown) as file:
            begin, size = 0, batch_size(file)
            for group in range(file.num_row_groups):
                group_rows = file.metadata.row_group(group).num_rows
                if begin + group_rows <= first:
                    begin += group_rows
                    continue
                try:
                    for batch in file.iter_batches(size, row_groups=[group]):
                        start = max(first - begin, (first - begin) % step)
                        for k in range(start, batch.num_rows, step):
                            yield f"{self.shown}:{begin + k + 1}", batch.slice(k, 1)
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

    def entries(self, first: int, step: int) -> Generator[tuple[str, Any], None, int]:
        self.refuse_changed()
        samples = list_samples(self.stamp, self.shown)
        for sample in samples[first::step]:
            yield f"{self.shown}:{sample['key']}", sample
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
