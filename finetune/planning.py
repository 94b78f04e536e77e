"""What a run will take before it is begun: parameters, steps, arithmetic and peak memory, from the
configuration and the data alone.

Nothing is estimated by a formula that a step could answer: the adapted model is built on torch's
meta device, and one step of the mean and of the heaviest batch is followed through it
(`finetune.model.memory`).
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.console import Console

from finetune.data.collate import Collator
from finetune.data.examples import Encoder, RowCounts
from finetune.data.sampling import EpochSampler
from finetune.data.sources import Row
from finetune.errors import DataError, ModelError
from finetune.model.kernels import Device
from finetune.model.load import load_processor
from finetune.model.memory import StepMemory
from finetune.model.planned import Parameters, PlannedModel
from finetune.preparation import cache_of, load_encoder, open_streams, prepare_rows
from finetune.recipe import ImagesSection, Recipe

# What the driver and CUDA's own libraries hold on a card beside torch's tensors. It differs between
# cards and versions; `scripts/bench_gpu.py` reports it as the difference to what the card says.
CUDA_CONTEXT_BYTES = 600 * 2**20
# Rows of a stream that stand for all of it
STREAMED_ROWS = 128
_COSTS = ("num_tokens", "num_learnt_tokens", "num_images", "num_views", "num_view_pixels")


@dataclass(frozen=True)
class RowCosts:
    """What the rows to be trained cost, a line a row, and one epoch's number of them."""

    rows: Sequence[Row]
    counts: np.ndarray
    an_epoch: int | None
    """None where rows are streamed: then `rows` are the stream's first ones."""

    def mean(self) -> dict[str, float]:
        """Of each cost, a row."""
        return {name: float(self.counts[name].mean()) for name in _COSTS}

    def typical(self, number: int) -> list[int]:
        """Numbers of the rows nearest to the mean row in what makes them costly."""
        table = self._table()
        scale = np.maximum(table.mean(axis=0), 1)
        distance = np.abs(table / scale - table.mean(axis=0) / scale).sum(axis=1)
        return self._first(np.argsort(distance, kind="stable"), number)

    def heaviest(self, number: int) -> list[list[int]]:
        """Batches of this many rows one of which is the heaviest that there can be: those of most
        tokens, those of most pixels, and both together, since rows are padded to the longest and
        views to the largest of their batch.
        """
        table = self._table()
        longest = np.argsort(-table[:, 0], kind="stable")
        largest = np.argsort(-table[:, 1], kind="stable")
        mixed = [x for pair in zip(longest[:number], largest[:number], strict=True) for x in pair]
        batches = [self._first(order, number) for order in (longest, largest)]
        if number > 1:
            batches.append(self._first(np.array(list(dict.fromkeys(mixed))), number))
        alike: dict[tuple[Any, ...], list[int]] = {}
        for batch in batches:
            alike.setdefault(tuple(map(tuple, table[sorted(batch)].tolist())), batch)
        return list(alike.values())

    def _table(self) -> np.ndarray:
        return np.stack(
            [self.counts[name].astype(np.int64) for name in ("num_tokens", "num_view_pixels")], 1
        )

    @staticmethod
    def _first(order: np.ndarray, number: int) -> list[int]:
        return [int(each) for each in itertools.islice(itertools.cycle(order.tolist()), number)]


@dataclass(frozen=True)
class BatchPlan:
    """One batch: its rows, what they hold together, and what a step of it takes."""

    where: list[str]
    num_padded_tokens: int
    costs: Mapping[str, int]
    memory: StepMemory

    def to_json(self) -> dict[str, Any]:
        """Sizes in GiB."""
        return {
            "rows": self.where,
            "padded_tokens": self.num_padded_tokens,
            **self.costs,
            "peak_memory_gib": gib(self.memory.peak_bytes),
            "peak_at": self.memory.peak_at,
            "terms": {term: gib(size) for term, size in self.memory.terms.items()},
        }


