"""The model families, by the `model_type` of their `config.json`."""

from finetune.families.family import Family
from finetune.families.idefics2 import IDEFICS2

FAMILIES: dict[str, Family] = {family.model_type: family for family in (IDEFICS2,)}
