"""Mllama (Llama 3.2 Vision): a ViT on up to four tiles an image, and gated cross-attention layers
among those of Llama 3.1, which alone see it; an image is one token of the text.

Source: transformers v5.23, models/mllama, and the reference in llama-models 0.3.0,
llama3/multimodal/model.py.

Shape letters: B rows, T tokens, I images of the row that has most, M tiles of the row that has
most, n images of one grid with r x c tiles, C channels (3), H and W pixels of a tile, P patches and
the class token, D width of the tower, E width of the language model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from finetune.data.packed_views import normalised, pack_views
from finetune.data.views import Canvas, ImagePlan, Size, View
from finetune.families.family import CrossEncoder, Family, Part, Template, ViewedRow
from finetune.recipe import ImagesSection

IMAGE = "<|image|>"
DATE = "26 Jul 2024"  # what the checkpoint's template falls back to where there is no clock

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")

# As in Idefics2's base: it was never trained on <|eot_id|> nor on the tokens around a role, whose
# embeddings and rows of the head mean nothing there. <|end_of_text|> it knows.
BASE_TEMPLATE = Template(
    text=(
        "{{ bos_token }}{% for message in messages %}{{ message['role'].capitalize() }}: "
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<|image|>' }}{% endif %}"
        "{% endfor %}"
        "{% if message['role'] == 'assistant' %}{{ '<|end_of_text|>' }}{% endif %}{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    turn_end_token="<|end_of_text|>",
    closes_every_turn=False,
)


def parts_of(config: Any) -> Mapping[str, Part]:
    """The layers of `cross_attention_layers` are the connector, their feed-forward halves included:
    they were put between those of a finished Llama.
    """
    crossing = set(config.text_config.cross_attention_layers)
    prefixes: dict[bool, list[str]] = {True: [], False: []}
    for number in range(config.text_config.num_hidden_layers):
        prefixes[number in crossing].append(f"model.language_model.layers.{number}")
    return {
        "language": Part(prefixes=tuple(prefixes[False]), linears=(*_ATTENTION, *_MLP)),
        "connector": Part(
            prefixes=("model.multi_modal_projector", *prefixes[True]),
            linears=("multi_modal_projector", *_ATTENTION, *_MLP),
        ),
        "vision": Part(prefixes=("model.vision_model",), linears=(*_ATTENTION, "fc1", "fc2")),
    }


def arrangements(max_tiles: int) -> list[tuple[int, int]]:
    """Rows and columns of every grid of at most so many tiles, in the order of the model's ids,
    which begin at 1.
    """
    numbers = range(1, max_tiles + 1)
    return [(rows, cols) for rows in numbers for cols in numbers if rows * cols <= max_tiles]


def choose_grid(width_px: int, height_px: int, tile_px: int, max_tiles: int) -> tuple[int, int]:
    """Rows and columns of the grid that enlarges the image least, or else shrinks it least; of
    equals, the one of fewest tiles.

    Source: transformers v5.23, mllama/image_processing_pil_mllama.py, get_optimal_tiled_canvas.
    """
    scale_of = {
        (rows, cols): min(rows * tile_px / height_px, cols * tile_px / width_px)
        for rows, cols in arrangements(max_tiles)
    }
    enlarging = [scale for scale in scale_of.values() if scale >= 1]
    best = min(enlarging) if enlarging else max(scale_of.values())
    return min(
        (grid for grid, scale in scale_of.items() if scale == best),
        key=lambda grid: grid[0] * grid[1],
    )


def fit_into(width_px: int, height_px: int, canvas_px: Size, tile_px: int) -> Size:
    """The size at which an image is laid on its canvas: only those that fit into one tile are
    enlarged, and then to that tile. The divisions are the library's own floating-point ones.

    Source: transformers v5.23, mllama/image_processing_pil_mllama.py, get_image_size_fit_to_canvas.
    """
    target_width = min(max(width_px, tile_px), canvas_px[0])
    target_height = min(max(height_px, tile_px), canvas_px[1])
    scale_width, scale_height = target_width / width_px, target_height / height_px
    if scale_width < scale_height:
        return target_width, min(math.floor(height_px * scale_width) or 1, target_height)
    return min(math.floor(width_px * scale_height) or 1, target_width), target_height


def plan_image(
    width_px: int, height_px: int, images: ImagesSection, image_processor: Any
) -> ImagePlan:
    """The tiles in reading order, black where the image does not reach.

    There is nothing to set: the tower always computes four tiles and the text always has one token,
    so that showing one tile would lose pixels and save little: only cross-attention takes as many
    tiles as there are.
    """
    tile_px = image_processor.size["height"]
    rows, cols = choose_grid(width_px, height_px, tile_px, image_processor.max_image_tiles)
    canvas = (cols * tile_px, rows * tile_px)
    size = fit_into(width_px, height_px, canvas, tile_px)
    corners = [(col * tile_px, row * tile_px) for row in range(rows) for col in range(cols)]
    views = [View((x, y, x + tile_px, y + tile_px), tile_px, tile_px) for x, y in corners]
    is_split = len(views) > 1
    return ImagePlan(
        tuple(views),
        resizes=(size,),
        canvas=Canvas(*canvas, left_px=0, upper_px=0, colour=(0, 0, 0)),
        rows=rows if is_split else 0,
        cols=cols if is_split else 0,
    )


def stack(
    rows: Sequence[ViewedRow], processor: Any, input_ids_BT: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Tiles in the four places of each image, with what says which of them are there and which
    tokens see them.

    Gives `pixel_values` [B, I, 4, C, H, W] (rescaled and normalised, float32), `aspect_ratio_ids`
    [B, I], `aspect_ratio_mask` [B, I, 4] and `cross_attention_mask` [B, T, I, 4], or nothing where
    there is no image: then the model leaves its cross-attention layers out.
    """
    num_images = max(len(row.plans) for row in rows)
    if not num_images:
        return {}
    image_processor = processor.image_processor
    num_tiles, tile_px = image_processor.max_image_tiles, image_processor.size["height"]
    pixels = torch.zeros((len(rows), num_images, num_tiles, 3, tile_px, tile_px))
    ids_BI = torch.zeros((len(rows), num_images), dtype=torch.long)
    tiles_BI4 = torch.zeros((len(rows), num_images, num_tiles), dtype=torch.long)
    tiles_BI4[:, :, 0] = 1  # of a missing image, too, as in the library: no row may be all masked
    seen_BTI4 = torch.zeros((*input_ids_BT.shape, num_images, num_tiles), dtype=torch.long)
    grids = arrangements(num_tiles)
    for b, row in enumerate(rows):
        views = iter(row.views)
        spans = spans_that_see(input_ids_BT[b].tolist(), processor.image_token_id)
        for i, (plan, span) in enumerate(zip(row.plans, spans, strict=True)):
            for tile in range(len(plan.views)):
                pixels[b, i, tile] = normalised(next(views), image_processor)
            ids_BI[b, i] = grids.index((plan.rows or 1, plan.cols or 1)) + 1
            tiles_BI4[b, i, : len(plan.views)] = 1
            seen_BTI4[b, span, i, : len(plan.views)] = 1
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": ids_BI,
        "aspect_ratio_mask": tiles_BI4,
        "cross_attention_mask": seen_BTI4,
    }


