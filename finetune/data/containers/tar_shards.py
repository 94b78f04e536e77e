"""Tar archives in webdataset's layout: the members that share a name up to its first dot are one
sample. Nothing is ever unpacked to disk.

Source: github.com/webdataset/webdataset, "The WebDataset Format".
"""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.data.containers import json_text
from finetune.data.containers.compressed import open_file
from finetune.data.containers.container import Container
from finetune.data.containers.files import FileStamp, read_bytes
from finetune.data.containers.json_rows import JsonRows, open_spilled
from finetune.errors import DataError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".avif", ".heic", ".heif", ".ico"),
)
MAX_IMAGE_BYTES = 512 << 20

_IMAGE_KEYS = ("image", "images", "image_url", "url")
_PIECE_BYTES = 1 << 20

Member = tuple[str, int, int]  # name, first byte, number of bytes


class TarShard(Container):
    """The samples of one archive. Where its members lie is looked up once, and kept."""

    def __init__(self, data: FileStamp, samples: JsonRows):
        self.shown = samples.shown
        self.root = samples.root
        self._data = data
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def where(self, number: int) -> str:
        return f"{self.shown}:{self._samples.read(number)['key']}"

    def read(self, number: int) -> Any:
        return read_sample(self._data, self._samples.read(number))

    def read_range(self, start: int, stop: int) -> Iterator[tuple[str, Any]]:
        for where, sample in self._samples.read_range(start, stop):
            if isinstance(sample, DataError):
                yield where, sample
                continue
            try:
                row = read_sample(self._data, sample)
            except DataError as error:
                row = error
            yield f"{self.shown}:{sample['key']}", row

    def identity(self) -> list[Any]:
        return self._samples.identity()


def open_tar(
    data: FileStamp, cache: Path, *, shown: str, root: Path, source: FileStamp
) -> TarShard:
    """Raises `DataError` for what is no tar archive."""

    def samples() -> Iterator[tuple[int, Any]]:
        return enumerate(list_samples(data, shown), start=1)

    rows = open_spilled(data, cache, "samples", samples, shown=shown, root=root)
    rows.sources = [source]
    return TarShard(data, rows)


def list_samples(data: FileStamp, shown: str) -> list[dict[str, Any]]:
    """Each sample's `key` with its `members`, or with the `error` why there are none, in the order
    of the archive. Members need not stand side by side. Raises `DataError` for no archive at all.
    """
    samples: dict[str, list[Member]] = {}
    errors: dict[str, str] = {}  # by key; its own row, in the place of a sample
    order: dict[str, None] = {}
    with open_file(Path(data.path)) as file:
        try:
            archive = tarfile.open(fileobj=file, mode="r:", errors="replace")  # noqa: SIM115
        except tarfile.TarError as error:
            raise DataError(
                f"{shown}: is not a tar archive, or is damaged at its start ({error}); "
                "write or copy it again"
            ) from error
        broken = ""
        try:
            while (info := archive.next()) is not None:
                vars(archive)["members"] = []  # it keeps them all
                name = info.name.removeprefix("./")
                key = _key(name)
                if info.isdir() or name.rpartition("/")[2].startswith("."):
                    continue
                if problem := _problem(info):
                    order[name], errors[name] = None, problem
                    continue
                order[key] = None
                missing = info.offset_data + info.size - data.size
                if missing > 0:
                    errors[key] = (
                        f"{name!r} is cut short: the archive ends {missing:,} bytes early; "
                        "write or copy it again"
                    )
                    break
                samples.setdefault(key, []).append((name, info.offset_data, info.size))
            else:
                broken = _unread_tail(file, archive.offset, data.size)
        except (tarfile.TarError, OSError, ValueError) as error:
            broken = f"cannot be read from byte {archive.offset:,} on ({error})"
    found: list[dict[str, Any]] = [
        {"key": key, "error": errors[key]}
        if key in errors
        else {"key": key, "members": samples[key]}
        for key in order
    ]
    if broken:
        found.append({"key": f"byte {archive.offset}", "error": f"{broken}; write it again"})
    return found


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _problem(info: tarfile.TarInfo) -> str:
    """Why a member cannot be part of a sample; nothing where it can."""
    if not info.isreg() or info.issparse():
        return "is a link, a device or a sparse file; put the file itself into the archive"
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "has a name that leads out of the archive; use relative names without '..'"
    return ""


