"""The shards of a stream: each reads the rows of one file in their order, from any of them on."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.data.containers import json_text
from finetune.data.containers.arrow import batch_rows, batch_size, not_parquet, parquet_file
from finetune.data.containers.compressed import compression, open_plain
from finetune.data.containers.delimited import read_table
from finetune.data.containers.files import FileStamp, refuse_changed, shown_path
from finetune.data.containers.json_rows import BOM
from finetune.data.containers.kinds import Kind, kind_of, refuse_foreign, suffix_of
from finetune.data.containers.tar_shards import list_samples, read_sample
from finetune.errors import DataError

Mark = tuple[int, int, int]
"""Where a row begins in a shard: its number, the lines before it, its first byte."""


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


class FileShard(ABC):
    """What shards that are files share; each kind of file has its own `entries`."""

    def __init__(self, stamp: FileStamp, shown: str):
        self.stamp = stamp
        self.shown = shown
        self.path = Path(stamp.path)
        self.num_bytes: int | None = stamp.size

    def num_rows(self) -> int | None:
        return None

    def parts(self) -> Sequence[Shard]:
        return [self]

    @abstractmethod
    def entries(
        self, first: int, step: int, mark: Mark | None
    ) -> Generator[tuple[str, Any, Mark | None], None, int]: ...

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


class LinesShard(FileShard):
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


class TableShard(FileShard):
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


class ParquetShard(FileShard):
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


class TarFile(FileShard):
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


SHARDS: dict[Kind, type[FileShard]] = {
    "lines": LinesShard,
    "table": TableShard,
    "parquet": ParquetShard,
    "tar": TarFile,
}


def open_shard(path: Path) -> FileShard:
    """Of a file, by its kind. Raises `DataError`."""
    stamp, kind, shown = FileStamp.of(path), kind_of(path), shown_path(path)
    if kind not in SHARDS:
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
    return SHARDS[kind](stamp, shown)
