"""Mantis: many images in one row, CLIP or SigLIP, a two-layer perceptron, Llama-3.

Built as LLaVA-1.5 is. Source: arXiv 2405.01483; TIGER-AI-Lab/Mantis, mantis/models/conversation.py
and mantis/models/mllava/processing_llava.py.
"""

from dataclasses import replace
from typing import Any

from finetune.families.family import Template
from finetune.families.llava import LLAVA, knows_two_more_tokens, padding_processor

_CLIP = "clip_vision_model"
_SIGLIP = "siglip_vision_model"

# The system line is the one that every row of the training had, odd as it reads. The numbers of the
# images stand in the template, not in our code, so that plain transformers writes them, too.
LLAMA3_TEMPLATE = Template(
    text=(
        "{% if not messages or messages[0]['role'] != 'system' %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\\n\\n"
        "You are a pirate chatbot who always responds in pirate speak!<|eot_id|>' }}{% endif %}"
        "{% set images = namespace(count=0) %}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{% set images.count = images.count + 1 %}"
        "{{ '(image ' ~ images.count ~ ': <Image><image></Image>)' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    turn_end_token="<|eot_id|>",
)


def build_processor(load: Any, config: Any) -> Any:
    """By hand: the checkpoints name `MLlavaProcessor`, which the library does not have.

    CLIP's class token is counted, since the strategy `default` drops it; SigLIP has none. The CLIP
    variant was trained on images whose sides were cut off; here they are padded instead, as
    nothing is to be lost. SigLIP bends the whole image to a square.
    """
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = load(AutoTokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.image_token_index + 1)
    is_clip = config.vision_config.model_type == _CLIP
    if is_clip:
        image_processor = padding_processor(load(CLIPImageProcessorPil), config)
    else:
        image_processor = load(SiglipImageProcessorPil)
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(is_clip),
    )


def why_untrainable(config: Any) -> str | None:
    """Only the towers whose image tokens and prompts are known."""
    vision, text = config.vision_config.model_type, config.text_config.model_type
    if vision in (_CLIP, _SIGLIP) and text == "llama":
        return None
    return (
        f"its towers are {vision} and {text}, not those of Mantis ({_CLIP} or {_SIGLIP}, and "
        "llama); use TIGER-Lab/Mantis-8B-clip-llama3 or TIGER-Lab/Mantis-8B-siglip-llama3"
    )


MANTIS = replace(
    LLAVA,
    name="mantis",
    turn_end_token="<|eot_id|>",
    closes_every_turn=True,
    own_template=LLAMA3_TEMPLATE,
    recognises=knows_two_more_tokens,
    build_processor=build_processor,
    untrainable=why_untrainable,
)
