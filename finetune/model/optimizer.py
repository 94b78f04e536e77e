"""Which weights step at which rate, and what an optimizer needs to be installed."""

from collections.abc import Collection
from typing import Any

from finetune.families.family import Family
from finetune.model.adapters import part_of_weight
from finetune.model.parts import target_pattern
from finetune.recipe import Recipe

# By the module that is imported; what pip calls it, where that is another name.
# Source: transformers v5.23, trainer_optimizer.py.
_PACKAGES = {
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "grokadamw": "grokadamw",
    "lomo": "lomo_optim",
    "adalomo": "lomo_optim",
    "stable_adamw": "optimi",
}
_PACKAGES_BY_START = {"galore": "galore_torch", "apollo": "apollo_torch", "sched": "schedulefree"}
_IN_TORCH = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")


def package_of(optimizer: str) -> str | None:
    """The module that an optimizer of transformers is imported from; None where that is torch or
    transformers itself.
    """
    if optimizer in _IN_TORCH:
        return None
    for start, package in _PACKAGES_BY_START.items():
        if optimizer.startswith(start):
            return package
    return _PACKAGES.get(optimizer, "bitsandbytes")


def projected_modules(model: Any, family: Family, recipe: Recipe) -> str | None:
    """The linear layers whose gradients GaLore and APOLLO project, as a pattern; None for other
    optimizers.
    """
    if not recipe.training.optimizer.startswith(("galore", "apollo")):
        return None
    parts = family.parts_of(model.config)
    return target_pattern(parts[part] for part in recipe.adapter.parts)


def has_several_rates(recipe: Recipe) -> bool:
    """Whether not all weights step at one rate."""
    training = recipe.training
    ratio = training.lora_plus_ratio if recipe.adapter.method != "full" else 1
    return isinstance(training.learning_rate, dict) or ratio != 1


def base_rate(recipe: Recipe) -> float:
    """The one rate, or that of the first part trained."""
    rate = recipe.training.learning_rate
    return rate[recipe.adapter.parts[0]] if isinstance(rate, dict) else rate


def parameter_groups(
    model: Any, family: Family, recipe: Recipe, decayed: Collection[str]
) -> list[dict[str, Any]]:
    """The trained weights by part, by LoRA matrix, and by whether they decay: for each its rate.

    `decayed` names the weights that decay. Groups are called `language`, or `language/lora_B` where
    LoRA+ (arXiv 2402.12354) gives the matrices B a rate of their own; the first part comes first.
    Every part with trained weights has a rate: recipes and models where one had none were refused.
    """
    training, names = recipe.training, recipe.adapter.parts
    part_of = part_of_weight(model, family)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = part_of(name)
        rates: Any = training.learning_rate
        rate = rates[group] if isinstance(rates, dict) else rates
        if ".lora_B." in name and training.lora_plus_ratio != 1:
            rate, group = rate * training.lora_plus_ratio, f"{group}/lora_B"
        decays = name in decayed
        new = {
            "params": [],
            "lr": rate,
            "weight_decay": training.weight_decay if decays else 0.0,
            "name": group,
        }
        groups.setdefault((group, decays), new)["params"].append(parameter)
    order = {part: number for number, part in enumerate(names)}
    return sorted(groups.values(), key=lambda g: order.get(g["name"].partition("/")[0], len(order)))
