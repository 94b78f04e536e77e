"""Folders of images: with a metadata file, or with a folder for each label.

Source: huggingface.co/docs/datasets, "Create an image dataset", ImageFolder.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.containers.container import Container
from finetune.data.containers.tar_shards import IMAGE_SUFFIXES
from finetune.errors import DataError

_RENAMED = {"file_name": "image", "file_names": "images"}


class WithMetadata(Container):
    """Rows of a metadata file, which name images by `file_name` or `file_names`."""

    def __init__(self, metadata: Container, folder: Path):
        self.shown = metadata.shown
        self.root = folder
        self._metadata = metadata

    def __len__(self) -> int:
        return len(self._metadata)

    def where(self, number: int) -> str:
        return self._metadata.where(number)

    def read(self, number: int) -> Any:
        return _renamed(self._metadata.read(number))

    def read_range(self, start: int, stop: int) -> Iterator[tuple[str, Any]]:
        for where, row in self._metadata.read_range(start, stop):
            yield where, _renamed(row)

    def identity(self) -> list[Any]:
        return self._metadata.identity()


def _renamed(row: Any) -> Any:
    """An `image` that holds something already is left for the converter to see beside the name."""
    if not isinstance(row, dict):
        return row
    return {
        _RENAMED[key] if key in _RENAMED and row.get(_RENAMED[key]) is None else key: value
        for key, value in row.items()
        if key not in _RENAMED.values() or value is not None
    }


class LabelFolders(Container):
    """An image a row; its label is the folder that holds it.

    The names are one run of bytes, so that a million of them are no million objects.
    """

    def __init__(self, names: list[str], folder: Path, shown: str):
        self.shown = shown
        self.root = folder
        encoded = [os.fsencode(name) for name in names]
        self._names = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def _name(self, number: int) -> bytes:
        start = int(self._ends[number - 1]) if number else 0
        return self._names[start : int(self._ends[number])]

    def where(self, number: int) -> str:
        return f"{self.shown}/{self._name(number).decode(errors='backslashreplace')}"

    def read(self, number: int) -> Any:
        try:
            name = self._name(number).decode()
        except UnicodeDecodeError as error:
            raise DataError("has a name that is not UTF-8; rename the file") from error
        label, slash, _ = name.rpartition("/")
        return {"image": name, "label": label} if slash else {"image": name}

    def identity(self) -> list[Any]:
        digest = hashlib.blake2b(self._names, digest_size=16)
        digest.update(self._ends.tobytes())
        return [[str(self.root.absolute()), len(self), digest.hexdigest()]]


def list_images(folder: Path) -> list[str]:
    """Paths of all images below the folder, relative to it, sorted. Hidden ones are left out, and
    linked folders are not entered.
    """
    found = []
    for place, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(place, folder)
        prefix = "" if below == "." else f"{below.replace(os.sep, '/')}/"
        found += [
            prefix + name
            for name in files
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)
        ]
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: cannot be read ({error.strerror}); check its permissions"
    ) from error
