"""Which settings would make a run fit on a card: each is tried by planning the recipe again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from finetune.data.sampling import Batching
from finetune.errors import DataError, ModelError
from finetune.model.planned import PlannedModel
from finetune.planning import Planner, needed_bytes
from finetune.recipe import ImagesSection, Recipe, TrainingSection
from finetune.vision_cache_plan import seeing_features

Settings = Mapping[str, Any]
"""Values by dotted name."""


@dataclass(frozen=True)
class Saving:
    """Settings that take less memory, and what they cost in words."""

    settings: Settings
    costs: str


@dataclass(frozen=True)
class Way:
    """Changed settings, what they cost in words, and what the heaviest batch then takes."""

    settings: Settings
    costs: str
    peak_bytes: int
    fits: bool

    def in_words(self) -> str:
        """The settings, as they are typed behind a recipe's name."""
        return " ".join(
            f"{name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in self.settings.items()
        )


def ways_to_fit(planner: Planner, limit_bytes: int) -> list[Way]:
    """Settings under which the heaviest batch would fit, the cheapest first: single ones, and where
    none is enough, several together; where those are not, either, the nearest.
    """
    peak_with = _Peaks(planner, limit_bytes)
    groups = list(_savings(planner))
    ways = []
    for group in groups:
        for saving in group:
            peak = peak_with(saving.settings)
            if peak is not None and peak <= limit_bytes:
                ways.append(Way(saving.settings, saving.costs, peak, True))
                break
    if ways:
        return ways
    together = combined(groups, peak_with, limit_bytes)
    return [together] if together else []


def combined(
    groups: Sequence[Sequence[Saving]],
    peak_with: Callable[[Settings], int | None],
    limit_bytes: int,
) -> Way | None:
    """The savings that help together, at most one of a group, and as few as it takes to fit; None
    where nothing helps.

    `peak_with` gives bytes, or None for settings that exclude each other.
    """
    peak = peak_with({})
    assert peak is not None, "the recipe itself can be planned"
    chosen: dict[int, Saving] = {}
    waiting = list(range(len(groups)))
    helped = True
    # What is refused or useless alone may help beside another: nf4 once LoRA stands for full
    while helped and peak > limit_bytes:
        helped = False
        for number in tuple(waiting):
            for saving in groups[number]:
                found = peak_with(_merged({**chosen, number: saving}))
                if found is not None and found < peak:
                    chosen[number], peak, helped = saving, found, True
                if peak <= limit_bytes:
                    break
            if number in chosen:
                waiting.remove(number)
            if peak <= limit_bytes:
                break
    if not chosen:
        return None
    # What was gathered before the saving that was enough may not be needed beside it
    for number in sorted(chosen, reverse=True) if peak <= limit_bytes else ():
        others = {each: saving for each, saving in chosen.items() if each != number}
        milder = groups[number][: groups[number].index(chosen[number])]
        for less in (others, *({**others, number: saving} for saving in milder)):
            found = peak_with(_merged(less))
            if found is not None and found <= limit_bytes:
                chosen, peak = less, found
                break
    costs = dict.fromkeys(chosen[number].costs for number in sorted(chosen))
    return Way(_merged(chosen), "; ".join(costs), peak, peak <= limit_bytes)


def _merged(chosen: Mapping[int, Saving]) -> dict[str, Any]:
    return {
        name: value for number in sorted(chosen) for name, value in chosen[number].settings.items()
    }


class _Peaks:
    """Bytes that a planner's recipe needs with other settings, at least where they are over the
    limit; None where the settings exclude each other. Nothing is planned twice.
    """

    def __init__(self, planner: Planner, limit_bytes: int):
        self.planner = planner
        self.limit_bytes = limit_bytes
        self.known: dict[str, int | None] = {}
        self.models: dict[str, PlannedModel] = {_model_key(planner.recipe): planner.model}

    def __call__(self, settings: Settings) -> int | None:
        key = repr(sorted(settings.items()))
        if key not in self.known:
            self.known[key] = self._peak(settings)
        return self.known[key]

    def _peak(self, settings: Settings) -> int | None:
        changed = with_settings(self.planner.recipe, settings)
        if changed is None:
            return None
        try:
            planner = self.planner.varied(changed)
            key = _model_key(changed)
            if key not in self.models:
                self.models[key] = planner.model
            planner.model = self.models[key].with_training(changed)
            peak = 0
            limits = Batching.of_recipe(changed.training).limits
            for numbers in planner.rows.heaviest(limits):
                with seeing_features(planner.model) as shapes:
                    memories = [planner.batch(numbers).memory]
                if shapes and changed.training.vision_cache != "off":
                    memories.append(planner.batch(numbers, features=shapes[0]).memory)
                peak = max(peak, *(needed_bytes(each, planner.device) for each in memories))
                if peak > self.limit_bytes:
                    break
        except (DataError, ModelError):  # such as image settings that the model has no use for
            return None
        return peak


