"""How fast a recipe's rows load, how fast they train, and how fast they do both at once.

    python -m scripts.bench_waiting RECIPE [--workers 0 1 2] [--batches 24] [key=value ...]

Run it on the machine that will train, with the recipe that will be trained. For each number of
loading processes it prints, in Markdown, rows a second of the loader alone, of the model alone (on
batches that are there), and of training as it is, and from these the share of the time that the
model waits, and the processes that would have to load for it never to wait.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from finetune.arguments import training_arguments
from finetune.data.collate import Collator
from finetune.environment import environment
from finetune.errors import FinetuneError
from finetune.model.methods import load_trainable
from finetune.recipe import Recipe, load_recipe
from finetune.rundir import RunDir
from finetune.trainer import VisionSFTTrainer
from finetune.training import epoch_batches, prepare


@dataclass(frozen=True)
class Speeds:
    """Rows a second with so many loading processes; 0 load within the training process."""

    num_workers: int
    loading: float
    training: float
    both: float

    @property
    def waiting(self) -> float:
        """The share of the time of training that the model does not compute."""
        return max(0.0, 1 - self.both / self.training)

    @property
    def workers_needed(self) -> int:
        """Loading processes that deliver what the model takes, each on a core of its own."""
        return math.ceil(self.training / (self.loading / max(1, self.num_workers)))


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_waiting", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("changes", nargs="*", help="settings, as `finetune train` takes them")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=24, help="timed, of each kind")
    wanted = parser.parse_intermixed_args()
    try:
        print("| processes | loading, rows/s | model, rows/s | both, rows/s | waits | needs |")
        print("| --- | --- | --- | --- | --- | --- |")
        for num_workers in wanted.workers:
            changes = [*wanted.changes, f"training.num_workers={num_workers}"]
            speeds = measure(load_recipe(wanted.recipe, changes), wanted.batches)
            print(
                f"| {num_workers} | {speeds.loading:.1f} | {speeds.training:.1f} "
                f"| {speeds.both:.1f} | {speeds.waiting:.0%} | {speeds.workers_needed} |",
                flush=True,
            )
    except FinetuneError as error:
        raise SystemExit(str(error)) from None
    print(f"\n{environment()}")


def measure(recipe: Recipe, num_batches: int) -> Speeds:
    """Load, then train on what was loaded, then do both, `num_batches` each time.

    The start of the loading processes and a first step are left out of all three.
    """
    steps = math.ceil(num_batches / recipe.training.gradient_accumulation)
    recipe = recipe.model_copy(
        update={
            "training": recipe.training.model_copy(
                update={"max_steps": steps + 1, "epochs": None, "save_steps": 10**6}
            )
        }
    )
    prepared = prepare(recipe, Console(quiet=True))
    assert prepared.train
    model, _ = load_trainable(prepared.recipe, prepared.encoder.processor)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _Clocked(
            model,
            training_arguments(prepared.recipe, RunDir(Path(folder)), num_eval_rows=0),
            Collator(prepared.encoder, prepared.train.rows),
            epoch_batches(prepared),
            num_train_rows=len(prepared.train.rows),
            recipe=prepared.recipe,
        )
        accumulation = recipe.training.gradient_accumulation
        loader = _endless(trainer)
        kept = list(islice(loader, accumulation))
        start, num_before = time.perf_counter(), _num_rows(kept)
        kept += islice(loader, num_batches)
        loading = (_num_rows(kept) - num_before) / (time.perf_counter() - start)
        loader.close()
        training = trainer.rate_on(islice(cycle(kept), (steps + 1) * accumulation))
        return Speeds(recipe.training.num_workers, loading, training, trainer.rate_on(None))


def _endless(trainer: VisionSFTTrainer) -> Generator[dict[str, Any]]:
    """Batches of one epoch after the other, as the loader gives them."""
    while True:
        yield from trainer.get_train_dataloader()


def _num_rows(batches: Sequence[dict[str, Any]]) -> int:
    layouts = [each.get("layout") for each in batches]
    return sum(
        layout.num_rows if layout else len(batch["input_ids"])
        for layout, batch in zip(layouts, batches, strict=True)
    )


class _Clocked(VisionSFTTrainer):
    """Notes when each pass ends; trains on `kept` batches where there are."""

    kept: list[dict[str, Any]] | None = None

    def rate_on(self, batches: Iterable[dict[str, Any]] | None) -> float:
        """Train on these batches, or on those of the loader; rows a second from the end of the
        first step to that of the last.
        """
        # a step takes entries out of its batch
        self.kept = None if batches is None else [dict(each) for each in batches]
        self._ends: list[tuple[float, int]] = []
        self.train()
        ends = self._ends[self.args.gradient_accumulation_steps - 1 :]
        (start, before), (end, after) = ends[0], ends[-1]
        return (after - before) / (end - start)

    def get_train_dataloader(self) -> Any:
        """The project's, or the batches that are kept."""
        return super().get_train_dataloader() if self.kept is None else self.kept

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The project's, and when it was done."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._ends.append((time.perf_counter(), self.num_samples_seen))
        return loss


if __name__ == "__main__":
    main()
