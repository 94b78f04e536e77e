"""What training costs here and by plain TRL, side by side on one machine.

    python -m scripts.bench_train --out docs/performance.md

Both train the same random Idefics2 of middle size (`scripts.mid_model`) with the same LoRA on the
same pictures, every training in a process of its own, stock and ours in turn. Parts can be run one
by one, `--part items`; a run takes the place of what an earlier one measured of the same, so that
the page can be made from several. `--quick` runs all of it on a tiny model within one process, to
see that it works: its figures mean nothing.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.examination import COUNTS
from finetune.data.gathering import Limits, RowSizes
from finetune.data.sampling import Batching, EpochBatches, EpochSampler
from finetune.errors import FinetuneError
from scripts.bench_page import PARTS, write_page
from scripts.bench_results import Results, machine
from scripts.bench_sides import Job, run
from scripts.mid_model import KINDS, MID, TINY, Build, save_model, shares_table, write_rows

OURS: Mapping[str, Any] = {}
"""Settings of the recipe that ours is measured with; what is not here is as recipes have it."""
CACHE = {"training.vision_cache": "1GiB"}


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    build: Build
    mixed: int
    """Pictures of the mixed set, a row each."""
    pages: int
    """Of the set shaped like DocVQA, four rows each."""
    batch_sizes: tuple[int, ...]
    repeats: Mapping[int, int]
    """Times that a batch size is measured, where it is not once."""
    item_rows: int
    item_batch_size: int
    item_repeats: int
    pictures: tuple[int, ...]
    """In a row, of the part on growth."""
    edges_px: tuple[int, ...]
    num_rows: tuple[int, ...]
    steps: int
    """Of the loss curves."""


FULL = Scale(
    build=MID,
    mixed=16,
    pages=2,
    batch_sizes=(1, 2, 4, 8),
    repeats={4: 3},
    item_rows=8,
    item_batch_size=4,
    item_repeats=1,
    pictures=(1, 2, 4, 8),
    edges_px=(378, 490, 686, 980),
    num_rows=(1_000, 10_000, 100_000, 1_000_000),
    steps=50,
)
QUICK = Scale(
    build=TINY,
    mixed=2,
    pages=1,
    batch_sizes=(2,),
    repeats={},
    item_rows=2,
    item_batch_size=2,
    item_repeats=1,
    pictures=(1,),
    edges_px=(196,),
    num_rows=(1_000,),
    steps=2,
)


@dataclass(frozen=True)
class Item:
    """Something that makes training cheaper, and how to do without it."""

    name: str
    rows: str = "mixed"
    on: Mapping[str, Any] = field(default_factory=dict)
    off: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    """Where no key of the recipe turns it off: a name in `bench_sides.TAKEN_OUT`."""
    epochs: int = 1


ITEMS = (
    Item("views at their own size, each once", off={"model.packed_vision": False}),
    *(
        Item(name, without=(name,))
        for name in (
            "no gradient through a frozen tower",
            "connector computed again, not kept",
            "loss of learnt tokens alone",
            "LoRA added in place",
        )
    ),
    Item("batches by cost", on={"training.group_by_cost": True}),
    Item("packing", on={"training.packing": True}),
    Item("shared pictures", rows="docvqa", off={"training.share_images": "off"}),
    Item("resize by torch", rows="docvqa", on={"data.fast_resize": True}),
    Item("vision cache, three epochs", on=CACHE, epochs=3),
)


@dataclass(frozen=True)
class Work:
    """A training to be measured, and where its figures stand."""

    part: str
    name: str
    variant: str
    repeat: int
    job: Job

    @property
    def key(self) -> dict[str, Any]:
        """What tells its record from all others."""
        return {
            "part": self.part,
            "name": self.name,
            "variant": self.variant,
            "batch_size": self.job.batch_size,
            "repeat": self.repeat,
        }


class Bench:
    """Draws what is trained on, and knows what to measure of it."""

    def __init__(self, folder: Path, scale: Scale, *, threads: int):
        self.folder = folder
        self.scale = scale
        self.threads = threads

    def model(self) -> str:
        """Where the model lies. Its table of positions reaches as far as the largest edge does."""
        folder = self.folder / "model"
        if not folder.exists():
            save_model(folder, self.scale.build)
        return str(folder)

    def rows(self, name: str, **drawn: Any) -> str:
        """The rows of a set, drawn when they are first needed."""
        folder = self.folder / name
        if not folder.exists():
            write_rows(folder, **drawn)
        return str(folder / "rows.jsonl")

    def set(self, name: str, num: int) -> str:
        """`num` pictures of all kinds, or pages."""
        if name == "docvqa":
            return self.rows(f"docvqa-{num}", kinds=["scan"] * num, questions=4)
        return self.rows(f"mixed-{num}", kinds=KINDS[:num])

    def job(self, side: str, rows: str, batch_size: int, **settings: Any) -> Job:
        """A training of one side."""
        if side == "ours":
            settings["settings"] = {**OURS, **settings.get("settings", {})}
        else:
            settings.pop("settings", None)
        return Job(side, self.model(), rows, batch_size, threads=self.threads, **settings)

    def main(self, batch_sizes: tuple[int, ...]) -> Iterator[Work]:
        """Both sets at all batch sizes, and three epochs with the vision cache."""
        scale = self.scale
        sets = {
            "mixed": self.set("mixed", scale.mixed),
            "docvqa": self.set("docvqa", scale.pages),
        }
        for name, rows in sets.items():
            for batch_size in batch_sizes:
                for repeat in range(scale.repeats.get(batch_size, 1)):
                    for side in ("stock", "ours"):
                        job = self.job(side, rows, batch_size, seed=repeat)
                        yield Work("main", name, side, repeat, job)
            if scale.item_batch_size in batch_sizes:
                for side in ("stock", "ours"):
                    job = self.job(side, rows, scale.item_batch_size, max_steps=1, tensors=True)
                    yield Work("main", name, f"{side}, tensors", 0, job)
        rows = self.set("mixed", scale.item_rows)
        for side in ("stock", "ours") if scale.item_batch_size in batch_sizes else ():
            job = self.job(side, rows, scale.item_batch_size, epochs=3, settings=CACHE)
            yield Work("main", "mixed, three epochs", side, 0, job)

    def items(self) -> Iterator[Work]:
        """Each item on and off, in turn."""
        for repeat in range(self.scale.item_repeats):
            for item in ITEMS:
                num = self.scale.pages if item.rows == "docvqa" else self.scale.item_rows
                for variant, settings in (("on", item.on), ("off", item.off)):
                    job = self.job(
                        "ours",
                        self.set(item.rows, num),
                        self.scale.item_batch_size,
                        seed=repeat,
                        epochs=item.epochs,
                        settings=settings,
                        without=item.without if variant == "off" else (),
                    )
                    yield Work("items", item.name, variant, repeat, job)

    def growth(self) -> Iterator[Work]:
        """More pictures in a row, and larger ones."""
        for pictures in self.scale.pictures:
            rows = self.rows(
                f"pictures-{pictures}", kinds=["photo"] * 2, pictures=pictures, size_px=(320, 240)
            )
            for side in ("stock", "ours"):
                job = self.job(side, rows, 1)
                yield Work("growth", f"{pictures} picture{'s' * (pictures > 1)}", side, 0, job)
        rows = self.rows("large", kinds=["scan"] * 2, size_px=(1700, 2200))
        for edge in self.scale.edges_px:
            for side in ("stock", "ours"):
                job = self.job(side, rows, 1, split=False, longest_edge_px=edge)
                yield Work("growth", f"{edge} px", side, 0, job)

    def curves(self) -> Iterator[Work]:
        """Ours first: it tells stock which rows it took, and what of them is learnt."""
        steps, batch_size = self.scale.steps, 2
        rows = self.set("mixed", len(KINDS) if steps > 2 else self.scale.mixed)
        for side in ("ours", "stock"):
            job = self.job(
                side,
                rows,
                batch_size,
                max_steps=steps,
                longest_edge_px=294,
                shortest_edge_px=98,
                told=str(self.folder / "told.json"),
            )
            yield Work("curves", "50 steps", side, 0, job)


def in_own_process(job: Job) -> dict[str, Any]:
    """The figures of a training, or why there are none as `error`."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asdict(job), file)
        file.flush()
        done = subprocess.run(
            [sys.executable, "-m", "scripts.bench_sides", file.name],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"},
        )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def in_this_process(job: Job) -> dict[str, Any]:
    """The same, where memory need not be told apart."""
    gc.freeze()  # trainings collect garbage, and would go through every module each time
    try:
        return asdict(run(job))
    except FinetuneError as error:
        return {"error": str(error).splitlines()[0]}
    finally:
        gc.unfreeze()


