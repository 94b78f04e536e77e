"""JSON values at known places of a file: the rows of a JSON Lines file, the elements of a list in a
document, or rows spilled to the cache.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from finetune.data.containers import json_text
from finetune.data.containers.cached import (
    RowIndex,
    Sink,
    find_derived,
    keep_index,
    load_index,
    write_derived,
)
from finetune.data.containers.container import Container
from finetune.data.containers.files import FileStamp, read_bytes, shown_path
from finetune.errors import DataError

BOM = b"\xef\xbb\xbf"
_SCAN_BYTES = 16 << 20
_BLOCK_BYTES = 4 << 20
_BLOCK_ROWS = 1 << 15
_BLANK = np.isin(np.arange(256), list(b" \t\n\r\x0b\x0c"))


class JsonRows(Container):
    """Rows read by their offsets.

    In a `spilled` file a row that is a string is no row, but the reason why there is none.
    """

    def __init__(
        self,
        data: FileStamp,
        index: RowIndex,
        *,
        shown: str,
        root: Path,
        source: FileStamp,
        spilled: bool = False,
    ):
        self.shown = shown
        self.root = root
        self._data = data
        self._index = index
        self.sources = [source]
        self._spilled = spilled

    def __len__(self) -> int:
        return len(self._index.spans)

    def where(self, number: int) -> str:
        return f"{self.shown}:{self._index.spans[number, 2]}"

    def read(self, number: int) -> Any:
        start, stop, _ = self._index.spans[number].tolist()
        json_text.refuse_long_row(stop - start)
        return self._checked(json_text.parse_json(read_bytes(self._data, start, stop - start)))

    def _checked(self, row: Any) -> Any:
        if self._spilled and isinstance(row, str):
            raise DataError(row)
        return row

    def read_range(self, start: int, stop: int) -> Iterator[tuple[str, Any]]:
        spans, shown, spilled = self._index.spans, self.shown, self._spilled
        stop = min(stop, len(spans))
        while start < stop:
            # read what lies together in one go
            window = spans[start : min(start + _BLOCK_ROWS, stop), 1]
            begin = int(spans[start, 0])
            block_bytes = min(_BLOCK_BYTES, json_text.MAX_ROW_BYTES)
            count = max(int(np.searchsorted(window, begin + block_bytes, "right")), 1)
            rows = spans[start : start + count].tolist()
            start += count
            try:
                json_text.refuse_long_row(rows[-1][1] - begin)
                block = read_bytes(self._data, begin, rows[-1][1] - begin)
            except DataError as error:
                for _, _, name in rows:
                    yield f"{shown}:{name}", error
                continue
            exact = json_text.has_long_number(block)
            for first, after, name in rows:
                text = block[first - begin : after - begin]
                try:
                    row = json_text.parse_json(text) if exact else orjson.loads(text)
                    if spilled and isinstance(row, str):
                        row = DataError(row)
                except orjson.JSONDecodeError:
                    row = _parsed_or_error(text)
                except DataError as error:
                    row = error
                yield f"{shown}:{name}", row

    def identity(self) -> list[Any]:
        return [stamp.as_list() for stamp in self.sources]


def _parsed_or_error(text: bytes) -> Any:
    try:
        return json_text.parse_json(text)
    except DataError as error:
        return error


def open_lines(
    data: FileStamp, cache: Path, *, shown: str, root: Path, source: FileStamp
) -> JsonRows:
    """One row a line; blank lines are none. The lines are looked up once and kept in the cache."""
    index = load_index(data, cache)
    if index is None:
        index = keep_index(data, cache, scan_lines(data))
    return JsonRows(data, index, shown=shown, root=root, source=source)


def scan_lines(data: FileStamp) -> np.ndarray:
    """First byte, byte after the last, and number (from 1) of each line that is not blank, [rows,
    3]. Raises `DataError` with the path.
    """
    parts: list[np.ndarray] = []
    line_start, line_number, line_blank = 0, 1, True
    for offset, chunk in _chunks(data):
        if offset == 0 and chunk.startswith(BOM):
            line_start = len(BOM)
        values = np.frombuffer(chunk, np.uint8)
        ends = np.flatnonzero(values == 10)  # within the chunk
        if len(ends) == 0:
            line_blank = line_blank and not chunk[max(line_start - offset, 0) :].strip()
            continue
        starts = np.empty(len(ends), np.int64)
        starts[0] = max(line_start - offset, 0)
        starts[1:] = ends[:-1] + 1
        # most lines show by their first byte that they are not blank
        doubtful = np.flatnonzero(_BLANK[values[starts]])
        kept = np.ones(len(ends), bool)
        for i in doubtful.tolist():
            kept[i] = bool(chunk[starts[i] : ends[i]].strip())
        kept[0] |= not line_blank
        spans = np.empty((len(ends), 3), np.int64)
        spans[:, 0] = starts + offset
        spans[0, 0] = line_start
        spans[:, 1] = ends + offset
        spans[:, 2] = np.arange(line_number, line_number + len(ends))
        parts.append(spans[kept])
        line_start, line_number = int(ends[-1]) + 1 + offset, line_number + len(ends)
        line_blank = not chunk[int(ends[-1]) + 1 :].strip()
    if not line_blank:
        parts.append(np.array([[line_start, data.size, line_number]], np.int64))
    return np.concatenate(parts) if parts else np.empty((0, 3), np.int64)


def _chunks(data: FileStamp) -> Iterator[tuple[int, bytes]]:
    for offset in range(0, data.size, _SCAN_BYTES):
        try:
            yield offset, read_bytes(data, offset, min(_SCAN_BYTES, data.size - offset))
        except DataError as error:
            raise DataError(f"{shown_path(Path(data.path))}: {error}") from error


Spillable = Callable[[], Iterable[tuple[int, Any]]]


def open_spilled(
    source: FileStamp, cache: Path, kind: str, rows: Spillable, *, shown: str, root: Path
) -> JsonRows:
    """What has no rows at known places of its own: numbers and rows (or the `DataError`s in their
    stead) are written to the cache once, and read from there.
    """
    data = find_derived(source, cache, kind)
    index = load_index(data, cache) if data else None
    if data is None or index is None:
        data, index = _spill(source, cache, kind, rows)
    return JsonRows(data, index, shown=shown, root=root, source=source, spilled=True)


def _spill(
    source: FileStamp, cache: Path, kind: str, rows: Spillable
) -> tuple[FileStamp, RowIndex]:
    parts: list[np.ndarray] = []

    def write(sink: Sink) -> None:
        offset, lines, spans = 0, [], []
        for number, row in rows():
            line = orjson.dumps(str(row) if isinstance(row, DataError) else row)
            spans.append((offset, offset + len(line), number))
            offset += len(line) + 1
            lines.append(line)
            if offset - spans[0][0] > 1 << 20:
                sink.write(b"\n".join(lines) + b"\n")
                parts.append(np.array(spans, np.int64))
                lines, spans = [], []
        if lines:
            sink.write(b"\n".join(lines) + b"\n")
            parts.append(np.array(spans, np.int64))

    data = write_derived(source, cache, kind, write)
    spans = np.concatenate(parts) if parts else np.empty((0, 3), np.int64)
    return data, keep_index(data, cache, spans)
