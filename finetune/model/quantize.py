"""The base weights held in 4 or 8 bits, by bitsandbytes: those of the language part alone."""

import re
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from finetune.errors import ModelError
from finetune.families.family import Family
from finetune.model.parts import target_pattern
from finetune.processes import engine
from finetune.recipe import ModelSection


def quantization_config(
    model: ModelSection, family: Family, config: Any
) -> BitsAndBytesConfig | None:
    """What `from_pretrained` is to do; None where the weights stay as they are.

    NormalFloat 4 with the scales quantised as well (arXiv 2305.14314), or LLM.int8. Vision,
    connector and head stay in 16 bits: they are a tenth of the weights, and what they compute comes
    before, or after, everything else.

    FSDP shares out numbers of one kind, so the 4-bit ones are packed into numbers of the other
    weights' dtype then: whole bytes accelerate would leave on every card (1.15,
    utils/fsdp_utils.py, fsdp2_prepare_model), and another dtype would be converted.
    """
    if model.quantize == "none":
        return None
    parts = family.parts_of(config)
    kept = [prefix for part in ("vision", "connector") for prefix in parts[part].prefixes]
    kept.append("lm_head")  # a list of ours takes the place of the library's, which has the head
    if model.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    dtype = getattr(torch, model.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if engine() == "fsdp" else torch.uint8,
        llm_int8_skip_modules=kept,
    )


def refuse_other_modules(model: Any, family: Family, name: str) -> None:
    """Raise `ModelError` unless exactly the linear layers of the language part are quantised."""
    expected = re.compile(target_pattern([family.parts_of(model.config)["language"]]))
    for module_name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if is_quantized(module) != bool(expected.fullmatch(module_name)):
            was = "was" if is_quantized(module) else "was not"
            raise ModelError(
                f"{name}: {module_name} {was} quantised, against what is said of its part; the "
                "checkpoint is laid out differently; set model.quantize: none"
            )


def keep_weights_as_loaded(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    It does so at the first pass without gradients, and back again to save them, and each time
    rounds the scales to bfloat16: a model that was evaluated in between is then another one than
    the same folder loaded again. Source: bitsandbytes 0.50, nn/modules.py, Linear4bit.forward.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether bitsandbytes holds this layer's weight."""
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")
