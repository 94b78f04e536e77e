"""The chat-with-images schema: one `Conversation` between every dataset's own shape and every
model's own rendering.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "scans/0041.png"},
                                               {"type": "text", "text": "What is the total?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "12.50"}]}]}

`content` may also be a plain string. A message with `"train": false` is shown to the model but not
learnt; `"references": ["12.50", "12.5"]` on an assistant message are all answers that count as
right. Parts `{"type": "image"}` without an image take theirs, in order, from a column `images`
beside `messages`, as TRL writes them (huggingface.co/docs/trl, "Dataset formats and types", vision
datasets).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from data_formats.wording import kind, missing, must_be, nearest, shown

Role = Literal["system", "user", "assistant"]

_ROLES = ("system", "user", "assistant")
_MESSAGE_KEYS = frozenset({"role", "content", "train", "references"})
_TEXT_KEYS = frozenset({"type", "text"})
_IMAGE_NAMES = ("image", "path", "url", "base64")  # transformers' templates know all four
_IMAGE_KEYS = frozenset({"type", *_IMAGE_NAMES})
# What other formats write into a message: such a row is theirs, and not a misspelt one of ours.
_FOREIGN_KEYS = ("weight", "loss", "name", "tool_calls", "function_call", "refusal", "audio")


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
    """An image within a message: a path, a URL, a data URI or plain base64 as a string, or the
    bytes of an image file.
    """

    source: str | bytes


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `train` is False where an assistant's words are context only.

    `references` are all answers that count as right in an assistant's place, duplicates kept, since
    VQA accuracy counts votes; none means that its own text is the only one.
    """

    role: Role
    content: tuple[Text | Image, ...]
    train: bool = True
    references: tuple[str, ...] = ()

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
        return Conversation(self.messages[: self._last_answer()])

    def references(self) -> tuple[str, ...]:
        """All right answers in the place of the last assistant message: its references, or else its
        stripped text.
        """
        answer = self.messages[self._last_answer()]
        return answer.references or (answer.text.strip(),)

    def _last_answer(self) -> int:
        return max(i for i, message in enumerate(self.messages) if message.role == "assistant")


def fits(row: Any) -> bool:
    """Whether a row's messages have string content or text and image parts, and no other format's
    keys.

    Text that holds `<image>` is not ours: it is a placeholder in the formats that have them.
    """
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        return False
    has_image_parts = False
    for message in row["messages"]:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            return False
        if any(message.get(key) is not None for key in _FOREIGN_KEYS):
            return False
        match message.get("content"):
            case str(text):
                if "<image>" in text:
                    return False
            case list(parts):
                types = [part.get("type") for part in parts if isinstance(part, dict)]
                if len(types) < len(parts) or any(t not in ("text", "image") for t in types):
                    return False
                has_image_parts |= "image" in types
            case _:
                return False
    return bool(row["messages"]) and (has_image_parts or _images_beside(row) is None)


def parse_chat(row: Any) -> Conversation:
    """A row of the native format as a `Conversation`; a blank system turn is dropped.

    Raises `FormatError`, naming the first fault.
    """
    if not isinstance(row, dict):
        raise FormatError(
            f"expected an object with 'messages', found {kind(row)}; write the row so"
        )
    if "messages" not in row:
        raise FormatError(missing(row, "messages", "a chat row has a list of messages"))
    values = row["messages"]
    if not isinstance(values, list) or not values:
        raise FormatError(must_be("'messages'", "a list with at least one message", values))
    beside = _images_beside(row)
    images = _TakenInOrder([]) if beside is None else _TakenInOrder(images_of(row))
    messages = []
    for i, value in enumerate(values):
        message = _message(value, i, images)
        if message.role == "system" and is_blank(message):
            continue
        messages.append(message)
    if beside is not None:
        images.refuse_if_not_all_are_taken(beside)
    if not messages:
        raise FormatError("'messages' holds nothing but an empty system turn; add a user turn")
    return Conversation(tuple(messages))


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
        if not message.train:
            row["train"] = False
        if message.references:
            row["references"] = list(message.references)
        messages.append(row)
    return {"messages": messages}


def is_blank(message: Message) -> bool:
    """Whether a message has neither an image nor any text but white space."""
    for part in message.content:
        if isinstance(part, Image) or (part.text and not part.text.isspace()):
            return False
    return True


def parse_image(value: Any, place: str) -> Image:
    """An image as any dataset writes it: a string or bytes, or an object with `bytes`, `path` or
    `url`, of which the first that holds something counts. Raises `FormatError`.

    Undecoded images of the datasets library are `{"bytes": ..., "path": ...}`, with a path that is
    often the bare name of a file that is nowhere: so the bytes win.
    """
    source = value
    if isinstance(value, dict):
        source = next((value[key] for key in ("bytes", "path", "url") if value.get(key)), None)
    if isinstance(source, str | bytes) and source:
        return Image(source)
    raise FormatError(
        f"{place} must be a path, a data URI, a URL or bytes, found {kind(source)}"
        + ("" if source is value else " under 'bytes', 'path' and 'url'")
        + "; name the image there, or remove it"
    )


