"""Idefics2: SigLIP, a perceiver that pools each view to a fixed number of latents, Mistral.

Source: arXiv 2405.02246 and transformers v5.23, models/idefics2.

Shape letters: B rows, T tokens, N views of the row that has most, C channels (3), H and W pixels of
the largest view.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from finetune.data.packed_views import normalised
from finetune.data.views import Box, ImagePlan, Size, View
from finetune.errors import DataError
from finetune.families.family import Family, Part, Template, ViewedRow, ViewEncoder
from finetune.recipe import ImagesSection

FAKE = "<fake_token_around_image>"
IMAGE = "<image>"

_ATTENTION = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")

PARTS = {
    "language": Part(
        prefixes=("model.text_model",),
        linears=(*_ATTENTION, "o_proj", *_MLP),
    ),
    "connector": Part(
        prefixes=("model.connector.modality_projection", "model.connector.perceiver_resampler"),
        linears=(*_ATTENTION, "o_proj", *_MLP),
    ),
    "vision": Part(
        prefixes=("model.vision_model",),
        linears=(*_ATTENTION, "out_proj", "fc1", "fc2"),
    ),
}

# The base was never trained on <end_of_utterance>: neither its embedding nor its row of the head
# means anything, and a frozen head could not learn to stop there. </s> it knows.
BASE_TEMPLATE = Template(
    text=(
        "{% for message in messages %}{{ message['role'].capitalize() }}"
        "{% if message['content'] and message['content'][0]['type'] == 'image' %}{{ ':' }}"
        "{% else %}{{ ': ' }}{% endif %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<image>' }}{% endif %}"
        "{% endfor %}"
        "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    turn_end_token="</s>",
    closes_every_turn=False,
)


def resize_to_fit(
    width_px: int, height_px: int, *, shortest_edge_px: int, longest_edge_px: int
) -> Size:
    """The size Idefics2 sees: the long edge brought down to its limit, then each edge up to the
    short one.

    The second step may bend the aspect ratio of very long images (100 x 5000 becomes 378 x 980), as
    the model was trained. The divisions are the library's own floating-point ones: exact integers
    would differ by a pixel at times. Source: transformers v5.23,
    idefics2/image_processing_pil_idefics2.py, get_resize_output_image_size.
    """
    aspect_ratio = width_px / height_px
    if width_px >= height_px and width_px > longest_edge_px:
        width_px, height_px = longest_edge_px, int(longest_edge_px / aspect_ratio)
    elif height_px > width_px and height_px > longest_edge_px:
        width_px, height_px = int(longest_edge_px * aspect_ratio), longest_edge_px
    return max(width_px, shortest_edge_px), max(height_px, shortest_edge_px)


def quarters(width_px: int, height_px: int) -> list[Box]:
    """The four quarter crops in reading order; with odd sizes the right and lower ones take the
    extra pixel.

    Source: transformers v5.23, idefics2/image_processing_pil_idefics2.py, split_images.
    """
    middle_x, middle_y = width_px // 2, height_px // 2
    return [
        (0, 0, middle_x, middle_y),
        (middle_x, 0, width_px, middle_y),
        (0, middle_y, middle_x, height_px),
        (middle_x, middle_y, width_px, height_px),
    ]


def plan_image(
    width_px: int, height_px: int, images: ImagesSection, image_processor: Any = None
) -> ImagePlan:
    """The quarters, if split, then the whole.

    `auto` splits only where the whole view would lose pixels, that is, where an edge is above
    `longest_edge_px`. Raises `DataError` for an image of one pixel's width or height that would be
    split.
    """
    longest_edge_px, shortest_edge_px = images.longest_edge_px, images.shortest_edge_px
    assert longest_edge_px, "the settings were not resolved"
    assert shortest_edge_px, "the settings were not resolved"
    whole = (0, 0, width_px, height_px)
    is_split = images.split == "always" or (
        images.split == "auto" and max(width_px, height_px) > longest_edge_px
    )
    if is_split and min(width_px, height_px) < 2:
        raise DataError(
            f"is {width_px} x {height_px} pixels, too small to be split in four; "
            "leave it out, or set images.split: never"
        )
    boxes = [*quarters(width_px, height_px), whole] if is_split else [whole]
    views = []
    for box in boxes:
        left, upper, right, lower = box
        width, height = resize_to_fit(
            right - left,
            lower - upper,
            shortest_edge_px=shortest_edge_px,
            longest_edge_px=longest_edge_px,
        )
        views.append(View(box, width, height))
    tiles = 2 if is_split else 0
    return ImagePlan(tuple(views), rows=tiles, cols=tiles)


def image_text(processor: Any, plan: ImagePlan, number: int) -> str:
    """Fake tokens around the latents of each view; `finish_text` merges those that meet."""
    return (FAKE + IMAGE * processor.image_seq_len + FAKE) * len(plan.views)


_CLOSING_FAKE = re.compile(rf"{re.escape(FAKE)}(?=[^\s<])")


def finish_text(processor: Any, text: str) -> str:
    """Adjacent views share their fake token, and a word never touches one.

    Source: transformers v5.23, idefics2/processing_idefics2.py, __call__.
    """
    return _CLOSING_FAKE.sub(f"{FAKE} ", text.replace(FAKE + FAKE, FAKE))


def num_image_tokens(processor: Any, plan: ImagePlan) -> int:
    """The latents of every view."""
    return len(plan.views) * processor.image_seq_len


def stack_padded_views(
    rows: Sequence[ViewedRow], processor: Any, input_ids_BT: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Views padded to the largest, each with the mask that says what is padding.

    Gives `pixel_values` [B, N, C, H, W] (rescaled and normalised, float32) and
    `pixel_attention_mask` [B, N, H, W] (bool; a byte a pixel, where the processor's int64 takes
    eight), or nothing where there is no view. Rows without a view, or with fewer than others, get
    views of zeros, which the model drops.
    """
    views = [row.views for row in rows]
    flat: list[np.ndarray] = [view for row in views for view in row]
    if not flat:
        return {}
    num_views = max(len(row) for row in views)
    height = max(view.shape[1] for view in flat)
    width = max(view.shape[2] for view in flat)
    pixels_BNCHW = torch.zeros((len(views), num_views, 3, height, width))
    mask_BNHW = torch.zeros((len(views), num_views, height, width), dtype=torch.bool)
    for i, row in enumerate(views):
        for n, view in enumerate(row):
            _, h, w = view.shape
            pixels_BNCHW[i, n, :, :h, :w] = normalised(
                torch.from_numpy(view), processor.image_processor
            )
            mask_BNHW[i, n, :h, :w] = True
    return {"pixel_values": pixels_BNCHW, "pixel_attention_mask": mask_BNHW}


