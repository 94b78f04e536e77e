"""The recipe's data entries -> rows: each a conversation that knows where it came from. Nothing is
dropped without being listed.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from data_formats.chat import Conversation, FormatError
from data_formats.formats import converter, recognise
from data_formats.rules import refuse_odd_turns
from finetune.data.containers import (
    Container,
    Stream,
    open_container,
    open_hub,
    open_hub_stream,
    open_stream,
)
from finetune.data.containers.files import shown_path
from finetune.data.images import ImageAccess
from finetune.errors import DataError
from finetune.recipe import DataSection, DataSource

NUM_RECOGNISED_ROWS = 20  # that format: auto looks at


@dataclass(frozen=True, slots=True)
class Row:
    """A usable row: `where` is `file:line`, its images are looked up and opened by
    `image_access`.
    """

    where: str
    conversation: Conversation
    image_access: ImageAccess


class Reader:
    """Raw rows of one entry -> `Row`s.

    `format_name` is the format they are read as, `same_as` names others that would read them the
    same.
    """

    def __init__(self, settings: DataSource, access: ImageAccess, first_rows: list[Any]):
        self.settings = settings
        self.access = access
        self.format_name, self.same_as = _format_of(settings, first_rows)
        self._convert = self._converter()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_convert"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._convert = self._converter()

    def _converter(self) -> Callable[[Any], Conversation]:
        columns = self.settings.columns
        return converter(
            self.format_name,
            columns=columns.model_dump(exclude_none=True) if columns else None,
            question=self.settings.question,
        )

    def row(self, where: str, raw: Any) -> Row:
        """Raises `DataError`, without the place, for a row that cannot be used."""
        try:
            conversation = self._convert(raw)
            refuse_odd_turns(conversation)
        except FormatError as error:
            raise DataError(str(error)) from error
        return Row(where, conversation, self.access)

    def row_or_error(self, where: str, raw: Any) -> Row | DataError:
        """As `row`, the error given rather than raised; `raw` may be an error already."""
        if isinstance(raw, DataError):
            return raw
        try:
            return self.row(where, raw)
        except DataError as error:
            return error


class Source:
    """One data entry, its rows read by number and only when asked for."""

    def __init__(self, container: Container, reader: Reader):
        self.container = container
        self.reader = reader

    def __len__(self) -> int:
        return len(self.container)

    def row(self, number: int) -> Row:
        """Raises `DataError`, without the place, for a row that cannot be used."""
        return self.reader.row(self.container.where(number), self.container.read(number))

    def rows(self, start: int, stop: int) -> Iterator[tuple[str, Row | DataError]]:
        """Each row, or why it cannot be used, with its place."""
        for where, raw in self.container.read_range(start, stop):
            yield where, self.reader.row_or_error(where, raw)

    def identity(self) -> list[Any]:
        """What the rows depend on, for caches: files with size and time, and how they are read."""
        settings = self.reader.settings.model_dump(mode="json", exclude={"weight"})
        return [self.container.identity(), settings, repr(self.reader.access)]


class Rows(Sequence[Row]):
    """Rows of some sources, by their numbers over all of them; each is read when asked for."""

    def __init__(self, sources: Sequence[Source], numbers: np.ndarray):
        self.sources = tuple(sources)
        self.numbers = numbers
        self._ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "Row | Rows":
        """Raises `DataError`, naming the place, for a row that has changed since it was checked."""
        if isinstance(index, slice):
            return Rows(self.sources, self.numbers[index])
        source, number = self._place(int(self.numbers[index]))
        try:
            return source.row(number)
        except DataError as error:
            raise DataError(f"{source.container.where(number)}: {error}") from error

    def row_or_error(self, index: int) -> tuple[str, Row | DataError]:
        """The place of a row, and the row or why it cannot be used."""
        source, number = self._place(int(self.numbers[index]))
        where = source.container.where(number)
        try:
            return where, source.row(number)
        except DataError as error:
            return where, error

    def where_of(self, number: int) -> str:
        """The place of a row by its number over all rows of the sources, used or not."""
        source, inside = self._place(number)
        return source.container.where(inside)

    def _place(self, number: int) -> tuple[Source, int]:
        """The source of a row, and the row's number in it."""
        source = int(np.searchsorted(self._ends, number, side="right"))
        return self.sources[source], number - (int(self._ends[source - 1]) if source else 0)

    def __add__(self, other: "Rows") -> "Rows":
        """These rows, then the other's."""
        shift = int(self._ends[-1]) if len(self._ends) else 0
        return Rows(
            self.sources + other.sources, np.concatenate([self.numbers, other.numbers + shift])
        )

    def num_of_sources(self) -> list[int]:
        """How many of the rows each source has."""
        number = np.searchsorted(self._ends, self.numbers, side="right")
        return np.bincount(number, minlength=len(self.sources)).tolist()


