"""How far a run has come in the rows that it streams, in the checkpoints, too."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from finetune.data.examination import Finding
from finetune.data.patience import DriveError
from finetune.data.streaming import ExampleStream, Position
from finetune.errors import DataError, RunDirError
from finetune.processes import any_of_all, is_first, lists_of_all, sum_of_all
from finetune.rundir import read_json, write_json


class StreamProgress(TrainerCallback):
    """Takes note of every batch of a stream: positions, what was left out, rows counted."""

    def __init__(self, stream: ExampleStream, on_findings: Callable[[list[Finding]], None]):
        """`on_findings` is told what was left out of the stream, or changed: in the first process,
        of all of them.
        """
        self.stream = stream
        self.on_findings = on_findings
        self.num_rows = {"taken": 0, "trained": 0, "left out": 0}
        """Of this process, and of all when the training has ended."""

    def next_batches(
        self, batches: Iterator[dict[str, Any]], count: int, device: torch.device
    ) -> list[dict[str, Any]]:
        """The batches of a step in this process.

        Raises `DataError`, or `DriveError`, in all processes where one of them cannot go on, which
        the others would wait for.
        """
        found: list[dict[str, Any]] = []
        fault = None
        try:
            found += islice(batches, count)
            if not found:
                rank, num_ranks = self.stream.rank, self.stream.num_ranks
                raise DataError(
                    f"data.train: the stream has no row for process {rank} of {num_ranks}; train "
                    "in fewer processes, or add rows"
                )
        except (DataError, DriveError) as error:
            fault = error
        findings = [finding for batch in found for finding in batch["stream"]["findings"]]
        if any_of_all(bool(fault or findings), device):
            told = lists_of_all([(fault and (type(fault), str(fault)), findings)])
            if is_first():
                self.on_findings([finding for _, each in told for finding in each])
            if faults := [each for each, _ in told if each]:
                kind, words = faults[0]
                raise kind(words) from fault
        return found

    def take_note(self, told: dict[str, Any], num_trained: int) -> None:
        """Of a batch, by what `StreamCollator` told of it."""
        self.stream.positions[told["consumer"]] = Position.from_json(told["position"])
        self.stream.turn = told["consumer"] + 1
        left_out = sum(finding.kind != "changed" for finding in told["findings"])
        self.num_rows["taken"] += told["num_taken"]
        self.num_rows["trained"] += num_trained
        self.num_rows["left out"] += left_out

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add up what the processes have counted."""
        self.num_rows = {
            name: sum_of_all(count, args.device) for name, count in self.num_rows.items()
        }

    def write(self, checkpoint: Path) -> None:
        """How far each loading process of this training process has come."""
        positions = {str(number): p.to_json() for number, p in self.stream.positions.items()}
        state = {"positions": positions, "turn": self.stream.turn, "rows": self.num_rows}
        write_json(_file(checkpoint, self.stream.rank), state)

    def go_on(self, checkpoint: Path, per_rank: int) -> None:
        """Let every loading process, of which a training process has `per_rank`, start where it was
        at the checkpoint.

        Raises `RunDirError` where the checkpoint was written by another number of processes, among
        which the rows were shared out otherwise.
        """
        rank, num_ranks = self.stream.rank, len(_files(checkpoint))
        known = set(range(rank * per_rank, (rank + 1) * per_rank))
        state = read_json(_file(checkpoint, rank)) if num_ranks == self.stream.num_ranks else {}
        positions = {
            int(number): Position.from_json(value)
            for number, value in state.get("positions", {}).items()
        }
        if not state or not positions.keys() <= known:
            raise RunDirError(
                f"{checkpoint}: was written with another number of loading or training processes; "
                "resume with the same training.num_workers and as many devices"
            )
        self.stream.positions, self.stream.turn = positions, state["turn"]
        self.num_rows = state["rows"]


def read_num_streamed(checkpoint: Path) -> dict[str, int]:
    """Rows taken from the stream by all training processes until then, and what became of them."""
    counts = [read_json(file)["rows"] for file in _files(checkpoint)]
    return {name: sum(each[name] for each in counts) for name in counts[0]}


def _file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"stream-{rank}.json"


def _files(checkpoint: Path) -> list[Path]:
    return list(checkpoint.glob("stream-*.json"))
