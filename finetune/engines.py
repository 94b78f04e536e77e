"""What several processes train with: DDP, FSDP2, or DeepSpeed's ZeRO, by accelerate, as the files
in recipes/launch say.

`accelerate launch --config_file` tells accelerate by the environment, and so does `use_engine`, of
the same file: it makes no difference which of the two, `--processes` or torchrun starts a run.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from finetune.errors import RecipeError, summarise_problems
from finetune.packages import missing
from finetune.processes import engine
from finetune.recipe import Recipe
from finetune.recipe.conflicts import conflicts
from finetune.recipe.files import LAUNCH, recipes_dir

ENGINES = ("ddp", "fsdp", "zero2", "zero3")
_FREE = ("ACCELERATE_USE_FSDP", "FSDP_RESHARD_AFTER_FORWARD")
"""What a launcher may tell otherwise than recipes/launch/fsdp.yaml."""


def launch_file(name: str) -> Path:
    """accelerate's configuration for an engine."""
    return recipes_dir() / LAUNCH / f"{name}.yaml"


def use_engine(
    recipe: Recipe, source: str, *, resume: bool = False, dry_run: bool = False
) -> Recipe:
    """Have accelerate train with what the recipe names, or a launcher has told; the recipe, with
    the name in it, for weights or optimizers in shares.

    Before anything asks which process this is. `source` is for messages. Raises `RecipeError` for
    what cannot be: a machine without a GPU is told in a dry run, too, but ends none.
    """
    asked, told = recipe.training.distributed, engine()
    name = asked or told
    problems = [*_of_launcher(asked, told), *_of_this_machine(name, dry_run)]
    if name == "zero2":
        problems += _of_unpickling(recipe, resume)
    if name != "ddp" and not problems:
        training = recipe.training.model_copy(update={"distributed": name})
        recipe = recipe.model_copy(update={"training": training})
        if not asked:  # a recipe's own were told when it was read
            problems += [f"{problem}" for problem in conflicts(recipe)]
    if problems:
        raise RecipeError(summarise_problems(source, problems))
    if name != "ddp" and told == "ddp" and has_devices():
        os.environ.update(environment_of(name))
    return recipe


def has_devices() -> bool:
    """Whether there is what FSDP and DeepSpeed share weights out over: on a CPU accelerate takes
    DDP in their place, in silence (1.15, state.py, AcceleratorState).
    """
    return torch.cuda.is_available()


def _of_launcher(asked: str | None, told: str) -> Iterator[str]:
    if told not in ENGINES:
        yield f"training.distributed: the launcher asks for {told}; expected zero2"
    elif asked and told not in (asked, "ddp"):
        yield (
            f"training.distributed: {asked}, and the launcher asks for {told}; leave one of both "
            "out"
        )
    if told == "fsdp":
        for key, value in environment_of("fsdp").items():
            if key not in _FREE and os.environ.get(key, "").lower() != value.lower():
                yield f"{key.lower()}: set {value}, as in recipes/launch/fsdp.yaml"
        if os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
            yield "fsdp_transformer_layer_cls_to_wrap: follows from the model; leave it out"
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        yield (
            "deepspeed_config_file: is not read; write its settings under deepspeed_config, as "
            "recipes/launch/zero2.yaml"
        )


def _of_this_machine(name: str, dry_run: bool) -> Iterator[str]:
    if name == "ddp":
        return
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 and not dry_run:
        yield (
            f"training.distributed: {name} shares out what several processes hold; add --processes "
            "N, or leave it out"
        )
    if name.startswith("zero"):
        yield from missing({f"training.distributed: {name}": "deepspeed"})
    if name == "zero3" and not dry_run:
        yield (
            "training.distributed: zero3 has all processes call the same modules in every pass "
            "(DeepSpeed 0.19 compares them), and how often a vision tower is called depends on the "
            "pictures of a batch; set fsdp, which shards the same weights"
        )
    elif not has_devices() and not dry_run:
        yield (
            f"training.distributed: {name} runs on GPUs only, and this machine has none "
            "(accelerate would train with ddp in its place); leave it out"
        )


def _of_unpickling(recipe: Recipe, resume: bool) -> Iterator[str]:
    """What has DeepSpeed load its checkpoints, which it does with `weights_only=False`.

    Source: DeepSpeed 0.19.8, runtime/checkpoint_engine/torch_checkpoint_engine.py.
    """
    why = "DeepSpeed unpickles its checkpoints, which may run code; "
    if resume:
        yield (
            f"training.distributed: zero2 has no --resume: {why}begin with --overwrite, or with "
            "training.distributed: fsdp, which goes on"
        )
    if recipe.evaluation.load_best:
        yield (
            f"evaluation.load_best: is not for training.distributed: zero2: {why}set false, or "
            "training.distributed: fsdp"
        )


def environment_of(name: str) -> dict[str, str]:
    """What `accelerate launch --config_file` sets for an engine.

    Source: accelerate 1.15, utils/launch.py; a test holds the two together.
    """
    settings = yaml.safe_load(launch_file(name).read_text(encoding="utf-8"))
    if "fsdp_config" in settings:
        found = {key.upper(): _text(value) for key, value in settings["fsdp_config"].items()}
        return {"ACCELERATE_USE_FSDP": "true"} | found
    if "deepspeed_config" in settings:
        found = {
            f"ACCELERATE_DEEPSPEED_{key.removesuffix('_flag').upper()}": _text(value)
            for key, value in settings["deepspeed_config"].items()
        }
        return {"ACCELERATE_USE_DEEPSPEED": "true"} | found
    return {}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
