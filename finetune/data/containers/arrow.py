"""Arrow tables on disk: Parquet, Arrow files, and what `save_to_disk` writes.

Parquet cannot be read a row at a time, so it is copied to the cache as an Arrow stream, which is
then memory-mapped. Images that `datasets` stored are {"bytes", "path"} in the file, and stay so.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finetune.data.containers.cached import Sink, find_derived, write_derived
from finetune.data.containers.compressed import open_file
from finetune.data.containers.container import Container
from finetune.data.containers.files import FileStamp, RecentlyOpened, refuse_changed, shown_path
from finetune.errors import DataError

_BATCH_BYTES = 8 << 20
_MAX_BATCH_ROWS = 4096
_SLICE_ROWS = 256


class _Batches:
    """The record batches of a memory-mapped Arrow file, of either kind."""

    def __init__(self, stamp: FileStamp):
        refuse_changed(stamp, Path(stamp.path).stat())
        self._file = None
        source = pa.memory_map(stamp.path)
        if source.read(6) == b"ARROW1":
            self._file = pa.ipc.open_file(source)
            counts = [
                self._file.get_batch(i).num_rows for i in range(self._file.num_record_batches)
            ]
            self.schema = self._file.schema
        else:
            source.seek(0)
            stream = pa.ipc.open_stream(source)
            self._loaded = list(stream)
            counts = [batch.num_rows for batch in self._loaded]
            self.schema = stream.schema
        self.ends = np.cumsum(counts, dtype=np.int64)
        self.num_rows = int(self.ends[-1]) if counts else 0

    def batch(self, i: int) -> pa.RecordBatch:
        return self._file.get_batch(i) if self._file is not None else self._loaded[i]


_OPENED = RecentlyOpened(256, _Batches)


class ArrowRows(Container):
    """Rows of one or more Arrow files under one name, numbered from 1."""

    def __init__(
        self, files: Sequence[FileStamp], *, shown: str, root: Path, sources: Sequence[FileStamp]
    ):
        self.shown = shown
        self.root = root
        self._files = list(files)
        self._sources = list(sources)
        self._ends: list[int] = []
        for stamp in files:
            open_file(Path(stamp.path)).close()  # what cannot be opened is not damaged
            try:
                count = _OPENED.get(stamp).num_rows
            except (OSError, pa.ArrowException) as error:
                raise DataError(
                    f"{shown_path(Path(stamp.path))}: is not an Arrow file, or is damaged "
                    f"({_first_line(error)}); write or copy it again"
                ) from error
            self._ends.append(count + (self._ends[-1] if self._ends else 0))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def where(self, number: int) -> str:
        return f"{self.shown}:{number + 1}"

    def read(self, number: int) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        [row] = self._rows(number, number + 1)
        if isinstance(row, DataError):
            raise row
        return row

    def read_range(self, start: int, stop: int) -> Iterator[tuple[str, Any]]:
        for number, row in enumerate(self._rows(start, min(stop, len(self))), start=start + 1):
            yield f"{self.shown}:{number}", row

    def _rows(self, start: int, stop: int) -> Iterator[Any]:
        while start < stop:
            i = int(np.searchsorted(self._ends, start, "right"))
            first = self._ends[i - 1] if i else 0
            try:
                opened = _OPENED.get(self._files[i])
            except (OSError, pa.ArrowException) as error:
                yield DataError(f"the file cannot be read ({_first_line(error)}); copy it again")
                start += 1
                continue
            k = int(np.searchsorted(opened.ends, start - first, "right"))
            offset = start - first - (int(opened.ends[k - 1]) if k else 0)
            taken = min(stop - start, int(opened.ends[k]) + first - start)
            yield from batch_rows(opened.batch(k).slice(offset, taken))
            start += taken

    def identity(self) -> list[Any]:
        return [stamp.as_list() for stamp in self._sources]


def batch_rows(batch: pa.RecordBatch | pa.Table) -> Iterator[Any]:
    """Plain values by column name, or the `DataError` of a row that has none; few rows at a time,
    where they hold images.
    """
    simple = all(_is_simple(field.type) for field in batch.schema)
    step = batch.num_rows
    if step > 1:
        step = min(max(int(_BATCH_BYTES / (batch.nbytes / step + 1)), 1), _SLICE_ROWS)
    for start in range(0, batch.num_rows, max(step, 1)):
        for row in _slice_rows(batch.slice(start, step)):
            yield row if simple else _plain_or_error(row)


def _slice_rows(batch: pa.RecordBatch | pa.Table) -> list[Any]:
    try:
        return batch.to_pylist()
    except (ValueError, pa.ArrowException) as error:  # such as text that is not UTF-8
        if batch.num_rows > 1:
            return [row for i in range(batch.num_rows) for row in _slice_rows(batch.slice(i, 1))]
        return [DataError(f"cannot be read ({_first_line(error)}); write the row again")]


def _is_simple(kind: pa.DataType) -> bool:
    """Whether Python's values of the type are JSON's, or bytes, as they are."""
    if pa.types.is_struct(kind):
        return all(_is_simple(kind.field(i).type) for i in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_simple(kind.value_type)
    return any(
        test(kind)
        for test in (
            *(pa.types.is_string, pa.types.is_large_string, pa.types.is_integer),
            *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_boolean, pa.types.is_null),
        )
    )


def _plain_or_error(row: Any) -> Any:
    if isinstance(row, DataError):
        return row
    try:
        return plain_value(row)
    except DataError as error:
        return error


def plain_value(value: Any) -> Any:
    """Dates, decimals and the like as text; NaN, which pandas writes for what is missing, as None.
    Raises `DataError` for other numbers that are not finite.
    """
    match value:
        case None | str() | bytes() | bool() | int():
            return value
        case float():
            if math.isinf(value):
                raise DataError(f"holds {value}, which is no finite number; write null, or a text")
            return None if math.isnan(value) else value
        case dict():
            return {str(key): plain_value(inner) for key, inner in value.items()}
        case list() if value and all(isinstance(pair, tuple) for pair in value):  # a map
            return {str(key): plain_value(inner) for key, inner in value}
        case list():
            return [plain_value(inner) for inner in value]
        case _:
            return str(value)


def open_parquet(source: FileStamp, cache: Path, *, shown: str, root: Path) -> ArrowRows:
    """Raises `DataError`."""
    data = find_derived(source, cache, "arrow")
    if data is None:
        data = write_derived(source, cache, "arrow", lambda sink: _copy(source, shown, sink))
    return ArrowRows([data], shown=shown, root=root, sources=[source])


def parquet_file(path: Path, shown: str) -> pq.ParquetFile:
    """The open file. Raises `DataError`."""
    open_file(path).close()  # what cannot be opened is not damaged
    try:
        # else whole row groups are read at once, which may hold gigabytes of images
        return pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise not_parquet(shown, error) from error


def not_parquet(shown: str, error: Exception) -> DataError:
    return DataError(
        f"{shown}: is not a Parquet file, or is damaged ({_first_line(error)}); "
        "write or copy it again"
    )


def batch_size(file: pq.ParquetFile) -> int:
    """Rows a batch, so that a batch of images fits the memory."""
    num_bytes = sum(
        file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)
    )
    row_bytes = num_bytes / max(file.metadata.num_rows, 1)
    return int(min(max(_BATCH_BYTES / max(row_bytes, 1), 1), _MAX_BATCH_ROWS))


def _copy(source: FileStamp, shown: str, sink: Sink) -> None:
    with parquet_file(Path(source.path), shown) as file:
        try:
            with pa.ipc.new_stream(sink, file.schema_arrow) as out:
                for batch in file.iter_batches(batch_size(file)):
                    out.write_batch(batch)
        except pa.ArrowException as error:
            raise not_parquet(shown, error) from error


def open_arrow(source: FileStamp, *, shown: str, root: Path) -> ArrowRows:
    """Raises `DataError`."""
    return ArrowRows([source], shown=shown, root=root, sources=[source])


def open_saved(folder: Path, *, shown: str) -> ArrowRows:
    """What `Dataset.save_to_disk` wrote. Raises `DataError`."""
    state = _read_state(folder / "state.json")
    names = [entry.get("filename") for entry in state.get("_data_files") or []]
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(
            f"{shown}: was saved by an old version of datasets, with rows selected; load it there "
            "and save it again"
        )
    if not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise DataError(f"{shown}: state.json names files outside of the folder; save it again")
    files = [FileStamp.of(folder / name) for name in names]
    return ArrowRows(files, shown=shown, root=folder, sources=files)


def saved_splits(folder: Path) -> list[str]:
    """The names of the splits in a folder of `DatasetDict.save_to_disk`. Raises `DataError`."""
    return [str(name) for name in _read_state(folder / "dataset_dict.json").get("splits") or []]


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{shown_path(path)}: cannot be read; save the dataset again") from error
    if not isinstance(state, dict):
        raise DataError(f"{shown_path(path)}: is not what save_to_disk writes; save it again")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
