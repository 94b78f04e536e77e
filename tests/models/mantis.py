"""Mantis with CLIP or SigLIP, tiny on disk as the Hub stores TIGER-Lab/Mantis-8B-*-llama3, and full
size on the meta device.
"""

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlavaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from tests.models.llava import (
    CLIP_PREPROCESSING,
    CORPUS,
    old_adapter_keys,
    save_tiny_weights,
    stock_inputs,
    tiny_vision,
    token_facts,
    write_json,
)

__all__ = ["full_size", "old_adapter_keys", "save_tiny", "stock_inputs"]

Vision = Literal["clip", "siglip"]

NUM_TOKENS = 600  # without the two that Mantis adds

_LANGUAGE = 8_030_277_632

PARAMETERS: dict[Vision, dict[str, int]] = {
    "clip": {
        "vision": 303_507_456,
        "connector": 20_979_712,
        "language": _LANGUAGE,
        "total": 303_507_456 + 20_979_712 + _LANGUAGE,
    },
    "siglip": {
        "vision": 428_225_600,
        "connector": 21_504_000,
        "language": _LANGUAGE,
        "total": 428_225_600 + 21_504_000 + _LANGUAGE,
    },
}

LORA: dict[Vision, dict[tuple[str, ...], int]] = {
    "clip": {
        ("language",): 20_971_520,
        ("language", "connector"): 21_078_016,
        ("language", "connector", "vision"): 24_616_960,
    },
    "siglip": {
        ("language",): 20_971_520,
        ("language", "connector"): 21_079_040,
        ("language", "connector", "vision"): 25_532_416,
    },
}

SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
ADDED_TOKENS = ["<image>", "<pad>"]

# Llama-3-Instruct's own, which cannot write the typed parts of an image
TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)

SIGLIP_PREPROCESSING = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
}

# How tiktoken parts a text before its bytes are merged; llama_models, llama3/tokenizer.py
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def save_tiny(folder: Path, vision: Vision = "siglip") -> None:
    """A random model of 3 x 3 patches with the files of the Hub, which name a processor that the
    library does not have, and the old key names of its weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    vocab_size = len(tokenizer)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": vocab_size - 2,
        "model_type": "llava",
        "pad_token_id": vocab_size - 1,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "hidden_size": 32,
            "intermediate_size": 64,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "torch_dtype": "float32",
            "vocab_size": vocab_size,
        },
        "torch_dtype": "float32",
        "transformers_version": "4.41.0",
        "vision_config": tiny_vision(f"{vision}_vision_model"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {
            "_from_model_config": True,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": vocab_size - 1,
        },
    )
    save_tiny_weights(config, folder)
    edge = config["vision_config"]["image_size"]
    square = {"height": edge, "width": edge}
    preprocessing = (
        {**CLIP_PREPROCESSING, "size": {"shortest_edge": edge}, "crop_size": square}
        if vision == "clip"
        else {**SIGLIP_PREPROCESSING, "size": square}
    )
    write_json(
        folder / "preprocessor_config.json",
        {**preprocessing, "processor_class": "MLlavaProcessor"},
    )
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    tokens = tokenizer.added_tokens_decoder.items()
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {str(i): token_facts(token) for i, token in tokens},
            "bos_token": "<|begin_of_text|>",
            "chat_template": TEMPLATE,
            "clean_up_tokenization_spaces": True,
            "eos_token": "<|end_of_text|>",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": "<pad>",
            "processor_class": "MLlavaProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def full_size(vision: Vision = "siglip") -> Any:
    """Mantis-8B-clip-llama3 or -siglip-llama3 on the meta device, from their configurations on the
    Hub: Llama-3-8B-Instruct with two more tokens, CLIP-L/14 of 336 pixels or SigLIP-SO400M/14 of
    384.
    """
    towers = {
        "clip": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 336,
            "projection_dim": 768,
        },
        "siglip": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 384,
        },
    }
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 128258,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        vision_config=towers[vision],
        image_token_index=128256,
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


@cache
def real_tokenizer() -> PreTrainedTokenizerFast:
    """The vocabulary of Mantis in full: Llama-3's, from the package llama_models, and two more."""
    path = files("llama_models") / "llama3/tokenizer.model"
    backend = TikTokenConverter(str(path)).tokenizer()
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
    # the order in which Meta numbered them; llama_models, llama3/tokenizer.py
    special = [*SPECIAL_TOKENS[:2], *reserved[:4], *SPECIAL_TOKENS[2:4], reserved[4]]
    return _wrapped(backend, [*special, "<|eot_id|>", *reserved[5:]])


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Llama-3's kind of vocabulary, small, with `<image>` and `<pad>` after it."""
    vocabulary, merges = _vocabulary()
    backend = Tokenizer(models.BPE(dict(vocabulary), list(merges), ignore_merges=True))
    return _wrapped(backend, SPECIAL_TOKENS)


def _wrapped(backend: Tokenizer, special_tokens: list[str]) -> PreTrainedTokenizerFast:
    tokens = [*special_tokens, *ADDED_TOKENS]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in tokens])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, backend.token_to_id(bos))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token="<|end_of_text|>",
        pad_token="<pad>",
    )


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Bytes, then what they are merged to, filled up to `NUM_TOKENS` with the special ones."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    num_pieces = NUM_TOKENS - len(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=num_pieces,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]