@dataclass
class _Images:
    """The images of a row as they travel, tiles and their grid in one: uint8 [r, c, C, H, W]."""

    views: list[np.ndarray]


def pack(rows: Sequence[ViewedRow], processor: Any, input_ids_BT: torch.Tensor) -> dict[str, Any]:
    """Each different image once, with the tiles that it has and no others.

    Gives `pixel_values`, whose groups are images of one grid [n, r, c, C, H, W] and whose order is
    of tiles, M for each row (those that it lacks are any), and `cross_attention_mask` [B, T, 1, M];
    or nothing where there is no image. Cross-attention knows no order of tiles but the mask, so a
    row's stand side by side, with no room for those that its images lack.
    """
    num_tiles = max(len(row.views) for row in rows)
    if not num_tiles:
        return {}
    packed = pack_views(list(map(_images, rows)), processor, input_ids_BT)["pixel_values"]
    counts = [len(group[0].flatten(0, 1)) for group in packed.groups for _ in range(len(group))]
    firsts = np.cumsum([0, *counts])
    order_BM = torch.zeros((len(rows), num_tiles), dtype=torch.long)
    seen_BTM = torch.zeros((*input_ids_BT.shape, num_tiles), dtype=torch.long)
    images = iter(packed.order_N.tolist())
    for b, row in enumerate(rows):
        spans = spans_that_see(input_ids_BT[b].tolist(), processor.image_token_id)
        start = 0
        for plan, span in zip(row.plans, spans, strict=True):
            first, count = int(firsts[next(images)]), len(plan.views)
            order_BM[b, start : start + count] = torch.arange(first, first + count)
            seen_BTM[b, span, start : start + count] = 1
            start += count
    return {
        "pixel_values": replace(packed, order_N=order_BM.flatten()),
        "cross_attention_mask": seen_BTM[:, :, None],
    }


def _images(row: ViewedRow) -> _Images:
    tiles = iter(row.views)
    grids = [(plan.rows or 1, plan.cols or 1) for plan in row.plans]
    images = [np.stack([next(tiles) for _ in range(rows * cols)]) for rows, cols in grids]
    return _Images(
        [image.reshape(*grid, *image.shape[1:]) for image, grid in zip(images, grids, strict=True)]
    )


