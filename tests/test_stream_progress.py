from collections.abc import Iterator
from copy import copy
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from finetune.data.examples import Encoder
from finetune.data.streaming import ExampleStream, StreamCollator
from finetune.stream_progress import StreamProgress, read_num_streamed
from tests.test_streaming import stream_of, write_shards


def batches(stream: ExampleStream) -> Iterator[dict[str, Any]]:
    collator = StreamCollator(stream.encoder)
    return iter(DataLoader(stream, batch_size=2, collate_fn=collator, num_workers=2))


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_going_on_keeps_the_turns_of_two_loading_processes(
    encoder: Encoder, tmp_path: Path, stop: int
) -> None:
    stream = stream_of(write_shards("jsonl", tmp_path / "rows"), encoder)
    resumed = copy(stream)
    expected = list(islice(batches(stream), 7))
    broken = StreamProgress(stream, print)
    for batch in expected[:stop]:
        broken.take_note(batch["stream"], 2)
    broken.write(tmp_path)
    StreamProgress(resumed, print).go_on(tmp_path, per_rank=2)
    for batch, other in zip(islice(batches(resumed), 7 - stop), expected[stop:], strict=True):
        assert torch.equal(batch["input_ids"], other["input_ids"])
        assert batch["stream"]["position"] == other["stream"]["position"]


def test_a_checkpoint_counts_the_rows_of_all_processes(encoder: Encoder, tmp_path: Path) -> None:
    path = write_shards("jsonl", tmp_path / "rows")
    for rank in range(2):
        progress = StreamProgress(stream_of(path, encoder, rank=rank, num_ranks=2), print)
        progress.num_rows = {"taken": 5 + rank, "trained": 5, "left out": rank}
        progress.write(tmp_path)
    assert read_num_streamed(tmp_path) == {"taken": 11, "trained": 10, "left out": 1}
