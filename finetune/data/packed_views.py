"""The views of a batch as they travel to the model: every different one once, at its own size, a
byte a value.

Shape letters: N views of the batch, n different ones of one size, C channels (3), H height, W width
in pixels, P patches, D width of the vision tower.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from xxhash import xxh3_128_digest


class HasViews(Protocol):
    """A row, or several laid out as one."""

    @property
    def views(self) -> list[Any]:
        """The views of all images one after the other, uint8 [C, H, W]."""
        ...


@dataclass(frozen=True)
class PackedViews:
    """Stands in a batch where the library has `pixel_values`.

    `groups` are uint8 [n, C, H, W], views of one size each. `order_N` is the place of each view of
    the batch among those of all groups, one after the other; one place may come several times.
    """

    groups: tuple[torch.Tensor, ...]
    order_N: torch.Tensor
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

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

    def on_meta(self) -> "PackedViews":
        """Without values, for a step that is followed and not computed."""
        return self.to("meta")

    def _mapped(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "PackedViews":
        groups = tuple(map(move, self.groups))
        return replace(self, groups=groups, order_N=move(self.order_N))

    def normalised(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Views as the vision tower takes them, float32, computed where they are."""
        mean, std = (
            torch.tensor(values, device=pixels_NCHW.device).view(3, 1, 1)
            for values in (self.mean, self.std)
        )
        return (pixels_NCHW.float() * self.rescale_factor - mean) / std


def pack_views(
    rows: Sequence[HasViews], processor: Any, input_ids_BT: torch.Tensor
) -> dict[str, Any]:
    """`pixel_values`, a `PackedViews`, row after row; or nothing where there is no view."""
    places, by_size = _different(view for row in rows for view in row.views)
    if not places:
        return {}
    starts, start = {}, 0
    for size, views in by_size.items():
        starts[size] = start
        start += len(views)
    image_processor = processor.image_processor
    packed = PackedViews(
        groups=tuple(torch.from_numpy(np.stack(views)) for views in by_size.values()),
        order_N=torch.tensor([starts[size] + place for size, place in places]),
        rescale_factor=image_processor.rescale_factor,
        mean=tuple(image_processor.image_mean),
        std=tuple(image_processor.image_std),
    )
    return {"pixel_values": packed}


def _different(
    views: Any,
) -> tuple[list[tuple[tuple[int, ...], int]], dict[tuple[int, ...], list[np.ndarray]]]:
    """Size and place of every view among the different ones of its size, and these."""
    places: list[tuple[tuple[int, ...], int]] = []
    by_size: dict[tuple[int, ...], list[np.ndarray]] = {}
    seen: dict[tuple[tuple[int, ...], bytes], int] = {}
    digests: dict[int, bytes] = {}  # rows about one picture hold the same objects
    for view in views:
        digest = digests.setdefault(id(view), b"") or xxh3_128_digest(
            np.ascontiguousarray(view).data
        )
        digests[id(view)] = digest
        size = view.shape
        alike = by_size.setdefault(size, [])
        place = seen.setdefault((size, digest), len(alike))
        if place == len(alike):
            alike.append(view)
        places.append((size, place))
    return places, by_size
