"""Idefics3: SigLIP on tiles of one size, a pixel shuffle instead of a perceiver, Llama 3; and the
first SmolVLM, which is stored as one, with SmolLM2.

Source: arXiv 2408.12637 and transformers v5.23, models/idefics3.
"""

import math
from collections.abc import Iterator
from typing import Any

from finetune.data.views import ImagePlan, Size, View
from finetune.errors import ModelError
from finetune.families.family import Family, Part, ViewEncoder
from finetune.families.idefics2 import (
    FAKE,
    IMAGE,
    PARTS,
    num_image_tokens,
    stack_padded_views,
    tower,
)
from finetune.recipe import ImagesSection

GLOBAL = "<global-img>"

MAX_TILES = 6  # rows and columns have names up to <row_6_col_6> in the vocabulary of SmolVLM
MAX_EDGE_PX = 4096  # where the library's image processor stops


def scaled_to_longest_edge(width_px: int, height_px: int, longest_edge_px: int) -> Size:
    """The size whose longer edge is the limit, small images enlarged; an odd shorter edge gets one
    pixel more.

    The divisions are the library's own floating-point ones: exact integers would differ by a pixel
    at times. Source: transformers v5.23, idefics3/image_processing_pil_idefics3.py,
    _resize_output_size_rescale_to_max_len.
    """
    aspect_ratio = width_px / height_px
    if width_px >= height_px:
        shorter = int(longest_edge_px / aspect_ratio)
        return longest_edge_px, max(shorter + shorter % 2, 1)
    shorter = int(longest_edge_px * aspect_ratio)
    return max(shorter + shorter % 2, 1), longest_edge_px


def enlarged_to_tiles(width_px: int, height_px: int, tile_px: int) -> Size:
    """Both edges brought up to whole tiles, the longer one first.

    The library's `get_number_of_image_patches` takes the shorter edge from before the longer one
    grew, and so counts a row too few at times where the longest edge is not whole tiles. Source:
    transformers v5.23, idefics3/image_processing_pil_idefics3.py, resize_for_vision_encoder.
    """
    aspect_ratio = width_px / height_px
    if width_px >= height_px:
        width_px = _up_to_tiles(width_px, tile_px)
        return width_px, _up_to_tiles(int(width_px / aspect_ratio), tile_px)
    height_px = _up_to_tiles(height_px, tile_px)
    return _up_to_tiles(int(height_px * aspect_ratio), tile_px), height_px


def _up_to_tiles(edge_px: int, tile_px: int) -> int:
    # an edge of nothing is still a tile: the product of a ratio and its inverse may be below 1
    return max(math.ceil(edge_px / tile_px), 1) * tile_px


def plan_image(
    width_px: int, height_px: int, images: ImagesSection, image_processor: Any
) -> ImagePlan:
    """The tiles in reading order, if split, then the whole, bent to one tile's square.

    `auto` splits only images with an edge above a tile's.
    """
    assert images.longest_edge_px, "settings were not resolved"
    tile_px = image_processor.max_image_size["longest_edge"]
    scaled = scaled_to_longest_edge(width_px, height_px, images.longest_edge_px)
    is_split = images.split == "always" or (
        images.split == "auto" and max(width_px, height_px) > tile_px
    )
    if not is_split:
        return ImagePlan((View((0, 0, *scaled), tile_px, tile_px),), resizes=(scaled,))
    tiled = enlarged_to_tiles(*scaled, tile_px)
    whole = View((0, 0, *tiled), tile_px, tile_px)
    cols, rows = tiled[0] // tile_px, tiled[1] // tile_px
    if cols == rows == 1:
        return ImagePlan((whole,), resizes=(scaled, tiled))
    corners = [(col * tile_px, row * tile_px) for row in range(rows) for col in range(cols)]
    tiles = [View((x, y, x + tile_px, y + tile_px), tile_px, tile_px) for x, y in corners]
    return ImagePlan((*tiles, whole), resizes=(scaled, tiled), rows=rows, cols=cols)


def image_text(processor: Any, plan: ImagePlan, number: int) -> str:
    """Every tile by the name of its place, rows on lines of their own, and the whole image last.

    Source: transformers v5.23, idefics3/processing_idefics3.py, replace_image_token.
    """
    latents = IMAGE * processor.image_seq_len
    rows = [
        "".join(f"{FAKE}<row_{row}_col_{col}>{latents}" for col in range(1, plan.cols + 1)) + "\n"
        for row in range(1, plan.rows + 1)
    ]
    return "".join(rows) + ("\n" if rows else "") + FAKE + GLOBAL + latents + FAKE


def set_images(processor: Any, images: ImagesSection) -> None:
    """On the object, since its text path counts tiles from there. With `split: auto` the processor
    does not split: each image decides for itself.

    Raises `ModelError` for an edge of more tiles than have names, or where the library stops.
    """
    assert images.longest_edge_px, "settings were not resolved"
    image_processor = processor.image_processor
    tile_px = image_processor.max_image_size["longest_edge"]
    num_tiles = math.ceil(images.longest_edge_px / tile_px)
    if images.split != "never" and num_tiles > MAX_TILES:
        raise ModelError(
            f"images.longest_edge_px: {images.longest_edge_px} makes {num_tiles} tiles of "
            f"{tile_px} pixels in a row, and the model knows {MAX_TILES} at most; set "
            f"{MAX_TILES * tile_px} or less"
        )
    if images.longest_edge_px > MAX_EDGE_PX:
        raise ModelError(
            f"images.longest_edge_px: {images.longest_edge_px} is more than the {MAX_EDGE_PX} "
            f"pixels that the image processor goes up to; set {MAX_EDGE_PX} or less"
        )
    image_processor.do_image_splitting = images.split == "always"
    image_processor.do_resize = True
    image_processor.size = {"longest_edge": images.longest_edge_px}


def own_images(processor: Any) -> dict[str, Any]:
    """All checkpoints split, at four tiles an edge; the shorter edge is whatever comes of that."""
    image_processor = processor.image_processor
    return {
        "split": "always" if image_processor.do_image_splitting else "never",
        "longest_edge_px": dict(image_processor.size)["longest_edge"],
    }


def fewer_tiles(images: ImagesSection) -> Iterator[ImagesSection]:
    """Every share of the longest edge that may be one of whole tiles, then a single view.

    How large a tile is only the image processor knows; an edge of n tiles has all its smaller
    numbers of tiles among its n-ths.
    """
    if images.split == "never" or not images.longest_edge_px:
        return
    shares = {part / of for of in range(2, MAX_TILES + 1) for part in range(1, of)}
    for share in sorted(shares, reverse=True):
        edge_px = max(round(images.longest_edge_px * share), 1)
        yield images.model_copy(update={"longest_edge_px": edge_px})
    yield images.model_copy(update={"split": "never"})


IDEFICS3 = Family(
    name="idefics3",
    model_type="idefics3",
    parts_of=lambda config: (
        PARTS | {"connector": Part(prefixes=("model.connector",), linears=("proj",))}
    ),
    image_tokens=(IMAGE, FAKE),
    turn_end_token="<end_of_utterance>",
    plan_image=plan_image,
    image_text=image_text,
    num_image_tokens=num_image_tokens,
    stack=stack_padded_views,
    view_encoder=ViewEncoder(tower, lambda inner, hidden_nPD: inner.connector(hidden_nPD)),
    set_images=set_images,
    own_images=own_images,
    cheaper_images=fewer_tiles,
)
