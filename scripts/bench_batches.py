"""What grouping by cost, budgets and gathered pictures do to padding and to the spread of steps.

    python -m scripts.bench_batches [--rows 20000] [--million 1000000] [--steps 24] [--rounds 2]

Prints three tables in Markdown. The first is counted, and comes out the same on every machine: rows
of mixed pictures and lengths, and four questions a page, as idefics2-8b would see them with
splitting; a batch costs what `finetune.data.batches.cost` says. The second has the seconds that an
epoch's batches take to make, the third the passes of nano on one thread, grouped and not, in turn.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from finetune.arguments import training_arguments
from finetune.data.batches import Batches, cost
from finetune.data.collate import Collator
from finetune.data.gathering import Limits, RowSizes
from finetune.data.sampling import Batching, EpochBatches, EpochSampler
from finetune.environment import environment
from finetune.families.idefics2 import IDEFICS2
from finetune.model.methods import load_trainable
from finetune.recipe import ImagesSection, Recipe, load_recipe
from finetune.rundir import RunDir
from finetune.trainer import VisionSFTTrainer
from finetune.training import epoch_batches, prepare

TOKENS_A_VIEW = 64
PICTURES = {"photo": (640, 480), "chart": (850, 600), "receipt": (500, 1200), "page": (1700, 2200)}
ACCUMULATION = 8
PROCESSES = 8
ROW = "| {} |".format


def main() -> None:
    """Count, time, and print."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_batches", description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--million", type=int, default=1_000_000, help="rows of the timed epoch")
    parser.add_argument(
        "--steps", type=int, default=24, help="timed steps of nano; 0 leaves it out"
    )
    parser.add_argument("--rounds", type=int, default=2)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    for line in counted(wanted.rows):
        print(line)
    print()
    for line in epoch_seconds(wanted.million):
        print(line)
    if wanted.steps:
        print()
        for line in timed(wanted.steps, wanted.rounds):
            print(line)
    print(f"\n{json.dumps(environment())}")


