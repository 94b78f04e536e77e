"""Checkpoints laid out as on the Hub, put together of backbones that were trained alone.

Their connectors are as the library starts them, from a seed.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionModel,
    GenerationConfig,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsProcessor,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from finetune.families.llava import VICUNA_TEMPLATE
from scripts.finding_backbones import SPECIALS, WIDTH, build_tokenizer
from scripts.finding_boards import BOARD_PX
from scripts.nano_model import CHAT_TEMPLATE

HALF = [0.5, 0.5, 0.5]  # mean and deviation of pixels; the towers were trained on -1 to 1


def save_llava(folder: Path, language: LlamaForCausalLM, tower: Any, *, seed: int) -> None:
    """LLaVA-1.5's architecture: a perceptron of two layers turns each patch into a token."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model: Any = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=language.config.to_dict(),
            vision_config=tower.config.to_dict(),
            image_token_index=_id(tokenizer, "<image>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        )
    )
    _copy(language.model, model.model.language_model)
    _copy(language.lm_head, model.lm_head)
    _copy(tower, model.model.vision_tower)
    model.generation_config = _generation([2])
    processor = LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": BOARD_PX},
            crop_size={"height": BOARD_PX, "width": BOARD_PX},
            image_mean=HALF,
            image_std=HALF,
        ),
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA_TEMPLATE.text,
    )
    _save(model, processor, folder)


def save_idefics(folder: Path, language: LlamaForCausalLM, tower: Any, *, seed: int) -> None:
    """The first Idefics' architecture: before every layer, gated attention to the patches."""
    tokenizer = build_tokenizer()
    num_own = len(tokenizer) - len(SPECIALS)
    config, vision = language.config, tower.config
    torch.manual_seed(seed)
    model: Any = IdeficsForVisionText2Text(
        IdeficsConfig(
            vocab_size=num_own,
            additional_vocab_size=len(SPECIALS),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            cross_layer_interval=1,
            use_resampler=False,
            qk_layer_norms=True,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            vision_config={
                "embed_dim": vision.hidden_size,
                "hidden_act": vision.hidden_act,
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "intermediate_size": vision.intermediate_size,
                "num_attention_heads": vision.num_attention_heads,
                "num_hidden_layers": vision.num_hidden_layers,
                "layer_norm_eps": vision.layer_norm_eps,
            },
        )
    )
    _copy(language.model.layers, model.model.layers)
    _copy(language.model.norm, model.model.norm)
    _copy(tower, model.model.vision_model)
    embeddings: Any = language.model.embed_tokens.weight.data
    head: Any = language.lm_head.weight.data
    both = len(tokenizer)
    model.model.embed_tokens.weight.data.copy_(embeddings[:num_own])
    model.model.embed_tokens.additional_embedding.weight.data.copy_(embeddings[num_own:both])
    model.lm_head.weight.data.copy_(head[:num_own])
    model.lm_head.additional_fc.weight.data.copy_(head[num_own:both])
    model.generation_config = _generation([2])
    processor = IdeficsProcessor(
        IdeficsImageProcessorPil(image_size=BOARD_PX, image_mean=HALF, image_std=HALF), tokenizer
    )
    _save(model, processor, folder)


