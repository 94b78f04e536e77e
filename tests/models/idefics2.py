"""Idefics2 without a download: with its real vocabulary, tiny on disk as the Hub stores it, and
full size on the meta device.
"""

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, Idefics2Config, Idefics2Processor, LlamaTokenizer
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics2.modeling_idefics2 import Idefics2ForConditionalGeneration

from finetune.model.load import EMBEDDED, model_location
from tests.models.stock import stock_inputs

__all__ = ["full_size", "save_tiny", "stock_inputs"]

PARAMETERS = {
    "vision": 417_792_240,
    "connector": 91_750_400 + 651_468_800,
    "language": 7_110_672_384 + 131_084_288,
    "total": 8_402_768_112,
}

LORA = {
    ("language",): 20_971_520,
    ("language", "connector"): 23_326_720,
    ("language", "connector", "vision"): 27_674_368,
}

SPECIAL_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
SIZE = {"longest_edge": 980, "shortest_edge": 378}
TINY_SIZE = {"longest_edge": 112, "shortest_edge": 28}


def build_processor(image_seq_len: int = 64) -> Any:
    """The processor of idefics2-8b, from the Mistral-7B-v0.1 vocabulary in mistral-common.

    The chat template is nano's, whose text is held to the one on the Hub by a test of its own.
    """
    images = Idefics2ImageProcessorPil(
        do_image_splitting=False, size=SIZE, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return Idefics2Processor(
        images, build_tokenizer(), image_seq_len=image_seq_len, chat_template=chat_template()
    )


def chat_template() -> str:
    return Path(model_location(EMBEDDED), "chat_template.jinja").read_text(encoding="utf-8")


def build_tokenizer() -> Any:
    vocabulary, merges = _vocabulary()
    tokenizer = LlamaTokenizer(
        vocab=dict(vocabulary), merges=list(merges), add_bos_token=True, legacy=False
    )
    added = [AddedToken(s, normalized=False, special=True) for s in SPECIAL_TOKENS]
    tokenizer.add_special_tokens({"additional_special_tokens": added})  # type: ignore[dict-item]
    tokenizer.pad_token = "<unk>"
    tokenizer.padding_side = "left"
    return tokenizer


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    pieces = SentencePieceProcessor(str(files("mistral_common") / "data/tokenizer.model.v1"))
    vocabulary = {pieces.IdToPiece(i): i for i in range(len(pieces))}
    return vocabulary, _merges(pieces, vocabulary)


def _merges(pieces: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """BPE merges in order: every way to build a normal piece from two others, best piece first."""
    merges = []
    for text, i in vocabulary.items():
        if pieces.IsControl(i) or pieces.IsUnknown(i) or pieces.IsByte(i):
            continue
        splits = [(text[:k], text[k:]) for k in range(1, len(text))]
        splits = [(a, b) for a, b in splits if a in vocabulary and b in vocabulary]
        splits.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(pieces.GetScore(i), pair) for pair in splits]
    merges.sort(key=lambda merge: -merge[0])
    return [pair for _, pair in merges]


def save_tiny(folder: Path, *, base: bool = False) -> None:
    """A random model of 8 x 8 patches with 4 latents, the real vocabulary, and the files of the
    Hub; of -8b-base, which does not split and has no template, with `base`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Idefics2ForConditionalGeneration"],
        "image_token_id": 32001,
        "model_type": "idefics2",
        "perceiver_config": {
            "hidden_size": 16,
            "model_type": "idefics2",
            "num_key_value_heads": 1,
            "resampler_depth": 2,
            "resampler_head_dim": 8,
            "resampler_n_heads": 2,
            "resampler_n_latents": 4,
        },
        "text_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-05,
            "vocab_size": 32003,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.40.0.dev0",
        "use_cache": True,
        "vision_config": {
            "hidden_size": 32,
            "image_size": 112,
            "intermediate_size": 64,
            "model_type": "idefics2",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "patch_size": 14,
        },
    }
    _write(folder / "config.json", config)
    ends = 2 if base else [2, 32002]
    generation = {"bos_token_id": 1, "eos_token_id": ends, "pad_token_id": 0}
    _write(folder / "generation_config.json", {**generation, "bad_words_ids": [[32000], [32001]]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Idefics2ForConditionalGeneration(Idefics2Config(**config))
        # the library starts weights small, so that tiny models would say nearly the same of all
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_image_splitting": not base,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5] * 3,
            "image_processor_type": "Idefics2ImageProcessor",
            "image_std": [0.5] * 3,
            "processor_class": "Idefics2Processor",
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": TINY_SIZE,
        },
    )
    processor = {"image_seq_len": 4, "processor_class": "Idefics2Processor"}
    _write(folder / "processor_config.json", processor)
    if not base:
        _write(folder / "chat_template.json", {"chat_template": chat_template()})
    build_tokenizer().save_pretrained(str(folder))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def full_size() -> Any:
    """idefics2-8b on the meta device, from the configuration on the Hub."""
    config = Idefics2Config(
        text_config={"model_type": "mistral", "vocab_size": 32003, "pad_token_id": 0},
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 980,
        },
        perceiver_config={
            "hidden_size": 4096,
            "resampler_n_latents": 64,
            "resampler_depth": 3,
            "resampler_n_heads": 16,
            "resampler_head_dim": 96,
            "num_key_value_heads": 4,
        },
    )
    with torch.device("meta"):
        return Idefics2ForConditionalGeneration(config)
