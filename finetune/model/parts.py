"""Which part of a model a module or weight belongs to, by its name: in patterns, and asked."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from finetune.families.family import Family, Part


def target_pattern(parts: Iterable[Part]) -> str:
    """The regular expression that PEFT matches in full against module names, for the linear layers
    of these parts; a part may itself be one.
    """
    return "|".join(
        rf"(?={module_pattern(part)}(?:\.|$))(?:.*\.)?(?:{'|'.join(part.linears)})"
        for part in parts
    )


def module_pattern(part: Part) -> str:
    """The regular expression of the modules that a part consists of."""
    return f"(?:{'|'.join(map(re.escape, part.prefixes))})"


def part_of(family: Family, config: Any) -> Callable[[str], str | None]:
    """Gives `vision`, `connector`, `language` or None for a name of the model, without PEFT's
    prefix. Of several parts within each other the one named at more length, as it stands deeper.
    """
    patterns = {
        part: re.compile(rf"({module_pattern(facts)})(?:\..*)?")
        for part, facts in family.parts_of(config).items()
    }

    def find(name: str) -> str | None:
        lengths = {
            part: len(match[1])
            for part, pattern in patterns.items()
            if (match := pattern.fullmatch(name))
        }
        return max(lengths, key=lambda part: lengths[part]) if lengths else None

    return find
