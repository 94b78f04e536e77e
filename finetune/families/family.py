"""What a model family must say of itself; everything else is written once for all families."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """One of a model's parts: `language`, `connector` or `vision`."""

    prefixes: tuple[str, ...]
    """Where its modules stand in the conditional-generation model, as dotted names."""

    linears: tuple[str, ...]
    """The last names of its linear layers, which LoRA adapts."""


@dataclass(frozen=True)
class Family:
    """The facts of one family, as data and small functions."""

    model_type: str
    """As in `config.json`."""

    parts: Mapping[str, Part]

    turn_end_token: str
    """The token that closes every turn of the chat template, and the last one learnt of an
    answer.
    """

    image_tokens: tuple[str, ...]
    """Tokens that stand for images in the text: never learnt, never generated."""

    views_when_split: int
    """How many views the processor makes of an image that it splits."""

    adjust_config: Callable[[Any], None]
    """Mends the model's configuration before the weights are loaded."""

    trained_edge_px: Callable[[Any], int]
    """The longest edge of a view that the vision tower's position table covers, from the
    configuration.
    """
