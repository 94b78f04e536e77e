"""Packages that some settings need and this one does not install."""

from collections.abc import Mapping
from importlib.util import find_spec

from finetune.errors import RecipeError, summarise_problems

# Where pip knows it by another name than Python
PIP_NAMES = {
    "galore_torch": "galore-torch",
    "apollo_torch": "apollo-torch",
    "lomo_optim": "lomo-optim",
    "optimi": "torch-optimi",
    "liger_kernel": "liger-kernel",
}


def refuse_missing(packages: Mapping[str, str], source: str) -> None:
    """Raise `RecipeError` for modules that are not installed, by what needs them."""
    if problems := missing(packages):
        raise RecipeError(summarise_problems(source, problems))


def missing(packages: Mapping[str, str]) -> list[str]:
    """A problem for each module that is not installed, and how to install it."""
    return [
        f"{setting}: needs the package {package}, which is not installed; pip install "
        f"{PIP_NAMES.get(package, package)}"
        for setting, package in packages.items()
        if find_spec(package) is None
    ]
