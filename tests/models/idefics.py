"""The first Idefics without a download: a tiny one as the Hub stores it, and the 9B on the meta
device.
"""

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PilImage
from safetensors.torch import save_file
from transformers import (
    AddedToken,
    BatchFeature,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaTokenizer,
)

from data_formats.chat import Conversation, Image

PARAMETERS = {
    "vision": 630_766_080,
    "connector": 1_560_481_552,
    "language": 6_738_440_192,
    "total": 8_929_687_824,
}
LORA = {
    ("language",): 19_988_480,
    ("connector",): 5_791_744,
    ("vision",): 5_898_240,
    ("language", "connector"): 25_780_224,
    ("language", "connector", "vision"): 31_678_464,
}

ADDED_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
_WORDS = "▁the ▁is ▁image ▁total User Assistant ▁What ▁sign ▁written ▁cat ▁A"


def build_tokenizer(num_added: int = 3) -> LlamaTokenizer:
    """A small stand-in of Llama's kind: pieces with a mark for the space before, then bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *string.printable[:94]]
    merges = []
    for word in _WORDS.split():
        for k in range(2, len(word) + 1):
            if word[:k] not in pieces:
                pieces.append(word[:k])
                merges.append((word[: k - 1], word[k - 1]))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    added = [AddedToken(token, normalized=False, special=True) for token in ADDED_TOKENS]
    tokenizer.add_tokens(added[:num_added], special_tokens=True)  # type: ignore[arg-type]
    return tokenizer


def save_tiny(folder: Path, *, num_added: int = 3, perceiver: bool = True) -> None:
    """A tiny random idefics-9b-instruct, laid out as on the Hub; the base has two added tokens, and
    without `perceiver` the cross-attention reads the patches.

    Its gates are open: as the library initialises them, no image would be seen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(num_added)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    _write(
        folder / "config.json",
        {
            "additional_vocab_size": num_added,
            "alpha_initializer": "zeros",
            "alpha_type": "float",
            "alphas_initializer_range": 0.0,
            "architectures": ["IdeficsForVisionText2Text"],
            "cross_layer_activation_function": "swiglu",
            "cross_layer_interval": 2,
            "dropout": 0.0,
            "freeze_lm_head": False,
            "freeze_text_layers": True,
            "freeze_text_module_exceptions": [],
            "freeze_vision_layers": True,
            "freeze_vision_module_exceptions": [],
            "hidden_act": "silu",
            "hidden_size": 32,
            "intermediate_size": 64,
            "max_position_embeddings": 2048,
            "model_type": "idefics",
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "perceiver_config": {
                "model_type": "idefics_perciever",
                "qk_layer_norms_perceiver": True,
                "resampler_depth": 2,
                "resampler_head_dim": 8,
                "resampler_n_heads": 2,
                "resampler_n_latents": 4,
                "use_resampler": True,
            },
            "qk_layer_norms": True,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "transformers_version": "4.33.0.dev0",
            "use_cache": True,
            "use_resampler": perceiver,
            "vision_config": {
                "attention_dropout": 0.0,
                "embed_dim": 16,
                "hidden_act": "gelu",
                "image_size": 28,
                "intermediate_size": 32,
                "layer_norm_eps": 1e-5,
                "model_type": "idefics",
                "num_attention_heads": 2,
                "num_channels": 3,
                "num_hidden_layers": 2,
                "patch_size": 14,
            },
            "vocab_size": len(tokenizer) - num_added,
            **ids,
        },
    )
    _write(folder / "generation_config.json", ids)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    _write(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            "tokenizer_class": "LlamaTokenizer",
            **names,
        },
    )
    added = list(ADDED_TOKENS[:num_added])
    _write(folder / "special_tokens_map.json", {"additional_special_tokens": added, **names})
    token_ids = {token: tokenizer.convert_tokens_to_ids(token) for token in added}
    _write(folder / "added_tokens.json", token_ids)
    _write(
        folder / "preprocessor_config.json",
        {
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_num_channels": 3,
            "image_processor_type": "IdeficsImageProcessor",
            "image_size": 28,
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "processor_class": "IdeficsProcessor",
        },
    )
    torch.manual_seed(0)
    model: Any = IdeficsForVisionText2Text(IdeficsConfig.from_pretrained(folder))
    weights = {}
    for name, tensor in model.state_dict().items():
        opened = torch.full_like(tensor, 0.7) if "alpha" in name else tensor * 4
        weights[name] = tensor.clone() if "norm" in name or name.endswith("ln.weight") else opened
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def full_size() -> Any:
    """idefics-9b-instruct on the meta device: the library's defaults for the 9B, with its vision
    width, perceiver and every fourth layer crossed, as in its configuration on the Hub (from
    memory; the Hub shows 8.93 billion parameters, too).
    """
    config = IdeficsConfig(
        additional_vocab_size=len(ADDED_TOKENS),
        cross_layer_interval=4,
        qk_layer_norms=True,
        use_resampler=True,
        vision_config={"embed_dim": 1280},
        perceiver_config={"use_resampler": True, "qk_layer_norms_perceiver": True},
    )
    with torch.device("meta"):
        return IdeficsForVisionText2Text(config)


def stock_inputs(
    processor: Any,
    conversation: Conversation,
    images: Sequence[PilImage.Image],
    *,
    generation_prompt: bool,
) -> BatchFeature:
    """What the library's own processor makes of a conversation, given to it as its documentation
    does: texts and images in one list.

    Texts of blanks alone are left out, since it would break up two images that stand together.
    """
    has_end = "<end_of_utterance>" in processor.tokenizer.get_vocab()
    left = iter(images)
    items: list[Any] = [""]
    for i, message in enumerate(conversation.messages):
        begins_with_image = bool(message.content) and isinstance(message.content[0], Image)
        header = message.role.capitalize() + (":" if begins_with_image else ": ")
        _append(items, ("\n" if i else "") + header)
        for part in message.content:
            _append(items, next(left) if isinstance(part, Image) else part.text)
        closed = "</s>" if message.role == "assistant" else ""
        _append(items, "<end_of_utterance>" if has_end else closed)
    if generation_prompt:
        _append(items, "\nAssistant:" if conversation.messages else "Assistant:")
    prompt = [item for item in items if not isinstance(item, str) or item.strip(" ")]
    return processor(text=[prompt], add_end_of_utterance_token=False, return_tensors="pt")


def _append(items: list[Any], item: Any) -> None:
    if isinstance(item, str) and isinstance(items[-1], str):
        items[-1] += item
    else:
        items.append(item)


def old_adapter_keys(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's weights under the names that PEFT gave them before transformers 5: the same."""
    return dict(weights)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
