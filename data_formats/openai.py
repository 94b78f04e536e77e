"""OpenAI's chat and fine-tuning lines.

    {"messages": [{"role": "user", "content": [
                       {"type": "text", "text": "What is the total?"},
                       {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}]},
                  {"role": "assistant", "content": "12.50", "weight": 1}]}

Source: developers.openai.com/api/docs/guides/vision-fine-tuning (lines of a training file), and the
Responses API's names for the same parts (input_text, input_image). `"weight": 0` on an assistant's
message leaves it unlearnt.
"""

from typing import Any

from data_formats.cells import as_object
from data_formats.chat import (
    Conversation,
    FormatError,
    Image,
    Message,
    Role,
    Text,
    is_blank,
    parse_image,
    refuse_unknown_keys,
)
from data_formats.placeholders import PLACEHOLDER
from data_formats.wording import missing, must_be, shown

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image_url", "input_image")
_OTHER_TYPES = ("input_audio", "refusal", "file", "input_file", "video_url")
_TOOL_ROLES = ("tool", "function")
_KNOWN_KEYS = ("role", "content", "weight", "name")
_REFUSED_KEYS = ("tool_calls", "function_call", "tool_call_id", "audio", "refusal", "annotations")
_REFUSED_COLUMNS = ("tools", "functions", "function_call", "tool_choice", "parallel_tool_calls")


def fits(row: Any) -> bool:
    """Whether a row has messages whose parts, if they are lists, are OpenAI's."""
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        return False
    if row.get("images") or row.get("image"):
        return False
    return bool(row["messages"]) and all(_is_message(message) for message in row["messages"])


def parse(row: Any) -> Conversation:
    """A line of a training file. Raises `FormatError`, naming the first fault."""
    row = as_object(row)
    if not isinstance(row.get("messages"), list) or not row["messages"]:
        raise FormatError(missing(row, "messages", "an openai row has a list of messages"))
    for key in _REFUSED_COLUMNS:
        if row.get(key):
            raise FormatError(
                f"{key!r} is about tool calls, which cannot be learnt here; leave the row out, or "
                "remove it"
            )
    for key in ("image", "images"):
        if row.get(key):
            raise FormatError(
                f"{key!r} stands beside 'messages'; put each image where it is shown, as a part "
                '{"type": "image_url", "image_url": {"url": ...}}'
            )
    messages = [_message(value, f"messages[{i}]") for i, value in enumerate(row["messages"])]
    messages = [m for m in messages if m.role != "system" or not is_blank(m)]
    if not messages:
        raise FormatError("'messages' holds nothing but an empty system turn; add a user turn")
    return Conversation(tuple(messages))


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("role") not in (*_ROLES, *_TOOL_ROLES):
        return False
    if any(
        value[key] is not None and key not in _KNOWN_KEYS and key not in _REFUSED_KEYS
        for key in value
    ):
        return False
    content = value.get("content")
    if isinstance(content, str):
        # A placeholder is a word like any other here, so the row is more likely another format's.
        return PLACEHOLDER not in content
    if content is None:
        return bool(value.get("tool_calls") or value.get("function_call") or value.get("refusal"))
    types = (*_TEXT_TYPES, *_IMAGE_TYPES, *_OTHER_TYPES)
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") in types for part in content
    )


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise FormatError(must_be(place, "an object with 'role' and 'content'", value))
    role = value.get("role")
    if role in _TOOL_ROLES:
        raise FormatError(
            f"{place} is part of a tool call, which cannot be learnt here; leave the row out"
        )
    if not isinstance(role, str) or role not in _ROLES:
        raise FormatError(
            f"{place}.role is {shown(role)}; expected system, developer, user or "
            "assistant; write one of them, or leave the row out"
        )
    for key in _REFUSED_KEYS:
        if value.get(key):
            raise FormatError(
                f"{place}.{key} cannot be learnt here, where answers are text; leave the row out"
            )
    known = {key: v for key, v in value.items() if key not in _REFUSED_KEYS}
    refuse_unknown_keys(known, _KNOWN_KEYS, place)
    content = value.get("content")
    if isinstance(content, str):
        parts: tuple[Text | Image, ...] = (Text(content),)
    elif isinstance(content, list):
        parts = tuple(_part(part, f"{place}.content[{i}]") for i, part in enumerate(content))
    else:
        raise FormatError(must_be(f"{place}.content", "a string or a list of parts", content))
    return Message(_ROLES[role], parts, _train(value.get("weight"), role, place))


def _train(weight: Any, role: str, place: str) -> bool:
    if weight is None:
        return True
    if role != "assistant":
        raise FormatError(
            f"{place}.weight is given for a {role} turn; remove it, or move it to the answer"
        )
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise FormatError(must_be(f"{place}.weight", "0 or 1", weight))
    return weight == 1


def _part(value: Any, place: str) -> Text | Image:
    if not isinstance(value, dict):
        raise FormatError(must_be(place, "a text or image_url part", value))
    type_ = value.get("type")
    held = {key: v for key, v in value.items() if v not in ("", [], {})}
    if type_ in _TEXT_TYPES:
        refuse_unknown_keys(held, ("type", "text"), place)
        if not isinstance(value.get("text"), str):
            raise FormatError(must_be(f"{place}.text", "a string", value.get("text")))
        return Text(value["text"])
    if type_ in _IMAGE_TYPES:
        refuse_unknown_keys(held, ("type", "image_url", "detail"), place)
        return parse_image(value.get("image_url"), f"{place}.image_url")
    todo = (
        "set format: chat for such parts" if type_ == "image" else "write one, or leave the row out"
    )
    raise FormatError(f"{place}.type is {shown(type_)}; expected 'text' or 'image_url'; {todo}")
