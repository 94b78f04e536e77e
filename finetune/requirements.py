"""What a recipe asks of this version, this machine and its packages, where it is not there."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from finetune.errors import RecipeError, summarise_problems
from finetune.metrics import packages_needed
from finetune.model.methods import mixes_dtypes
from finetune.model.optimizer import package_of
from finetune.packages import missing
from finetune.recipe import Recipe

_ACCELERATE = (
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",  # python -m
    "accelerate.commands.accelerate_cli",
)


def refuse_what_cannot_run(recipe: Recipe, source: str) -> None:
    """Raise `RecipeError` for settings that this version or this machine cannot carry out.

    None of them is passed over in silence.
    """
    refuse_a_lonely_launch()
    problems: list[str] = []
    training, on_gpu = recipe.training, torch.cuda.is_available()
    if recipe.model.dtype == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported():
        problems.append("model.dtype: bfloat16 is not computed by this GPU; set float16")
    if recipe.model.dtype == "float16" and not on_gpu and mixes_dtypes(recipe):
        problems.append(
            "adapter.modules_to_save: in float16 they train on a GPU only; set model.dtype: "
            "bfloat16 or float32"
        )
    name = training.optimizer
    if name.startswith(("galore_adamw_8bit", "adalomo")) and not on_gpu:
        problems.append(f"training.optimizer: {name} runs on a GPU only; set adamw_torch")
    if training.loss_kernel == "liger" and not on_gpu:
        problems.append("training.loss_kernel: liger runs on a GPU only; set auto or torch")
    if name == "galore_adafactor_layerwise":
        problems.append(
            f"training.optimizer: {name} cannot be set up by this version of transformers; "
            "set galore_adafactor"
        )
    if training.on_oom == "split" and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        problems.append(
            "training.on_oom: split is for one process: the others have added up gradients by the "
            "time that one runs out of memory; set stop"
        )
    problems += missing(_packages(recipe))
    if problems:
        raise RecipeError(summarise_problems(source, problems))


def refuse_a_lonely_launch() -> None:
    """Raise `RecipeError` where several processes were asked of `accelerate launch`, and it started
    one: as it does with `--cpu --num_processes 2` (accelerate 1.15, commands/launch.py).
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        return
    words: list[str] = []
    with suppress(psutil.Error):
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    asked = _num_processes_asked(words)
    if asked > 1:
        raise RecipeError(
            f"accelerate launch was asked for {asked} processes and has started one; use finetune "
            f"train RECIPE --processes {asked}, or ACCELERATE_USE_CPU=true torchrun "
            f"--nproc_per_node {asked} -m finetune train RECIPE"
        )


def _num_processes_asked(words: Sequence[str]) -> int:
    """Of `accelerate launch`, by its command line or the configuration that it names; 1 where it
    was not asked, or is not there.
    """
    if not any(Path(word).name in _ACCELERATE for word in words):
        return 1
    asked: Any = _value_of("num_processes", words)
    file = _value_of("config_file", words)
    if asked is None and file:
        with suppress(OSError, ValueError, yaml.YAMLError):
            settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            asked = settings.get("num_processes") if isinstance(settings, dict) else None
    text = str(asked)
    return int(text) if text.isdecimal() else 1


def _value_of(option: str, words: Sequence[str]) -> str | None:
    for number, word in enumerate(words):
        name, is_given, value = word.partition("=")
        if name.replace("-", "_") == f"__{option}":
            return value if is_given else "".join(words[number + 1 : number + 2])
    return None


def _packages(recipe: Recipe) -> dict[str, str]:
    """The module that a setting needs, by the setting."""
    needed = {f"output.trackers: {name}": name for name in recipe.output.trackers}
    optimizer = recipe.training.optimizer
    package = package_of(optimizer)
    if package and recipe.adapter.method != "frozen":
        needed[f"training.optimizer: {optimizer}"] = package
    if recipe.model.quantize != "none":
        needed[f"model.quantize: {recipe.model.quantize}"] = "bitsandbytes"
    if recipe.training.loss_kernel == "liger":
        needed["training.loss_kernel: liger"] = "liger_kernel"
    needed |= packages_needed(recipe.evaluation.metrics, "evaluation.metrics")
    if recipe.model.attention == "flash_attention_2":
        needed["model.attention: flash_attention_2"] = "flash_attn"
    return needed
