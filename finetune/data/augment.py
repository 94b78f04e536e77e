"""Training rows shown otherwise each time: pictures enlarged, exchanges in another order.

Both are how Idefics2 was instruction-tuned (arXiv 2405.02246, section 4.2). What is drawn for a row
depends on the seed, the epoch and the row's place alone, so that a run can be repeated and resumed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_formats.chat import Conversation, Image, Text
from finetune.data.shorten import Numbered, number_images
from finetune.data.views import ImagePlan, Size
from finetune.errors import DataError
from finetune.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Augmentation:
    """The recipe's options for training rows."""

    random_upscale: float
    shuffle_turns: bool
    seed: int

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> "Augmentation | None":
        """None where every row is shown as it is."""
        data = recipe.data
        if data.random_upscale == 1 and not data.shuffle_turns:
            return None
        return cls(data.random_upscale, data.shuffle_turns, recipe.training.seed)

    def draws(self, epoch: int, *place: int) -> "Draws":
        """For the row at this place, which may take several numbers, in this epoch, from 0."""
        rng = np.random.default_rng([self.seed, epoch, *place])
        return Draws(self.random_upscale, self.shuffle_turns, rng)


@dataclass(frozen=True, slots=True)
class Draws:
    """What happens to one row in one epoch; each question is asked once."""

    random_upscale: float
    shuffle_turns: bool
    rng: np.random.Generator

    def order(self, conversation: Conversation) -> tuple[Conversation, Sequence[int]]:
        """The conversation in its order for this time, and for each of its images the number it
        had before.
        """
        if self.shuffle_turns:
            return shuffle_exchanges(conversation, self.rng)
        return conversation, range(sum(1 for _ in conversation.images()))

    def factors(self, num_images: int) -> list[float]:
        """By how much each image is enlarged, evenly between 1 and `random_upscale`."""
        return self.rng.uniform(1, self.random_upscale, num_images).tolist()


def plan_enlarged(
    plan_of: Callable[[int, int], ImagePlan], size_px: Size, own: ImagePlan, factor: float
) -> ImagePlan:
    """The views of a picture as if its file were larger by `factor`; `own` are those it has.

    `plan_of` keeps to the image settings, so that nothing is shown larger than they allow. A
    picture of the same views at either size keeps its own: it would only be blurred.
    """
    width_px, height_px = (round(edge * factor) for edge in size_px)
    try:
        plan = plan_of(width_px, height_px)
    except DataError:  # too large to be shown, which the picture itself is not
        return own
    if plan.resizes:  # it is brought to one size from any other, and that in one step
        return plan
    if _view_sizes(plan) == _view_sizes(own):
        return own
    return replace(plan, resizes=((width_px, height_px),))


def _view_sizes(plan: ImagePlan) -> list[Size]:
    return [(view.width_px, view.height_px) for view in plan.views]


def shuffle_exchanges(
    conversation: Conversation, rng: np.random.Generator
) -> tuple[Conversation, Sequence[int]]:
    """The exchanges in another order, and for each image the number it had before.

    An exchange is a user's turns and what follows them up to the user's next. What stands before
    the first one stays first, a question without an answer last. An exchange without a picture is
    about those before it, and stays with them: where they open their exchange, they move to the
    front of whichever comes first; where they stand within its text, it stays in front.
    """
    entries = number_images(conversation)
    starts = [
        i
        for i, (message, _) in enumerate(entries)
        if message.role == "user" and (i == 0 or entries[i - 1][0].role != "user")
    ]
    if not starts:
        return conversation, range(sum(1 for _ in conversation.images()))
    stops = [*starts[1:], len(entries)]
    exchanges = [entries[start:stop] for start, stop in zip(starts, stops, strict=True)]
    unanswered = exchanges.pop() if entries[-1][0].role == "user" else []
    topics: list[list[list[Numbered]]] = []
    for exchange in exchanges:
        if not topics or any(numbers for _, numbers in exchange):
            topics.append([])
        topics[-1].append(exchange)
    shuffled = [
        entry
        for i in rng.permutation(len(topics)).tolist()
        for exchange in _shuffle_topic(topics[i], rng)
        for entry in exchange
    ]
    ordered = [*entries[: starts[0]], *shuffled, *unanswered]
    messages = tuple(message for message, _ in ordered)
    return Conversation(messages), [number for _, numbers in ordered for number in numbers]


def _shuffle_topic(
    exchanges: list[list[Numbered]], rng: np.random.Generator
) -> list[list[Numbered]]:
    """Exchanges of which only the first may have pictures."""
    order = rng.permutation(len(exchanges)).tolist()
    opening = exchanges[0]
    if order[0] == 0 or not any(numbers for _, numbers in opening):
        return [exchanges[i] for i in order]
    pictures, rest = _take_pictures(opening)
    if rest is None:
        return [opening, *(exchanges[i] for i in order if i)]
    left = [rest, *exchanges[1:]]
    (message, _), *others = left[order[0]]
    numbers = tuple(number for _, numbers in opening for number in numbers)
    first = [(replace(message, content=(*pictures, *message.content)), numbers), *others]
    return [first, *(left[i] for i in order[1:])]


def _take_pictures(exchange: list[Numbered]) -> tuple[list[Image], list[Numbered] | None]:
    """The pictures of an exchange and the exchange without them, or None where they do not all
    stand before its words.
    """
    (message, numbers), *others = exchange
    words = [i for i, part in enumerate(message.content) if isinstance(part, Text) and part.text]
    first_word = next((i for i in words if not message.content[i].text.isspace()), None)  # type: ignore[union-attr]
    pictures = [part for part in message.content[:first_word] if isinstance(part, Image)]
    if first_word is None or len(pictures) < len(numbers) or any(more for _, more in others):
        return [], None
    return pictures, [(replace(message, content=message.content[first_word:]), ()), *others]
