"""The views of a batch as they travel to the model: every different one once, at its own size, a
byte a value.

Shape letters: N views of the batch, V different ones, n different ones of one size, C channels (3),
H height, W width in pixels, P places of a view's features, D their width.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from xxhash import xxh3_128_digest

_Group = tuple[tuple[int, ...], bool]  # the size of its views, and whether it holds features


class HasViews(Protocol):
    """A row, or several laid out as one."""

    @property
    def views(self) -> list[Any]:
        """The views of all images one after the other, uint8 [C, H, W]."""
        ...


@dataclass(frozen=True, slots=True)
class KeyedView:
    """A view that the vision cache has a name for: its features where they are kept, its pixels
    where they are to be computed.

    Two of one key are equal: they show the same.
    """

    key: str
    shape: tuple[int, int, int] = field(compare=False)
    """Of the pixels [C, H, W]."""
    pixels: np.ndarray | None = field(default=None, compare=False, repr=False)
    """uint8 [C, H, W]."""
    features: torch.Tensor | None = field(default=None, compare=False, repr=False)
    """bfloat16 [P, D]."""

    @property
    def given(self) -> np.ndarray | torch.Tensor:
        """The one of both that is there."""
        given = self.pixels if self.features is None else self.features
        assert given is not None, "neither pixels nor features"
        return given


def view_key(view: "np.ndarray | KeyedView") -> Hashable:
    """Equal for views that show the same, as far as shape and pixels, or the cache, tell."""
    if isinstance(view, KeyedView):
        return view.key
    return view.shape, xxh3_128_digest(np.ascontiguousarray(view).data)


@dataclass(frozen=True)
class PackedViews:
    """Stands in a batch where the library has `pixel_values`.

    `groups` are views of one size each, uint8 [n, C, H, W], of Llama 3.2 pictures of
    one grid of r x c tiles, uint8 [n, r, c, C, H, W], or the features that a vision cache
    has of them, bfloat16 [n, P, D]. `order_N` is the place of each view of the batch among those of
    all groups, one after the other; one place may come several times. `keys` [V] name the views
    whose features the cache is to keep, and is empty where there is none.
    """

    groups: tuple[torch.Tensor, ...]
    order_N: torch.Tensor
    rescale_factor: float
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    keys: tuple[str | None, ...] = ()

    def __len__(self) -> int:
        return len(self.order_N)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(each.numel() * each.element_size() for each in (*self.groups, self.order_N))

    def to(self, device: Any, non_blocking: bool = False) -> "PackedViews":
        """On another device; accelerate and our trainer move a batch's values by this."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedViews":
        """In memory that a GPU reads by itself; torch's DataLoader looks for this."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "PackedViews":
        groups = tuple(map(move, self.groups))
        return replace(self, groups=groups, order_N=move(self.order_N))


class Normalisation(Protocol):
    """What an image processor knows of it, too: a factor for bytes, and by channel what is taken
    away and what the rest is divided by.
    """

    @property
    def rescale_factor(self) -> float: ...
    @property
    def image_mean(self) -> Sequence[float]: ...
    @property
    def image_std(self) -> Sequence[float]: ...


def normalised(pixels: np.ndarray | torch.Tensor, by: Normalisation) -> torch.Tensor:
    """Bytes [..., C, H, W] as a vision tower takes them, float32, computed where they are."""
    pixels = torch.as_tensor(pixels)
    mean, std = (
        torch.tensor(values, device=pixels.device).view(3, 1, 1)
        for values in (by.image_mean, by.image_std)
    )
    return (pixels.float() * by.rescale_factor - mean) / std


def pack_views(
    rows: Sequence[HasViews], processor: Any, input_ids_BT: torch.Tensor
) -> dict[str, Any]:
    """`pixel_values`, a `PackedViews`, row after row; or nothing where there is no view."""
    places, groups = _different(view for row in rows for view in row.views)
    if not places:
        return {}
    starts = dict(zip(groups, accumulate(map(len, groups.values()), initial=0), strict=False))
    each = [view for group in groups.values() for view in group]
    keys = tuple(_key_to_keep(view) for view in each)
    image_processor = processor.image_processor
    packed = PackedViews(
        groups=tuple(map(_stacked, groups.values())),
        order_N=torch.tensor([starts[group] + place for group, place in places]),
        rescale_factor=image_processor.rescale_factor,
        image_mean=tuple(image_processor.image_mean),
        image_std=tuple(image_processor.image_std),
        keys=keys if any(keys) else (),
    )
    return {"pixel_values": packed}


def _different(views: Iterable[Any]) -> tuple[list[tuple[_Group, int]], dict[_Group, list[Any]]]:
    """Group of every view, and its place among the different ones of that; and these."""
    groups: dict[_Group, list[Any]] = {}
    seen: dict[Hashable, tuple[_Group, int]] = {}
    keys: dict[int, Hashable] = {}  # rows about one picture hold the same objects
    places = []
    for view in views:
        if id(view) not in keys:
            keys[id(view)] = view_key(view)
        key = keys[id(view)]
        if key not in seen:
            # features, too, are grouped by the size of their pixels, for the connector to compute
            # the same batches whether they were kept or not
            group = view.shape, isinstance(view, KeyedView) and view.features is not None
            alike = groups.setdefault(group, [])
            seen[key] = group, len(alike)
            alike.append(view)
        places.append(seen[key])
    return places, groups


def _stacked(views: list[Any]) -> torch.Tensor:
    given: list[Any] = [view.given if isinstance(view, KeyedView) else view for view in views]
    if isinstance(given[0], torch.Tensor):
        return torch.stack(given)
    return torch.from_numpy(np.stack(given))


def _key_to_keep(view: Any) -> str | None:
    return view.key if isinstance(view, KeyedView) and view.features is None else None
