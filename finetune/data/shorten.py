"""Rows over `data.max_tokens` made to fit without a cut inside an image or an answer.

A row is shortened by whole exchanges, oldest first, or by showing its pictures in fewer views.
What was done is told in words, counted by kind and listed with the row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from data_formats.chat import Conversation, Image, Message
from finetune.data.views import Size
from finetune.recipe import ImagesSection


@dataclass(frozen=True, slots=True)
class Shortened:
    """What is left of a conversation: which of its images, and the settings each is shown by where
    these are not the recipe's.

    `kind` counts like with like, `change` says what was done to this row.
    """

    conversation: Conversation
    image_numbers: tuple[int, ...]
    settings: tuple[ImagesSection, ...] | None
    kind: str
    change: str


def without_oldest_exchanges(conversation: Conversation) -> Iterator[Shortened]:
    """The conversation without its first exchange, its first two, and so on; one always stays.

    An exchange is a user's turns and what follows them up to the user's next. System turns stay.
    Where the first exchange left has no picture of its own, it is about those shown before: they
    move to its front, or its answer would be learnt blind.
    """
    numbered = number_images(conversation)
    system = [entry for entry in numbered if entry[0].role == "system"]
    exchanges = _exchanges([entry for entry in numbered if entry[0].role != "system"])
    for num_dropped in range(1, len(exchanges)):
        dropped = [entry for exchange in exchanges[:num_dropped] for entry in exchange]
        kept = [entry for exchange in exchanges[num_dropped:] for entry in exchange]
        if not any(message.role == "assistant" and message.train for message, _ in kept):
            return
        if not any(numbers for _, numbers in exchanges[num_dropped]):
            kept[0] = _with_images_of(dropped, kept[0])
        left = [*system, *kept]
        yield Shortened(
            Conversation(tuple(message for message, _ in left)),
            tuple(number for _, numbers in left for number in numbers),
            None,
            "oldest exchanges dropped",
            f"{num_dropped} of {len(exchanges)} exchanges dropped",
        )


def with_fewer_views(
    conversation: Conversation,
    sizes_px: Sequence[Size],
    ladders: Sequence[Sequence[ImagesSection]],
) -> Iterator[Shortened]:
    """The conversation with one more picture in fewer views each time: every picture that can goes
    down a step before any goes down two, and of these the one of fewest pixels, which loses least.

    `ladders` has the settings of each picture, its own first, then step by step cheaper ones.
    """
    steps = sorted(
        (step, sizes_px[i][0] * sizes_px[i][1], i)
        for i, ladder in enumerate(ladders)
        for step in range(1, len(ladder))
    )
    num_reducible = sum(len(ladder) > 1 for ladder in ladders)
    settings = [ladder[0] for ladder in ladders]
    for step, _, i in steps:
        settings[i] = ladders[i][step]
        num_reduced = sum(
            now is not ladder[0] for now, ladder in zip(settings, ladders, strict=True)
        )
        yield Shortened(
            conversation,
            tuple(range(len(ladders))),
            tuple(settings),
            "pictures in fewer views",
            f"{num_reduced} of {num_reducible} split pictures shown in fewer views",
        )


Numbered = tuple[Message, tuple[int, ...]]  # a message, and the row's numbers of its images


def number_images(conversation: Conversation) -> list[Numbered]:
    """Each message with the numbers of its images, counted through the row from 0."""
    entries, number = [], 0
    for message in conversation.messages:
        count = sum(isinstance(part, Image) for part in message.content)
        entries.append((message, tuple(range(number, number + count))))
        number += count
    return entries


def _exchanges(entries: Sequence[Numbered]) -> list[list[Numbered]]:
    exchanges: list[list[Numbered]] = []
    previous = "assistant"
    for entry in entries:
        if not exchanges or (entry[0].role == "user" and previous != "user"):
            exchanges.append([])
        exchanges[-1].append(entry)
        previous = entry[0].role
    return exchanges


def _with_images_of(dropped: Sequence[Numbered], first: Numbered) -> Numbered:
    images = [part for message, _ in dropped for part in message.content if isinstance(part, Image)]
    numbers = tuple(number for _, numbers in dropped for number in numbers)
    message = first[0]
    return replace(message, content=(*images, *message.content)), (*numbers, *first[1])