def _model_key(recipe: Recipe) -> str:
    """The same for recipes whose models on the meta device are the same."""
    return recipe.model.model_dump_json() + recipe.adapter.model_dump_json()


def _savings(planner: Planner) -> Iterator[list[Saving]]:
    """Settings that take less memory, the least costly first; a list holds values of the same
    settings, of which one is chosen, the mildest first.
    """
    recipe, training, adapter = planner.recipe, planner.recipe.training, planner.recipe.adapter
    yield list(smaller_batches(training))
    if not training.gradient_checkpointing:
        slower = "the same training, about a third slower"
        yield [Saving({"training.gradient_checkpointing": True}, slower)]
    if adapter.method == "full" and not training.optimizer.startswith("paged"):
        yield [Saving({"training.optimizer": "paged_adamw_8bit"}, "a rounded optimizer state")]
    if recipe.model.quantize == "none":
        yield [Saving({"model.quantize": "nf4"}, "rounded weights, slower steps")]
    yield from _smaller_images(planner)
    if adapter.method == "full":
        yield [Saving({"adapter.method": "lora"}, "fewer weights learn")]
    elif max(adapter.rank.values() if isinstance(adapter.rank, dict) else [adapter.rank]) > 8:
        yield [Saving({"adapter.rank": 8}, "the adapter learns less")]


def smaller_batches(training: TrainingSection) -> Iterator[Saving]:
    """Fewer rows a pass, and as many more passes a step."""
    passes, slower = training.gradient_accumulation, "the same training, a little slower"
    if training.batch_size:
        samples = training.batch_size * passes
        for size in range(training.batch_size - 1, 0, -1):
            if samples % size == 0:
                settings = {"batch_size": size, "gradient_accumulation": samples // size}
                yield Saving({f"training.{key}": value for key, value in settings.items()}, slower)
        return
    budgets = {
        f"training.{key}": budget
        for key in ("batch_tokens", "batch_patches")
        if (budget := getattr(training, key))
    }
    for share in (2, 4, 8):
        if min(budgets.values()) >= share:
            smaller = {key: budget // share for key, budget in budgets.items()}
            more = {"training.gradient_accumulation": passes * share}
            yield Saving(smaller | more, f"about {slower}")


def _smaller_images(planner: Planner) -> Iterator[list[Saving]]:
    images, config, family = planner.recipe.images, planner.model.config, planner.encoder.family
    if images.split == "always":
        yield [Saving({"images.split": "auto"}, "small pictures lose detail")]
    cheaper = list(family.cheaper_images(images))
    few = [*cheaper[: -1 : len(cheaper) // 4 + 1], *cheaper[-1:]]
    yield [Saving(_changed_images(images, each), "small print is lost") for each in few]
    edge, patch = images.longest_edge_px, getattr(config.vision_config, "patch_size", 14)
    if edge and family.trained_edge_px(config):
        lower = [int(edge * share) // patch * patch for share in (0.75, 0.5)]
        shortest = images.shortest_edge_px or 1
        smaller = [
            images.model_copy(
                update={"longest_edge_px": each, "shortest_edge_px": min(each, shortest)}
            )
            for each in lower
        ]
        yield [Saving(_changed_images(images, each), "small print is lost") for each in smaller]


def _changed_images(before: ImagesSection, after: ImagesSection) -> dict[str, Any]:
    old = before.model_dump()
    return {f"images.{key}": x for key, x in after.model_dump().items() if x != old[key]}


def with_settings(recipe: Recipe, settings: Settings) -> Recipe | None:
    """The recipe with some settings changed, by dotted name; None where they exclude each other."""
    values = recipe.model_dump()
    for name, value in settings.items():
        section, _, key = name.partition(".")
        values[section][key] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError:
        return None