def tower(inner: Any, pixels_nCHW: torch.Tensor) -> torch.Tensor:
    """The last hidden states of views without padding [n, P, D]."""
    num_views, _, height, width = pixels_nCHW.shape
    patch = inner.config.vision_config.patch_size
    is_patch = torch.ones(
        (num_views, height // patch, width // patch), dtype=torch.bool, device=pixels_nCHW.device
    )
    seen = inner.vision_model(pixel_values=pixels_nCHW, patch_attention_mask=is_patch)
    return seen.last_hidden_state


def tower_of_sizes(inner: Any, groups: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`tower` of groups of views, each of one size [n, C, H, W], in one pass of the layers.

    Their parts are called as modules, since the module as a whole takes one size. The layers get no
    mask: it is for their attention to keep views apart (`finetune.model.varlen`).
    """
    vision, patch = inner.vision_model, inner.config.vision_config.patch_size
    patches = []
    for pixels_nCHW in groups:
        num_views, _, height, width = pixels_nCHW.shape
        shape = (num_views, height // patch, width // patch)
        is_patch = torch.ones(shape, dtype=torch.bool, device=pixels_nCHW.device)
        patches.append(vision.embeddings(pixel_values=pixels_nCHW, patch_attention_mask=is_patch))
    one_1PD = torch.cat([each.flatten(0, 1) for each in patches])[None]
    hidden_1PD = vision.encoder(inputs_embeds=one_1PD, attention_mask=None).last_hidden_state
    parts = vision.post_layernorm(hidden_1PD)[0].split([each[..., 0].numel() for each in patches])
    return [part.view_as(each) for part, each in zip(parts, patches, strict=True)]


def connect(inner: Any, hidden_nPD: torch.Tensor) -> torch.Tensor:
    """Their latents [n, L, E]."""
    is_patch = torch.ones(hidden_nPD.shape[:2], dtype=torch.bool, device=hidden_nPD.device)
    return inner.connector(hidden_nPD, attention_mask=is_patch)


def set_images(processor: Any, images: ImagesSection) -> None:
    """On the object, because a per-call `do_image_splitting` changes the views but not the number
    of image tokens. With `split: auto` the processor does not split: each image decides for itself.
    """
    processor.image_processor.do_image_splitting = images.split == "always"
    processor.image_processor.size = {
        "longest_edge": images.longest_edge_px,
        "shortest_edge": images.shortest_edge_px,
    }


def own_images(processor: Any) -> dict[str, Any]:
    """-8b and -8b-chatty split, -8b-base does not."""
    size = dict(processor.image_processor.size)
    return {
        "split": "always" if processor.image_processor.do_image_splitting else "never",
        "longest_edge_px": size["longest_edge"],
        "shortest_edge_px": size["shortest_edge"],
    }


def unsplit(images: ImagesSection) -> Iterator[ImagesSection]:
    """A view costs the same tokens at any size, so there is nothing cheaper than one."""
    if images.split != "never":
        yield images.model_copy(update={"split": "never"})


def copy_text_eps_to_perceiver(config: Any) -> None:
    """Give the perceiver the text model's epsilon, with which it was trained.

    The configuration on the Hub does not name it, and the library's default has since become 1e-6
    instead of 1e-5.
    """
    config.perceiver_config.rms_norm_eps = config.text_config.rms_norm_eps


def position_table_edge(config: Any) -> int:
    """The side of the square that the table of patch positions was trained on, in pixels."""
    return config.vision_config.image_size


IDEFICS2 = Family(
    name="idefics2",
    model_type="idefics2",
    parts_of=lambda config: PARTS,
    image_tokens=(IMAGE, FAKE),
    turn_end_token="<end_of_utterance>",
    plan_image=plan_image,
    image_text=image_text,
    finish_text=finish_text,
    num_image_tokens=num_image_tokens,
    stack=stack_padded_views,
    view_encoder=ViewEncoder(tower, connect, tower_of_sizes),
    set_images=set_images,
    own_images=own_images,
    cheaper_images=unsplit,
    lent_template=BASE_TEMPLATE,
    adjust_config=copy_text_eps_to_perceiver,
    trained_edge_px=position_table_edge,
)
