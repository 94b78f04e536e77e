"""Rows in their order, read once and from the start: for what is too large to be indexed or kept.

The rows are dealt out to consumers (a rank's loading process each), so that each row goes to
exactly one of them, whatever their number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.data.containers.container import shared_root
from finetune.data.containers.files import shown_path
from finetune.data.containers.hub import hub_shards
from finetune.data.containers.kinds import expand_pattern, find_kind, refuse_several_splits
from finetune.data.containers.shards import SHARDS, Mark, Shard, open_shard
from finetune.data.patience import drive_error
from finetune.errors import DataError
from finetune.patterns import is_pattern

UNEVEN = 1.1  # shards are dealt out where no consumer gets more than this times the mean


@dataclass(frozen=True, slots=True)
class Place:
    """Where a consumer goes on: with its `row` of the `shard`, both by number, at the `mark` where
    the shard gave one. `before` are the rows of all consumers in the shards before.
    """

    shard: int
    before: int
    row: int
    mark: Mark | None = None

    def to_json(self) -> list[Any]:
        """As a checkpoint holds it."""
        return list(astuple(self))

    @classmethod
    def from_json(cls, value: Any) -> "Place":
        """What `to_json` gave."""
        shard, before, row, mark = value
        return cls(shard, before, row, tuple(mark) if mark else None)


class Stream:
    """Rows of shards, one after the other."""

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        shown: str,
        root: Path,
        roots: tuple[Path, ...] = (),
        identity: list[Any],
    ):
        self.shown = shown
        self.root = root
        self.roots = roots
        self._shards = list(shards)
        self._identity = identity

    def identity(self) -> list[Any]:
        """What the rows depend on, as JSON: path, size and mtime_ns of every file."""
        return self._identity

    def iterate(
        self, consumer: int, num_consumers: int, skip: int = 0, start: Place | None = None
    ) -> "Reading":
        """Place and row, or the `DataError`, of this consumer's rows after the first `skip` ones,
        which are not decoded; from `start` on, which another reading gave for the same consumer.

        The order is fixed for each consumer. Whole shards are dealt out where that is even enough,
        else the parts of shards, else all consumers read all shards, and take rows in turn. Raises
        `DataError` where a shard cannot be read on.
        """
        if not 0 <= consumer < num_consumers:
            raise ValueError(f"consumer {consumer} of {num_consumers}")
        for shards in (self._shards, self._parts):
            if _is_even(shards, num_consumers):
                return Reading(shards[consumer::num_consumers], 1, start or Place(0, 0, 0), skip)
        return Reading(self._shards, num_consumers, start or Place(0, 0, consumer), skip)

    @cached_property
    def _parts(self) -> list[Shard]:
        return [part for shard in self._shards for part in shard.parts()]


def _is_even(shards: Sequence[Shard], num_consumers: int) -> bool:
    """Whether each consumer gets about as much where they are dealt out; shards of which one does
    not know its size count as equal.
    """
    if len(shards) < num_consumers:
        return False
    sizes = [shard.num_bytes for shard in shards]
    known = [1 if None in sizes else size or 0 for size in sizes]
    largest = max(sum(known[i::num_consumers]) for i in range(num_consumers))
    return largest <= UNEVEN * sum(known) / num_consumers


class Reading(Iterator[tuple[str, Any]]):
    """The rows of one consumer: of each shard one in `step`."""

    def __init__(self, shards: Sequence[Shard], step: int, start: Place, skip: int):
        self.place = start
        """Where the next row is."""
        self._rows = self._read(shards, step, skip)

    def __next__(self) -> tuple[str, Any]:
        return next(self._rows)

    def _read(self, shards: Sequence[Shard], step: int, skip: int) -> Iterator[tuple[str, Any]]:
        start = self.place
        turn, before = (start.before + start.row) % step, start.before
        for number in range(start.shard, len(shards)):
            shard, row, mark = shards[number], (turn - before) % step, None
            if number == start.shard:
                row, mark = start.row, start.mark
            num_rows = shard.num_rows() if skip else None
            if num_rows is not None:  # skip without reading
                passed = min(skip, len(range(row, num_rows, step)))
                skip -= passed
                row += passed * step
                if row >= num_rows:
                    before += num_rows
                    continue
            entries = shard.entries(row, step, mark)
            while True:
                try:
                    where, entry, mark = next(entries)
                except StopIteration as end:
                    before += end.value
                    break
                except OSError as error:
                    if failing := drive_error(shard.shown, error):
                        raise failing from error
                    raise
                row += step
                self.place = Place(number, before, row, mark)
                if skip:
                    skip -= 1
                    continue
                try:
                    decoded = entry if isinstance(entry, DataError) else shard.decode(entry)
                except DataError as error:
                    decoded = error
                yield where, decoded


def open_stream(path: Path) -> Stream:
    """The rows of files in their order: JSON Lines and tables (plain, gzip, zstandard), Parquet and
    tar; a file, a folder, a glob or a brace range. Nothing is written. Raises `DataError`.
    """
    if path.is_dir():
        try:
            paths = sorted(
                file
                for file in path.iterdir()
                if not file.name.startswith(".") and find_kind(file) in SHARDS
            )
        except OSError as error:
            raise DataError(
                f"{shown_path(path)}: cannot be read ({error.strerror}); check its permissions"
            ) from error
        if len({find_kind(file) for file in paths}) != 1:
            raise DataError(
                f"{shown_path(path)}: is no folder of JSON Lines, CSV, Parquet or tar files of one "
                "kind; give a pattern such as folder/*.jsonl"
            )
        refuse_several_splits(paths, shown_path(path))
    elif is_pattern(path):
        paths = expand_pattern(path)
    else:
        paths = [path]
    shards = [open_shard(file) for file in paths]
    root, roots = shared_root([file.parent for file in paths])
    return Stream(
        shards,
        shown=shown_path(path),
        root=root,
        roots=roots,
        identity=[shard.stamp.as_list() for shard in shards],
    )


def open_hub_stream(hub: str, *, config: str | None, split: str, revision: str) -> Stream:
    """The rows of a Hub dataset as they come over the network. Raises `DataError`."""
    shards = hub_shards(hub, config=config, split=split, revision=revision)
    return Stream(
        shards,
        shown=f"{hub}/{split}",
        root=Path(hub) if Path(hub).is_dir() else Path(),
        identity=[["hub", hub, config, split, revision]],
    )
