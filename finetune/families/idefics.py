"""Idefics, the first: CLIP, a perceiver, and gated cross-attention layers before every fourth layer
of Llama; an image is one token of the text.

Source: arXiv 2306.16527 and transformers v5.23, models/idefics.

Shape letters: B rows, T tokens, I images of the row that has most, n views of one call, C channels
(3), H and W pixels of a view, P patches and the class token, D width of the tower, L latents.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from finetune.data.packed_views import HasViews, normalised, pack_views
from finetune.data.views import ImagePlan, View
from finetune.families.family import CrossEncoder, Family, Part, Template, ViewedRow
from finetune.families.idefics2 import FAKE, IMAGE
from finetune.recipe import ImagesSection

_ATTENTION = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")

PARTS = {
    "language": Part(prefixes=("model.layers",), linears=(*_ATTENTION, "o_proj", *_MLP)),
    "connector": Part(
        prefixes=("model.perceiver_resampler", "model.gated_cross_attn_layers"),
        linears=(*_ATTENTION, "output_proj", "fc", "c_proj", "o_proj", *_MLP),
    ),
    "vision": Part(
        prefixes=("model.vision_model",),
        linears=(*_ATTENTION, "out_proj", "fc1", "fc2"),
    ),
}

_NUM_IMAGE_TOKENS = 2  # all that the base adds to Llama's; instruct adds <end_of_utterance>


def _template(answer_end: str, other_end: str) -> str:
    """Turns as on the model card of idefics-9b-instruct, a line each; <s> first, which the
    library's processor writes by itself.
    """
    return (
        "{{ bos_token }}{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
        "{{ message['role'].capitalize() }}"
        "{% if message['content'] and message['content'][0]['type'] == 'image' %}{{ ':' }}"
        "{% else %}{{ ': ' }}{% endif %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<image>' }}{% endif %}"
        "{% endfor %}"
        f"{{% if message['role'] == 'assistant' %}}{{{{ '{answer_end}' }}}}"
        f"{{% else %}}{{{{ '{other_end}' }}}}{{% endif %}}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{% if messages %}{{ '\\n' }}{% endif %}{{ 'Assistant:' }}"
        "{% endif %}"
    )


INSTRUCT_TEMPLATE = Template(
    text=_template("<end_of_utterance>", "<end_of_utterance>"), turn_end_token="<end_of_utterance>"
)

# The base has no <end_of_utterance> at all
BASE_TEMPLATE = Template(text=_template("</s>", ""), turn_end_token="</s>", closes_every_turn=False)


def plan_image(
    width_px: int, height_px: int, images: ImagesSection, image_processor: Any
) -> ImagePlan:
    """The whole image, bent to the one square that the model knows."""
    edge_px = image_processor.size["height"]
    return ImagePlan((View((0, 0, width_px, height_px), edge_px, edge_px),))


_SPACES_AROUND_IMAGE = re.compile(rf" *({re.escape(FAKE + IMAGE + FAKE)}) *")


def finish_text(processor: Any, text: str) -> str:
    """No spaces beside an image, and adjacent images share their fake token.

    Source: transformers v5.23, idefics/processing_idefics.py, __call__, which strips every text
    between images.
    """
    return _SPACES_AROUND_IMAGE.sub(r"\1", text).replace(FAKE + FAKE, FAKE)


def stack(
    rows: Sequence[ViewedRow], processor: Any, input_ids_BT: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Gives `pixel_values` [B, I, C, H, W] (rescaled and normalised, float32) and
    `image_attention_mask` [B, T, I], the image that each token sees.

    Rows with fewer images than others get images of zeros, which no token sees; so does a batch
    without any, since the model cannot do without.
    """
    num_images = max(1, *(len(row.views) for row in rows))
    edge_px = processor.image_processor.size["height"]
    pixels_BICHW = torch.zeros((len(rows), num_images, 3, edge_px, edge_px))
    for b, row in enumerate(rows):
        for i, view in enumerate(row.views):
            pixels_BICHW[b, i] = normalised(view, processor.image_processor)
    mask_BTI = _seen_mask(input_ids_BT, processor.image_token_id, num_images)
    return {"pixel_values": pixels_BICHW, "image_attention_mask": mask_BTI}


@dataclass
class _Views:
    views: list[Any]


