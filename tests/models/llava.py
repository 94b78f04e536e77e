"""LLaVA-1.5, tiny on disk as the Hub stores llava-hf/llava-1.5-7b-hf, and full size on the meta
device.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AddedToken, LlamaTokenizer, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from tests.models.stock import stock_inputs

__all__ = ["full_size", "old_adapter_keys", "save_tiny", "stock_inputs"]

NUM_TOKENS = 800  # without the two that LLaVA adds

PARAMETERS = {
    "vision": 303_507_456,
    "connector": 20_979_712,
    "language": 6_738_939_904,
    "total": 7_063_427_072,
}

LORA = {
    ("language",): 19_988_480,
    ("language", "connector"): 20_094_976,
    ("language", "connector", "vision"): 23_633_920,
}

# As on the Hub
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

CLIP_PREPROCESSING = {
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "CLIPImageProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
}

CORPUS = [
    "USER: ASSISTANT: What is written on the sign? The sign says stop.",
    "A chat between a curious user and an artificial intelligence assistant.",
    "Read the total of the receipt and answer with the number alone, as in 12.90 or 1,345.",
    "Which of these pictures shows the larger house, and what colour is its door?",
    "the quick brown fox jumps over the lazy dog 0123456789 THE QUICK BROWN FOX",
]


def save_tiny(folder: Path) -> None:
    """A random model of 3 x 3 patches with the files of the Hub and the key names of its weights,
    which are those of transformers 4.36.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = NUM_TOKENS + 32
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": NUM_TOKENS,
        "model_type": "llava",
        "pad_token_id": NUM_TOKENS + 1,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 32,
            "intermediate_size": 64,
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float32",
            "vocab_size": vocab_size,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.36.0.dev0",
        "vision_config": tiny_vision("clip_vision_model"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": vocab_size,
    }
    write_json(folder / "config.json", config)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": NUM_TOKENS + 1}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **special})
    save_tiny_weights(config, folder)
    edge = config["vision_config"]["image_size"]
    sizes = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
    write_json(
        folder / "preprocessor_config.json",
        {**CLIP_PREPROCESSING, **sizes, "processor_class": "LlavaProcessor"},
    )
    write_json(
        folder / "processor_config.json",
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    )
    write_json(folder / "chat_template.json", {"chat_template": TEMPLATE})
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    tokens = tokenizer.added_tokens_decoder.items()
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {str(i): token_facts(token) for i, token in tokens},
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "extra_special_tokens": {"image_token": "<image>"},
            "image_token": "<image>",
            "legacy": False,
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": "<pad>",
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
    )


def tiny_vision(model_type: str) -> dict[str, Any]:
    """A vision tower of 3 x 3 patches."""
    config = {
        "hidden_size": 32,
        "image_size": 42,
        "intermediate_size": 64,
        "model_type": model_type,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "patch_size": 14,
    }
    if model_type == "clip_vision_model":
        config |= {"projection_dim": 32, "vocab_size": 32000}
    return config


def save_tiny_weights(config: dict[str, Any], folder: Path) -> None:
    """Random weights of a configuration under their names before transformers 5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(LlavaConfig(**config))
        # the library starts weights small, so that tiny models would say nearly the same of all
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    weights = {old_key(key): value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def old_key(key: str) -> str:
    """A module's or a weight's name before transformers 4.52, as the Hub has it."""
    if key.startswith("lm_head."):
        return f"language_model.{key}"
    key = key.removeprefix("model.")
    key = key.replace("language_model.", "language_model.model.", 1)
    return key.replace("vision_tower.", "vision_tower.vision_model.", 1)


def old_adapter_keys(state_dict: dict[str, Any]) -> dict[str, Any]:
    """An adapter's weights under the names that PEFT gave them before transformers 4.52."""
    prefix = "base_model.model."
    return {prefix + old_key(key.removeprefix(prefix)): value for key, value in state_dict.items()}


def full_size() -> Any:
    """llava-1.5-7b-hf on the meta device: CLIP-L/14 of 336 pixels and Vicuna-7B v1.5, from the
    configuration on the Hub with what it leaves out from the library's defaults.
    """
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 336,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        image_token_index=32000,
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def tiny_tokenizer() -> LlamaTokenizer:
    """Llama's kind of vocabulary with `<image>` and `<pad>` after it."""
    vocabulary, merges = _vocabulary()
    tokenizer = LlamaTokenizer(
        vocab=dict(vocabulary), merges=list(merges), add_bos_token=True, legacy=False
    )
    added = [AddedToken(token, normalized=False, special=True) for token in ("<image>", "<pad>")]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.pad_token = "<pad>"
    return tokenizer


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Pieces and merges as sentencepiece orders them: special tokens, bytes, then the pieces."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=NUM_TOKENS, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    names += [f"<unused{i}>" for i in range(NUM_TOKENS - len(names))]
    vocabulary = {name: i for i, name in enumerate(names[:NUM_TOKENS])}
    merges = [(left, right) for left, right in model["merges"] if left + right in vocabulary]
    return vocabulary, merges


def token_facts(token: Any) -> dict[str, Any]:
    """An added token as `tokenizer_config.json` lists it."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
