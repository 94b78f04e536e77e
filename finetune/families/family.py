"""What a model family must say of itself; everything else is written once for all families.

Shape letters: B rows, T tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from finetune.data.packed_views import pack_views
from finetune.data.views import ImagePlan
from finetune.recipe import ImagesSection


@dataclass(frozen=True)
class Part:
    """One of a model's parts: `language`, `connector` or `vision`."""

    prefixes: tuple[str, ...]
    """Where its modules stand in the conditional-generation model, as dotted names."""

    linears: tuple[str, ...]
    """The last names of its linear layers, which LoRA adapts."""


class ViewedRow(Protocol):
    """What of an example the tensors of its images are made from."""

    @property
    def input_ids(self) -> list[int]:
        """Token ids of the row."""
        ...

    @property
    def views(self) -> list[Any]:
        """The views of all images one after the other, uint8 [3, H, W]."""
        ...

    @property
    def plans(self) -> Sequence[ImagePlan]:
        """How each image was cut into its views."""
        ...


@dataclass(frozen=True)
class ViewEncoder:
    """How views become features, where these take the places of the image tokens in the text.

    Both are given the model that holds tower and connector, and call its modules as modules, so
    that the hooks of what wraps them run.
    """

    tower: Callable[[Any, torch.Tensor], torch.Tensor]
    """Views of one size [n, C, H, W], normalised -> what the connector takes of them [n, P, D]."""

    connect: Callable[[Any, torch.Tensor], torch.Tensor]
    """That [n, P, D] -> the features [n, L, E] that stand in the text."""

    tower_of_sizes: Callable[[Any, Sequence[torch.Tensor]], list[torch.Tensor]] | None = None
    """`tower` of views of several sizes, a tensor a size, whose patches become one sequence: for
    where attention keeps them apart by itself. None where views have one size.
    """


@dataclass(frozen=True)
class CrossEncoder(ViewEncoder):
    """How views become states of their own, which cross-attention layers read. All that a token
    sees is named by a mask, so views that nothing shows, in places where a batch has none, may be
    any.
    """

    inputs: Callable[[Any, Mapping[str, Any], torch.Tensor], dict[str, Any]] = field(kw_only=True)
    """The model without its head, what else its forward is given, by name, and the states of all
    views [N, L, E] -> in what it takes them.
    """


@dataclass(frozen=True)
class Template:
    """A chat template of ours, for checkpoints whose own is missing or lacks something."""

    text: str
    """In Jinja, as `tokenizer.chat_template`."""

    turn_end_token: str
    """The token that closes an answer, and its last one learnt."""

    closes_every_turn: bool = True
    """Whether it stands after users' turns as well."""


@dataclass(frozen=True)
class Family:
    """The facts of one family, as data and small functions."""

    name: str
    """As messages and files call it."""

    model_type: str
    """As in `config.json`."""

    parts_of: Callable[[Any], Mapping[str, Part]]
    """The parts of a model with this configuration, on which the numbers of layers may depend."""

    image_tokens: tuple[str, ...]
    """Tokens that stand for images in the text, the placeholder of the chat template first: never
    learnt, never generated.
    """

    turn_end_token: str
    """The token that closes an answer in the checkpoint's own template, and its last one learnt."""

    plan_image: Callable[[int, int, ImagesSection, Any], ImagePlan]
    """Width and height of an image in pixels, image settings and image processor -> its views.

    Raises `DataError` for an image that cannot be shown.
    """

    image_text: Callable[[Any, ImagePlan, int], str]
    """Processor, plan of an image and its number in the row, from 1 -> what takes the place of its
    placeholder in the text.
    """

    num_image_tokens: Callable[[Any, ImagePlan], int]
    """How often `processor.image_token_id` must stand in the ids for an image with this plan."""

    stack: Callable[[Sequence[ViewedRow], Any, torch.Tensor], dict[str, torch.Tensor]]
    """Rows of a batch, processor and padded `input_ids` [B, T] -> what the model's forward takes
    for their images; called also for a batch without any.
    """

    set_images: Callable[[Any, ImagesSection], None]
    """Brings a processor to the image settings, so that it does what `plan_image` does."""

    own_images: Callable[[Any], dict[str, Any]]
    """The image settings that a processor comes with, under the recipe's names. Settings that the
    family has no use for are left out.
    """

    recognises: Callable[[Any], bool] = lambda config: True
    """Whether a configuration of this `model_type` is of this family."""

    pack: Callable[[Sequence[ViewedRow], Any, torch.Tensor], dict[str, Any]] = pack_views
    """As `stack`, with a `PackedViews` for `pixel_values`, as the model takes it once
    `finetune.model.vision` has been there.
    """

    view_encoder: ViewEncoder | None = None
    """The steps from packed views to features; None where cross-attention reads them."""

    cross_encoder: CrossEncoder | None = None
    """The steps from packed views to states; None where features stand in the text."""

    closes_every_turn: bool = True
    """Whether the template puts `turn_end_token` after users' turns as well as after answers."""

    own_template: Template | None = None
    """Takes the place of the checkpoint's template, where that cannot be trained with."""

    lent_template: Template | None = None
    """Used where the checkpoint has no template."""

    template_variables: Mapping[str, Any] = field(default_factory=dict)
    """Values for the template that would otherwise depend on the day or the machine."""

    finish_text: Callable[[Any, str], str] = lambda processor, text: text
    """Processor and text with its images expanded -> the text that is tokenised."""

    build_processor: Callable[[Callable[[type | None], Any], Any], Any] = lambda load, config: load(
        None
    )
    """How the processor is made, from the configuration and a function that loads what a class of
    the library finds in the checkpoint (without a class: what `AutoProcessor` finds).
    """

    adjust_config: Callable[[Any], None] = lambda config: None
    """Mends the model's configuration before the weights are loaded."""

    adjust_model: Callable[[Any], None] = lambda model: None
    """Mends the model once its weights are loaded."""

    trained_edge_px: Callable[[Any], int | None] = lambda config: None
    """The longest edge of a view that the vision tower's position table covers, from the
    configuration; None where views have one size.
    """

    cheaper_images: Callable[[ImagesSection], Iterator[ImagesSection]] = lambda images: iter(())
    """Settings under which an image costs fewer tokens, the least loss first."""

    untrainable: Callable[[Any], str | None] = lambda config: None
    """Why a checkpoint with this configuration cannot be trained; None where it can."""

    def template_of(self, processor: Any) -> Template:
        """The template that a processor of this family renders with."""
        for template in (self.own_template, self.lent_template):
            if template and template.text == processor.chat_template:
                return template
        return Template(processor.chat_template, self.turn_end_token, self.closes_every_turn)
