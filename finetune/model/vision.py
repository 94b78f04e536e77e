"""Packed vision: the tower and the connector run over the views themselves, with no padding between
them, no gradient where nothing learns, and each different view once.

Shape letters: N views of the batch, n views of one call, C channels (3), H height, W width in
pixels, P patches, D width of the tower, L features a view, E width of the language model.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, Literal, Protocol, cast

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from finetune.data.packed_views import PackedViews, normalised
from finetune.families.family import CrossEncoder, Family, ViewEncoder
from finetune.model.varlen import is_at_hand, views_apart

Stage = Literal["tower", "connector"]
"""The part whose output is kept: nothing up to there is trained."""

MAX_PATCHES = 4096
"""Of the views that tower and connector take in one call.

A call this large keeps a GPU busy, and bounds what a connector layer holds when it is computed
again: at the width of 8B models 14,336 x 4,096 numbers of 2 bytes, three times.
"""


class FeatureKeeper(Protocol):
    """Keeps the features of views for later batches."""

    stage: Stage
    num_read: int
    """Views that came with their features."""

    def keep(self, keys: Sequence[str | None], features_nPD: torch.Tensor) -> torch.Tensor:
        """Those of one call, as they will be given in their keys' place."""
        ...


def take_packed_views(model: Any, family: Family) -> None:
    """Let a model take `PackedViews` as `pixel_values`; the tensors of the library's own processor
    it takes as before.

    The class is changed, not the object's method, so that a copy of the model uses its own weights,
    and hooks of whatever wraps the modules run as they would.
    """
    if encoder := family.view_encoder or family.cross_encoder:
        inner = model.model
        inner.__class__ = _with_packed_views(type(inner), isinstance(encoder, CrossEncoder))
        inner.view_encoder = encoder
        # `gradient_checkpointing_enable` looks for this name, and puts the function beside it
        inner.gradient_checkpointing = False
        parts = family.parts_of(model.config)
        inner.view_modules = {
            part: tuple(name.removeprefix("model.") for name in parts[part].prefixes)
            for part in ("vision", "connector")
        }


@functools.cache
def _with_packed_views(plain: type, is_crossed: bool) -> type:
    if issubclass(plain, _TakesPackedViews):
        return plain
    if is_crossed:
        body = {"__module__": plain.__module__}
        return type(plain.__name__, (_CrossesPackedViews, plain), body)
    # `generate` reads off the signature what to pass
    stock = cast(Any, plain).get_image_features
    method = functools.wraps(stock)(lambda self, *args, **kwargs: self.features(*args, **kwargs))
    body = {"__module__": plain.__module__, "get_image_features": method}
    return type(plain.__name__, (_TakesPackedViews, plain), body)