def drawn_rows(num_rows: int, kind: str, seed: int = 0) -> RowSizes:
    """`mixed`: one question a picture, one row in ten without any. `pages`: as DocVQA's, one to
    seven questions about each page, four in the mean.
    """
    rng = np.random.default_rng(seed)
    settings = ImagesSection(split="always", longest_edge_px=980, shortest_edge_px=378)
    plans = [IDEFICS2.plan_image(*size, settings, None) for size in PICTURES.values()]
    patches = np.array([plan.num_pixels // 14**2 for plan in plans] + [0])
    views = np.array([len(plan.views) for plan in plans] + [0])
    asked = rng.integers(10, 40, num_rows)
    if kind == "pages":
        questions = rng.integers(1, 8, num_rows)
        pictures = np.repeat(np.arange(num_rows), questions)[:num_rows]
        shown = np.full(num_rows, len(PICTURES) - 1)
        answered = rng.integers(2, 12, num_rows)
    else:
        pictures = np.arange(num_rows)
        shares = [0.225] * len(PICTURES) + [0.1]
        shown = rng.choice(len(PICTURES) + 1, num_rows, p=shares)
        lengths = rng.choice(3, num_rows, p=[0.6, 0.3, 0.1])
        answered = rng.integers([2, 50, 200], [12, 150, 600], (num_rows, 3))[
            np.arange(num_rows), lengths
        ]
    in_text = views[shown] * TOKENS_A_VIEW
    return RowSizes(in_text + asked + answered, patches[shown], pictures, in_text, patches[shown])


def ways(sizes: RowSizes, rows: int) -> Iterator[tuple[str, Batching, bool]]:
    """Name, how batches are made, and whether rows of one picture are gathered."""
    plain = Batching(Limits(rows), ACCUMULATION)
    tokens, patches = (rows * int(each.mean()) for each in (sizes.tokens, sizes.patches))
    budgets = Limits(tokens=round(tokens * 1.1), patches=round(patches * 1.1))
    yield f"{rows} rows", plain, False
    yield f"{rows} rows, grouped", replace(plain, by_cost=True), False
    yield f"{rows} rows, gathered", plain, True
    yield f"{rows} rows, gathered, grouped", replace(plain, by_cost=True), True
    yield f"budgets of {rows * 1.1:g} mean rows", replace(plain, limits=budgets), False
    yield "the same, grouped", replace(plain, limits=budgets, by_cost=True), False


def counted(num_rows: int) -> Iterator[str]:
    """A line for each kind of rows and way: all counts of one epoch."""
    names = (
        "rows",
        "batches",
        "rows a batch",
        "padded tokens",
        "patches, of those without gathering",
        "cost of a pass: std/mean",
        "p95/p50",
        f"of a step of {ACCUMULATION}: std/mean",
        "p95/p50",
        f"waiting of {PROCESSES} processes",
    )
    yield ROW(" | ".join(names))
    yield ROW(" | ".join(["---"] * len(names)))
    for kind in ("mixed", "pages"):
        sizes = drawn_rows(num_rows, kind)
        apart = RowSizes(sizes.tokens, sizes.patches)
        for size in (2, 4, 8):
            for name, batching, gathers in ways(apart, size):
                if gathers and kind == "mixed":
                    continue
                figures = figures_of(batching, sizes if gathers else apart)
                yield ROW(" | ".join([kind, name, *figures]))


def figures_of(batching: Batching, sizes: RowSizes) -> Iterator[str]:
    """Of one epoch, the cells of a line behind its name."""
    num_rows = len(sizes.tokens)
    tokens, patches = loads(batching, sizes)
    costs = cost(tokens, patches)
    whole = len(costs) // ACCUMULATION * ACCUMULATION
    steps = costs[:whole].reshape(-1, ACCUMULATION).sum(1)
    yield f"{len(costs):,}"
    yield f"{num_rows / len(costs):.2f}"
    yield f"{1 - real_tokens(batching, sizes) / tokens.sum():.1%}"
    yield f"{patches.sum() / sizes.patches.sum():.1%}"
    yield from (f"{each:.3f}" for each in (*spread(costs), *spread(steps)))
    # as many processes, each with its own passes at once
    at_once = replace(batching, num_processes=PROCESSES)
    costs = cost(*loads(at_once, sizes))
    costs = costs[: len(costs) // PROCESSES * PROCESSES].reshape(-1, PROCESSES)
    yield f"{1 - costs.sum() / (costs.max(1).sum() * PROCESSES):.1%}"


def loads(batching: Batching, sizes: RowSizes) -> tuple[np.ndarray, np.ndarray]:
    """Padded tokens and patches of the batches of an epoch."""
    return as_arrays(batching, sizes).loads(sizes)


def real_tokens(batching: Batching, sizes: RowSizes) -> int:
    """Tokens of the batches of an epoch without padding, what rows share counted once."""
    return int(as_arrays(batching, sizes).loads(sizes, packs=True)[0].sum())


def as_arrays(batching: Batching, sizes: RowSizes) -> Batches:
    """The batches of the first epoch."""
    sampler = EpochSampler([(len(sizes.tokens), 1.0)], seed=0)
    lists = EpochBatches(sampler, batching, sizes).of_epoch(0)
    starts = np.cumsum([0, *(len(batch) for batch in lists[:-1])])
    return Batches(np.array([row for batch in lists for row in batch]), starts)


def spread(values: np.ndarray) -> tuple[float, float]:
    """std/mean, and the 95th percentile over the median."""
    return (
        float(values.std() / values.mean()),
        float(np.percentile(values, 95) / np.median(values)),
    )


def epoch_seconds(num_rows: int) -> Iterator[str]:
    """How long it takes to make the batches of an epoch of so many rows."""
    names = (f"an epoch of {num_rows:,} rows", "seconds to count", "to make its batches")
    yield ROW(" | ".join(names))
    yield ROW(" | ".join(["---"] * len(names)))
    sizes = drawn_rows(num_rows, "pages")
    apart = RowSizes(sizes.tokens, sizes.patches)
    for name, batching, gathers in ways(apart, 4):
        sampler = EpochSampler([(num_rows, 1.0)], seed=0)
        batches = EpochBatches(sampler, batching, sizes if gathers else apart)
        started = time.perf_counter()
        len(batches)
        counted = time.perf_counter() - started
        started = time.perf_counter()
        batches.of_epoch(0)
        made = time.perf_counter() - started
        yield ROW(" | ".join([name, f"{counted:.2f}", f"{made:.2f}"]))


@dataclass
class Clocked:
    """What was measured of one way, over all rounds."""

    passes: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    tokens: int = 0
    padded: int = 0


def timed(num_steps: int, num_rounds: int) -> Iterator[str]:
    """Passes of nano on pictures of several sizes and answers of several lengths."""
    settings = {
        "4 rows": ["batch_size=4", "group_by_cost=false"],
        "4 rows, grouped": ["batch_size=4", "group_by_cost=true"],
    }
    clocked = {name: Clocked() for name in settings}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = write_rows(folder, num_rows=num_steps * 16)
        for number in range(num_rounds):
            for name, training in settings.items():
                overrides = [f"training.{each}" for each in (*training, f"max_steps={num_steps}")]
                run = RunDir(folder / f"run-{number}-{len(name)}")
                time_steps(load_recipe(recipe, overrides), run, clocked[name])
    names = (
        f"nano, {num_steps} steps x {num_rounds}",
        "padded tokens",
        "CPU seconds of a pass: std/mean",
        "p95/p50",
        "of a step of 4: std/mean",
        "p95/p50",
        "samples per CPU second, each round",
    )
    yield ROW(" | ".join(names))
    yield ROW(" | ".join(["---"] * len(names)))
    for name, each in clocked.items():
        both = (*spread(np.array(each.passes)), *spread(np.array(each.steps)))
        cells = [name, f"{1 - each.tokens / each.padded:.1%}", *(f"{value:.3f}" for value in both)]
        yield ROW(" | ".join([*cells, ", ".join(f"{rate:.2f}" for rate in each.rates)]))
    rates = [median(each.rates) for each in clocked.values()]
    yield f"\nmedian samples per CPU second, grouped over not: {rates[1] / rates[0]:.2f}"


def write_rows(folder: Path, num_rows: int) -> Path:
    """Noise of four shapes, answers of a few words or of many; the recipe's path."""
    draws, rng = random.Random(0), np.random.default_rng(0)
    shapes = [(280, 280), (280, 140), (140, 280), (112, 112)]
    for number, (width, height) in enumerate(shapes):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    with (folder / "train.jsonl").open("w") as file:
        for _ in range(num_rows):
            words = draws.choice([2, 2, 2, 40, 40, 200])
            answer = " ".join(str(draws.randrange(1000)) for _ in range(words))
            content = [
                {"type": "image", "image": f"{draws.randrange(len(shapes))}.png"},
                {"type": "text", "text": "What is written?"},
            ]
            messages: list[dict[str, Any]] = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    recipe = {
        "model": {"name": "nano", "dtype": "float32"},
        "images": {"split": "always", "longest_edge_px": 224, "shortest_edge_px": 112},
        "data": {"train": [{"path": str(folder / "train.jsonl")}], "max_tokens": 4096},
        "training": {
            "gradient_accumulation": 4,
            "num_workers": 0,
            "save_steps": 10**6,
            "share_images": "off",
        },
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


class TimedTrainer(VisionSFTTrainer):
    """Notes how much each pass takes of the processor, and how much of it is padding."""

    clocked: Clocked

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The project's, and its time."""
        self.clocked.tokens += int(inputs["attention_mask"].sum())
        self.clocked.padded += inputs["attention_mask"].numel()
        # of the processor: on one thread as good as the clock's, and other work does not count
        started = time.process_time()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.clocked.passes.append(time.process_time() - started)
        return loss


def time_steps(recipe: Recipe, run: RunDir, clocked: Clocked) -> None:
    """Train for some steps; the first one warms up and is left out."""
    prepared = prepare(recipe, Console(quiet=True))
    assert prepared.train
    model, _ = load_trainable(prepared.recipe, prepared.encoder.processor)
    trainer = TimedTrainer(
        model,
        training_arguments(prepared.recipe, run, num_eval_rows=0),
        Collator(prepared.encoder, prepared.train.rows),
        epoch_batches(prepared),
        num_train_rows=len(prepared.train.rows),
        recipe=prepared.recipe,
    )
    trainer.clocked = Clocked()
    trainer.train()
    accumulation = recipe.training.gradient_accumulation
    passes: Sequence[float] = trainer.clocked.passes[accumulation:]
    steps = np.array(passes).reshape(-1, accumulation).sum(1).tolist()
    clocked.passes += passes
    clocked.steps += steps
    clocked.tokens += trainer.clocked.tokens
    clocked.padded += trainer.clocked.padded
    rows = (trainer.num_samples_seen / len(trainer.clocked.passes)) * len(passes)
    clocked.rates.append(rows / sum(passes))


if __name__ == "__main__":
    main()