def save_idefics2(
    folder: Path, language: LlamaForCausalLM, tower: Any, *, num_latents: int, seed: int
) -> None:
    """Idefics2's architecture: a perceiver pools the patches to so many latents."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model: Any = Idefics2ForConditionalGeneration(
        Idefics2Config(
            text_config={**_text(language), "model_type": "mistral", "sliding_window": None},
            vision_config=_vision(tower),
            perceiver_config={
                "hidden_size": WIDTH,
                "resampler_n_latents": num_latents,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
                "rms_norm_eps": language.config.rms_norm_eps,
            },
            image_token_id=_id(tokenizer, "<image>"),
            tie_word_embeddings=False,
        )
    )
    # the library starts them as ones; all alike, they would stay alike
    nn.init.normal_(model.model.connector.perceiver_resampler.latents)
    _fill(model, language, tower)
    processor = Idefics2Processor(
        Idefics2ImageProcessorPil(
            do_image_splitting=False,
            size={"longest_edge": BOARD_PX, "shortest_edge": BOARD_PX},
        ),
        tokenizer,
        image_seq_len=num_latents,
        chat_template=CHAT_TEMPLATE,
    )
    _save(model, processor, folder)


def save_idefics3(folder: Path, language: LlamaForCausalLM, tower: Any, *, seed: int) -> None:
    """Idefics3's architecture without its shuffling of pixels: each patch is a token, through one
    matrix.
    """
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model: Any = Idefics3ForConditionalGeneration(
        Idefics3Config(
            text_config={**_text(language), "model_type": "llama"},
            vision_config=_vision(tower),
            scale_factor=1,
            image_token_id=_id(tokenizer, "<image>"),
            tie_word_embeddings=False,
        )
    )
    _fill(model, language, tower)
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(
            do_image_splitting=False,
            size={"longest_edge": BOARD_PX},
            max_image_size={"longest_edge": BOARD_PX},
        ),
        tokenizer,
        image_seq_len=(BOARD_PX // tower.config.patch_size) ** 2,
        chat_template=CHAT_TEMPLATE,
    )
    _save(model, processor, folder)


def _fill(model: Any, language: LlamaForCausalLM, tower: Any) -> None:
    _copy(language.model, model.model.text_model)
    _copy(language.lm_head, model.lm_head)
    _copy(tower, model.model.vision_model)
    end = _id(build_tokenizer(), "<end_of_utterance>")
    model.generation_config = _generation([2, end])


def _text(language: LlamaForCausalLM) -> dict[str, Any]:
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings rms_norm_eps bos_token_id eos_token_id "
        "pad_token_id"
    )
    return {name: getattr(language.config, name) for name in names.split()}


def _vision(tower: Any) -> dict[str, Any]:
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size"
    )
    return {name: getattr(tower.config, name) for name in names.split()}


def _copy(source: Any, target: Any) -> None:
    """All weights, name for name; buffers that only one of them keeps do not matter."""
    names = {name for name, _ in target.named_parameters()}
    weights = {name: value for name, value in source.state_dict().items() if name in names}
    assert weights.keys() == names, names.symmetric_difference(weights)
    target.load_state_dict(weights, strict=False)


def _generation(eos: list[int]) -> GenerationConfig:
    return GenerationConfig(bos_token_id=1, eos_token_id=eos, pad_token_id=0)


def _id(tokenizer: Any, token: str) -> int:
    return tokenizer.convert_tokens_to_ids(token)


def _save(model: Any, processor: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# Name of each model: the backbones that it is put together of, and how
MODELS: dict[str, tuple[str, str, Callable[..., None]]] = {
    "autoregressive": ("language-2", "clip-2", save_llava),
    "cross-attention": ("language-2", "clip-2", save_idefics),
    "stronger-language": ("language-3", "clip-1", save_llava),
    "stronger-vision": ("language-1", "clip-3", save_llava),
    "latents-64": ("language-2", "fine-2", partial(save_idefics2, num_latents=64)),
    "latents-16": ("language-2", "fine-2", partial(save_idefics2, num_latents=16)),
    "latents-4": ("language-2", "fine-2", partial(save_idefics2, num_latents=4)),
    "no-pooling": ("language-2", "fine-2", save_idefics3),
}


def save_model(name: str, backbones: Path, folder: Path, *, seed: int) -> None:
    """One of `MODELS`, of backbones in `backbones`, with a connector that `seed` starts."""
    language, tower, save = MODELS[name]
    tower_class = CLIPVisionModel if tower.startswith("clip") else Idefics2VisionTransformer
    save(
        folder,
        LlamaForCausalLM.from_pretrained(backbones / language),
        tower_class.from_pretrained(backbones / tower),
        seed=seed,
    )
