"""What every conversation must hold to, whichever format it came in."""

from data_formats.chat import Conversation, FormatError, Image, Text, is_blank


def refuse_odd_turns(conversation: Conversation) -> None:
    """Raise `FormatError` for turns that no chat template can render faithfully, or that teach
    nothing.

    Two user turns in a row, and two assistant turns, are good. Turns are counted from 1, as the
    converter gave them (a blank system turn is gone by then).
    """
    is_asked = False
    num_learnt = 0
    for number, message in enumerate(conversation.messages, start=1):
        role = message.role
        for part in message.content:
            _refuse_broken_text(part.text if isinstance(part, Text) else part.source, number, role)
        for reference in message.references:
            _refuse_broken_text(reference, number, role)
        if is_blank(message):
            todo = "text" if role == "assistant" else "text or an image"
            raise FormatError(
                f"turn {number} ({role}) is empty; give it {todo}, or leave the row out"
            )
        if role == "system":
            if is_asked:
                raise FormatError(
                    f"turn {number} is a system turn after the first {_first(conversation)} turn; "
                    "move it to the start, or make it part of a user turn"
                )
            continue
        if role == "assistant" and message.train:
            if not is_asked:
                raise FormatError(
                    f"turn {number} (assistant) comes first, so nothing was asked; put a user turn "
                    "before it, or set train: false on it"
                )
            if any(isinstance(part, Image) for part in message.content):
                raise FormatError(
                    f"turn {number} (assistant) holds an image, which the model cannot learn to "
                    "write; move it to a user turn, or set train: false on the assistant turn"
                )
            num_learnt += 1
        is_asked = True
    if not num_learnt:
        raise FormatError(
            "has no assistant turn to learn from; add one, or leave the row out (train: false "
            "turns do not count)"
        )


def _first(conversation: Conversation) -> str:
    return next(m.role for m in conversation.messages if m.role != "system")


def _refuse_broken_text(text: str | bytes, number: int, role: str) -> None:
    """NUL stands for a broken file, and JSON escapes may cut an emoji in two."""
    if isinstance(text, bytes):
        return
    if "\0" in text:
        raise FormatError(
            f"turn {number} ({role}) holds a NUL character; remove it (it often stands for text "
            "read in the wrong encoding)"
        )
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"turn {number} ({role}) holds half of a character (a lone surrogate, "
            f"\\u{ord(text[error.start]):04x}); write it whole"
        ) from error
