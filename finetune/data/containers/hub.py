"""Datasets of the Hub, through `datasets`: prepared on disk, or streamed; their code is not run."""

import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from finetune.data.containers.arrow import batch_rows, plain_value
from finetune.data.containers.container import Container
from finetune.errors import DataError

_SLICE_ROWS = 256


class HubRows(Container):
    """Rows of one split, memory-mapped; numbered from 1."""

    def __init__(self, dataset: Any, *, shown: str, root: Path, asked: list[Any]):
        self.shown = shown
        self.root = root
        self._asked = asked
        self._fingerprint = str(dataset._fingerprint)
        self._dataset = dataset.with_format("arrow")  # which decodes no image

    def __len__(self) -> int:
        return len(self._dataset)

    def where(self, number: int) -> str:
        return f"{self.shown}:{number + 1}"

    def read(self, number: int) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        [row] = batch_rows(self._dataset[number : number + 1])
        if isinstance(row, DataError):
            raise row
        return row

    def read_range(self, start: int, stop: int) -> Iterator[tuple[str, Any]]:
        stop = min(stop, len(self))
        for begin in range(start, stop, _SLICE_ROWS):
            rows = batch_rows(self._dataset[begin : min(begin + _SLICE_ROWS, stop)])
            for number, row in enumerate(rows, start=begin + 1):
                yield f"{self.shown}:{number}", row

    def identity(self) -> list[Any]:
        return [[*self._asked, self._fingerprint]]


def open_hub(hub: str, *, config: str | None, split: str, revision: str, cache: Path) -> HubRows:
    """The rows of a Hub dataset, downloaded into the Hugging Face cache, which runs share; a folder
    of that name below the current one is read in its stead, and prepared in `cache`. Raises
    `DataError`.
    """
    folder = Path(hub).is_dir()
    dataset = _load(hub, config, split, revision, cache_dir=str(cache) if folder else None)
    return HubRows(
        dataset,
        shown=f"{hub}/{split}",
        root=Path(hub) if folder else Path(),
        asked=["hub", hub, config, split, revision],
    )


class HubShard:
    """One shard of a streamed split."""

    def __init__(self, dataset: Any, number: int, shown: str):
        self._dataset = dataset
        self._number = number
        self.shown = shown
        self.num_bytes = None

    def num_rows(self) -> int | None:
        return None

    def parts(self) -> "list[HubShard]":
        return [self]

    def entries(
        self, first: int, step: int, mark: Any
    ) -> Generator[tuple[str, Any, None], None, int]:
        number = 0
        dataset = self._dataset.shard(self._dataset.num_shards, self._number)
        rows = iter(dataset)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return number
            except Exception as error:
                raise DataError(
                    f"{self.shown}:{number + 1}: the stream broke off ({_first_line(error)}); see "
                    "to the network, and resume"
                ) from error
            if number >= first and (number - first) % step == 0:
                yield f"{self.shown}:{number + 1}", row, None
            number += 1

    def decode(self, entry: Any) -> Any:
        return plain_value(entry)


def hub_shards(hub: str, *, config: str | None, split: str, revision: str) -> list[HubShard]:
    """The shards of a split, to be streamed; images stay as they are stored. Raises `DataError`."""
    dataset = _load(hub, config, split, revision, streaming=True).decode(False)
    shown, count = f"{hub}/{split}", dataset.num_shards
    if count == 1:
        return [HubShard(dataset, 0, shown)]
    return [HubShard(dataset, i, f"{shown}:shard {i + 1} of {count}") for i in range(count)]


def _load(hub: str, config: str | None, split: str, revision: str, **settings: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(hub, config, split=split, revision=revision, **settings)
    except Exception as error:
        raise DataError(f"{hub}: {_reason(hub, config, split, revision, error)}") from error


def _reason(hub: str, config: str | None, split: str, revision: str, error: Exception) -> str:
    """What went wrong, in words; `datasets` tells most of it in its messages alone."""
    chain: list[BaseException] = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 20:
        chain.append(below)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    text = str(error)

    def listed(pattern: str) -> str | None:
        match = re.search(pattern + r".*?\[(.*?)\]", text, re.DOTALL)
        return match[1].replace("'", "") if match else None

    if found := listed("(?:Bad|Unknown) split"):
        return f"has no split {split!r}; it has: {found}"
    if found := listed("BuilderConfig .* not found"):
        return f"has no config {config!r}; it has: {found}"
    if found := listed("Config name is missing"):
        return f"has several configs; set config to one of: {found}"
    if "scripts are no longer supported" in text:
        return (
            "is made by a loading script, and code from the Hub is never run; take its Parquet "
            "branch where it has one (revision: refs/convert/parquet), or save it as Parquet"
        )
    if "GatedRepoError" in kinds or "gated dataset" in text:
        return (
            "is gated; ask for access on its page at huggingface.co, and log in with "
            "'hf auth login'"
        )
    if "RevisionNotFoundError" in kinds or text.startswith("Revision"):
        return f"has no revision {revision!r}; give a branch, a tag or a commit of it"
    if kinds & {"ConnectionError", "ConnectError", "TimeoutException", "OfflineModeIsEnabled"}:
        return (
            "could not be reached, and is not in the cache; see to the network (and "
            "HF_HUB_OFFLINE), or give a local path"
        )
    if kinds & {"DataFilesNotFoundError", "EmptyDatasetError"} and Path(hub).is_dir():
        return "is a folder here, which holds no data files that can be read; give path instead"
    if kinds & {"DataFilesNotFoundError", "EmptyDatasetError"}:
        return "holds no data files that can be read; download it, and give the path to its files"
    if kinds & {"DatasetNotFoundError", "HFValidationError"} or "find any data file" in text:
        return (
            "is not on the Hub, or is private; mind the spelling of user/name, or log in with "
            "'hf auth login'"
        )
    if kinds & {"DatasetGenerationError"}:
        return (
            f"cannot be read as one table ({_first_line(chain[-1])}); download its files, and give "
            "their path: rows are then read one by one"
        )
    return f"cannot be read ({type(error).__name__}: {_first_line(error)})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
