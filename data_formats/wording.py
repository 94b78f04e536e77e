"""How values and keys are named in messages: short, in JSON's words, whatever the row holds."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

_SHOWN = 60  # characters of a value; a row may hold megabytes


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    if value is None:
        return "nothing"
    if isinstance(value, str | list | dict) and not value:
        return {str: "an empty string", list: "an empty list", dict: "an empty object"}[type(value)]
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        bytes: "bytes",
        list: "a list",
    }
    return names.get(type(value), "an object")


def shown(value: Any) -> str:
    """A string quoted, and cut if long; anything else by its kind, since a repr may be deep."""
    if isinstance(value, str) and value:
        return repr(value if len(value) <= _SHOWN else value[:_SHOWN] + "...")
    if isinstance(value, bool):
        return "true" if value else "false"
    return kind(value)


def keys(row: dict[Any, Any], *, at_most: int = 5) -> str:
    """The first keys of a row that hold something, quoted; `nothing` where there are none."""
    held = [key for key, value in row.items() if value is not None]
    names = [shown(key) for key in held[:at_most]]
    return ", ".join([*names, "..."] if len(held) > at_most else names) or "nothing"


def nearest(name: Any, known: Iterable[str]) -> str | None:
    """The known name that was probably meant."""
    near = difflib.get_close_matches(str(name)[:_SHOWN], list(known), n=1)
    return near[0] if near else None


def missing(row: dict[Any, Any], key: str, expected: str) -> str:
    """The message for a column that a format cannot do without; the misspelt one is named."""
    near = nearest(key, (name for name in row if isinstance(name, str) and name != key))
    todo = f"is {near!r} meant to be {key!r}?" if near else "add it, or leave the row out"
    return f"{key!r} is missing (found {keys(row)}); {expected}; {todo}"


def must_be(place: str, expected: str, value: Any, *, verb: str = "be") -> str:
    """The message for a value of another kind than a format promises."""
    if value is None:
        todo = "add it, or leave the row out"
    elif not value and isinstance(value, str | list | dict):
        todo = "fill it, or leave the row out"
    elif isinstance(value, int | float) and expected.startswith(("a string", "a text")):
        todo = "put it in quotes"
    else:
        todo = "write it so"
    return f"{place} must {verb} {expected}, found {kind(value)}; {todo}"


def listed(names: Sequence[str], last: str = "and") -> str:
    """Names, quoted, as in a sentence: `'a', 'b' and 'c'`."""
    quoted = [repr(name) for name in names]
    if len(quoted) < 2:
        return "".join(quoted)
    return f"{', '.join(quoted[:-1])} {last} {quoted[-1]}"
