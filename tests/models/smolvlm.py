"""SmolVLM2 without a download: a tiny checkpoint as the Hub stores it, and full-size ones on the
meta device. SmolVLM-Instruct, which is stored as Idefics3, is here beside them.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from tests.models.idefics3 import (
    SPECIALS,
    TINY_VISION,
    byte_level_bpe,
    old_adapter_keys,
    save_checkpoint,
    stock_inputs,
)
from tests.models.idefics3 import TEMPLATE as IDEFICS3_TEMPLATE

__all__ = ["full_size", "old_adapter_keys", "save_tiny", "stock_inputs"]

# Source: transformers v5.23, smolvlm/processing_smolvlm.py, DEFAULT_CHAT_TEMPLATE without videos;
# as in chat_template.json of SmolVLM2-500M-Video-Instruct.
TEMPLATE = IDEFICS3_TEMPLATE.replace("<|begin_of_text|>", "<|im_start|>").replace(
    "message['role'].capitalize()", "message['role'] | capitalize"
)
PLACES = tuple(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7))

SMOLVLM2_2B = {
    "image_token_id": 49190,
    "scale_factor": 3,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama",
        "vocab_size": 49280,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 2,
    },
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 384,
    },
}
SMOLVLM_2B = SMOLVLM2_2B | {
    "image_token_id": 49153,
    "text_config": SMOLVLM2_2B["text_config"] | {"vocab_size": 49155},
}
SMOLVLM2_500M = {
    "image_token_id": 49190,
    "scale_factor": 4,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama",
        "vocab_size": 49280,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "pad_token_id": 2,
    },
    "vision_config": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    },
}
SMOLVLM2_256M = SMOLVLM2_500M | {
    "text_config": SMOLVLM2_500M["text_config"]
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
}

PARAMETERS = {
    "vision": 412_987_248,
    "connector": 21_233_664,
    "language": 1_812_563_968,
    "total": 2_246_784_880,  # as the Hub shows for SmolVLM2-2.2B-Instruct
}
LORA = {
    ("language",): 9_043_968,
    ("language", "connector"): 9_143_296,
    ("language", "connector", "vision"): 13_490_944,
}


def full_size(config: dict[str, Any] = SMOLVLM2_2B) -> Any:
    """SmolVLM2-2.2B-Instruct, or another, on the meta device; sizes from the configurations on the
    Hub, as quoted by public ports of the models.
    """
    with torch.device("meta"):
        return SmolVLMForConditionalGeneration(SmolVLMConfig(**config))


def save_tiny(folder: Path) -> None:
    """Two layers a part, tiles of 88 pixels, which are no whole patches, as 384 are not; four
    tokens each.
    """
    vision = TINY_VISION | {"model_type": "smolvlm_vision", "image_size": 88}
    config = {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "pad_token_id": 128002,  # stands in every SmolVLM2's file, and means nothing
        "scale_factor": 3,
        "vision_config": vision,
    }
    first = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = byte_level_bpe(first, ("<global-img>", *PLACES, *SPECIALS))
    tokens = {"bos": "<|im_start|>", "eos": "<end_of_utterance>", "pad": "<|im_end|>"}
    save_checkpoint(folder, config, tokenizer, tokens, TEMPLATE, tile_px=88, model_name="SmolVLM")