def measure(job: Job, *, apart: bool) -> dict[str, Any]:
    """The figures of a training, and what it ran on."""
    load = round(os.getloadavg()[0], 2)
    figures = in_own_process(job) if apart else in_this_process(job)
    return {"load_before": load, "machine": machine(job.threads)} | figures


def measure_epoch(num_rows: int, threads: int) -> dict[str, Any]:
    """CPU seconds until an epoch of so many rows is laid out in batches of four: as drawn, and with
    rows sorted by cost and rows of one picture together.
    """
    rng = np.random.default_rng(0)
    counts = np.zeros(num_rows, COUNTS)
    counts["num_tokens"] = rng.integers(100, 500, num_rows)
    counts["num_view_pixels"] = rng.integers(200_000, 900_000, num_rows)
    counts["num_images"], counts["num_views"] = 1, 5
    pictures = rng.permutation(np.arange(num_rows) // 4 + 1).astype(np.uint64)
    sizes = RowSizes.of_counts(counts, patch_px=14, picture_keys=pictures, tokens_a_view=64)
    seconds = []
    for by_cost, of_rows in ((False, None), (True, sizes)):
        start = time.process_time()
        sampler = EpochSampler([(num_rows, 1.0)], 0)
        batches = EpochBatches(sampler, Batching(Limits(4), by_cost=by_cost), of_rows)
        assert len(batches) >= num_rows // 4
        assert sum(map(len, batches)) == num_rows
        seconds.append(round(time.process_time() - start, 4))
    return {
        "part": "growth",
        "name": f"{num_rows:,} rows",
        "variant": "laid out",
        "batch_size": 4,
        "repeat": 0,
        "machine": machine(threads),
        "plain_seconds": seconds[0],
        "gathered_seconds": seconds[1],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for, and write it into the page."""
    options = parse(arguments)
    scale = QUICK if options.quick else FULL
    if options.repeats:
        every = dict.fromkeys(options.batch_size or scale.batch_sizes, options.repeats)
        scale = replace(scale, repeats=every, item_repeats=options.repeats)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        results = Results(options.results or folder / "results.json")
        bench = Bench(folder, scale, threads=options.threads)
        batch_sizes = tuple(options.batch_size or scale.batch_sizes)
        works = {
            "model": lambda: (),
            "main": lambda: bench.main(batch_sizes),
            "items": bench.items,
            "growth": bench.growth,
            "curves": bench.curves,
        }
        plan = [work for part in options.part for work in works[part]()]
        results.drop([work.key for work in plan])
        measured: dict[str, dict[str, Any]] = {}
        for number, work in enumerate(plan, 1):
            start, job = time.perf_counter(), json.dumps(asdict(work.job), sort_keys=True)
            if job not in measured:  # what all items are compared with is one training a round
                measured[job] = measure(work.job, apart=not options.quick)
            record = work.key | measured[job]
            results.add(record)
            told = record.get("error") or f"{record['samples'] / record['cpu_seconds']:.3f} /CPU s"
            print(
                f"{number}/{len(plan)} {' '.join(map(str, work.key.values()))}: {told}, "
                f"{time.perf_counter() - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        if "model" in options.part:
            results.drop([{"part": "model"}])
            told = {"part": "model", "variant": "", "name": "", "batch_size": 0, "repeat": 0}
            results.add(told | {"table": shares_table(), "machine": machine(options.threads)})
        if "growth" in options.part:
            for num_rows in scale.num_rows:
                record = measure_epoch(num_rows, options.threads)
                results.drop([{"part": "growth", "name": record["name"]}])
                results.add(record)
        if options.out:
            write_page(options.out, results.records)
    return int(any("error" in record for record in results.records))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_train", description=__doc__)
    parser.add_argument("--out", type=Path, help="a page with the marks of its parts")
    parser.add_argument("--results", type=Path, help="where figures are kept between runs")
    parser.add_argument("--folder", type=Path, help="where to draw and train; else a temporary one")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--batch-size", nargs="+", type=int, help="of the part main")
    parser.add_argument("--repeats", type=int, help="of main and items, in place of their own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few steps")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
