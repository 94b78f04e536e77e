"""YAML as a recipe needs it: repeated keys reported, mistakes with their line, overrides on top."""

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


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; this one notes them."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self.repeated: list[Problem] = []

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
    """The document, or None where it cannot be read, and the problems found on the way."""
    try:
        loader = _Loader(text)
        return loader.get_single_data(), loader.repeated
    except yaml.MarkedYAMLError as error:
        return None, [Problem((), _syntax_error(error))]
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return None, [Problem((), f"line {line}: holds a character that YAML does not allow")]
    except (ValueError, RecursionError) as error:  # such as the date 2025-13-01
        return None, [
            Problem((), f"is not usable YAML ({error}); put dates and odd numbers in quotes")
        ]


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
            if not part.isdecimal() or int(part) > len(here):
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