class _TakesPackedViews:
    """Before the library's class of a model without its head, in the order of inheritance."""

    view_encoder: ViewEncoder
    view_modules: dict[str, tuple[str, ...]]
    feature_keeper: FeatureKeeper | None = None

    def features(self, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the library's `get_image_features`; of packed views `pooler_output` has the features
        alone, one tensor [N * L, E].
        """
        if not isinstance(pixel_values, PackedViews):
            stock = cast(Any, super())
            return stock.get_image_features(pixel_values, *args, **kwargs)
        features_NLE = encode_views(self, pixel_values)
        return BaseModelOutputWithPooling(pooler_output=[features_NLE.flatten(0, 1)])  # type: ignore[arg-type]


class _CrossesPackedViews(_TakesPackedViews):
    """The same, where cross-attention layers read the views."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's, with what its own modules make of the views in their place."""
        views = kwargs.get("pixel_values")
        if isinstance(views, PackedViews):
            encoder = cast(CrossEncoder, self.view_encoder)
            states = encoder.inputs(self, kwargs, encode_views(self, views))
            kwargs = kwargs | {"pixel_values": None} | states
        stock = cast(Any, super())
        return stock.forward(*args, **kwargs)


def encode_views(inner: Any, views: PackedViews) -> torch.Tensor:
    """The features of every view of a batch [N, L, E], in their order.

    `inner` is the model that holds tower and connector.
    """
    encoder: ViewEncoder = inner.view_encoder
    in_tower = torch.no_grad if not _learns(inner, "vision") else nullcontext
    connect = functools.partial(encoder.connect, inner)
    if _recomputes(inner):
        connect = functools.partial(inner._gradient_checkpointing_func, connect)
    keeper: FeatureKeeper | None = inner.feature_keeper
    keys = iter(views.keys)
    hidden = _hidden_of_calls(inner, views)
    features = []
    for given in views_of_calls(views, inner.config.vision_config.patch_size):
        keys_n = list(islice(keys, len(given)))
        is_known: Stage | None = None
        if given.is_floating_point():
            assert keeper, "kept features need the keeper that knows their stage"
            is_known, state = keeper.stage, given.to(inner.dtype)
            keeper.num_read += len(given)
        else:
            with in_tower():
                state = next(hidden)
            state = _kept(keeper, "tower", keys_n, state)
        if is_known != "connector":
            state = _kept(keeper, "connector", keys_n, connect(state))
        features.append(state)
    return torch.cat(features)[views.order_N]


def _kept(
    keeper: FeatureKeeper | None, stage: Stage, keys: Sequence[str | None], features: torch.Tensor
) -> torch.Tensor:
    """As they will be read where these are what is kept, else as they are."""
    if keeper and keeper.stage == stage and any(keys):
        return keeper.keep(keys, features)
    return features


def _hidden_of_calls(inner: Any, views: PackedViews) -> Iterator[torch.Tensor]:
    """What the tower makes of each call's pixels [n, P, D].

    Where attention keeps views apart by itself, sizes run together, up to `MAX_PATCHES`.
    """
    encoder: ViewEncoder = inner.view_encoder
    patch_size = inner.config.vision_config.patch_size
    calls = [each for each in views_of_calls(views, patch_size) if not each.is_floating_point()]
    pixels = (normalised(each, views).to(inner.dtype) for each in calls)
    vision = inner.get_submodule(inner.view_modules["vision"][0])
    if encoder.tower_of_sizes is None or _learns(inner, "vision") or not is_at_hand(vision):
        yield from (encoder.tower(inner, each) for each in pixels)
        return
    lengths = [_patches_of_views(each, patch_size) for each in calls]
    for together in _up_to(MAX_PATCHES, map(sum, lengths)):
        with views_apart(vision, [each for i in together for each in lengths[i]]):
            hidden = encoder.tower_of_sizes(inner, list(islice(pixels, len(together))))
        yield from hidden


def _up_to(most: int, sizes: Iterable[int]) -> Iterator[list[int]]:
    """Numbers of things of these sizes, in order, as many together as are no larger than `most`, or
    one.
    """
    together, total = [], 0
    for number, size in enumerate(sizes):
        if together and total + size > most:
            yield together
            together, total = [], 0
        together.append(number)
        total += size
    if together:
        yield together


def _patches_of_views(pixels_nCHW: torch.Tensor, patch_size: int) -> list[int]:
    """The number of patches of each of some views, or of images with their tiles."""
    num_views, *tiles, _, height, width = pixels_nCHW.shape
    num_patches = math.prod(tiles) * (height // patch_size) * (width // patch_size)
    return [num_patches] * num_views


def views_of_calls(views: PackedViews, patch_size: int) -> Iterator[torch.Tensor]:
    """The groups, cut where one holds more than `MAX_PATCHES`."""
    for group in views.groups:
        if group.is_floating_point():
            num_patches = group.shape[1]
        else:
            num_patches = _patches_of_views(group, patch_size)[0]
        yield from group.split(max(MAX_PATCHES // max(num_patches, 1), 1))


def frozen_stage(inner: Any) -> Stage | None:
    """How far from the pixels on nothing is trained; None where something of the tower is."""
    if _learns(inner, "vision"):
        return None
    return "tower" if _learns(inner, "connector") else "connector"


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
