"""Packed vision: the tower and the connector run over the views themselves, with no padding between
them, no gradient where nothing learns, and each different view once.

Shape letters: N views of the batch, n views of one call, C channels (3), H height, W width in
pixels, P patches, D width of the tower, L features a view, E width of the language model.
"""

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from finetune.data.packed_views import PackedViews
from finetune.families.family import Family, ViewEncoder

MAX_PATCHES = 8192
"""Of the views that tower and connector take in one call.

A call this large keeps a GPU busy, and bounds what a connector layer holds when it is computed
again: at the width of 8B models 14,336 x 8,192 numbers of 2 bytes, three times.
"""


def take_packed_views(model: Any, family: Family) -> None:
    """Let a model take `PackedViews` as `pixel_values`; the tensors of the library's own processor
    it takes as before.

    The class is changed, not the object's method, so that a copy of the model uses its own weights,
    and hooks of whatever wraps the modules run as they would.
    """
    if family.view_encoder:
        inner = model.model
        inner.__class__ = _with_packed_views(type(inner))
        inner.view_encoder = family.view_encoder
        # `gradient_checkpointing_enable` looks for this name, and puts the function beside it
        inner.gradient_checkpointing = False
        parts = family.parts_of(model.config)
        inner.view_modules = {
            part: tuple(name.removeprefix("model.") for name in parts[part].prefixes)
            for part in ("vision", "connector")
        }


def _with_packed_views(plain: type) -> type:
    if issubclass(plain, _TakesPackedViews):
        return plain
    # `generate` reads off the signature what to pass
    stock = cast(Any, plain).get_image_features
    method = functools.wraps(stock)(lambda self, *args, **kwargs: self.features(*args, **kwargs))
    body = {"__module__": plain.__module__, "get_image_features": method}
    return type(plain.__name__, (_TakesPackedViews, plain), body)


class _TakesPackedViews:
    """Before the library's class of a model without its head, in the order of inheritance."""

    view_encoder: ViewEncoder
    view_modules: dict[str, tuple[str, ...]]

    def features(self, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the library's `get_image_features`; of packed views `pooler_output` has the features
        alone, one tensor [N * L, E].
        """
        if not isinstance(pixel_values, PackedViews):
            stock = cast(Any, super())
            return stock.get_image_features(pixel_values, *args, **kwargs)
        features_NLE = encode_views(self, pixel_values)
        return BaseModelOutputWithPooling(pooler_output=[features_NLE.flatten(0, 1)])  # type: ignore[arg-type]


def encode_views(inner: Any, views: PackedViews) -> torch.Tensor:
    """The features of every view of a batch [N, L, E], in their order.

    `inner` is the model that holds tower and connector.
    """
    encoder: ViewEncoder = inner.view_encoder
    in_tower = torch.no_grad if not _learns(inner, "vision") else nullcontext
    connect = functools.partial(encoder.connect, inner)
    if _recomputes(inner):
        connect = functools.partial(inner._gradient_checkpointing_func, connect)
    features = []
    for pixels_nCHW in views_of_calls(views, inner.config.vision_config.patch_size):
        with in_tower():
            hidden_nPD = encoder.tower(inner, views.normalised(pixels_nCHW).to(inner.dtype))
        features.append(connect(hidden_nPD))
    return torch.cat(features)[views.order_N]


def views_of_calls(views: PackedViews, patch_size: int) -> Iterator[torch.Tensor]:
    """The groups, cut where one holds more than `MAX_PATCHES`."""
    for group in views.groups:
        num_patches = (group.shape[-2] // patch_size) * (group.shape[-1] // patch_size)
        yield from group.split(max(MAX_PATCHES // max(num_patches, 1), 1))


def _learns(inner: Any, part: str) -> bool:
    modules = map(inner.get_submodule, inner.view_modules[part])
    return any(each.requires_grad for module in modules for each in module.parameters())


def _recomputes(inner: Any) -> bool:
    """Whether the connector's activations are computed again rather than kept: the library's
    checkpointing leaves it out.
    """
    return (
        inner.training
        and inner.gradient_checkpointing
        and torch.is_grad_enabled()
        and (_learns(inner, "connector") or _learns(inner, "vision"))
    )
