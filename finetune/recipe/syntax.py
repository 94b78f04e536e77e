"""YAML as a recipe needs it: repeated keys reported, mistakes with their line, overrides on top;
and no more of it than a recipe may hold, whoever wrote the file.
"""

from collections.abc import Sequence
from typing import Any

import yaml

from finetune.recipe.messages import Problem, in_words

# Setting one of these on the command line takes the place of the others in the file.
ALTERNATIVES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("training", "max_steps"): ("epochs",),
    ("training", "epochs"): ("max_steps",),
    ("training", "batch_size"): ("batch_tokens", "batch_patches"),
    ("training", "batch_tokens"): ("batch_size",),
    ("training", "batch_patches"): ("batch_size",),
}


# The shipped recipes have some hundred values, five levels deep, in two or three KiB.
MAX_BYTES = 256 * 2**10
MAX_VALUES = 10_000
MAX_DEPTH = 32
MAX_DIGITS = (
    100  # 1:1:1:... takes the square of its length to read, and is not the only such number
)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_TOO_DEEP = f"is nested more than {MAX_DEPTH} levels deep; a recipe has five"


class _RefusedError(Exception):
    """YAML that is well formed, and more than a recipe may hold."""


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; this one notes them.

    It also counts what an alias stands for each time it is used, before anything is built of it: a
    few lines of aliases of aliases stand for a billion values, and so do merges (`<<`).
    """

    def __init__(self, stream: str):
        super().__init__(stream)
        self.repeated: list[Problem] = []
        self._num_values = self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}  # of each finished node, aliases within it included

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        before, line = self._num_values, event.start_mark.line + 1
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _RefusedError(f"line {line}: {_TOO_DEEP}")
        node = super().compose_node(parent, index)
        assert node is not None
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            raise _RefusedError(f"line {line}: holds a number of {len(node.value):,} characters")
        if not isinstance(event, yaml.AliasEvent):
            self._sizes[node] = self._num_values + 1 - before
            self._num_values += 1
        elif node in self._sizes:
            self._num_values += self._sizes[node]
        else:
            raise _RefusedError(f"line {line}: *{event.anchor} stands within &{event.anchor}")
        if self._num_values > MAX_VALUES:
            raise _RefusedError(
                f"line {line}: holds more than {MAX_VALUES:,} values up to here, those that "
                "aliases stand for counted each time; a recipe has some hundred"
            )
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Looks at keys before merges (`<<`) are folded in, which may rightly repeat them."""
        node = super().compose_mapping_node(anchor)
        assert node is not None
        first_line: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first_line:
                text = (
                    f"{key.value!r} is given twice, first on line {first_line[key.value]}; keep one"
                )
                self.repeated.append(Problem((), f"line {line}: {text}"))
            first_line.setdefault(key.value, line)
        return node


def parse_yaml(text: str) -> tuple[Any, list[Problem]]:
    """The document, or None where it cannot be read or is larger than a recipe may be, and the
    problems found on the way. No part of it is part of another, whatever aliases there were.
    """
    if len(text) > MAX_BYTES:  # of a file the bytes were counted; this is for other texts
        return None, [Problem((), f"is longer than the {MAX_BYTES:,} characters it may have")]
    try:
        loader = _Loader(text)
        return _unshared(loader.get_single_data()), loader.repeated
    except _RefusedError as error:
        return None, [Problem((), str(error))]
    except yaml.MarkedYAMLError as error:
        return None, [Problem((), _syntax_error(error))]
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return None, [Problem((), f"line {line}: holds a character that YAML does not allow")]
    except Exception as error:
        # Such as the date 2025-13-01. PyYAML lets through what a tag (`!!bool maybe`) or an odd
        # number leads it to: KeyError, IndexError, AttributeError, OverflowError
        what = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        return None, [
            Problem((), f"is not usable YAML ({what[:100]}); put dates and odd numbers in quotes")
        ]


def _unshared(value: Any, depth: int = 1) -> Any:
    """A copy in which each alias has values of its own, so that an override changes one place."""
    if depth > MAX_DEPTH:
        raise _RefusedError(_TOO_DEEP)
    if isinstance(value, dict):
        return {key: _unshared(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_unshared(inner, depth + 1) for inner in value]
    return value


def _syntax_error(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    what = error.problem or "cannot be read"
    if "'\\t'" in what:
        return f"{where}a tab; YAML is indented with spaces"
    context = f" ({error.context})" if error.context else ""
    return f"{where}is not YAML: {what}{context}"


def apply_overrides(raw: Any, overrides: Sequence[str]) -> list[Problem]:
    """Lay `dotted.key=value` settings onto `raw` in place; a later one wins over an earlier one."""
    if not isinstance(raw, dict):
        return []
    problems, keys = [], [tuple(text.partition("=")[0].strip().split(".")) for text in overrides]
    for text, key in zip(overrides, keys, strict=True):
        if not text.partition("=")[1] or not all(key):
            problems.append(
                Problem((), f"{text!r} is no override; write KEY=VALUE, such as adapter.rank=16")
            )
            continue
        value, wrong = parse_yaml(text.partition("=")[2])
        if wrong:
            problems += [Problem(key, f"the value after '=': {problem}") for problem in wrong]
        elif refusal := _set(raw, key, value):
            problems.append(Problem(key, refusal))
        elif value is not None:
            for other in ALTERNATIVES.get(key[:2], ()):
                if (key[0], other) not in keys:
                    raw[key[0]].pop(other, None)
    return problems


def _set(raw: Any, key: Sequence[str], value: Any) -> str | None:
    """Put the value in its place, new sections and list entries included, or say why not."""
    here = raw
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        # What to put where nothing stands yet: a list before a number, a mapping before a name.
        new = value if last else [] if key[depth + 1].isdecimal() else {}
        if isinstance(here, list):
            if not part.isdecimal() or len(part) > 9 or int(part) > len(here):
                count = f"{len(here)} " + ("entry" if len(here) == 1 else "entries")
                return (
                    f"{'.'.join(key[:depth])} is a list of {count}, numbered from 0; found {part!r}"
                )
            place: Any = int(part)
            if place == len(here):
                here.append(new)
        elif isinstance(here, dict):
            place = part
            if here.get(place) is None:
                here[place] = new
        else:
            return f"{'.'.join(key[:depth])} is {in_words(here)}, with no keys below it"
        if last:
            here[place] = value
        here = here[place]
    return None
