"""Rows that are read while training: shared out over processes, checked as they come, and gone on
with where an interrupted run stopped.

A *consumer* is one loading process of one training process. Each has its own rows, in an order
that the seed decides, and tells with every row how far it has come.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from finetune.data.augment import Augmentation, Draws
from finetune.data.collate import BatchRow, collate
from finetune.data.containers import Place, Reading
from finetune.data.examination import Finding
from finetune.data.examples import Encoder, Example, OverlongError
from finetune.data.patience import DriveError
from finetune.data.sources import StreamSource
from finetune.errors import DataError

WINDOW = 256  # rows read ahead and shuffled; unread pictures are all that they cost


@dataclass(frozen=True, slots=True)
class Position:
    """How far a consumer has come: the epoch, and of each source the rows taken before the window
    at hand, and where the first of the window is; then the rows taken of the window.
    """

    epoch: int
    taken: tuple[int, ...]
    places: tuple[Place | None, ...]
    in_window: int = 0

    def to_json(self) -> list[Any]:
        """As a checkpoint holds it."""
        places = [place and place.to_json() for place in self.places]
        return [self.epoch, list(self.taken), places, self.in_window]

    @classmethod
    def from_json(cls, value: Any) -> "Position":
        """What `to_json` gave."""
        epoch, taken, places, in_window = value
        found = tuple(place and Place.from_json(place) for place in places)
        return cls(epoch, tuple(taken), found, in_window)


@dataclass(frozen=True, slots=True)
class StreamedExample:
    """An example, the rows left out or shortened since the one before, and the position after
    it.
    """

    example: Example
    findings: list[Finding]
    num_taken: int
    consumer: int
    position: Position


class ExampleStream(IterableDataset[StreamedExample]):
    """Examples without end: epoch after epoch of the sources, mixed by their weights.

    A source of weight 2 gives two rows for one of a source of weight 1, as long as both last; each
    row comes once an epoch. Bad and overlong rows raise `DataError`, or are left out and told of,
    as the recipe says; a drive that fails raises `DriveError`. `rank` and `num_ranks` are those of
    the training process; `positions` are where consumers go on, by their number. `augmentation`
    changes rows as they are shown. `turn` is the consumer whose batch is next: they take turns
    within a training process.
    """

    def __init__(
        self,
        sources: Sequence[StreamSource],
        encoder: Encoder,
        *,
        seed: int,
        skip_bad: bool,
        skip_overlong: bool,
        rank: int = 0,
        num_ranks: int = 1,
        positions: dict[int, Position] | None = None,
        augmentation: Augmentation | None = None,
    ):
        self.sources = tuple(sources)
        self.encoder = encoder
        self.seed = seed
        self.skip_bad = skip_bad
        self.skip_overlong = skip_overlong
        self.rank = rank
        self.num_ranks = num_ranks
        self.positions = positions or {}
        self.augmentation = augmentation
        self.turn = 0

    def __iter__(self) -> Iterator[StreamedExample]:
        worker = get_worker_info()
        per_rank, number = (worker.num_workers, worker.id) if worker else (1, 0)
        number = (self.turn + number) % per_rank  # a loader begins with its first process
        consumer, num_consumers = self.rank * per_rank + number, self.num_ranks * per_rank
        num_sources = len(self.sources)
        nothing = Position(0, (0,) * num_sources, (None,) * num_sources)
        start = self.positions.get(consumer, nothing)
        findings: list[Finding] = []
        num_taken = 0
        epoch_has_rows = True
        for row, position in self._rows(consumer, num_consumers, start):
            if position is None:  # an epoch has ended
                if not num_taken and not epoch_has_rows:
                    return  # fewer rows than loading processes: the others have them
                if not epoch_has_rows:
                    raise DataError(
                        f"data.train: the stream has no usable row for loading process {consumer} "
                        f"of {num_consumers}; lower training.num_workers, or mend its rows"
                    )
                epoch_has_rows = False
                continue
            num_taken += 1
            example = self._encode(row, self._draws(consumer, position), findings)
            if example:
                yield StreamedExample(example, findings, num_taken, consumer, position)
                findings, num_taken, epoch_has_rows = [], 0, True

    def _draws(self, consumer: int, position: Position) -> Draws | None:
        """Of a row by its place in what this consumer reads."""
        if not self.augmentation:
            return None
        place = (consumer, sum(position.taken), position.in_window)
        return self.augmentation.draws(position.epoch, *place)

    def _encode(
        self, row: tuple[StreamSource, str, Any], draws: Draws | None, findings: list[Finding]
    ) -> Example | None:
        source, where, raw = row
        try:
            read = source.reader.row_or_error(where, raw)
            if isinstance(read, DataError):
                raise read
            example, fitted = self.encoder.encode_fitted(read, draws)
        except DriveError as error:
            raise DriveError(f"{where}: {error}") from error
        except DataError as error:
            overlong = isinstance(error, OverlongError)
            if not (self.skip_overlong if overlong else self.skip_bad):
                raise DataError(f"{where}: {error}") from error
            findings.append(Finding("overlong" if overlong else "bad", where, str(error)))
            return None
        if fitted.kind:
            findings.append(Finding("changed", where, fitted.change, fitted.kind))
        return example

    def _rows(
        self, consumer: int, num_consumers: int, start: Position
    ) -> Iterator[tuple[Any, Position | None]]:
        """Rows with the position after each, and None for the position at the end of an epoch."""
        epoch, taken, places, skip = start.epoch, list(start.taken), start.places, start.in_window
        while True:
            readings = [
                source.stream.iterate(consumer, num_consumers, start=place)
                for source, place in zip(self.sources, places, strict=True)
            ]
            left = list(range(len(readings)))
            while left:
                before = Position(epoch, tuple(taken), tuple(each.place for each in readings))
                window = list(islice(self._mixed(readings, left, taken), WINDOW))
                order = np.random.default_rng([self.seed, epoch, consumer, sum(before.taken)])
                for number, place in enumerate(order.permutation(len(window)).tolist()):
                    if number >= skip:
                        yield window[place], replace(before, in_window=number + 1)
                skip = 0
            yield None, None
            epoch, taken, places = epoch + 1, [0] * len(self.sources), (None,) * len(self.sources)

    def _mixed(
        self, readings: Sequence[Reading], left: list[int], taken: list[int]
    ) -> Iterator[tuple[StreamSource, str, Any]]:
        """The row of that source which is furthest behind its share; `taken` says how far each is,
        so that going on needs no other memory.
        """
        weights = [source.reader.settings.weight for source in self.sources]
        while left:
            source = min(left, key=lambda i: ((taken[i] + 1) / weights[i], i))
            row = next(readings[source], None)
            if row is None:
                left.remove(source)
                continue
            taken[source] += 1
            yield self.sources[source], *row


class StreamCollator:
    """A batch of streamed examples, with what is to be told of them under `stream`."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def __call__(self, features: Sequence[StreamedExample]) -> dict[str, Any]:
        """As `collate`. `stream` holds consumer, position after the batch, findings, the
        number of rows taken, and the `BatchRow`s.
        """
        encoder = self.encoder
        batch = collate(
            [feature.example for feature in features],
            encoder.processor,
            encoder.family,
            packed_vision=encoder.packed_vision,
            layouting=encoder.layouting,
        )
        batch["stream"] = {
            "consumer": features[-1].consumer,
            "position": features[-1].position.to_json(),
            "findings": [finding for feature in features for finding in feature.findings],
            "num_taken": sum(feature.num_taken for feature in features),
            "rows": tuple(BatchRow.of_example(feature.example) for feature in features),
        }
        return batch
