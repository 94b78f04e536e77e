"""What a path is, by its name and its first bytes; and which files a pattern stands for."""

import os
import re
from pathlib import Path
from typing import Literal

from finetune.data.containers.compressed import SUFFIXES as COMPRESSED
from finetune.data.containers.compressed import open_plain
from finetune.data.containers.files import near_name, shown_path
from finetune.errors import DataError
from finetune.patterns import globbed, written_out

Kind = Literal["lines", "document", "table", "parquet", "arrow", "tar"]

KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".jsonlines": "lines",
    ".json": "document",
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "tar",
    ".tgz": "tar",
}

TEXT_KINDS: tuple[Kind, ...] = ("lines", "document", "table")

UNDERSTOOD = (
    ".jsonl, .json, .csv, .tsv (each also .gz or .zst), .parquet, .arrow, .tar, a folder of those, "
    "a folder of save_to_disk, or a folder of images with metadata.jsonl or with a folder for each "
    "label"
)

_PICKLE = "pickles are never loaded, since they may run code; write the rows as JSON Lines"
_UNPACK = "unpack it, and give the file or folder within"
_TABLE = "save the sheet as CSV (UTF-8)"
_REFUSED = {
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".joblib"), _PICKLE),
    **dict.fromkeys((".zip", ".7z", ".rar", ".bz2", ".xz", ".lz4", ".tbz2", ".txz"), _UNPACK),
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), _TABLE),
    ".txt": "a text file has no columns; write a JSON object a line into a .jsonl file",
    ".md": "a text file has no columns; write a JSON object a line into a .jsonl file",
    ".xml": "convert it to a JSON object a line (.jsonl)",
    ".html": "convert it to a JSON object a line (.jsonl)",
    ".yaml": "convert it to a JSON object a line (.jsonl)",
    ".yml": "convert it to a JSON object a line (.jsonl)",
    ".pdf": "a row names a PDF as its image; write the rows into a .jsonl file",
    ".tfrecord": "convert it to Parquet or to tar shards",
    ".h5": "convert it to Parquet or to tar shards",
    ".hdf5": "convert it to Parquet or to tar shards",
    ".lmdb": "convert it to Parquet or to tar shards",
    ".sqlite": "export the table as CSV or JSON Lines",
    ".db": "export the table as CSV or JSON Lines",
    ".safetensors": "these are weights, not rows; give a data file",
    ".py": "scripts are never run; load the dataset and save it as Parquet or JSON Lines",
    **dict.fromkeys(
        (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"),
        "one image is no rows; give the file that has the questions, or the folder of the images",
    ),
}

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def suffix_of(path: Path) -> str:
    """The suffix that tells the kind, in lower case, without one for compression."""
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def find_kind(path: Path) -> Kind | None:
    """The kind by the name alone, or None."""
    return KINDS.get(suffix_of(path))


def kind_of(path: Path) -> Kind:
    """Raises `DataError`, with what to do, for a file that is none."""
    suffix = suffix_of(path)
    kind = KINDS.get(suffix)
    if kind is not None:
        return kind
    if suffix in _REFUSED:
        raise DataError(f"{shown_path(path)}: a {suffix} file cannot be read; {_REFUSED[suffix]}")
    raise DataError(
        f"{shown_path(path)}: {f'the suffix {suffix}' if suffix else 'a name without a suffix'} "
        f"does not tell what it holds; expected {UNDERSTOOD}; name it so"
    )


def refuse_foreign(path: Path, shown: str, kind: Kind) -> None:
    """Raise `DataError` for a file that is something else in truth, as a whole."""
    with open_plain(path) as file:
        head = file.read(4096)
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{shown}: is a Git LFS pointer, not the file itself; run 'git lfs pull'")
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        raise DataError(
            f"{shown}: is a web page or XML, perhaps an error message saved in place of the file; "
            "download it again"
        )
    if kind not in TEXT_KINDS:
        return
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head[:2] in (b"{\0", b"\0{", b"[\0", b"\0["):
        raise DataError(f"{shown}: is UTF-16; save it as UTF-8")
    if head.startswith((b"PK\x03\x04", b"PAR1", b"BZh9", b"\xfd7zXZ")):
        raise DataError(
            f"{shown}: is a zip, Parquet, bzip2 or xz file under another name; name it after what "
            "it is, or unpack it"
        )
    lines = [line.strip() for line in head.removeprefix(b"\xef\xbb\xbf").splitlines()]
    first = next((line for line in lines if line), b"")
    if kind == "lines" and first in (b"[", b"{"):
        raise DataError(
            f"{shown}: is one JSON document over many lines, not an object a line; name it .json"
        )


def expand_pattern(path: Path) -> list[Path]:
    """The files of a glob or of a brace range, sorted as written. Raises `DataError` where there
    are none, or where one of a range is missing.
    """
    found: list[Path] = []
    for text in written_out(os.fspath(path)):
        files_of_it = [Path(file) for file in globbed(text)]
        if files_of_it == [Path(text)] and not Path(text).exists():
            raise DataError(f"{text}: is not there; {near_name(Path(text))}")
        found += files_of_it
    files = [file for file in dict.fromkeys(found) if not file.is_dir()]
    if not files:
        raise DataError(
            f"{shown_path(path)}: no file fits this pattern; look at it with ls, and mind the "
            "folder it starts from"
        )
    return files


def refuse_several_splits(paths: list[Path], shown: str) -> None:
    """Raise `DataError` where a folder holds train and test files side by side: read as one they
    would put the test rows into the training.
    """
    splits: dict[str, Path] = {}
    for path in paths:
        word = re.match(r"[a-z]*", path.name.lower())
        split = _SPLIT_WORDS.get(word[0] if word else "")
        if split:
            splits.setdefault(split, path)
    if len(splits) > 1:
        names = ", ".join(path.name for path in splits.values())
        first = splits.get("train") or next(iter(splits.values()))
        written = first.name if first.is_dir() else f"{re.split('[-_.0-9]', first.name)[0]}*"
        raise DataError(
            f"{shown}: holds several splits ({names}); point at one of them, such as "
            f"{shown_path(first.parent / written)}"
        )
