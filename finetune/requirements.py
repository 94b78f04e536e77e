"""What a recipe asks of this version, this machine and its packages, where it is not there."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from finetune.errors import RecipeError, summarise_problems
from finetune.metrics import PACKAGES
from finetune.model.methods import mixes_dtypes
from finetune.model.optimizer import package_of
from finetune.packages import missing
from finetune.recipe import Recipe


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
    """Of `accelerate launch`, by its command line; 1 where it was not asked, or is not there."""
    if not any(Path(word).name in ("accelerate", "accelerate-launch") for word in words):
        return 1
    pairs = [word.partition("=")[::2] for word in words]
    for number, (name, value) in enumerate(pairs):
        if name in ("--num_processes", "--num-processes"):
            text = value or (words[number + 1] if number + 1 < len(words) else "")
            return int(text) if text.isdigit() else 1
    return 1


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
    needed |= {
        f"evaluation.metrics: {name}": PACKAGES[name]
        for name in recipe.evaluation.metrics
        if name in PACKAGES
    }
    if recipe.model.attention == "flash_attention_2":
        needed["model.attention: flash_attention_2"] = "flash_attn"
    return needed
