"""The findings of the paper of Idefics2, tried on models small enough for two CPU cores.

    python -m scripts.findings              # all that was not yet run, then docs/findings.md
    python -m scripts.findings --prepare    # boards and models of seed 0, for the recipes
    python -m scripts.findings --only 4 6   # some findings

Trains the backbones, puts models together, runs every recipe of recipes/findings with each seed,
two at a time, and keeps what came out in docs/findings.json. Broken off, it goes on with what is
left.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from finetune.charts import curve
from finetune.plan import plan
from finetune.recipe import load_recipe
from finetune.recipe.files import recipes_dir
from finetune.rundir import RunDir, read_json, read_jsonl, replacing
from scripts.bench_results import Results, machine
from scripts.finding_backbones import BACKBONES, SCORE
from scripts.finding_boards import write_sets
from scripts.finding_models import MODELS, save_model
from scripts.findings_page import write_page, write_scores

SEEDS = (0, 1, 2)
AT_ONCE = 2  # runs, of one thread each
ROOT = Path("runs/findings")

# Which run each model comes from that is not put together of backbones
READER = "4-latents-16"
STARTS = {"3": "2-autoregressive", "5": READER, "6": READER}


@dataclass(frozen=True)
class Job:
    """A command whose result is `made` in the end; where that is there, later than what it is made
    `of`, and `is_current`, nothing is left to do.
    """

    command: Sequence[str]
    made: Path
    of: Path | None = None
    is_current: Callable[[], bool] = lambda: True

    def run(self) -> None:
        """Run it, with what it prints in a file beside its result. Raises `SystemExit` where it
        fails.
        """
        if self.made.is_file() and not self._is_older() and self.is_current():
            return
        log = self.made.parent.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with log.open("w", encoding="utf-8") as output:
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(self.command, stdout=output, stderr=output, env=one_thread)
        if done.returncode or not self.made.is_file():
            raise SystemExit(f"failed: {' '.join(self.command)}; see {log}")
        print(f"{time.monotonic() - began:4.0f} s  {self.made.parent}", flush=True)

    def _is_older(self) -> bool:
        """Than what it was made of, which has been made again since."""
        return self.of is not None and self.made.stat().st_mtime < self.of.stat().st_mtime


def recipes(only: Sequence[str] = ()) -> list[str]:
    """Names of the findings' recipes, those of `only` where it has numbers of findings."""
    names = sorted(path.stem for path in (recipes_dir() / "findings").glob("*.yaml"))
    return [name for name in names if not only or name[0] in only]


def backbone_jobs() -> Iterator[Job]:
    """One for each, those that take longest first."""
    for name in sorted(BACKBONES, key=lambda name: -BACKBONES[name][1]):
        folder = ROOT / "backbones" / name
        module = "scripts.finding_backbones"
        yield Job([sys.executable, "-m", module, name, str(folder)], folder / SCORE)


def make_models(seed: int) -> None:
    """Those of a seed that are not there yet."""
    for name in MODELS:
        folder = ROOT / f"seed-{seed}" / "models" / name
        if not folder.is_dir():
            with replacing(folder) as unfinished:
                save_model(name, ROOT / "backbones", unfinished, seed=seed)


def run_job(recipe: str, seed: int) -> Job:
    """`finetune train` of a recipe as it is shipped, from and into the folder of a seed."""
    settings = settings_of(recipe, seed)
    command = [sys.executable, "-m", "finetune", "train", f"findings/{recipe}", *settings]
    run = run_of(recipe, seed)

    def is_current() -> bool:
        stored = load_recipe(run.recipe, check_paths=False)
        now = load_recipe(f"findings/{recipe}", settings)
        return stored.model_dump(exclude={"images"}) == now.model_dump(exclude={"images"}) and all(
            getattr(stored.images, key) == value
            for key, value in now.images.model_dump(exclude_none=True).items()
        )

    return Job([*command, "--overwrite"], run.summary, start_of(recipe, seed), is_current)


def run_of(recipe: str, seed: int) -> RunDir:
    """Beside those of other recipes and seeds, so that rows are examined once for all."""
    return RunDir(ROOT / f"{recipe}-seed-{seed}")


def start_of(recipe: str, seed: int) -> Path | None:
    """A file of what another run gave, where a recipe goes on from it."""
    start = STARTS.get(recipe[0])
    if start == READER:
        return merge_job(seed).made
    return run_of(start, seed).summary if start else None


