"""Views of several sizes in one pass of the vision tower, with a stand-in for FlashAttention's
kernel: the features of each size alone.
"""

import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from finetune.data.packed_views import PackedViews, pack_views
from finetune.families.idefics2 import IDEFICS2
from finetune.model import varlen, vision
from finetune.model.load import load_model, load_processor
from finetune.model.vision import encode_views
from tests.conftest import NANO, NANO_IMAGES

SIZES = [(56, 112), (112, 56), (28, 140), (56, 112), (84, 84), (112, 56)]


def one_by_one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """The signature of flash_attn 2.8's `flash_attn_varlen_func`, as far as it is used."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert q.dim() == 3
    starts = cu_seqlens_q.tolist()
    assert (starts[0], starts[-1]) == (0, len(q))
    lengths = np.diff(starts)
    assert max_seqlen_q == max_seqlen_k == lengths.max()
    seen = [
        torch.nn.functional.scaled_dot_product_attention(
            *(each[start:end].transpose(0, 1) for each in (q, k, v)),
            scale=softmax_scale,
            dropout_p=dropout_p,
            is_causal=causal,
        ).transpose(0, 1)
        for start, end in pairwise(starts)
    ]
    return torch.cat(seen)


@pytest.fixture
def inner() -> Any:
    """In float64: the trained model blows rounding in float32 up to 7e-5."""
    return load_model(NANO)[0].eval().double().model


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=one_by_one)
    )
    monkeypatch.setattr(vision, "is_at_hand", lambda tower: True)


@pytest.fixture(scope="module")
def views() -> PackedViews:
    draw = np.random.default_rng(0)
    row: Any = SimpleNamespace(
        views=[draw.integers(0, 256, (3, *size), dtype=np.uint8) for size in SIZES]
    )
    processor, _ = load_processor(NANO, NANO_IMAGES)
    return pack_views([row], processor, torch.zeros(0))["pixel_values"]


def calls_of_layers(inner: Any) -> list[int]:
    """The batch size of every call of the first layer from now on."""
    calls: list[int] = []
    inner.vision_model.encoder.layers[0].register_forward_pre_hook(
        lambda module, args: calls.append(len(args[0]))
    )
    return calls


def test_features_of_all_sizes_at_once_are_those_of_each_alone(
    inner: Any, views: PackedViews, request: pytest.FixtureRequest
) -> None:
    calls = calls_of_layers(inner)
    with torch.no_grad():
        expected = encode_views(inner, views)
    assert sorted(calls) == [1, 1, 2, 2]
    calls.clear()
    request.getfixturevalue("kernel")
    inner.vision_model.requires_grad_(False)
    with torch.no_grad():
        features = encode_views(inner, views)
    assert calls == [1]
    torch.testing.assert_close(features, expected, atol=1e-9, rtol=1e-9)


def test_a_pass_is_cut_at_the_most_patches(
    inner: Any, views: PackedViews, kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner.vision_model.requires_grad_(False)
    whole = encode_views(inner, views)
    calls = calls_of_layers(inner)
    monkeypatch.setattr(vision, "MAX_PATCHES", 80)  # groups of 64, 64, 20 and 36
    cut = encode_views(inner, views)
    assert len(calls) == 3
    torch.testing.assert_close(cut, whole, atol=1e-9, rtol=1e-9)


def test_a_tower_that_learns_takes_each_size_alone(
    inner: Any, views: PackedViews, kernel: None
) -> None:
    """Its layers are computed again in the backward pass, where lengths are no longer known."""
    calls = calls_of_layers(inner)
    encode_views(inner, views)
    assert sorted(calls) == [1, 1, 2, 2]


def test_the_attention_is_the_towers_own_again_whatever_happens(inner: Any) -> None:
    tower = inner.vision_model
    with varlen.views_apart(tower, [4]):
        assert tower.encoder.layers[0].self_attn.config._attn_implementation == varlen.NAME
    with pytest.raises(ZeroDivisionError), varlen.views_apart(tower, [4]):
        _ = 1 / 0
    assert tower.config._attn_implementation == "sdpa"


def tower_of(device: str, dtype: torch.dtype, attention: str) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(_attn_implementation=attention),
        device=torch.device(device),
        dtype=dtype,
    )


def test_the_kernel_is_used_only_where_it_runs_and_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flash = "flash_attention_2"
    assert not varlen.is_at_hand(tower_of("cuda", torch.bfloat16, flash))  # not installed here
    monkeypatch.setattr(varlen, "is_flash_attn_2_available", lambda: True)
    assert varlen.is_at_hand(tower_of("cuda", torch.bfloat16, flash))
    assert not varlen.is_at_hand(tower_of("cpu", torch.bfloat16, flash))
    assert not varlen.is_at_hand(tower_of("cuda", torch.float32, flash))
    assert not varlen.is_at_hand(tower_of("cuda", torch.bfloat16, "sdpa"))


def test_only_views_of_many_sizes_run_together() -> None:
    """The others' tower takes one size, and needs nothing to keep views apart."""
    from finetune.families import FAMILIES

    encoders = {name: each.view_encoder for name, each in FAMILIES.items()}
    together = {name for name, each in encoders.items() if each and each.tower_of_sizes}
    assert together == {"idefics2"}
    assert IDEFICS2.view_encoder is encoders["idefics2"]
