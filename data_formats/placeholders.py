"""Text with `<image>` in it -> parts, each placeholder an image; the images are taken in order over
the whole conversation.

White space next to a placeholder is dropped, since chat templates set their own. The rule that
counts must match is that of LLaMA-Factory and ms-swift, whose data have the same shape.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from data_formats.chat import Conversation, FormatError, Image, Message, Role, Text

PLACEHOLDER = "<image>"


@dataclass(frozen=True, slots=True)
class Turn:
    """A message whose images are still placeholders in its text."""

    role: Role
    text: str
    train: bool = True


def place_images(
    turns: Iterable[Turn], images: Sequence[Image], *, put_missing_first: bool = False
) -> Conversation:
    """The turns with their images; blank system turns are dropped.

    Raises `FormatError` where placeholders and images are not equally many. With
    `put_missing_first`, images that have no placeholder come before the first user turn's text.
    """
    turns = [turn for turn in turns if turn.role != "system" or turn.text.strip()]
    if not turns:
        raise FormatError("holds no turn but an empty system turn; add a user turn")
    num_missing = len(images) - sum(turn.text.count(PLACEHOLDER) for turn in turns)
    first_user = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if num_missing > 0 and put_missing_first:
        if first_user is None:
            raise FormatError(
                f"has {_num(len(images), 'image')} but no user turn to show it in; add one"
            )
        user = turns[first_user]
        turns[first_user] = Turn("user", PLACEHOLDER * num_missing + user.text, user.train)
    elif num_missing:
        raise FormatError(
            _mismatch(len(images) - num_missing, len(images))
            + ("" if num_missing < 0 else ", or set format: ms-swift, which puts others first")
        )
    left = iter(images)
    return Conversation(
        tuple(Message(turn.role, _parts(turn.text, left), turn.train) for turn in turns)
    )


def with_images(text: str, images: Sequence[Image]) -> tuple[Text | Image, ...]:
    """One question about images: they come first, unless placeholders say where.

    Raises `FormatError` where there are placeholders, but not as many as images.
    """
    num_placeholders = text.count(PLACEHOLDER)
    if num_placeholders == len(images):
        return _parts(text, iter(images))
    if num_placeholders:
        raise FormatError(_mismatch(num_placeholders, len(images)))
    return (*images, Text(text))


def _parts(text: str, images: Iterator[Image]) -> tuple[Text | Image, ...]:
    if PLACEHOLDER not in text:
        return (Text(text),)
    first, *others = text.split(PLACEHOLDER)
    parts: list[Text | Image] = [Text(first.rstrip())]
    for i, piece in enumerate(others, start=1):
        is_last = i == len(others)
        parts += [next(images), Text(piece.lstrip() if is_last else piece.strip())]
    return tuple(part for part in parts if isinstance(part, Image) or part.text)


def _mismatch(num_placeholders: int, num_images: int) -> str:
    return (
        f"{_num(num_placeholders, f'{PLACEHOLDER} placeholder')} but {_num(num_images, 'image')}; "
        f"write {PLACEHOLDER} once for each image, where it is shown"
    )


def _num(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}" + ("" if count == 1 else "s")
