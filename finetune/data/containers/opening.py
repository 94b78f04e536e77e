"""A path -> the container that reads it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data.containers.arrow import open_arrow, open_parquet, open_saved, saved_splits
from finetune.data.containers.compressed import open_plain, plain_copy
from finetune.data.containers.container import Concatenated, Container
from finetune.data.containers.delimited import read_table
from finetune.data.containers.documents import open_document
from finetune.data.containers.files import FileStamp, shown_path
from finetune.data.containers.image_folders import LabelFolders, WithMetadata, list_images
from finetune.data.containers.json_rows import open_lines, open_spilled
from finetune.data.containers.kinds import (
    TEXT_KINDS,
    UNDERSTOOD,
    expand_pattern,
    find_kind,
    kind_of,
    refuse_foreign,
    refuse_several_splits,
    suffix_of,
)
from finetune.data.containers.tar_shards import open_tar
from finetune.errors import DataError
from finetune.patterns import is_pattern

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def open_container(path: Path, cache: Path) -> Container:
    """The rows of a file, a folder, a glob, or a brace range such as `shard-{000..010}.tar`.

    What has to be worked out first (offsets, uncompressed copies) is kept in `cache`. Raises
    `DataError`, naming the path, for what cannot be read at all.
    """
    if path.is_dir():
        return _open_folder(path, cache)
    if is_pattern(path):
        return _open_files(expand_pattern(path), cache, shown_path(path))
    return _open_file(path, cache)


def _open_file(path: Path, cache: Path) -> Container:
    source, shown, root = FileStamp.of(path), shown_path(path), path.parent
    kind = kind_of(path)
    refuse_foreign(path, shown, kind)
    match kind:
        case "parquet":
            return open_parquet(source, cache, shown=shown, root=root)
        case "arrow":
            return open_arrow(source, shown=shown, root=root)
        case "table":
            return open_spilled(
                source, cache, "table", lambda: _records(path, shown), shown=shown, root=root
            )
    data = plain_copy(source, cache)
    opener = {"lines": open_lines, "document": open_document, "tar": open_tar}[kind]
    return opener(data, cache, shown=shown, root=root, source=source)


def _records(path: Path, shown: str) -> Iterator[tuple[int, Any]]:
    with open_plain(path) as file:
        yield from read_table(file, shown, tabs=suffix_of(path) == ".tsv")


def _open_files(paths: list[Path], cache: Path, shown: str) -> Container:
    parts = [_open_file(path, cache) for path in paths]
    return parts[0] if len(parts) == 1 else Concatenated(parts, shown)


def _open_folder(folder: Path, cache: Path) -> Container:
    shown = shown_path(folder)
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(
            f"{shown}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    names = {path.name for path in entries}
    if "dataset_dict.json" in names:
        splits = ", ".join(f"{shown}/{split}" for split in saved_splits(folder))
        raise DataError(f"{shown}: holds several splits; point at one of them: {splits}")
    if {"state.json", "dataset_info.json"} <= names:
        return open_saved(folder, shown=shown)
    metadata = [folder / name for name in _METADATA if name in names]
    if len(metadata) > 1:
        found = ", ".join(path.name for path in metadata)
        raise DataError(f"{shown}: holds several metadata files ({found}); keep one")
    if metadata:
        return WithMetadata(_open_file(metadata[0], cache), folder)

    files = [path for path in entries if find_kind(path) and not path.is_dir()]
    groups: dict[str, list[Path]] = {}
    for path in files:
        kind = kind_of(path)
        groups.setdefault("text" if kind in TEXT_KINDS else kind, []).append(path)
    if len(groups) > 1:
        examples = ", ".join(group[0].name for group in groups.values())
        raise DataError(
            f"{shown}: holds files of several kinds ({examples}); point at the ones to read, such "
            f"as {shown}/*{suffix_of(files[0])}"
        )
    if files:
        refuse_several_splits(files, shown)
        return _open_files(files, cache, shown)

    images = list_images(folder)
    if any("/" in name for name in images):
        labels = [path for path in entries if path.is_dir()]
        refuse_several_splits(labels, shown)
        return LabelFolders(images, folder, shown)
    raise _not_understood(shown, entries)


def _not_understood(shown: str, entries: list[Path]) -> DataError:
    names = [path.name + ("/" if path.is_dir() else "") for path in entries]
    found = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
    return DataError(f"{shown}: holds {found or 'nothing'}; expected {UNDERSTOOD}; give one")