def pack(rows: Sequence[ViewedRow], processor: Any, input_ids_BT: torch.Tensor) -> dict[str, Any]:
    """As `stack`, with each different image once for `pixel_values`, and I places for each row,
    where images that it lacks are any.

    A batch without any has a black one, which no token sees.
    """
    shown: list[HasViews] = list(rows)
    if not any(row.views for row in rows):
        edge_px = processor.image_processor.size["height"]
        shown = [_Views([np.zeros((3, edge_px, edge_px), np.uint8)])]
    packed = pack_views(shown, processor, input_ids_BT)["pixel_values"]
    num_images = max(1, *(len(row.views) for row in rows))
    order_BI = torch.zeros((len(rows), num_images), dtype=torch.long)
    is_there_BI = torch.arange(num_images) < torch.tensor([len(row.views) for row in rows])[:, None]
    if is_there_BI.any():
        order_BI[is_there_BI] = packed.order_N
    mask_BTI = _seen_mask(input_ids_BT, processor.image_token_id, num_images)
    return {
        "pixel_values": replace(packed, order_N=order_BI.flatten()),
        "image_attention_mask": mask_BTI,
    }


def _seen_mask(input_ids_BT: torch.Tensor, image_token_id: int, num_images: int) -> torch.Tensor:
    seen_BT = image_seen(input_ids_BT, image_token_id)
    return (seen_BT[..., None] == torch.arange(num_images)).long()


def tower(inner: Any, pixels_nCHW: torch.Tensor) -> torch.Tensor:
    """The last hidden states [n, P, D]."""
    return inner.vision_model(pixel_values=pixels_nCHW).last_hidden_state


def connect(inner: Any, hidden_nPD: torch.Tensor) -> torch.Tensor:
    """Their latents [n, L, D], or themselves where the model has no perceiver."""
    return inner.perceiver_resampler(hidden_nPD) if inner.config.use_resampler else hidden_nPD


def states_of_rows(
    inner: Any, given: Mapping[str, Any], states_NLD: torch.Tensor
) -> dict[str, Any]:
    """As the model takes what `connect` gave [B, I, L, D]."""
    name = "perceiver_embeddings" if inner.config.use_resampler else "image_encoder_embeddings"
    return {name: states_NLD.unflatten(0, (len(given["image_attention_mask"]), -1))}


def image_seen(input_ids_BT: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """The number of the one image that each token sees [B, T]: the last before it, from 0, or -1
    for none.

    The library's processor hides an image after the next </s> as well, for texts packed into one
    row; a row here is one conversation, and the second answer about a picture would be learnt
    blind. Source: transformers v5.23, idefics/processing_idefics.py,
    image_attention_mask_for_packed_input_ids_pt.
    """
    return (input_ids_BT == image_token_id).cumsum(1) - 1


class WholeHead(nn.Linear):
    """The library's language model head, which keeps the rows of added tokens in a layer of their
    own, `additional_fc`, and is used and saved as before; but `weight` has the rows of all tokens.
    """

    additional_fc: nn.Linear

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # a parameter in the parent
        """Of all tokens, for those who multiply by it themselves, as TRL's fused head does."""
        return torch.cat([self._first_weight, self.additional_fc.weight])

    @property
    def _first_weight(self) -> torch.Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits of all tokens."""
        first = nn.functional.linear(input, self._first_weight)
        return torch.cat([first, self.additional_fc(input)], dim=-1)


def loss_over_all_tokens(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any
) -> torch.Tensor:
    """The library's loss, over as many tokens as there are logits for.

    The model passes the number of tokens before some were added, and crashes.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1], **kwargs)


def count_added_tokens(model: Any) -> None:
    """Let the loss, and whoever reads the head's weight, know of the added tokens, among which is
    the one that ends a turn.
    """
    model.loss_function = loss_over_all_tokens
    if model.config.additional_vocab_size > 0:
        model.lm_head.__class__ = WholeHead


IDEFICS = Family(
    name="idefics",
    model_type="idefics",
    recognises=lambda config: config.additional_vocab_size > _NUM_IMAGE_TOKENS,
    parts_of=lambda config: PARTS,
    image_tokens=(IMAGE, FAKE),
    turn_end_token="<end_of_utterance>",
    plan_image=plan_image,
    image_text=lambda processor, plan, number: FAKE + IMAGE + FAKE,
    finish_text=finish_text,
    num_image_tokens=lambda processor, plan: 1,
    stack=stack,
    pack=pack,
    cross_encoder=CrossEncoder(tower, connect, inputs=states_of_rows),
    set_images=lambda processor, images: None,
    own_images=lambda processor: {},
    lent_template=INSTRUCT_TEMPLATE,
    adjust_model=count_added_tokens,
)

IDEFICS_BASE = replace(
    IDEFICS,
    name="idefics-base",
    recognises=lambda config: config.additional_vocab_size <= _NUM_IMAGE_TOKENS,
    turn_end_token="</s>",
    closes_every_turn=False,
    lent_template=BASE_TEMPLATE,
)
