"""The model families, and which one a configuration belongs to."""

from typing import Any

from finetune.families.family import Family
from finetune.families.idefics2 import IDEFICS2

FAMILIES: dict[str, Family] = {family.name: family for family in (IDEFICS2,)}


def family_of(config: Any) -> Family | None:
    """The first family that recognises a configuration, or None."""
    for family in FAMILIES.values():
        if family.model_type == config.model_type and family.recognises(config):
            return family
    return None