def settings_of(recipe: str, seed: int) -> list[str]:
    """What of a recipe is another for a seed."""
    model = read_recipe(recipe)["model"]["name"].replace("seed-0", f"seed-{seed}")
    run = run_of(recipe, seed).path
    return [f"model.name={model}", f"training.seed={seed}", f"output.dir={run}"]


def merge_job(seed: int) -> Job:
    """The reader that findings 5 and 6 start from."""
    out = ROOT / f"seed-{seed}" / "models" / "reader"
    run = run_of(READER, seed).path
    command = [sys.executable, "-m", "finetune", "merge", str(run), "--out", str(out)]
    return Job(command, out / "model.safetensors", run_of(READER, seed).summary)


def read_recipe(name: str) -> dict[str, Any]:
    """As it is written."""
    text = (recipes_dir() / "findings" / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def run_all(jobs: Sequence[Job]) -> None:
    """Some at a time. Raises `SystemExit` for the first that failed, when those begun are done."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        started = [pool.submit(job.run) for job in jobs]
        try:
            for each in started:
                each.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def prepare(seeds: Sequence[int]) -> None:
    """Boards, backbones and models."""
    write_sets(ROOT / "data")
    run_all(list(backbone_jobs()))
    for seed in seeds:
        make_models(seed)


def run_findings(names: Sequence[str], seeds: Sequence[int]) -> None:
    """Every run, those first that others start from."""
    needed = {STARTS[name[0]] for name in names if name[0] in STARTS}
    first = sorted({name for name in names if name[0] not in STARTS} | needed)
    run_all([run_job(name, seed) for seed in seeds for name in first])
    if READER in needed:
        run_all([merge_job(seed) for seed in seeds])
    later = [name for name in names if name[0] in STARTS]
    run_all([run_job(name, seed) for seed in seeds for name in reversed(later)])


def record(run: RunDir, *, recipe: str, seed: int) -> dict[str, Any]:
    """What a run came to: figures, tokens and views, which of the held-out rows were right, the
    course of the loss.
    """
    summary, rows = read_json(run.summary), read_json(run.data)["train"]
    log = read_jsonl(run.metrics)
    return {
        "recipe": recipe,
        "seed": seed,
        "exact_match": summary["adapter"]["exact_match"],
        "loss": summary["adapter"]["loss"],
        "right": "".join(
            str(int(row["scores"]["adapter"]["exact_match"])) for row in read_jsonl(run.predictions)
        ),
        "trainable": summary["trainable_parameters"],
        "parameters": summary["total_parameters"],
        "tokens_a_row": rows["num_tokens"] / rows["num_rows"],
        "views_a_row": rows["num_views"] / rows["num_rows"],
        "losses": [[int(step), round(loss, 4)] for step, loss in curve(log, "loss")],
    }


def flops_a_row(name: str, seed: int) -> float:
    """Arithmetic of training a row of a recipe, forward and backward, by `finetune plan`."""
    recipe = load_recipe(f"findings/{name}", settings_of(name, seed))
    planned = plan(recipe, console=Console(quiet=True)).plan
    return planned.flops_per_step / planned.rows_per_step


def backbone_scores() -> dict[str, Any]:
    """How well each backbone knows its own part, and its number of parameters."""
    return {name: read_json(ROOT / "backbones" / name / SCORE) for name in BACKBONES}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run what is left, write the page; the exit code."""
    parser = argparse.ArgumentParser(description="Try the paper's findings on small models.")
    parser.add_argument("--prepare", action="store_true", help="boards and models of seed 0, alone")
    parser.add_argument("--only", nargs="+", default=(), choices=list("123456"), metavar="N")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("docs/findings.md"))
    args = parser.parse_args(argv)
    if not args.out.is_file():
        parser.error(
            f"--out {args.out}: no such file; copy docs/findings.md there, whose text it is"
        )
    began = time.monotonic()
    if args.prepare:
        prepare([0])
        return 0
    names = recipes(args.only)
    prepare(args.seeds)
    run_findings(names, args.seeds)
    results = Results(args.out.with_suffix(".json"))
    results.drop([{"recipe": name, "seed": seed} for name in names for seed in args.seeds])
    for name in names:
        shared = {"flops_a_row": flops_a_row(name, args.seeds[0]), "machine": machine(AT_ONCE)}
        for seed in args.seeds:
            run = run_of(name, seed)
            results.add(record(run, recipe=name, seed=seed) | shared)
    write_page(args.out, results.records, backbone_scores())
    write_scores(recipes_dir() / "README.md", results.records)
    print(f"{args.out}; {(time.monotonic() - began) / 60:.0f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