def images_of(row: dict[Any, Any]) -> list[Image]:
    """The images in the columns `images` or `image`: a list, or one alone. Raises `FormatError`."""
    key = _images_beside(row)
    if key is None:
        return []
    if key == "images" and row.get("image"):
        raise FormatError("has both 'image' and 'images'; put every image into 'images'")
    value = row[key]
    if not isinstance(value, list):
        return [parse_image(value, repr(key))]
    return [parse_image(image, f"{key}[{i}]") for i, image in enumerate(value)]


def _images_beside(row: dict[Any, Any]) -> str | None:
    """The column that holds images beside the messages; empty ones are what tables have."""
    if row.get("images"):
        return "images"
    return "image" if row.get("image") else None


class _TakenInOrder:
    """The images beside the messages, each taken once by a part without an image of its own."""

    def __init__(self, images: list[Image]):
        self.images = images
        self.num_parts = 0

    def take(self) -> Image | None:
        self.num_parts += 1
        return self.images[self.num_parts - 1] if self.num_parts <= len(self.images) else None

    def refuse_if_not_all_are_taken(self, key: str) -> None:
        if not self.num_parts:
            raise FormatError(
                f"{key!r} stands beside 'messages'; put each image where it is shown, as a part "
                '{"type": "image", "image": ...} of a message\'s content'
            )
        if self.num_parts != len(self.images):
            raise FormatError(
                f"{self.num_parts} image parts without an image but {len(self.images)} in {key!r}; "
                'write one part {"type": "image"} for each image'
            )


def _message(value: Any, i: int, images: _TakenInOrder) -> Message:
    if not isinstance(value, dict):
        raise FormatError(must_be(f"messages[{i}]", "an object with 'role' and 'content'", value))
    if not value.keys() <= _MESSAGE_KEYS:
        refuse_unknown_keys(value, ("role", "content", "train", "references"), f"messages[{i}]")
    role = value.get("role")
    if role not in _ROLES:
        raise FormatError(
            f"messages[{i}].role is {shown(role)}; expected system, user or assistant; "
            "write one of them, or leave the row out"
        )
    train = value.get("train", True)
    if train is not True and train is not False:
        if train is not None:
            raise FormatError(must_be(f"messages[{i}].train", "true or false", train))
        train = True
    content = value.get("content")
    if isinstance(content, str):
        parts: tuple[Text | Image, ...] = (Text(content),)
    elif isinstance(content, list):
        parts = tuple([_part(part, i, j, images) for j, part in enumerate(content)])
    elif "content" not in value:
        raise FormatError(
            f"messages[{i}].content is missing; give a string or a list of text and image parts"
        )
    else:
        raise FormatError(must_be(f"messages[{i}].content", "a string or a list of parts", content))
    references = value.get("references")
    if not references:
        return Message(role, parts, train)
    return Message(role, parts, train, _references(references, role, f"messages[{i}]"))


def _references(value: Any, role: Role, place: str) -> tuple[str, ...]:
    if role != "assistant":
        raise FormatError(
            f"{place}.references are given for a {role} turn; move them to the assistant's answer"
        )
    if not isinstance(value, list):
        raise FormatError(must_be(f"{place}.references", "a list of strings", value))
    for text in value:
        if not isinstance(text, str):
            raise FormatError(
                f"{place}.references must be a list of strings, found {kind(text)} in it; write "
                "each as a string"
            )
    return tuple(value)


def _part(value: Any, i: int, j: int, images: _TakenInOrder) -> Text | Image:
    if not isinstance(value, dict):
        raise FormatError(must_be(f"messages[{i}].content[{j}]", "a text or image part", value))
    type_ = value.get("type")
    if type_ == "text":
        if not value.keys() <= _TEXT_KEYS:
            refuse_unknown_keys(value, ("type", "text"), f"messages[{i}].content[{j}]")
        text = value.get("text")
        if not isinstance(text, str):
            raise FormatError(must_be(f"messages[{i}].content[{j}].text", "a string", text))
        return Text(text)
    if type_ == "image":
        if not value.keys() <= _IMAGE_KEYS:
            refuse_unknown_keys(value, ("type", "image"), f"messages[{i}].content[{j}]")
        given = [value[key] for key in _IMAGE_NAMES if value.get(key) is not None]
        if len(given) > 1:
            raise FormatError(
                f"messages[{i}].content[{j}] names its image in several ways; keep one of "
                f"{', '.join(_IMAGE_NAMES)}"
            )
        image = given[0] if given else None
        if isinstance(image, str) and image:
            return Image(image)
        if image is None:
            image = images.take()
            if image is not None:
                return image
            if images.images:  # too few of them; counted once the whole row is read
                return Image("")
        return parse_image(image, f"messages[{i}].content[{j}].image")
    of_openai = isinstance(type_, str) and type_ in ("image_url", "input_text", "input_image")
    todo = "set format: openai for such parts" if of_openai else "write one, or leave the row out"
    raise FormatError(
        f"messages[{i}].content[{j}].type is {shown(type_)}; expected 'text' or 'image'; {todo}"
    )


def refuse_unknown_keys(value: dict[Any, Any], known: tuple[str, ...], place: str) -> None:
    """A misspelt `train`, or an image given beside the content, would else be lost unseen.

    Keys that hold nothing are let pass: tables written as JSON have every column in every row.
    """
    for key in value:
        if key not in known and value[key] is not None:
            near = nearest(key, known)
            hint = (
                f"; did you mean {near!r}?" if near else f"; expected {', '.join(known)}; remove it"
            )
            raise FormatError(f"{place} has an unknown key {shown(key)}{hint}")
