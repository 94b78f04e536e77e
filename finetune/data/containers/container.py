"""What every container of rows can do, whatever its files look like."""

import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from finetune.errors import DataError


class Container(ABC):
    """Raw rows at any place. Holds paths and offsets alone, so that it can be pickled and forked;
    files are opened where they are read.
    """

    shown: str
    """The path as a person standing in the current folder would write it."""
    root: Path
    """Where relative image paths start."""
    roots: tuple[Path, ...] = ()
    """Of parts that start at different folders: these. Then `root` is only what they share."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows, unusable ones included."""

    @abstractmethod
    def where(self, number: int) -> str:
        """Place of the row for messages: `file:line` of text files, else rows count from 1."""

    @abstractmethod
    def read(self, number: int) -> Any:
        """The row as the file holds it. Raises `DataError` with the reason, without the place."""

    @abstractmethod
    def identity(self) -> list[Any]:
        """What the rows depend on, as JSON: path, size and mtime_ns of every file."""

    def read_range(self, start: int, stop: int) -> Iterator[tuple[str, Any]]:
        """Place and row, or the `DataError`, of each row from `start` to before `stop`."""
        for number in range(start, stop):
            try:
                row = self.read(number)
            except DataError as error:
                row = error
            yield self.where(number), row


def shared_root(roots: Sequence[Path]) -> tuple[Path, tuple[Path, ...]]:
    """The folder that holds them all, and the different ones where these are several."""
    different = {root.resolve(): root for root in roots}
    if len(different) == 1:
        return roots[0], ()
    return Path(os.path.commonpath(list(different))), tuple(different.values())


class Concatenated(Container):
    """Several containers, one after the other."""

    def __init__(self, parts: Sequence[Container], shown: str):
        self.parts = list(parts)
        self.shown = shown
        self.root, self.roots = shared_root([part.root for part in parts])
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def _find(self, number: int) -> tuple[Container, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        i = bisect_right(self._ends, number)
        return self.parts[i], number - (self._ends[i - 1] if i else 0)

    def where(self, number: int) -> str:
        part, inner = self._find(number)
        return part.where(inner)

    def read(self, number: int) -> Any:
        part, inner = self._find(number)
        return part.read(inner)

    def read_range(self, start: int, stop: int) -> Iterator[tuple[str, Any]]:
        begin = 0
        for part, end in zip(self.parts, self._ends, strict=True):
            if begin < stop and start < end:
                yield from part.read_range(max(start - begin, 0), min(stop, end) - begin)
            begin = end

    def identity(self) -> list[Any]:
        return [entry for part in self.parts for entry in part.identity()]
