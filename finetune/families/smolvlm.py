"""SmolVLM2: Idefics3 with SmolLM2, under a name of its own because it also takes videos.

Source: arXiv 2504.05299 and transformers v5.23, models/smolvlm. SmolVLM-Instruct and its siblings
of 256M and 500M are stored as Idefics3, and are of that family.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from finetune.families.idefics3 import IDEFICS3


def build_processor(load: Callable[[type | None], Any], config: Any) -> Any:
    """The checkpoint's own processor where its packages are there; else Idefics3's, which does the
    same with pictures.

    `SmolVLMProcessor` cannot be made without its part for videos, which needs torchvision, nor
    without num2words, which spells the number of frames. Source: transformers v5.23,
    smolvlm/processing_smolvlm.py.
    """
    from transformers import Idefics3Processor
    from transformers.utils.import_utils import is_num2words_available, is_torchvision_available

    if is_torchvision_available() and is_num2words_available():
        return load(None)
    return load(Idefics3Processor)


SMOLVLM = replace(IDEFICS3, name="smolvlm", model_type="smolvlm", build_processor=build_processor)
