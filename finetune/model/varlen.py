"""Views of several sizes through the vision tower at once: their patches stand in one sequence, and
FlashAttention's kernel for variable lengths keeps each view to itself.

Shape letters: P patches of all views, K heads, D width of a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.utils.import_utils import is_flash_attn_2_available

NAME = "flash_attention_2_by_view"

_views: ContextVar[tuple[torch.Tensor, int]] = ContextVar("views")


def is_at_hand(tower: Any) -> bool:
    """Whether the kernel can run where this tower is, and the recipe asked for it."""
    return (
        tower.config._attn_implementation == "flash_attention_2"
        and tower.device.type == "cuda"
        and tower.dtype in (torch.bfloat16, torch.float16)
        and is_flash_attn_2_available()
    )


@contextmanager
def views_apart(tower: Any, lengths: Sequence[int]) -> Iterator[None]:
    """Meanwhile the tower's layers take one sequence of views with so many patches each.

    By the configuration's name for the attention, since the layers pass nothing on to it. They must
    not be computed again after the block.
    """
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=tower.device)
    config = tower.config
    own_name, token = config._attn_implementation, _views.set((starts, max(lengths)))
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own_name
        _views.reset(token)


def attend_by_view(
    module: Any,
    query_1KPD: torch.Tensor,
    key_1KPD: torch.Tensor,
    value_1KPD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as the library's layers call it, within `views_apart` [1, P, K, D]; without
    dropout, as the tower does not learn.
    """
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    assert attention_mask is None, "a mask would be passed over"
    starts, longest = _views.get()
    each = (states[0].transpose(0, 1) for states in (query_1KPD, key_1KPD, value_1KPD))
    seen_PKD = flash_attn_varlen_func(
        *each, starts, starts, longest, longest, softmax_scale=scaling
    )
    return seen_PKD[None], None


AttentionInterface.register(NAME, attend_by_view)
