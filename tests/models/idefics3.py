"""Idefics3 without a download: a tiny checkpoint as the Hub stores it, and full-size ones on the
meta device.
"""

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from llama_models.llama3.tokenizer import Tokenizer as LlamaTokenizer
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from tests.models.stock import stock_inputs

__all__ = ["full_size", "old_adapter_keys", "save_tiny", "stock_inputs"]

# Source: the processor's files on the Hub, as quoted by public training code; SmolVLM's begins with
# <|im_start|> and is otherwise the same (transformers v5.23, smolvlm/processing_smolvlm.py).
TEMPLATE = (
    "<|begin_of_text|>{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SPECIALS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")

IDEFICS3_8B = {
    "image_token_id": 128257,
    "scale_factor": 2,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama",
        "vocab_size": 128259,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 10240,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128002,
    },
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 364,
    },
}

PARAMETERS = {
    "vision": 412_926_192,
    "connector": 18_874_368,
    "language": 8_030_285_824,
    "total": 8_462_086_384,
}
LORA = {
    ("language",): 20_971_520,  # as of every Llama 3 of 8B with seven linear layers each
    ("language", "connector"): 21_041_152,
    ("language", "connector", "vision"): 25_388_800,
}

TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
}
_TINY_TEXT = {
    "architectures": ["VLlama3ForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "torch_dtype": "bfloat16",
}

_CORPUS = (
    "What is the total of this invoice? The total is 12.50 euros, due on 3 May 2021.\n\n"
    "Describe the picture in a few words. A cat sits on a chair and looks at the window.\n"
    "Which year has the highest bar in the chart? The highest bar is the one of 1998.\n"
    "Assistant: User: System: Read the name on the card.\n\nThe name on the card is Anna Weber.\n"
)


def full_size() -> Any:
    """Idefics3-8B-Llama3 on the meta device; sizes from the configuration on the Hub (SigLIP-SO400M
    at 364 pixels, Llama-3.1-8B with three tokens more).
    """
    with torch.device("meta"):
        return Idefics3ForConditionalGeneration(Idefics3Config(**IDEFICS3_8B))


def save_tiny(folder: Path) -> None:
    """Two layers a part, tiles of 56 pixels in four tokens, in the files and key names of the
    Hub.
    """
    config = {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "image_seq_len": 4,
        "scale_factor": 2,
        "vision_config": TINY_VISION | {"model_type": "idefics3", "image_size": 56},
    }
    tokenizer = byte_level_bpe(("<|begin_of_text|>", "<|end_of_text|>", "<|reserved|>"), SPECIALS)
    tokenizer.post_processor = begins_with(tokenizer, "<|begin_of_text|>")
    settings = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|reserved|>"}
    save_checkpoint(
        folder, config, tokenizer, settings, TEMPLATE, tile_px=56, model_name="Idefics3"
    )


def save_checkpoint(
    folder: Path,
    config: dict[str, Any],
    tokenizer: Tokenizer,
    tokens: dict[str, str],
    template: str,
    *,
    tile_px: int,
    model_name: str,
) -> None:
    """The files of a checkpoint of 2024, before transformers 5: no `rope_parameters`, no nested
    processor configuration, the chat template in a JSON file.

    `tokens` names the bos, eos and pad tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = {f"{kind}_token_id": tokenizer.token_to_id(token) for kind, token in tokens.items()}
    config |= {
        "image_token_id": tokenizer.token_to_id("<image>"),
        "text_config": _TINY_TEXT | ids | {"vocab_size": tokenizer.get_vocab_size()},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.0",
        "use_cache": True,
    }
    _write(folder / "config.json", config)
    ends = (tokens["eos"], "<end_of_utterance>")
    stop = {"eos_token_id": [tokenizer.token_to_id(token) for token in dict.fromkeys(ends)]}
    _write(folder / "generation_config.json", {"_from_model_config": True} | ids | stop)

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    # these names are those of the files on the Hub: transformers 5 renamed none of them
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})

    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{kind}_token": token for kind, token in tokens.items()}
    processor_class = f"{model_name}Processor"
    _write(
        folder / "tokenizer_config.json",
        named
        | {
            "additional_special_tokens": list(SPECIALS),
            "clean_up_tokenization_spaces": False,
            "model_max_length": 8192,
            "processor_class": processor_class,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "truncation_side": "left",
        },
    )
    _write(folder / "chat_template.json", {"chat_template": template})
    patches = tile_px // config["vision_config"]["patch_size"]
    _write(
        folder / "processor_config.json",
        {
            "image_seq_len": (patches // config["scale_factor"]) ** 2,
            "processor_class": processor_class,
        },
    )
    _write(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_image_splitting": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": f"{model_name}ImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "max_image_size": {"longest_edge": tile_px},
            "processor_class": processor_class,
            "resample": 1,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": 4 * tile_px},
        },
    )


def byte_level_bpe(first: tuple[str, ...], last: tuple[str, ...]) -> Tokenizer:
    """A small vocabulary of bytes and pieces of words, with special tokens before and after."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    tokenizer.add_special_tokens(list(last))
    return tokenizer


def begins_with(tokenizer: Tokenizer, bos: str) -> Any:
    """A post-processor that puts the token first, as Llama 3's does."""
    return processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


def old_adapter_keys(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same: these modules had their names of today before transformers 5."""
    return dict(state_dict)


@cache
def real_processor() -> Any:
    """Idefics3-8B-Llama3's processor, with the vocabulary of Llama 3 that llama-models ships and
    the three tokens more of the Hub.
    """
    vocabulary = files("llama_models") / "llama3/tokenizer.model"
    ranked = LlamaTokenizer(Path(str(vocabulary))).special_tokens
    names = sorted(ranked, key=lambda name: ranked[name])
    backend = TikTokenConverter(str(vocabulary), extra_special_tokens=names).converted()
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    backend.post_processor = begins_with(backend, "<|begin_of_text|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|reserved_special_token_0|>",
    )
    images = Idefics3ImageProcessorPil()
    return Idefics3Processor(images, tokenizer, image_seq_len=169, chat_template=TEMPLATE)
