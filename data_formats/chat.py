"""The chat-with-images schema: one `Conversation` between every dataset's own shape and every
model's own rendering.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "scans/0041.png"},
                                               {"type": "text", "text": "What is the total?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "12.50"}]}]}

`content` may also be a plain string. A message with `"train": false` is shown to the model but not
learnt.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

Role = Literal["system", "user", "assistant"]


class FormatError(ValueError):
    """A row is not in the shape its format promises; the message names the place in the row and
    what to do.
    """


@dataclass(frozen=True, slots=True)
class Text:
    """A run of text within a message."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image within a message: a path, a data URI or a URL as a string, or the bytes of an image
    file.
    """

    source: str | bytes


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `train` is False where an assistant's words are context only."""

    role: Role
    content: tuple[Text | Image, ...]
    train: bool = True

    @property
    def text(self) -> str:
        """The text parts, one after the other, without the images."""
        return "".join(part.text for part in self.content if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in their order; at least one."""

    messages: tuple[Message, ...]

    def images(self) -> Iterator[Image]:
        """Every image, in the order in which the model sees them."""
        for message in self.messages:
            yield from (part for part in message.content if isinstance(part, Image))

    def learns(self) -> bool:
        """Whether any assistant message that says something is there to be learnt."""
        return any(m.role == "assistant" and m.train and m.text.strip() for m in self.messages)

    def before_last_answer(self) -> "Conversation":
        """The prompt of the last assistant message: everything before it, as at inference."""
        last = max(i for i, message in enumerate(self.messages) if message.role == "assistant")
        return Conversation(self.messages[:last])


def parse_chat(row: Any) -> Conversation:
    """A row of the native format as a `Conversation`. Raises `FormatError`, naming the first
    fault.
    """
    if not isinstance(row, dict):
        raise FormatError(f"expected an object with 'messages', found {_kind(row)}")
    if "messages" not in row:
        found = ", ".join(repr(key) for key in list(row)[:5]) or "nothing"
        raise FormatError(
            f"'messages' is missing (found {found}); a chat row has a list of messages"
        )
    for key in ("image", "images"):
        if row.get(key):
            raise FormatError(
                f"{key!r} stands beside 'messages'; put each image where it is shown, as a part "
                '{"type": "image", "image": ...} of a message\'s content'
            )
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise FormatError(
            f"'messages' must be a list with at least one message, found {_kind(messages)}"
        )
    return Conversation(
        tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))
    )


def dump_chat(conversation: Conversation) -> dict[str, Any]:
    """The row that `parse_chat` reads back as the same conversation; images by bytes cannot be
    written to JSON.
    """
    messages = []
    for message in conversation.messages:
        content = [
            {"type": "text", "text": part.text}
            if isinstance(part, Text)
            else {"type": "image", "image": part.source}
            for part in message.content
        ]
        row: dict[str, Any] = {"role": message.role, "content": content}
        messages.append(row if message.train else row | {"train": False})
    return {"messages": messages}


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise FormatError(
            f"{place} must be an object with 'role' and 'content', found {_kind(value)}"
        )
    _refuse_unknown(value, ("role", "content", "train"), place)
    role, train = value.get("role"), value.get("train", True)
    if role not in get_args(Role):
        raise FormatError(f"{place}.role is {role!r}; expected system, user or assistant")
    if not isinstance(train, bool):
        raise FormatError(f"{place}.train must be true or false, found {_kind(train)}")
    if "content" not in value:
        raise FormatError(
            f"{place}.content is missing; give a string or a list of text and image parts"
        )
    return Message(cast(Role, role), _content(value["content"], f"{place}.content"), train)


def _content(value: Any, place: str) -> tuple[Text | Image, ...]:
    if isinstance(value, str):
        return (Text(value),)
    if not isinstance(value, list):
        raise FormatError(f"{place} must be a string or a list of parts, found {_kind(value)}")
    return tuple(_part(part, f"{place}[{i}]") for i, part in enumerate(value))


def _part(value: Any, place: str) -> Text | Image:
    if not isinstance(value, dict):
        raise FormatError(f"{place} must be a text or image part, found {_kind(value)}")
    match value.get("type"):
        case "text":
            _refuse_unknown(value, ("type", "text"), place)
            if not isinstance(value.get("text"), str):
                raise FormatError(
                    f"{place}.text must be a string, found {_kind(value.get('text'))}"
                )
            return Text(value["text"])
        case "image":
            _refuse_unknown(value, ("type", "image"), place)
            if not isinstance(value.get("image"), str | bytes) or not value["image"]:
                raise FormatError(
                    f"{place}.image must be a path, a data URI, a URL or bytes, found "
                    f"{_kind(value.get('image'))}"
                )
            return Image(value["image"])
        case other:
            raise FormatError(f"{place}.type is {other!r}; expected 'text' or 'image'")


def _refuse_unknown(value: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    """A misspelt `train`, or an image given beside the content, would else be lost unseen.

    Keys that hold nothing are let pass: tables written as JSON have every column in every row.
    """
    for key in value:
        if key not in known and value[key] is not None:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected {', '.join(known)}"
            raise FormatError(f"{place} has an unknown key {key!r}{hint}")


def _kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    if value is None:
        return "nothing"
    if isinstance(value, str | list | dict) and not value:
        return {str: "an empty string", list: "an empty list", dict: "an empty object"}[type(value)]
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
    }
    return names.get(type(value), "an object")