def tower(inner: Any, pixels_nrcCHW: torch.Tensor) -> torch.Tensor:
    """What the projector takes of the tiles of images of one grid [n, r * c, P, D].

    The other of the four places are computed, too, as zeros: the library's mask hides them from
    each other alone, so that those of the image attend to them, as in training (transformers v5.23,
    mllama/modeling_mllama.py, _prepare_aspect_ratio_attention_mask: the outer product of what is
    padding, and of nothing else, is masked).
    """
    num_images, *grid = pixels_nrcCHW.shape[:3]
    num_places, num_tiles = inner.config.vision_config.max_num_tiles, math.prod(grid)
    tiles = pixels_nrcCHW.flatten(1, 2)
    pixels = tiles.new_zeros((num_images, 1, num_places, *tiles.shape[2:]))
    pixels[:, 0, :num_tiles] = tiles
    is_tile = (torch.arange(num_places, device=tiles.device) < num_tiles).long()
    grid_id = arrangements(num_places).index((grid[0], grid[1])) + 1
    seen = inner.vision_model(
        pixel_values=pixels,
        aspect_ratio_ids=torch.full((num_images, 1), grid_id, device=tiles.device),
        aspect_ratio_mask=is_tile.expand(num_images, 1, -1),
    )
    return seen.last_hidden_state[:, 0, :num_tiles]


def connect(inner: Any, hidden_nMPD: torch.Tensor) -> torch.Tensor:
    """Their states, tile after tile [n * r * c, P, E]."""
    return inner.multi_modal_projector(hidden_nMPD).flatten(0, 1)


def spans_that_see(ids: Sequence[int], image_token_id: int) -> list[slice]:
    """The tokens that see each image: from its own to the next image, or to the end; images that
    stand together are seen together.

    Of padded ids, since padding on the left moves them all. Source: transformers v5.23,
    mllama/processing_mllama.py, get_cross_attention_token_mask.
    """
    places = [place for place, token in enumerate(ids) if token == image_token_id]
    spans: list[slice] = []
    end = following = len(ids)
    for place in reversed(places):
        end = end if following == place + 1 else following
        spans.insert(0, slice(place, end))
        following = place
    return spans


def adjust_model(model: Any) -> None:
    """What the library leaves wrong in the forward pass, and in loading adapters."""
    leave_tokens_that_see_nothing(model)
    # PEFT alone finds only an adapter's language tensors under their names before transformers 4.52
    # and leaves the others random; it applies these, which transformers 5 itself does not read
    model._checkpoint_conversion_mapping = {
        "^vision_model": "model.vision_model",
        "^multi_modal_projector": "model.multi_modal_projector",
    }


def leave_tokens_that_see_nothing(model: Any) -> None:
    """Make cross-attention layers pass on tokens before an image, and rows without one, unchanged.

    The library masks such tokens' feed-forward half only. Their attention is over everything there
    is instead: over the images after them, and those of padding, of which a batch has more than its
    row alone. The reference masks both halves (CrossAttention.forward), and so was the model
    trained. Known as huggingface/transformers issue 39379.
    """
    for layer in model.model.language_model.layers:
        if hasattr(layer, "cross_attn"):
            layer.register_forward_hook(_keep_tokens_that_see_nothing, with_kwargs=True)


def _keep_tokens_that_see_nothing(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
) -> torch.Tensor:
    sees = kwargs.get("full_text_row_masked_out_mask")  # [B, 1, T, 1], 1 where a token sees a tile
    return output if sees is None else torch.where(sees[:, 0].bool(), output, args[0])


_SYSTEM_TEXT = "messages[0]['content']|trim"
_TYPED_SYSTEM_TEXT = (
    "(messages[0]['content'] if messages[0]['content'] is string "
    "else messages[0]['content'] | map(attribute='text') | join)|trim"
)


def mend_template(template: str) -> str:
    """The template without the calendar, and with the text of a system turn rather than its parts
    in Python's notation, as its first revisions wrote it. Other templates stay as they are.
    """
    return template.replace(_SYSTEM_TEXT, _TYPED_SYSTEM_TEXT).replace(
        'strftime_now("%d %b %Y")', f'"{DATE}"'
    )


def build_processor(load: Callable[[type | None], Any], config: Any) -> Any:
    """The checkpoint's, with its template mended, so that it is saved so beside the adapter."""
    processor = load(None)
    if isinstance(processor.chat_template, str):
        processor.chat_template = mend_template(processor.chat_template)
    return processor


MLLAMA = Family(
    name="mllama",
    model_type="mllama",
    parts_of=parts_of,
    image_tokens=(IMAGE,),
    turn_end_token="<|eot_id|>",
    plan_image=plan_image,
    image_text=lambda processor, plan, number: IMAGE,
    num_image_tokens=lambda processor, plan: 1,
    stack=stack,
    pack=pack,
    cross_encoder=CrossEncoder(
        tower, connect, inputs=lambda inner, given, states: {"cross_attention_states": states}
    ),
    set_images=lambda processor, images: None,
    own_images=lambda processor: {},
    lent_template=BASE_TEMPLATE,
    template_variables={"date_string": DATE},
    build_processor=build_processor,
    adjust_model=adjust_model,
)
