"""Attention of sequences that hold several rows: each sees itself alone.

Shape letters: S sequences, T tokens, N nodes (see `finetune.data.sequences`).
"""

from typing import Any

import torch

from finetune.data.sequences import Layout
from finetune.errors import ModelError


def follow_layouts(model: Any) -> None:
    """Let a model take `layout` beside its inputs; without one all stays as it is.

    A hook on the model inside, since that is called as a module whatever wraps the outer one: PEFT
    calls the outer one's `forward` itself, past all hooks.
    """
    inner = model.model
    if _mask_layout not in inner._forward_pre_hooks.values():
        inner.register_forward_pre_hook(_mask_layout, with_kwargs=True)


def _mask_layout(
    inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """`layout` becomes `attention_mask`, in the form that the attention of the language model
    takes.
    """
    layout: Layout | None = kwargs.pop("layout", None)
    if layout is None:
        return None
    config = inner.config.get_text_config()
    attention = str(config._attn_implementation)
    if "flash" in attention:
        # It takes no mask, and the library tells rows apart by positions that start again, in a
        # single sequence: modeling_flash_attention_utils.py, _is_packed_sequence
        assert len(layout.nodes) == 1, "one sequence was asked for"
        return args, kwargs | {"attention_mask": None}
    sees_STT = token_sees(layout, kwargs["position_ids"], sliding_window(config))
    mask_S1TT = sees_STT[:, None]
    if attention == "eager":  # it adds its mask, and the library leaves one of four axes as it is
        least = torch.finfo(inner.dtype).min
        mask_S1TT = torch.zeros_like(mask_S1TT, dtype=inner.dtype).masked_fill_(~mask_S1TT, least)
    return args, kwargs | {"attention_mask": mask_S1TT}


def token_sees(
    layout: Layout, positions_ST: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Whether each token sees each other [S, T, T], the seeing one first: those before it in its
    node and the nodes above, of which no more than `window` with itself. Padding sees itself.
    """
    nodes_ST, sees_SNN = layout.nodes, layout.sees
    num_tokens = nodes_ST.shape[1]
    of_nodes_STN = torch.take_along_dim(sees_SNN, nodes_ST[:, :, None], dim=1)
    sees_STT = torch.take_along_dim(of_nodes_STN, nodes_ST[:, None, :], dim=2)
    places_T = torch.arange(num_tokens, device=nodes_ST.device)
    sees_STT &= places_T[:, None] >= places_T
    if window is not None and window < num_tokens:
        sees_STT &= positions_ST[:, :, None] - positions_ST[:, None, :] < window
    return sees_STT


def sliding_window(config: Any) -> int | None:
    """How many tokens a layer of the language model sees, with the one that sees; None where all.

    As the library has it: Mistral's setting is for all layers; Llama has none, and passes over one
    in a file. Raises `ModelError` where only some layers have one, as no mask fits all then.
    """
    window = getattr(config, "sliding_window", None)
    if window is None or config.model_type == "llama":
        return None
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise ModelError(
            f"model.name: some layers of its language model ({config.model_type}) see "
            f"{window:,} tokens and others all, so that rows cannot be kept apart in one sequence; "
            "set training.packing: false and training.share_images: off"
        )
    return window
