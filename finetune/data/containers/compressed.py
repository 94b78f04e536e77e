"""gzip and zstandard: recognised by their first bytes, since names lie after a download."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from finetune.data.containers.cached import Sink, find_derived, write_derived
from finetune.data.containers.files import FileStamp, shown_path
from finetune.errors import DataError

SUFFIXES = (".gz", ".zst", ".zstd")
_PIECE_BYTES = 1 << 20
# A compressed zstandard block of 4 bytes may stand for 128 KiB, and its decoder gives all at once.
_ZSTD_PIECE_BYTES = 1 << 11


def compression(path: Path) -> str | None:
    """`gzip`, `zstd` or None. Raises `DataError`."""
    with open_file(path) as file:
        magic = file.read(4)
    if magic.startswith(b"\x1f\x8b"):
        return "gzip"
    return "zstd" if magic == b"\x28\xb5\x2f\xfd" else None


def open_file(path: Path) -> IO[bytes]:
    """The file for reading. Raises `DataError` with the path."""
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(
            f"{shown_path(path)}: cannot be read ({error.strerror}); check its permissions"
        ) from error


def open_plain(path: Path) -> IO[bytes]:
    """The file's content, decompressed on the way where it must be.

    Reading it raises `DataError`, with the path, where the compressed data are damaged.
    """
    kind = compression(path)
    if kind is None:
        return open_file(path)
    pieces = {"gzip": _gzip_pieces, "zstd": _zstd_pieces}[kind](path)
    return io.BufferedReader(_Pieces(pieces), _PIECE_BYTES)


def plain_copy(source: FileStamp, cache: Path) -> FileStamp:
    """The decompressed copy in the cache, or the file itself where it is plain already."""
    path = Path(source.path)
    if compression(path) is None:
        return source
    found = find_derived(source, cache, "plain")
    if found is not None:
        return found

    def write(sink: Sink) -> None:
        with open_plain(path) as file:
            while piece := file.read(_PIECE_BYTES):
                sink.write(piece)

    return write_derived(source, cache, "plain", write)


def _gzip_pieces(path: Path) -> Iterator[bytes]:
    with open_file(path) as file, gzip.GzipFile(fileobj=file) as unpacked:
        try:
            while piece := unpacked.read(_PIECE_BYTES):
                yield piece
        except EOFError as error:
            raise _cut_short(path) from error
        except (OSError, zlib.error) as error:
            raise DataError(
                f"{shown_path(path)}: is damaged gzip data ({error}); copy or compress it again"
            ) from error


def _zstd_pieces(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"{shown_path(path)}: zstandard is needed to read it; "
            "pip install 'vlm-recipes[zstd]', or decompress the file"
        ) from error
    decoder = None
    with open_file(path) as file:
        while data := file.read(_ZSTD_PIECE_BYTES):
            while data:
                if decoder is None:
                    decoder = zstandard.ZstdDecompressor().decompressobj()
                try:
                    piece = decoder.decompress(data)
                except zstandard.ZstdError as error:
                    raise DataError(
                        f"{shown_path(path)}: is damaged zstandard data ({error}); "
                        "copy or compress it again"
                    ) from error
                if piece:
                    yield piece
                data = b""
                if decoder.eof:  # a file may hold several frames
                    data, decoder = decoder.unused_data, None
    if decoder is not None:
        raise _cut_short(path)


def _cut_short(path: Path) -> DataError:
    return DataError(
        f"{shown_path(path)}: is cut short (the compressed data have no end); "
        "copy or download it again"
    )


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces = pieces
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        if not self._rest:
            self._rest = next(self._pieces, b"")
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