class StreamSource:
    """One data entry whose rows come one after the other."""

    def __init__(self, stream: Stream, reader: Reader):
        self.stream = stream
        self.reader = reader

    def summary(self) -> list[Any]:
        """What tells it from another stream wherever it stands: names and sizes of its files."""
        return [
            [Path(part[0]).name, part[1]] if isinstance(part, list) else part
            for part in self.stream.identity()
        ]

    def iterate(
        self, consumer: int = 0, num_consumers: int = 1, skip: int = 0
    ) -> Iterator[tuple[str, Row | DataError]]:
        """This consumer's rows, each or why it cannot be used, with its place; the first `skip`
        are passed over.
        """
        for where, raw in self.stream.iterate(consumer, num_consumers, skip):
            yield where, self.reader.row_or_error(where, raw)


def open_source(settings: DataSource, data: DataSection, cache: Path) -> Source:
    """An entry of the recipe, opened; indexes and copies of compressed files are kept in `cache`.

    Raises `DataError` where it cannot be read as a whole, holds no rows, or its format is unclear.
    """
    if settings.path:
        container = open_container(Path(settings.path), cache)
    else:
        assert settings.hub
        container = open_hub(
            settings.hub,
            config=settings.config,
            split=settings.split,
            revision=settings.revision,
            cache=cache,
        )
    if not len(container):
        raise _no_rows(container.shown)
    first = [raw for _, raw in container.read_range(0, min(NUM_RECOGNISED_ROWS, len(container)))]
    return Source(container, _reader(settings, data, container, first, cache))


def open_stream_source(settings: DataSource, data: DataSection, cache: Path) -> StreamSource:
    """As `open_source`, for an entry with `streaming: true`."""
    if settings.path:
        stream = open_stream(Path(settings.path))
    else:
        assert settings.hub
        stream = open_hub_stream(
            settings.hub,
            config=settings.config,
            split=settings.split,
            revision=settings.revision,
        )
    first = [raw for _, raw in itertools.islice(stream.iterate(0, 1), NUM_RECOGNISED_ROWS)]
    if not first:
        raise _no_rows(stream.shown)
    return StreamSource(stream, _reader(settings, data, stream, first, cache))


def image_access(data: DataSection, root: Path, cache: Path) -> ImageAccess:
    """The recipe's limits on images, for one folder."""
    return ImageAccess(
        root=root,
        allow_outside_root=data.allow_outside_root,
        max_megapixels=data.max_megapixels,
        allow_urls=data.allow_urls,
        url_max_mib=data.url_max_mib,
        url_timeout_seconds=data.url_timeout_seconds,
        url_cache=cache / "downloads",
        pdf_dpi=data.pdf_dpi,
        read_timeout_seconds=data.read_timeout_seconds,
        read_retries=data.read_retries,
    )


def _reader(
    settings: DataSource,
    data: DataSection,
    opened: Container | Stream,
    first_rows: list[Any],
    cache: Path,
) -> Reader:
    root = Path(settings.image_root) if settings.image_root else opened.root
    access = image_access(data, root, cache)
    if opened.roots and not settings.image_root:
        access = replace(access, folders=_listed(opened.roots))
    try:
        return Reader(settings, access, first_rows)
    except FormatError as error:
        raise DataError(f"{opened.shown}: {error}") from error


def _listed(folders: Sequence[Path]) -> str:
    more = f" and {len(folders) - 3:,} more" if len(folders) > 3 else ""
    return ", ".join(shown_path(folder) for folder in folders[:3]) + more


def _format_of(settings: DataSource, first_rows: list[Any]) -> tuple[str, tuple[str, ...]]:
    if settings.columns and settings.format == "auto":
        return "columns", ()
    if settings.format != "auto":
        return settings.format, ()
    readable = [row for row in first_rows if not isinstance(row, DataError)]
    if not readable:
        raise FormatError(f"no row can be read; the first {first_rows[0]}")
    if all(isinstance(row, list) for row in readable):
        raise FormatError("each row is a list; name the file .json, or write one object a line")
    recognised = recognise(readable)
    return recognised.name, recognised.same_as


def _no_rows(shown: str) -> DataError:
    return DataError(f"{shown}: holds no rows; give a file with one JSON object a line")