def _unread_tail(file: Any, offset: int, size: int) -> str:
    """tarfile takes a damaged header for the end; a true end is followed by nothing but zeros."""
    file.seek(offset)
    while piece := file.read(_PIECE_BYTES):
        if piece.count(0) < len(piece):
            return f"the archive cannot be read from byte {offset:,} of {size:,} on"
    return ""


def read_sample(data: FileStamp, sample: dict[str, Any]) -> dict[str, Any]:
    """The row of a sample: what its JSON says, and its images as bytes.

    Where the JSON names images of the sample, their bytes take the names' places; else one image is
    `image`, several are `images` in the order of their names. Text is `caption`. Other members are
    left alone. Raises `DataError` without the place, and `DriveError`.
    """
    if "error" in sample:
        raise DataError(sample["error"])
    members: list[Member] = [(name, start, size) for name, start, size in sample["members"]]
    _refuse_repeated(members)
    by_suffix: dict[str, list[Member]] = {"json": [], "txt": [], "image": []}
    for member in sorted(members):
        suffix = Path(member[0]).suffix.lower()
        kind = "image" if suffix in IMAGE_SUFFIXES else suffix[1:]
        by_suffix.setdefault(kind, []).append(member)
    if not by_suffix["json"] and not by_suffix["txt"]:
        names = ", ".join(Path(name).name for name, _, _ in members[:5])
        raise DataError(
            f"has no .json or .txt member (found {names}); add one with the text of the sample"
        )
    row = _json_member(data, by_suffix["json"])
    if by_suffix["txt"] and row.get("caption") is None:
        row["caption"] = _text_member(data, by_suffix["txt"])
    images = _Images(data, by_suffix["image"])
    try:
        row = images.put_in(row)
    except RecursionError:
        raise DataError(
            "is nested too deeply to be read (a chat row has four levels); write it flatter"
        ) from None
    if not images.num_used and len(by_suffix["image"]) == 1:
        row["image"] = images.read(by_suffix["image"][0])
    elif not images.num_used and by_suffix["image"]:
        row["images"] = [images.read(member) for member in by_suffix["image"]]
    return {"__key__": sample["key"]} | row


def _refuse_repeated(members: Sequence[Member]) -> None:
    names = [name for name, _, _ in members]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"holds {name!r} twice; write each member once")


def _json_member(data: FileStamp, members: Sequence[Member]) -> dict[str, Any]:
    if not members:
        return {}
    if len(members) > 1:
        names = ", ".join(Path(name).name for name, _, _ in members[:5])
        raise DataError(f"has {len(members)} JSON members ({names}); put the row into one")
    name, start, size = members[0]
    json_text.refuse_long_row(size)
    try:
        row = json_text.parse_json(read_bytes(data, start, size))
    except DataError as error:
        raise DataError(f"{Path(name).name} {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{Path(name).name} must hold one object, the row; write it so")
    return row


def _text_member(data: FileStamp, members: Sequence[Member]) -> str:
    if len(members) > 1:
        names = ", ".join(Path(name).name for name, _, _ in members[:5])
        raise DataError(f"has {len(members)} text members ({names}); keep one, or write a .json")
    name, start, size = members[0]
    json_text.refuse_long_row(size)
    try:
        return read_bytes(data, start, size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{Path(name).name} is not UTF-8 (byte {error.start + 1}); save it as UTF-8"
        ) from error


class _Images:
    """The image members of one sample, by the names that its JSON may use for them."""

    def __init__(self, data: FileStamp, members: Sequence[Member]):
        self._data = data
        self._by_name: dict[str, Member] = {}
        for member in members:
            self._by_name |= {member[0]: member, Path(member[0]).name: member}
        self.num_used = 0

    def read(self, member: Member) -> bytes:
        name, start, size = member
        if size > MAX_IMAGE_BYTES:
            raise DataError(
                f"{Path(name).name} is {size >> 20:,} MiB long, more than the "
                f"{MAX_IMAGE_BYTES >> 20} MiB that an image may have; make it smaller"
            )
        return read_bytes(self._data, start, size)

    def put_in(self, value: Any, *, named: bool = False) -> Any:
        """The value with bytes for names of members; `named` within a key for images."""
        if isinstance(value, dict):
            return {
                key: self.put_in(inner, named=key in _IMAGE_KEYS) for key, inner in value.items()
            }
        if isinstance(value, list):
            return [self.put_in(inner, named=named) for inner in value]
        if named and isinstance(value, str) and value.removeprefix("./") in self._by_name:
            self.num_used += 1
            return self.read(self._by_name[value.removeprefix("./")])
        return value
