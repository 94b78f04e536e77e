"""Whether an image file is whole, told from its structure before anything is decoded.

Decoders are lenient: one fills what is missing with grey, another stops at the last whole row, and
process-wide settings change which. What is learnt must not depend on that.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator

from finetune.errors import DataError

# What follows 0xFF in a JPEG scan and is data all the same: a stuffed zero, a restart, a fill byte
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_JPEG_END = 0xD9

_PNG_CRITICAL = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS"})

_TIFF_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # TIFF's types, in struct's letters
_TIFF_STRIPS, _TIFF_TILES = (273, 279), (324, 325)  # offsets, byte counts
_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 322, 323
_TIFF_WANTED = frozenset({*_TIFF_STRIPS, *_TIFF_TILES, _TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH})


class CutShortError(DataError):
    """The file ends before its image does."""


def refuse_cut_short(data: bytes, image_format: str) -> None:
    """Raise `CutShortError` where the file misses its end, `DataError` where a checksum is wrong.

    Formats that are not looked into here (GIF, BMP, raw PPM, AVIF) are refused by their decoders
    wherever a pixel is missing; `tests/test_images.py` cuts every format everywhere.
    """
    check = _CHECKS.get(image_format)
    if check is not None:
        try:
            check(data)
        except (struct.error, OverflowError, MemoryError):  # a structure that points beyond the end
            raise CutShortError("its structure goes on beyond its end") from None


def largest_part(data: bytes, image_format: str) -> tuple[int, int]:
    """Width and height of the largest thing the decoder would allocate besides the image itself:
    an icon's embedded pictures, a TIFF's tiles. (0, 0) for other formats.
    """
    try:
        if image_format == "ICO":
            return max(_icon_sizes(data), key=lambda size: size[0] * size[1], default=(0, 0))
        if image_format == "TIFF":
            tags = dict(_tiff_tags(data))
            if tags.get(_TIFF_TILE_WIDTH) and tags.get(_TIFF_TILE_LENGTH):
                return tags[_TIFF_TILE_WIDTH][0], tags[_TIFF_TILE_LENGTH][0]
    except (struct.error, OverflowError, MemoryError):
        raise CutShortError("its structure goes on beyond its end") from None
    return 0, 0


def _check_jpeg(data: bytes) -> None:
    """ITU-T T.81, annex B: segments carry their lengths, and scans end at the next marker."""
    position = 2
    while marker := _JPEG_MARKER.search(data, position):
        kind = marker[1][0]
        if kind == _JPEG_END:
            return
        (length,) = struct.unpack_from(">H", data, marker.end())
        position = marker.end() + length
    raise CutShortError("its end marker is missing")


def _check_png(data: bytes) -> None:
    """PNG specification, section 5: every chunk whole, with its checksum, up to IEND."""
    position = 8
    while True:
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(data):
            raise CutShortError(f"its {kind.decode('latin-1')} chunk is not whole")
        if kind in _PNG_CRITICAL:
            (expected,) = struct.unpack_from(">I", data, end - 4)
            if zlib.crc32(memoryview(data)[position + 4 : end - 4]) != expected:
                raise DataError(
                    f"is damaged (wrong checksum in {kind.decode()} at {position:,}); "
                    "mend or replace it"
                )
        if kind == b"IEND":
            return
        position = end


def _check_riff(data: bytes) -> None:
    (length,) = struct.unpack_from("<I", data, 4)
    if 8 + length > len(data):
        raise CutShortError(f"{len(data):,} of {8 + length:,} bytes")


def _check_tiff(data: bytes) -> None:
    """TIFF 6.0, section 2: the first page's tags and the strips or tiles they point at."""
    tags = dict(_tiff_tags(data))
    for offsets_tag, counts_tag in (_TIFF_STRIPS, _TIFF_TILES):
        offsets, counts = tags.get(offsets_tag, ()), tags.get(counts_tag, ())
        if any(offset + count > len(data) for offset, count in zip(offsets, counts, strict=False)):
            raise CutShortError("its pixels go on beyond its end")


def _tiff_tags(data: bytes) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Those tags of the first page that say where its pixels are."""
    order = "<" if data[:1] == b"I" else ">"
    is_big = data[2:4] in (b"\x2b\0", b"\0\x2b")
    (start,) = struct.unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)
    count_format, entry_format = ("Q", "HHQ8s") if is_big else ("H", "HHI4s")
    (num_tags,) = struct.unpack_from(order + count_format, data, start)
    first = start + struct.calcsize(order + count_format)
    entry_bytes = struct.calcsize(order + entry_format)
    wanted = {}
    for i in range(num_tags):
        entry = struct.unpack_from(order + entry_format, data, first + i * entry_bytes)
        tag, kind, count, inline = entry
        letter = _TIFF_WHOLE_NUMBERS.get(kind)
        if letter is not None and tag in _TIFF_WANTED:
            wanted[tag] = letter, count, inline  # of a repeated tag the last, as Pillow takes it
    for tag, (letter, count, inline) in wanted.items():
        values = struct.Struct(f"{order}{count}{letter}")
        if values.size <= len(inline):
            yield tag, values.unpack_from(inline)
        else:
            (offset,) = struct.unpack(order + ("Q" if is_big else "I"), inline)
            yield tag, values.unpack_from(data, offset)


def _check_ico(data: bytes) -> None:
    places = list(_icon_places(data))
    if any(offset + num_bytes > len(data) for offset, num_bytes in places):
        raise CutShortError("one of its pictures goes on beyond its end")
    if sum(num_bytes for _, num_bytes in places) > len(data):
        # 65,535 of them may be named, and each would be gone through
        raise DataError("is damaged (its pictures lie over one another); mend or replace it")
    for offset, num_bytes in places:
        if data[offset : offset + 8] == b"\x89PNG\r\n\x1a\n":
            _check_png(data[offset : offset + num_bytes])


def _icon_places(data: bytes) -> Iterator[tuple[int, int]]:
    """Offset and length of each picture of an icon."""
    (count,) = struct.unpack_from("<H", data, 4)
    for i in range(count):
        num_bytes, offset = struct.unpack_from("<II", data, 6 + 16 * i + 8)
        yield offset, num_bytes


def _icon_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """The pictures' own sizes, which the icon's directory may understate."""
    for offset, _ in _icon_places(data):
        if data[offset : offset + 8] == b"\x89PNG\r\n\x1a\n":
            yield struct.unpack_from(">II", data, offset + 16)
        else:  # a bitmap header, whose height counts the mask too
            width, height = struct.unpack_from("<ii", data, offset + 4)
            yield abs(width), abs(height) // 2


def _check_ppm(data: bytes) -> None:
    """In a plain greymap or pixmap nothing but the space after it shows that a number is whole."""
    if data[:2] in (b"P2", b"P3") and not data[-1:].isspace():
        raise CutShortError("its last number may be cut; end the file with a newline")


_CHECKS: dict[str, Callable[[bytes], None]] = {
    "JPEG": _check_jpeg,
    "PNG": _check_png,
    "WEBP": _check_riff,
    "TIFF": _check_tiff,
    "ICO": _check_ico,
    "PPM": _check_ppm,
}
