"""The model families, and which one a configuration belongs to."""

from typing import Any

from finetune.families.family import Family
from finetune.families.idefics import IDEFICS, IDEFICS_BASE
from finetune.families.idefics2 import IDEFICS2
from finetune.families.idefics3 import IDEFICS3
from finetune.families.llava import LLAVA
from finetune.families.mantis import MANTIS
from finetune.families.mllama import MLLAMA
from finetune.families.smolvlm import SMOLVLM

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        IDEFICS2,
        IDEFICS3,
        SMOLVLM,
        LLAVA,
        MANTIS,
        MLLAMA,
        IDEFICS,
        IDEFICS_BASE,
    )
}


def family_of(config: Any) -> Family | None:
    """The first family that recognises a configuration, or None."""
    for family in FAMILIES.values():
        if family.model_type == config.model_type and family.recognises(config):
            return family
    return None
