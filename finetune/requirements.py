"""What a recipe asks of this version, this machine and its packages, where it is not there."""

import os

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
    training, on_gpu = recipe.training, torch.cuda.is_available()
    unbuilt = {
        "several processes (WORLD_SIZE)": int(os.environ.get("WORLD_SIZE") or 1) > 1,
    }
    problems = [
        f"{setting}: not available in this version" for setting, used in unbuilt.items() if used
    ]
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
    problems += missing(_packages(recipe))
    if problems:
        raise RecipeError(summarise_problems(source, problems))


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
