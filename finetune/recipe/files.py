"""Where recipes are found, and where the files they name stand."""

import os
import re
from pathlib import Path
from typing import Any

from finetune.errors import RecipeError
from finetune.patterns import globbed, is_pattern, written_out
from finetune.recipe.messages import Problem, did_you_mean
from finetune.recipe.syntax import MAX_BYTES

HUB_ID = re.compile(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?", re.ASCII)


LAUNCH = "launch"
"""The folder beside the recipes with accelerate's configurations."""


def recipes_dir() -> Path:
    """The shipped recipes: inside the package once installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """File by name, such as `nano/digits`."""
    folder = recipes_dir()
    files = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in folder.rglob("*.yaml")
        if path.parent != folder / LAUNCH
    }
    return dict(sorted(files.items()))


def find_recipe(source: str | Path) -> Path:
    """The file itself, or the shipped recipe of that name. Raises `RecipeError`."""
    path = expand_home(source)
    if is_there(path) and not path.is_dir():
        return path
    shipped = shipped_recipes()
    name = str(source).removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    if is_there(path):
        recipes = [name for name in _names_in(path) if name.endswith((".yaml", ".yml"))]
        hint = f"; name one of its files: {', '.join(recipes)}" if recipes else ""
        raise RecipeError(f"{source}: is a folder; expected a recipe file{hint}")
    # Only the name after `recipes/` is like a shipped one.
    near = did_you_mean(name.removeprefix("recipes/"), shipped) or _near_file(path)
    raise RecipeError(
        f"{source}: no such file{near}; shipped recipes: {', '.join(shipped) or 'none'}"
    )


def read_text(path: Path, source: str | Path) -> str:
    """The recipe's text, a byte order mark taken off. Raises `RecipeError`, for a file that is too
    large without reading it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise RecipeError(
                f"{source}: is no recipe: it has {max(path.stat().st_size, len(data)):,} bytes, "
                f"and a recipe at most {MAX_BYTES:,}; give the recipe, which names data by path"
            )
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise RecipeError(
            f"{source}: is not UTF-8 text (byte 0x{byte:02x} at {error.start:,}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read ({error.strerror})") from error


def resolve_paths(raw: Any, recipe_folder: Path) -> list[Problem]:
    """Make the model's and the data's paths absolute, in place, and say which cannot be found."""
    if not isinstance(raw, dict):
        return []
    problems = []
    model = raw.get("model")
    if isinstance(model, dict) and isinstance(model.get("name"), str):
        model["name"], wrong = _resolve_model(model["name"])
        problems += [Problem(("model", "name"), text) for text in wrong]
    data = raw.get("data")
    for part in ("train", "eval"):
        entries = data.get(part) if isinstance(data, dict) else None
        for number, entry in enumerate(entries if isinstance(entries, list) else []):
            hub = entry.get("hub") if isinstance(entry, dict) else None
            if isinstance(hub, str) and is_there(expand_home(hub)):
                text = f"{hub!r} is a file or folder here; write path: for it, instead of hub:"
                problems.append(Problem(("data", part, number, "hub"), text))
            for key in ("path", "image_root"):
                if isinstance(entry, dict) and isinstance(entry.get(key), str) and entry[key]:
                    kind = "folder" if key == "image_root" else "file"
                    entry[key], wrong = _resolve(entry[key], recipe_folder, kind)
                    problems += [Problem(("data", part, number, key), text) for text in wrong]
    return problems


def _resolve(written: str, recipe_folder: Path, kind: str = "file") -> tuple[str, list[str]]:
    """A relative path starts in the current folder or the recipe's, if that is not two files."""
    path = expand_home(written)
    own = Path(os.path.normpath(recipe_folder.resolve() / path))
    if own.is_relative_to(recipes_dir().resolve()) and is_there(own):
        # A shipped recipe means the data it came with, whatever a copy of it left in this folder
        return str(own), []
    folders = (Path.cwd(), recipe_folder.resolve())
    places = list(dict.fromkeys(Path(os.path.normpath(folder / path)) for folder in folders))
    # Compared by where links lead, kept as named: a link's own suffix tells the format.
    there = [place for place in places if is_there(place) or _any_match(place)]
    found = list({place.resolve(): place for place in there}.values())
    if len(found) == 1:
        return str(found[0]), []
    if found:
        return written, [
            f"{written!r} is two files: {found[0]} and {found[1]}; write the one meant in full"
        ]
    near = next((hint for place in places if (hint := _near_file(place))), "")
    if path.is_absolute():
        return written, [f"{written!r}: no such {kind}{near}"]
    looked_in = " and ".join(str(place.parent) for place in places)
    return written, [f"{written!r}: no such {kind}; looked in {looked_in}{near}"]


def _resolve_model(name: str) -> tuple[str, list[str]]:
    """`nano` and Hub ids stay as they are; a folder of the same name wins over the Hub."""
    if name == "nano":
        return name, []
    path = expand_home(name)
    if is_there(path):
        if path.is_dir():
            return str(path.resolve()), []
        return name, [f"{name!r} is a file; name the folder that holds config.json and the weights"]
    if name.startswith(("./", "../", "/", "~", ".\\", "..\\")) or name in {".", ".."}:
        return name, [f"{name!r}: no such folder{_near_file(path)}"]
    if not HUB_ID.fullmatch(name):
        return name, [f"{name!r} is neither a folder here nor a Hub id (user/name), nor nano"]
    return name, []


def expand_home(path: str | Path) -> Path:
    """`~` replaced by the home folder; left alone where it names nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_there(path: Path) -> bool:
    """Whether something stands at the path; never raises, however odd the path is."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, not ours to look at, or a null character
        return False


def _any_match(pattern: Path) -> bool:
    """Whether the path is a pattern that finds something."""
    if not is_pattern(pattern):
        return False
    return any(is_there(Path(f)) for text in written_out(str(pattern)) for f in globbed(text))


def _near_file(path: Path) -> str:
    return did_you_mean(path.name, _names_in(path.parent))


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except (OSError, ValueError):
        return []
