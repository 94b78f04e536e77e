"""Copying a shipped recipe to where a user changes it, so that the copy runs as it is."""

import shutil
from pathlib import Path

import yaml

from finetune.errors import RecipeError, RunDirError
from finetune.recipe.files import recipes_dir, shipped_recipes

SCHEMA_LINE = "# yaml-language-server: $schema="


def shipped_recipe(name: str) -> Path:
    """The file of a shipped recipe. Raises `RecipeError` that names those there are."""
    recipes = shipped_recipes()
    if name.removesuffix(".yaml") not in recipes:
        raise RecipeError(
            f"{name}: no shipped recipe of that name; there are: {', '.join(recipes)}"
        )
    return recipes[name.removesuffix(".yaml")]


def copy_recipe(name: str, to: Path) -> list[Path]:
    """Copy a recipe, and beside it the folders of shipped data that it names; what was written.

    The first line is pointed at the installed schema, so that editors go on completing keys.
    Raises `RecipeError` for an unknown name, `RunDirError` for a place that is taken or closed.
    """
    source = shipped_recipe(name)
    to = to / source.name if to.is_dir() else to
    folders = {folder: to.parent / folder.name for folder in _data_folders(source)}
    for place in (to, *folders.values()):
        if place.exists():
            raise RunDirError(f"{place}: is there already; copy to another place")
    first, _, rest = source.read_text(encoding="utf-8").partition("\n")
    if first.startswith(SCHEMA_LINE):
        first = SCHEMA_LINE + str(recipes_dir() / "schema.json")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        for folder, place in folders.items():
            shutil.copytree(folder, place)
        to.write_text(f"{first}\n{rest}", encoding="utf-8")
    except (OSError, shutil.Error) as error:
        for place in folders.values():
            shutil.rmtree(place, ignore_errors=True)  # none of them was there before
        raise RunDirError(f"{to}: cannot be written ({error})") from error
    return [to, *folders.values()]


def _data_folders(recipe: Path) -> list[Path]:
    """The folders beside a shipped recipe that its data stands in."""
    data = yaml.safe_load(recipe.read_text(encoding="utf-8"))["data"]
    sources = [*data["train"], *data.get("eval", [])]
    files = [recipe.parent / source["path"] for source in sources if "path" in source]
    return list(dict.fromkeys(file.parent for file in files if file.is_file()))
