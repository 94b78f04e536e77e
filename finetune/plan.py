"""`finetune plan`: what a run would take, and what would make it fit on a card."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.errors import RecipeError
from finetune.fitting import Way, ways_to_fit
from finetune.model.kernels import Device
from finetune.model.load import quiet_libraries
from finetune.model.memory import TERMS
from finetune.planning import CUDA_CONTEXT_BYTES, Plan, Planner, gib
from finetune.preparation import counted
from finetune.recipe import Recipe, recipe_warnings
from finetune.recipe.fields import num_bytes
from finetune.tables import messages_console, results_console

# Torch's allocator cannot use every gap between tensors, and how many it leaves depends on the run
TIGHT_SHARE = 0.95

_MEANINGS = {
    "weights": "frozen weights, as they are held",
    "adapters": "weights that are trained",
    "gradients": "of the trained weights",
    "optimizer": "its state",
    "batch": "pixels, masks and ids of all batches of a step",
    "vision": "kept or in use in the vision tower",
    "connector": "between vision and language",
    "language": "kept or in use in the language model",
    "logits": "head and loss",
    "workspace": "for a moment, in the backward pass or the optimizer",
}


@dataclass(frozen=True)
class PlanResult:
    """A plan, and where a card was named, whether it fits and which settings would make it."""

    plan: Plan
    gpu_bytes: int | None
    ways: Sequence[Way]

    @property
    def fits(self) -> bool | None:
        """Whether the heaviest batch does; None where no card was named."""
        return None if self.gpu_bytes is None else self.plan.needed_bytes <= self.gpu_bytes

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return self.plan.to_json() | {
            "gpu": self.gpu_bytes
            and {
                "gib": gib(self.gpu_bytes),
                "needed_gib": gib(self.plan.needed_bytes),
                "fits": self.fits,
                "ways_to_fit": [
                    {
                        "settings": dict(way.settings),
                        "costs": way.costs,
                        "needed_gib": gib(way.peak_bytes),
                        "fits": way.fits,
                    }
                    for way in self.ways
                ],
            }
        }


def plan(
    recipe: Recipe,
    *,
    gpu: str | None = None,
    device: Device = "cuda",
    console: Console | None = None,
) -> PlanResult:
    """Plan a run on one device of this kind; `gpu` is its memory, such as 24GiB.

    Nothing is written but what `check` keeps of the rows. Raises `FinetuneError`.
    """
    console = console or messages_console()
    quiet_libraries()
    gpu_bytes = None if gpu is None else num_bytes(gpu)
    if gpu_bytes == 0:
        raise RecipeError(f"--gpu: expected a size such as 24GiB or 80GB, found {gpu!r}")
    for warning in recipe_warnings(recipe):
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    planner = Planner.of_recipe(recipe, console, device)
    console.print("following a step without weights")
    planned = planner.plan()
    ways: list[Way] = []
    if gpu_bytes and planned.needed_bytes > gpu_bytes:
        console.print("it does not fit; trying other settings")
        ways = ways_to_fit(planner, gpu_bytes)
    return PlanResult(planned, gpu_bytes, ways)


def print_plan(result: PlanResult, results: Console | None = None) -> None:
    """Two tables and the verdict."""
    results = results or results_console()
    results.print(_run_table(result.plan))
    results.print(_memory_table(result.plan))
    for line in _verdict(result):
        results.print(line, soft_wrap=True)


def _run_table(plan: Plan) -> Table:
    parameters, mean = plan.parameters, plan.mean_row
    table = Table(title=Text(f"{plan.recipe.model.name}: planned, not measured"))
    table.title_justify = "left"
    table.show_header = False
    table.add_column()
    table.add_column(justify="right")
    share = parameters.trainable / parameters.total
    rows = plan.rows_per_step
    for name, value in (
        ("parameters", f"{parameters.total:,}"),
        ("  vision", f"{parameters.vision:,}"),
        ("  connector", f"{parameters.connector:,}"),
        ("  language", f"{parameters.language:,}"),
        ("trained", f"{parameters.trainable:,} ({share:.2%})"),
        ("adapter on disk", f"{parameters.adapter_bytes / 2**20:,.1f} MiB"),
        ("steps, on one device", f"{plan.steps:,}"),
        ("rows a step", f"{rows:,.1f}".removesuffix(".0")),
        ("images a step", f"{mean['num_images'] * rows:,.1f}"),
        ("views a step", f"{mean['num_views'] * rows:,.1f}"),
        ("tokens a step", f"{mean['num_tokens'] * rows:,.0f}"),
        ("  of them learnt", f"{mean['num_learnt_tokens'] * rows:,.0f}"),
        ("arithmetic a step", _in_flops(plan.flops_per_step)),
        ("arithmetic in all", _in_flops(plan.flops_per_step * plan.steps)),
    ):
        table.add_row(name, value)
    return table


def _memory_table(plan: Plan) -> Table:
    table = Table(title=Text("peak memory of a step, GiB"), title_justify="left")
    for name in ("", "mean batch", "heaviest batch"):
        table.add_column(name, justify="right" if name else "left")
    table.add_column("what it is")
    both = (plan.mean, plan.worst)
    for term in TERMS:
        sizes = [each.memory.terms[term] for each in both]
        table.add_row(term, *(f"{size / 2**30:.3f}" for size in sizes), _MEANINGS[term])
    table.add_section()
    peaks = [each.memory.peak_bytes / 2**30 for each in both]
    table.add_row("all", *(f"{peak:.3f}" for peak in peaks), "without the driver's own")
    for name, of in (
        ("tokens, padded", lambda each: each.num_padded_tokens),
        ("views", lambda each: each.costs["num_views"]),
    ):
        table.add_row(name, *(f"{of(each):,}" for each in both), "")
    table.add_row("heaviest in the", *(each.memory.peak_at for each in both), "")
    return table


def _verdict(result: PlanResult) -> Iterator[str]:
    plan = result.plan
    where = plan.worst.where
    more = f" and {counted(len(where) - 1, 'row')} beside it" if len(where) > 1 else ""
    yield f"heaviest batch: {where[0]}{more}"
    if cache := plan.vision_cache:
        yield cache.in_words(_in_flops(cache.flops_saved))
    if plan.is_streamed:
        yield "planned from the first rows of a stream; heavier ones may come"
    if plan.shares_left_out:
        yield (
            f"training.distributed: {plan.shares_left_out} is left out of account: these figures "
            "are as with ddp, whole weights and optimizer on one card; docs/scale.md says how much "
            "less it is in shares"
        )
    if plan.device == "cuda":
        yield (
            f"the driver takes about {CUDA_CONTEXT_BYTES / 2**30:.1f} GiB beside it: "
            f"{plan.needed_bytes / 2**30:.1f} GiB in all"
        )
    if result.gpu_bytes is None:
        return
    size = f"{result.gpu_bytes / 2**30:.1f} GiB"
    spare = result.gpu_bytes - plan.needed_bytes
    if spare >= 0:
        tight = plan.needed_bytes > TIGHT_SHARE * result.gpu_bytes
        but = ", which is tight: gaps between tensors may take that" if tight else ""
        yield f"fits into {size} with {spare / 2**30:.1f} GiB to spare{but}"
        return
    yield f"does not fit into {size}: {-spare / 2**30:.1f} GiB too much"
    if not any(way.fits for way in result.ways):
        yield (
            "no settings that were tried make it fit; the nearest:"
            if result.ways
            else ("no settings that were tried take less")
        )
    elif len(result.ways) > 1:
        yield "each of these would make it fit, the cheapest first:"
    else:
        yield "this would make it fit:"
    for way in result.ways:
        yield f"  {way.in_words()}  ({way.peak_bytes / 2**30:.1f} GiB; {way.costs})"


def _in_flops(flops: float) -> str:
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12)):
        if flops >= size:
            return f"{flops / size:,.1f} {prefix}FLOP"
    return f"{flops / 1e9:,.1f} GFLOP"
