"""LLaVA-1.5: CLIP, a two-layer perceptron, Vicuna; and what else is built like it.

Source: arXiv 2310.03744, transformers v5.23, models/llava, and the chat template of
llava-hf/llava-1.5-7b-hf.

Shape letters: B rows, T tokens, N views of the batch, n views of one call, C channels (3), H and W
pixels of a view, P patches and the class token, D width of the tower.
"""

from collections.abc import Sequence
from typing import Any

import torch

from finetune.data.packed_views import normalised
from finetune.data.views import Canvas, ImagePlan, View
from finetune.errors import DataError
from finetune.families.family import Family, Part, Template, ViewedRow, ViewEncoder
from finetune.recipe import ImagesSection

IMAGE = "<image>"

# Pillow holds four bytes a pixel, so a padded picture of this side takes a GiB for a moment
LARGEST_SQUARE_PX = 16_384

PARTS = {
    "language": Part(
        prefixes=("model.language_model",),
        linears=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "connector": Part(
        prefixes=("model.multi_modal_projector",),
        linears=("linear_1", "linear_2"),
    ),
    "vision": Part(
        prefixes=("model.vision_tower",),
        linears=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    ),
}

# The checkpoint's own template puts a space after an answer and never </s>, so a model that learns
# from it never stops. Vicuna v1.5 was trained with </s> right after the answer and the next turn
# right after that; prompts are the checkpoint's own.
# Source: haotian-liu/LLaVA, llava/conversation.py, conv_llava_v1, SeparatorStyle.TWO.
VICUNA_TEMPLATE = Template(
    text=(
        "{% for message in messages %}"
        "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
        "{% for part in message['content'] if part['type'] == 'image' %}"
        "{{ '<image>\\n' }}{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}"
        "{{ part['text'] }}{% if message['role'] != 'assistant' %}{{ ' ' }}{% endif %}{% endfor %}"
        "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    turn_end_token="</s>",
    closes_every_turn=False,
)


def plan_image(
    width_px: int, height_px: int, images: ImagesSection, image_processor: Any
) -> ImagePlan:
    """One view of one size: the image padded to a square in the mean colour where the processor
    pads, bent to the square where it does not.

    Raises `DataError` for an image whose square is too large to be held.
    """
    edge = _edge_px(image_processor)
    side = max(width_px, height_px)
    if not getattr(image_processor, "do_pad", False) or width_px == height_px:
        return ImagePlan((View((0, 0, width_px, height_px), edge, edge),))
    if side > LARGEST_SQUARE_PX:
        raise DataError(
            f"is {width_px:,} x {height_px:,} pixels, and padding it to a square would take "
            f"{side:,} x {side:,}, more than {LARGEST_SQUARE_PX:,} x {LARGEST_SQUARE_PX:,}; "
            "cut it into several images, or scale it down"
        )
    red, green, blue = (int(share * 255) for share in image_processor.image_mean)
    canvas = Canvas(
        side,
        side,
        left_px=(side - width_px) // 2,
        upper_px=(side - height_px) // 2,
        colour=(red, green, blue),
    )
    return ImagePlan((View((0, 0, side, side), edge, edge),), canvas=canvas)


def _edge_px(image_processor: Any) -> int:
    """The side of the square that the vision tower takes."""
    size = dict(image_processor.size)
    return size.get("shortest_edge") or size["height"]


def image_text(processor: Any, plan: ImagePlan, number: int) -> str:
    """An image token for every patch that the connector is given."""
    return processor.image_token * num_image_tokens(processor, plan)


def num_image_tokens(processor: Any, plan: ImagePlan) -> int:
    """The patches, and the class token where the tower has one, less the first of them, which the
    strategy `default` drops.

    For CLIP that one is the class token. SigLIP has none, and loses its first patch, as in training
    (728 of 27 x 27). Source: transformers v5.23, llava/processing_llava.py, replace_image_token.
    """
    patch = processor.patch_size
    dropped = processor.vision_feature_select_strategy == "default"
    return sum(
        (view.width_px // patch) * (view.height_px // patch)
        + processor.num_additional_image_tokens
        - dropped
        for view in plan.views
    )


def stack_views(
    rows: Sequence[ViewedRow], processor: Any, input_ids_BT: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`pixel_values` [N, C, H, W] (rescaled and normalised, float32), row after row, or nothing
    where there is no view.

    The model puts their features in the places of the image tokens in the order of the ids, so
    neither padding nor rows without an image matter.
    """
    views = [normalised(view, processor.image_processor) for row in rows for view in row.views]
    return {"pixel_values": torch.stack(views)} if views else {}


def tower(inner: Any, pixels_nCHW: torch.Tensor) -> torch.Tensor:
    """The hidden states that the configuration chooses [n, P, D]: those of one layer, or of several
    side by side, less the first patch with the strategy `default`.

    The layers after the last of these do not run, nor does the pooling behind them, as they would
    in the module as a whole. Its parts are called as modules.
    """
    config, vision = inner.config, inner.vision_tower
    chosen = config.vision_feature_layer
    places = [chosen] if isinstance(chosen, int) else list(chosen)
    num_layers = len(vision.encoder.layers)
    depths = [place if place >= 0 else num_layers + 1 + place for place in places]
    hidden_nPD = vision.embeddings(pixels_nCHW)
    if hasattr(vision, "pre_layrnorm"):  # CLIP's, spelt so in the checkpoints; SigLIP has none
        hidden_nPD = vision.pre_layrnorm(hidden_nPD)
    after = {0: hidden_nPD}
    for depth, layer in enumerate(vision.encoder.layers[: max(depths)], start=1):
        hidden_nPD = layer(hidden_nPD, None)  # no mask: all patches see each other
        if depth in depths:
            after[depth] = hidden_nPD
    seen = torch.cat([after[depth] for depth in depths], dim=-1)
    return seen[:, 1:] if config.vision_feature_select_strategy == "default" else seen


def build_processor(load: Any, config: Any) -> Any:
    """The checkpoint's processor, which then pads images where it would cut off their sides."""
    processor = load(None)
    processor.image_processor = padding_processor(processor.image_processor, config)
    return processor


def padding_processor(image_processor: Any, config: Any) -> Any:
    """A CLIP image processor's settings in the library's own processor that pads to a square.

    The one stored with the checkpoint scales the short edge and cuts what the long edge has more: a
    page loses its head and foot without a word. LLaVA-1.5 was trained with padding (arXiv
    2310.03744, `image_aspect_ratio: pad`). The crop stays on as the library has it: after the
    padding there is nothing left for it to cut.
    """
    # the torchvision one, which another machine may have, resamples to other pixels
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    edge = config.vision_config.image_size
    return LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": edge},
        crop_size={"height": edge, "width": edge},
        resample=image_processor.resample,
        image_mean=list(image_processor.image_mean),
        image_std=list(image_processor.image_std),
        rescale_factor=image_processor.rescale_factor,
    )


def help_old_adapters_load(model: Any) -> None:
    """Have PEFT find an adapter of the connector under its name before transformers 4.52.

    PEFT 0.21 takes the library's renaming of it back, since `model.multi_modal_projector...` is
    also how the old name `base_model.model.multi_modal_projector...` ends; the adapter then stays
    random with a warning alone. This attribute PEFT applies before that (peft_model.py,
    from_pretrained), and transformers 5 itself does not read it.
    """
    model._checkpoint_conversion_mapping = {"^multi_modal_projector": "model.multi_modal_projector"}


def knows_two_more_tokens(config: Any) -> bool:
    """Whether the vocabulary ends with the image token and one more, as Mantis extends it;
    LLaVA-1.5 fills its own up to a multiple of 64.
    """
    return config.text_config.vocab_size == config.image_token_index + 2


def why_untrainable(config: Any) -> str | None:
    """`model_type: llava` stands on many models whose prompts and image sizes are others."""
    towers = config.vision_config.model_type, config.text_config.model_type
    if towers == ("clip_vision_model", "llama") and config.text_config.eos_token_id == 2:
        return None
    return (
        f"its model_type is llava, but its towers are {towers[0]} and {towers[1]} with "
        f"{config.text_config.eos_token_id} as the end of a text, not those of LLaVA-1.5 "
        "(clip_vision_model, llama, 2) or Mantis; use llava-hf/llava-1.5-7b-hf or -13b-hf, "
        "or a model of another family"
    )


VIEW_ENCODER = ViewEncoder(
    tower, connect=lambda inner, hidden_nPD: inner.multi_modal_projector(hidden_nPD)
)

LLAVA = Family(
    name="llava",
    model_type="llava",
    parts_of=lambda config: PARTS,
    image_tokens=(IMAGE,),
    turn_end_token="</s>",
    closes_every_turn=False,
    own_template=VICUNA_TEMPLATE,
    plan_image=plan_image,
    image_text=image_text,
    num_image_tokens=num_image_tokens,
    stack=stack_views,
    view_encoder=VIEW_ENCODER,
    set_images=lambda processor, images: None,  # one size, never split
    own_images=lambda processor: {},
    recognises=lambda config: not knows_two_more_tokens(config),
    build_processor=build_processor,
    adjust_model=help_old_adapters_load,
    untrainable=why_untrainable,
)