@dataclass(frozen=True)
class Way:
    """Changed settings, what they cost in words, and what the heaviest batch then takes."""

    settings: Mapping[str, Any]
    costs: str
    peak_bytes: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """A run as it would be, on one device."""

    recipe: Recipe
    device: Device
    parameters: Parameters
    steps: int
    mean_row: Mapping[str, float]
    mean: BatchPlan
    worst: BatchPlan
    is_streamed: bool

    @property
    def rows_per_step(self) -> int:
        """On this device."""
        training = self.recipe.training
        return training.batch_size * training.gradient_accumulation

    @property
    def flops_per_step(self) -> int:
        """Of a step of mean batches."""
        return self.mean.memory.flops * self.recipe.training.gradient_accumulation

    @property
    def needed_bytes(self) -> int:
        """On the device, with what the driver holds."""
        return needed_bytes(self.worst.memory, self.device)

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints, without what was asked about a card."""
        worst = self.worst.to_json()
        parameters = self.parameters
        return {
            "model": self.recipe.model.name,
            "device": self.device,
            "measured": False,
            "parameters": {
                name: size for name, size in asdict(parameters).items() if name != "adapter_bytes"
            },
            "trainable_share": parameters.trainable / parameters.total,
            "adapter_bytes": parameters.adapter_bytes,
            "steps": self.steps,
            "rows_per_step": self.rows_per_step,
            "mean_row": {name: round(value, 1) for name, value in self.mean_row.items()},
            "flops_per_step": self.flops_per_step,
            "flops": self.flops_per_step * self.steps,
            "peak_memory_gib": worst["peak_memory_gib"],
            "terms": worst["terms"],
            "mean": self.mean.to_json(),
            "worst": worst,
        }


def gib(size: float) -> float:
    """Bytes as GiB, to three digits behind the point."""
    return round(size / 2**30, 3)


def needed_bytes(memory: StepMemory, device: Device) -> int:
    """What a step takes of a device, with what its driver holds."""
    return memory.peak_bytes + (CUDA_CONTEXT_BYTES if device == "cuda" else 0)


@dataclass
class Planner:
    """Plans one recipe, and variants of it, on the same rows."""

    recipe: Recipe
    encoder: Encoder
    rows: RowCosts
    device: Device = "cuda"

    @classmethod
    def of_recipe(cls, recipe: Recipe, console: Console, device: Device = "cuda") -> "Planner":
        """Reads and counts the rows, unless an earlier command did. Raises `FinetuneError`."""
        encoder = load_encoder(recipe, console)
        recipe = recipe.model_copy(update={"images": encoder.images})
        return cls(recipe, encoder, count_rows(recipe, encoder, console), device)

    @cached_property
    def model(self) -> "PlannedModel":
        """Built at the first question that needs it."""
        return PlannedModel(self.recipe, self.encoder.processor, self.device)

    def plan(self) -> Plan:
        """All of it."""
        batch_size = self.recipe.training.batch_size
        mean = self.batch(self.rows.typical(batch_size))
        heaviest = [
            self.batch(numbers, of_others=mean) for numbers in self.rows.heaviest(batch_size)
        ]
        return Plan(
            recipe=self.recipe,
            device=self.device,
            parameters=self.model.parameters,
            steps=self.num_steps(),
            mean_row=self.rows.mean(),
            mean=mean,
            worst=max(heaviest, key=lambda each: each.memory.peak_bytes),
            is_streamed=self.rows.an_epoch is None,
        )

    def num_steps(self) -> int:
        """Optimizer steps on one device, as the trainer counts them."""
        training = self.recipe.training
        if training.max_steps:
            return training.max_steps
        assert self.rows.an_epoch is not None, "a streamed recipe has max_steps"
        batches = math.ceil(self.rows.an_epoch / training.batch_size)
        per_epoch = math.ceil(batches / training.gradient_accumulation)
        return math.ceil((training.epochs or 1) * per_epoch)

    def batch(self, numbers: Sequence[int], *, of_others: BatchPlan | None = None) -> BatchPlan:
        """The batch of these rows; the step's others are like it, or like `of_others`.

        The trainer collates all batches of a step before it computes the first (transformers,
        trainer.py, get_batch_samples), so that a step holds the pixels of all of them.
        """
        tensors = Collator(self.encoder, self.rows.rows)([{"row": each} for each in numbers])
        accumulation = self.recipe.training.gradient_accumulation
        other = sum(each.numel() * each.element_size() for each in tensors.values())
        if of_others:
            other = of_others.memory.terms["batch"] // accumulation
        memory = self.model.step(tensors, (accumulation - 1) * other)
        chosen = self.rows.counts[list(numbers)]
        return BatchPlan(
            where=[self.rows.rows[each].where for each in numbers],
            num_padded_tokens=tensors["input_ids"].numel(),
            costs={name: int(chosen[name].sum()) for name in _COSTS},
            memory=memory,
        )

    def varied(self, recipe: Recipe) -> "Planner":
        """Plans another recipe on the rows counted for this one."""
        encoder = self.encoder
        if recipe.images != self.recipe.images:
            processor, images = load_processor(recipe.model, recipe.images)
            encoder = Encoder.of_recipe(processor, encoder.family, images, recipe.data)
        return Planner(recipe, encoder, self.rows, self.device)

    def ways_to_fit(self, plan: Plan, limit_bytes: int) -> Iterator[Way]:
        """Settings under which the heaviest batch would fit, the cheapest first: single ones, and
        where none is enough, several together, as many as it takes.
        """
        helpful: list[tuple[dict[str, Any], str]] = []
        found = False
        for group in self._savings():
            best = None
            for settings, cost in group:
                peak = self._peak_with(settings, limit_bytes)
                if peak is None or peak >= plan.needed_bytes:
                    continue
                best = (settings, cost)
                if peak <= limit_bytes:
                    found = True
                    yield Way(settings, cost, peak, True)
                    break
            if best:
                helpful.append(best)
        together: dict[str, Any] = {}
        costs: list[str] = []
        way = None
        for settings, cost in helpful if not found else ():
            together, costs = together | settings, [*costs, cost]
            if (peak := self._peak_with(together, limit_bytes)) is not None:
                way = Way(together, "; ".join(dict.fromkeys(costs)), peak, peak <= limit_bytes)
            if way and way.fits:
                break
        if way:
            yield way

    def _peak_with(self, settings: Mapping[str, Any], limit_bytes: int) -> int | None:
        """Bytes needed with other settings, at least where they are over the limit; None where the
        settings exclude each other.
        """
        changed = with_settings(self.recipe, settings)
        if changed is None:
            return None
        try:
            planner = self.varied(changed)
        except ModelError:  # image settings that the model has no use for
            return None
        if changed.model == self.recipe.model and changed.adapter == self.recipe.adapter:
            planner.model = self.model.with_training(changed)
        peak = 0
        for numbers in self.rows.heaviest(changed.training.batch_size):
            try:
                memory = planner.batch(numbers).memory
            except (DataError, ModelError):
                return None
            peak = max(peak, needed_bytes(memory, self.device))
            if peak > limit_bytes:
                break
        return peak

    def _savings(self) -> Iterator[list[tuple[dict[str, Any], str]]]:
        """Settings that take less memory and what they cost, the least costly first; a list holds
        values of the same settings, of which one is chosen.
        """
        recipe, training, adapter = self.recipe, self.recipe.training, self.recipe.adapter
        samples = training.batch_size * training.gradient_accumulation
        yield [
            (
                {"training.batch_size": size, "training.gradient_accumulation": samples // size},
                "the same training, a little slower",
            )
            for size in range(training.batch_size - 1, 0, -1)
            if samples % size == 0
        ]
        if not training.gradient_checkpointing:
            slower = "the same training, about a third slower"
            yield [({"training.gradient_checkpointing": True}, slower)]
        if adapter.method == "full" and not training.optimizer.startswith("paged"):
            yield [({"training.optimizer": "paged_adamw_8bit"}, "a rounded optimizer state")]
        if recipe.model.quantize == "none":
            yield [({"model.quantize": "nf4"}, "rounded weights, slower steps")]
        yield from self._smaller_images()
        if adapter.method == "full":
            yield [({"adapter.method": "lora"}, "fewer weights learn")]
        elif max(adapter.rank.values() if isinstance(adapter.rank, dict) else [adapter.rank]) > 8:
            yield [({"adapter.rank": 8}, "the adapter learns less")]

    def _smaller_images(self) -> Iterator[list[tuple[dict[str, Any], str]]]:
        images, config = self.recipe.images, self.model.config
        if images.split == "always" and "auto" in self.encoder.family.split_choices:
            yield [({"images.split": "auto"}, "small pictures lose detail")]
        cheaper = list(self.encoder.family.cheaper_images(images))
        few = [*cheaper[: -1 : len(cheaper) // 4 + 1], *cheaper[-1:]]
        yield [(_changed_images(images, each), "small print is lost") for each in few]
        edge, patch = images.longest_edge_px, getattr(config.vision_config, "patch_size", 14)
        if edge and self.encoder.family.trained_edge_px(config):
            lower = [int(edge * share) // patch * patch for share in (0.75, 0.5)]
            shortest = images.shortest_edge_px or 1
            smaller = [
                images.model_copy(
                    update={"longest_edge_px": each, "shortest_edge_px": min(each, shortest)}
                )
                for each in lower
            ]
            yield [(_changed_images(images, each), "small print is lost") for each in smaller]


def _changed_images(before: ImagesSection, after: ImagesSection) -> dict[str, Any]:
    old = before.model_dump()
    return {f"images.{key}": x for key, x in after.model_dump().items() if x != old[key]}


def count_rows(recipe: Recipe, encoder: Encoder, console: Console) -> RowCosts:
    """What the rows of a recipe cost. Raises `DataError`, as training would."""
    cache = cache_of(recipe.output.dir)
    if not any(source.streaming for source in recipe.data.train):
        train, _ = prepare_rows(recipe, encoder, cache, console)
        sampler = EpochSampler(train.spans(), recipe.training.seed)
        return RowCosts(train.rows, train.counts, len(sampler))
    streams = open_streams(recipe, cache, console)
    each = [itertools.islice(s.iterate(), STREAMED_ROWS // len(streams) + 1) for s in streams]
    rows = [row for _, row in itertools.chain(*each) if isinstance(row, Row)]
    counted = zip(rows, encoder.count_many(rows), strict=True)
    usable = [(row, found) for row, found in counted if isinstance(found, RowCounts)]
    if not usable:
        raise DataError(f"data.train: none of the first {len(rows)} streamed rows can be used")
    console.print(f"train: planned from the first {len(usable)} usable rows of the stream")
    counts = np.zeros(len(usable), [(name, np.int64) for name in _COSTS])
    for number, (_, found) in enumerate(usable):
        counts[number] = tuple(getattr(found, name) for name in _COSTS)
    return RowCosts([row for row, _ in usable], counts, None)


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe | None:
    """The recipe with some settings changed, by dotted name; None where they exclude each other."""
    values = recipe.model_dump()
    for name, value in settings.items():
        section, _, key = name.partition(".")
        values[section][key] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError:
        return None
