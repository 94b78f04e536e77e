"""Reading and writing recipes, as a whole, everything wrong with one said at once."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import ValidationError

from finetune.errors import RecipeError, summarise_problems
from finetune.recipe.files import (
    find_recipe,
    read_text,
    resolve_paths,
)
from finetune.recipe.messages import Problem, problems_of
from finetune.recipe.schema import (
    DataSource,
    Recipe,
)
from finetune.recipe.syntax import apply_overrides, parse_yaml

# Tokens of the Hub, GitHub, AWS and OpenAI's like; a name or password before the host of a URL
_SECRET = re.compile(
    r"\b(hf_|gh[pousr]_|github_pat_|sk-)[A-Za-z0-9_-]{20}|\bAKIA[0-9A-Z]{16}|\w://[^/\s@]+@"
)


def recipe_warnings(recipe: Recipe) -> list[str]:
    """Settings the user made that have no effect, and held-out rows that are not.

    A recipe written by `dump_recipe` sets every key, so ask about the user's own file.
    """
    idle = [
        f"{key} has no effect {why}" for key, why in _without_effect(recipe) if _is_set(recipe, key)
    ]
    return [*idle, *_doubtful_training(recipe), *_doubtful_evaluation(recipe)]


def _is_set(recipe: Recipe, key: str) -> bool:
    section, _, name = key.partition(".")
    if name == "*":
        return bool(getattr(recipe, section).model_fields_set)
    return name in getattr(recipe, section).model_fields_set


def _without_effect(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Each idle setting with the reason, whether the user made it or not."""
    method, training = recipe.adapter.method, recipe.training
    lora_only = ("rank", "alpha", "dropout")
    idle = {"full": lora_only, "frozen": (*lora_only, "parts", "modules_to_save", "extra_tokens")}
    for name in idle.get(method, ()):
        yield f"adapter.{name}", f"with adapter.method: {method}"
    if method == "full":
        yield "adapter.modules_to_save", "with adapter.method: full; name their part in parts"
        yield "training.lora_plus_ratio", "with adapter.method: full, which has no matrices A and B"
    if method == "frozen":
        for name in ("learning_rate", "lora_plus_ratio", "neftune_alpha", "optimizer"):
            yield f"training.{name}", "with adapter.method: frozen, which trains nothing"
    if recipe.model.name == "nano" or Path(recipe.model.name).is_absolute():
        yield "model.revision", f"with model.name: {recipe.model.name}, which is not on the Hub"
    if training.batch_size == training.gradient_accumulation == 1:
        yield (
            "training.gradient_accumulation",
            "at 1 with batch_size: 1, and every step follows a single row; raise one of them",
        )
    if not recipe.evaluation.load_best and not recipe.evaluation.patience:
        yield "evaluation.best_metric", "without load_best or patience"
    if training.group_by_cost and any(source.streaming for source in recipe.data.train):
        yield "training.group_by_cost", "on streamed rows, whose cost is not known beforehand"
    yield from _without_company(recipe)
    if training.scheduler == "constant":
        yield (
            "training.warmup_ratio",
            "with training.scheduler: constant; constant_with_warmup has one",
        )
    if recipe.data.overlong == "fewer_views" and recipe.images.split == "never":
        yield "data.overlong", "as fewer_views: images.split: never has one view a picture already"
    if not recipe.data.eval_fraction:
        yield "data.eval_seed", "without data.eval_fraction"
    if not recipe.data.allow_urls:
        for name in ("url_max_mib", "url_timeout_seconds"):
            yield f"data.{name}", "without data.allow_urls: true"
    if not recipe.data.eval and not recipe.data.eval_fraction:
        yield "evaluation.*", "without data.eval: there are no held-out rows to judge"


