"""What a run will take before it is begun: parameters, steps, arithmetic and peak memory, from the
configuration and the data alone.

Nothing is estimated by a formula that a step could answer: the adapted model is built on torch's
meta device, and one step of the mean and of the heaviest batch is followed through it
(`finetune.model.memory`).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from rich.console import Console

from finetune.data.collate import Collator
from finetune.data.examples import Encoder, RowCounts
from finetune.data.gathering import Limits, RowSizes
from finetune.data.heaviest import heaviest_batches
from finetune.data.sampling import Batching, EpochBatches, EpochSampler
from finetune.data.sources import Row
from finetune.errors import DataError
from finetune.model.kernels import Device
from finetune.model.memory import StepMemory, tensors_of
from finetune.model.planned import Parameters, PlannedModel
from finetune.preparation import (
    cache_of,
    first_pictures,
    load_encoder,
    open_streams,
    prepare_rows,
    row_sizes,
)
from finetune.recipe import Recipe, TrainingSection
from finetune.vision_cache_plan import (
    CachePlan,
    FeatureShape,
    KeepsNothing,
    seeing_features,
    shares_shown_first,
)

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
    spans: Sequence[tuple[int, float]] = ()
    """Number of rows and weight of each source."""
    sizes: RowSizes | None = None
    """What batches are made by; from `counts` where it is left out."""
    shown_first: np.ndarray | None = None
    """Of each row's pictures the share that no row before shows."""
    first_pictures: np.ndarray | None = None
    """A key of each row's first picture, 0 for none."""

    def mean(self) -> dict[str, float]:
        """Of each cost, a row."""
        return {name: float(self.counts[name].mean()) for name in _COSTS}

    def typical(self, number: int) -> list[int]:
        """Numbers of rows that together cost about as much as so many mean ones: from the lightest
        to the heaviest in even steps, or the one nearest to the mean.
        """
        table = self._table()
        scaled = table / np.maximum(table.mean(axis=0), 1)
        if number == 1:
            return [int(np.abs(scaled - scaled.mean(axis=0)).sum(axis=1).argmin())]
        order = np.argsort(scaled.sum(axis=1), kind="stable")
        places = (np.arange(number) + 0.5) * len(order) / number
        return order[places.astype(int)].tolist()

    def heaviest(self, limits: Limits) -> list[list[int]]:
        """Batches one of which is the heaviest that there can be, without those of the same tokens
        and pixels as one before; of so many rows also where there are fewer, again and again.
        """
        table = self._table()
        alike: dict[tuple[Any, ...], list[int]] = {}
        sizes = self.sizes or RowSizes.of_counts(self.counts)
        if self.first_pictures is not None:  # a batch encodes a picture once, whoever asks
            sizes = sizes.telling_pictures(self.first_pictures)
        for batch in heaviest_batches(sizes, limits):
            alike.setdefault(tuple(map(tuple, table[sorted(batch)].tolist())), batch)
        return [self._first(np.array(batch), limits.rows or len(batch)) for batch in alike.values()]

    def batches(self, training: TrainingSection) -> EpochBatches:
        """Those that a run with these settings trains; not where rows are streamed."""
        assert self.an_epoch is not None
        sampler = EpochSampler(self.spans, training.seed)
        return EpochBatches(sampler, Batching.of_recipe(training), self.sizes)

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
    rows_per_batch: float
    """The mean, where batches are filled up to a budget or with rows of one picture."""
    vision_cache: CachePlan | None
    """None where there is nothing to keep, or rows are streamed."""

    @property
    def shares_left_out(self) -> str | None:
        """What trains in shares of weights or optimizer, which are counted whole here."""
        name = self.recipe.training.distributed
        return None if name == "ddp" else name

    @property
    def rows_per_step(self) -> float:
        """On this device."""
        return round(self.rows_per_batch * self.recipe.training.gradient_accumulation, 1)

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
            "shares_left_out": self.shares_left_out,
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
            "vision_cache": self.vision_cache and self.vision_cache.to_json(),
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
        rows_per_batch = self.rows_per_batch()
        typical = self.rows.typical(max(round(rows_per_batch), 1))
        with seeing_features(self.model) as shapes:
            mean = self.batch(typical)
        limits = Batching.of_recipe(self.recipe.training).limits
        batches = self.rows.heaviest(limits)
        heaviest = [self.batch(numbers, of_others=mean) for numbers in batches]
        features = shapes[0] if shapes else None
        kept = self.batch(typical, features=features) if features else None
        if features and self.recipe.training.vision_cache != "off":  # may be more than pixels
            heaviest += [
                self.batch(numbers, of_others=kept, features=features) for numbers in batches
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
            rows_per_batch=rows_per_batch,
            vision_cache=self._cache_plan(features, mean, kept) if features and kept else None,
        )

    def _cache_plan(
        self, features: FeatureShape, mean: BatchPlan, kept: BatchPlan
    ) -> CachePlan | None:
        """From the mean batch with its views, and with their features as they are `kept`."""
        rows = self.rows
        if rows.an_epoch is None or rows.shown_first is None:
            return None
        views, pixels = (
            float((rows.counts[name] * rows.shown_first).sum())
            for name in ("num_views", "num_view_pixels")
        )
        return CachePlan(
            stage=features.stage,
            needed_bytes=features.num_bytes(views, pixels),
            limit_bytes=self.recipe.training.vision_cache_bytes,
            flops_saved=(mean.memory.flops - kept.memory.flops) * len(self.batches),
        )

    @cached_property
    def batches(self) -> EpochBatches:
        """Those of the run; not where rows are streamed."""
        return self.rows.batches(self.recipe.training)

    def rows_per_batch(self) -> float:
        """How many a batch has, or the mean where that differs."""
        batch_size = self.recipe.training.batch_size
        is_even = self.rows.an_epoch is None or self.batches.have_one_size
        if batch_size and is_even:
            return batch_size
        return len(self.batches.sampler) / len(self.batches)

    def num_steps(self) -> int:
        """Optimizer steps on one device, as the trainer counts them."""
        return self.recipe.training.max_steps or self.batches.num_steps()

    def batch(
        self,
        numbers: Sequence[int],
        *,
        of_others: BatchPlan | None = None,
        features: FeatureShape | None = None,
    ) -> BatchPlan:
        """The batch of these rows; the step's others are like it, or like `of_others`. With
        `features` it has these in place of its views.

        The trainer collates all batches of a step before it computes the first (transformers,
        trainer.py, get_batch_samples), so that a step holds the pixels of all of them.
        """
        tensors = Collator(self.encoder, self.rows.rows)([{"row": each} for each in numbers])
        if features and "pixel_values" in tensors:
            tensors["pixel_values"] = features.in_place_of(tensors["pixel_values"])
            self.model.inner.feature_keeper = KeepsNothing(features.stage)
        accumulation = self.recipe.training.gradient_accumulation
        other = sum(each.nbytes for value in tensors.values() for each in tensors_of(value))
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
        """Plans another recipe on the rows counted for this one. Raises `ModelError`."""
        encoder = self.encoder
        if recipe.images != self.recipe.images:
            encoder = load_encoder(recipe, Console(quiet=True))
        return Planner(recipe, encoder, self.rows, self.device)


def count_rows(recipe: Recipe, encoder: Encoder, console: Console) -> RowCosts:
    """What the rows of a recipe cost. Raises `DataError`, as training would."""
    cache = cache_of(recipe.output.dir)
    if not any(source.streaming for source in recipe.data.train):
        train, _ = prepare_rows(recipe, encoder, cache, console)
        spans, sizes = train.spans(), row_sizes(recipe, encoder, train)
        an_epoch = len(EpochSampler(spans, recipe.training.seed))
        shown_first = shares_shown_first(train)
        first = first_pictures(train)
        return RowCosts(train.rows, train.counts, an_epoch, spans, sizes, shown_first, first)
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
    keys = [found.image_keys[0] if found.image_keys else 0 for _, found in usable]
    first = np.array(keys, np.uint64)
    return RowCosts([row for row, _ in usable], counts, None, first_pictures=first)
