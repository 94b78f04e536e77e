"""Rows over `data.max_tokens` made to fit without a cut inside an image or an answer.

A row is shortened by whole exchanges, oldest first, or by showing its pictures in fewer views.
What was done is told in words, counted by kind and listed with the row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from data_formats.chat import Conversation, Image, Message


@dataclass(frozen=True, slots=True)
class Shortened:
    """What is left of a conversation: which of its images, and which of them stay unsplit.

    `kind` counts like with like, `change` says what was done to this row.
    """

    conversation: Conversation
    image_numbers: tuple[int, ...]
    unsplit: frozenset[int]
    kind: str
    change: str


def without_oldest_exchanges(conversation: Conversation) -> Iterator[Shortened]:
    """The conversation without its first exchange, its first two, and so on; one always stays.

    An exchange is a user's turns and what follows them up to the user's next. System turns stay.
    Where the first exchange left has no picture of its own, it is about those shown before: they
    move to its front, or its answer would be learnt blind.
    """
    numbered = _numbered(conversation)
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
            frozenset(),
            "oldest exchanges dropped",
            f"{num_dropped} of {len(exchanges)} exchanges dropped",
        )


def with_fewer_views(
    conversation: Conversation, sizes_px: Sequence[tuple[int, int]], num_views: Sequence[int]
) -> Iterator[Shortened]:
    """The conversation with one more picture unsplit each time: first the one of fewest pixels,
    which loses least.
    """
    split = [i for i, views in enumerate(num_views) if views > 1]
    split.sort(key=lambda i: (sizes_px[i][0] * sizes_px[i][1], i))
    for count in range(1, len(split) + 1):
        yield Shortened(
            conversation,
            tuple(range(len(num_views))),
            frozenset(split[:count]),
            "pictures left unsplit",
            f"{count} of {len(split)} split pictures shown whole only",
        )


Numbered = tuple[Message, list[int]]  # a message, and the row's numbers of its images


def _numbered(conversation: Conversation) -> list[Numbered]:
    entries, number = [], 0
    for message in conversation.messages:
        count = sum(isinstance(part, Image) for part in message.content)
        entries.append((message, list(range(number, number + count))))
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
    numbers = [number for _, numbers in dropped for number in numbers]
    message = first[0]
    return replace(message, content=(*images, *message.content)), [*numbers, *first[1]]