def _without_company(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What puts rows into one sequence, where none can be."""
    training = recipe.training
    if training.batch_size == 1:
        yield "training.packing", "with batch_size: 1"
    if training.share_images == "off":
        return
    reasons = {
        "with batch_size: 1": training.batch_size == 1,
        "with model.attention: flash_attention_2, whose kernel takes no mask": (
            recipe.model.attention == "flash_attention_2"
        ),
        "with data.random_upscale, which shows each row its pictures at another size": (
            recipe.data.random_upscale > 1
        ),
        "with training.neftune_alpha, whose noise is each row's own": training.neftune_alpha > 0,
    }
    yield from (("training.share_images", why) for why, is_so in reasons.items() if is_so)


def _doubtful_training(recipe: Recipe) -> Iterator[str]:
    optimizer = recipe.training.optimizer
    if optimizer.endswith(("layerwise", "adalomo")) and recipe.adapter.method != "frozen":
        yield (
            f"training.optimizer: {optimizer} leaves its state out of checkpoints: a resumed run "
            "does not end as an unbroken one"
        )
    if recipe.adapter.method == "pissa" and recipe.adapter.dropout:
        yield (
            "adapter.dropout with adapter.method: pissa leaves out the strongest directions of the "
            "model's own weights at random; set adapter.dropout: 0"
        )


def _doubtful_evaluation(recipe: Recipe) -> Iterator[str]:
    """Entries with settings that do nothing, and rows both trained on and judged."""
    train = {_origin(source): number for number, source in enumerate(recipe.data.train)}
    for part, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for number, source in enumerate(sources):
            idle = ["config", "split", "revision"] if source.path else []
            idle += ["weight"] if part == "eval" else []
            for name in (name for name in idle if name in source.model_fields_set):
                why = "on held-out rows" if name == "weight" else "on a path, only with hub"
                yield f"data.{part}.{number}.{name} has no effect {why}"
    for number, source in enumerate(recipe.data.eval):
        if _origin(source) in train:
            twin = f"data.train.{train[_origin(source)]}"
            yield f"data.eval.{number} is the same as {twin}: its rows are trained on, not held out"
    if (
        not recipe.data.eval
        and not recipe.data.eval_fraction
        and not recipe.evaluation.model_fields_set
    ):
        yield "data.eval is empty: the result will not be judged"


def _origin(source: DataSource) -> tuple[str | None, ...]:
    return (source.path,) if source.path else (None, source.hub, source.split, source.revision)


def load_recipe(
    source: str | Path, overrides: Sequence[str] = (), *, check_paths: bool = True
) -> Recipe:
    """Read a recipe file or a shipped recipe by name, `dotted.key=value` overrides laid on top.

    Paths come out absolute. `check_paths=False` lets missing files pass, their paths as written.
    Raises `RecipeError` that lists every problem.
    """
    path = find_recipe(source)
    raw, problems = parse_yaml(read_text(path, source))
    if raw is None and not problems:
        problems.append(Problem((), "is empty; expected at least model.name and data.train"))
    elif raw is not None and not isinstance(raw, dict):
        problems.append(
            Problem((), "expected sections such as 'model:' and 'data:', found no mapping")
        )
    if not isinstance(raw, dict):
        raise RecipeError(summarise_problems(str(source), [str(problem) for problem in problems]))
    problems += apply_overrides(raw, overrides)
    if secrets := list(_secrets(raw)):  # alone, since other messages show what they found
        raise RecipeError(summarise_problems(str(source), [str(problem) for problem in secrets]))
    for required in ("model", "data"):  # so that the key inside is named as missing
        raw.setdefault(required, {})
    missing = resolve_paths(raw, path.parent)
    recipe, wrong = _validate(raw)
    if check_paths:  # and a value that is no path at all is not reported as missing too
        problems += [each for each in missing if each.loc not in {other.loc for other in wrong}]
    problems += wrong
    if problems or recipe is None:
        problems.sort(key=_place)
        raise RecipeError(summarise_problems(str(source), [str(problem) for problem in problems]))
    return recipe


def _secrets(value: Any, loc: tuple[str | int, ...] = ()) -> Iterator[Problem]:
    """Each text that looks like a password or a token; what it is, no message says."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _secrets(inner, (*loc, str(key)))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _secrets(inner, (*loc, number))
    elif isinstance(value, str) and _SECRET.search(value):
        yield Problem(
            loc,
            "looks like a password or token, which a run would copy into its folder, report and "
            "card; take it out, and log in with 'hf auth login' or set HF_TOKEN",
        )


def make_source(
    settings: dict[str, Any], names: Mapping[str, str] = MappingProxyType({})
) -> DataSource:
    """A data entry from settings given on the command line, where they are called by `names`.
    Raises `RecipeError`.
    """
    try:
        return DataSource.model_validate(settings)
    except ValidationError as error:
        problems = problems_of(error, DataSource)
        renamed = [
            replace(p, loc=(names.get(str(p.loc[0]), p.loc[0]), *p.loc[1:]) if p.loc else ())
            for p in problems
        ]
        raise RecipeError("\n".join(map(str, renamed))) from error


def _validate(raw: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, or what is wrong with it.

    Pydantic looks at fields together only once each is right alone. So the broken ones are taken
    out for a second look, and what that says of those very fields is left out.
    """
    try:
        return Recipe.model_validate(raw), []
    except ValidationError as error:
        problems = problems_of(error, Recipe)
    if any(problem.reads for problem in problems):
        return None, problems
    broken = [problem.loc[:2] for problem in problems]
    try:
        Recipe.model_validate(_without(raw, broken))
    except ValidationError as error:
        problems += [
            problem
            for problem in problems_of(error, Recipe)
            if problem.reads
            and not any(
                tuple(key.split("."))[: len(loc)] == loc for key in problem.reads for loc in broken
            )
        ]
    return None, problems


def _without(raw: dict[str, Any], broken: Sequence[tuple[str | int, ...]]) -> dict[str, Any]:
    """A copy with the broken keys gone, and stand-ins for those that must be there."""
    sections = {(name,) for name in raw} - set(broken)
    kept = {
        name: {key: inner for key, inner in value.items() if (name, key) not in broken}
        if isinstance(value, dict)
        else value
        for name, value in raw.items()
        if (name,) in sections
    }
    for name, stand_in in (
        ("model", {"name": "nano"}),
        ("data", {"train": [{"hub": "stand/in"}]}),
    ):
        section = kept.get(name)  # no mapping where a fault of the whole hid what is wrong with it
        kept[name] = stand_in | (section if isinstance(section, dict) else {})
    return kept


def _place(problem: Problem) -> int:
    """Problems of the whole file first, then in the order of the sections."""
    sections = list(Recipe.model_fields)
    if not problem.loc:
        return -1
    return sections.index(str(problem.loc[0])) if problem.loc[0] in sections else len(sections)


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults written out; `load_recipe` makes an equal one of it."""
    values = recipe.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
