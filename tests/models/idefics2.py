"""Idefics2 at full size without a download: the real vocabulary, and the model on the meta
device.
"""

from importlib.resources import files
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, Idefics2Config, Idefics2Processor, LlamaTokenizer
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics2.modeling_idefics2 import Idefics2ForConditionalGeneration

from finetune.model.load import EMBEDDED, model_location


def build_processor(image_seq_len: int = 64) -> Any:
    """The processor of idefics2-8b, from the Mistral-7B-v0.1 vocabulary in mistral-common.

    The chat template is nano's, whose text is held to the one on the Hub by a test of its own.
    """
    pieces = SentencePieceProcessor(str(files("mistral_common") / "data/tokenizer.model.v1"))
    vocabulary = {pieces.IdToPiece(i): i for i in range(len(pieces))}
    tokenizer = LlamaTokenizer(
        vocab=vocabulary, merges=_merges(pieces, vocabulary), add_bos_token=True, legacy=False
    )
    specials = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                AddedToken(s, normalized=False, special=True) for s in specials
            ]
        }  # type: ignore[dict-item]
    )
    tokenizer.pad_token = "<unk>"
    tokenizer.padding_side = "left"
    images = Idefics2ImageProcessorPil(
        do_image_splitting=False,
        size={"longest_edge": 980, "shortest_edge": 378},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    template = open(f"{model_location(EMBEDDED)}/chat_template.jinja").read()  # noqa: SIM115, PTH123
    return Idefics2Processor(images, tokenizer, image_seq_len=image_seq_len, chat_template=template)


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


def build_meta_model() -> Any:
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
