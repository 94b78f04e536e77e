"""Lists of turns as conversation datasets write them -> `Turn`s, their images still placeholders.

The keys of a turn are `from` and `value` (ShareGPT, LLaVA) or `role` and `content` (OpenAI's names,
which LLaMA-Factory, ms-swift and Mantis share).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from data_formats.chat import FormatError, Role
from data_formats.placeholders import Turn
from data_formats.wording import listed, must_be, shown

FROM_VALUE = ("from", "value")
ROLE_CONTENT = ("role", "content")

HUMAN_GPT: Mapping[str, Role] = {"human": "user", "gpt": "assistant"}
USER_ASSISTANT: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
ANY_NAME: Mapping[str, Role] = {
    **USER_ASSISTANT,
    **HUMAN_GPT,
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_TOOL_ROLES = ("tool", "tool_call", "tool_response", "function", "function_call", "observation")

# Columns of these formats that change what is learnt; a row is refused rather than read without.
_BEYOND_IMAGES = {
    "video": "videos",
    "videos": "videos",
    "audio": "sound",
    "audios": "sound",
    "tools": "tool calls",
    "functions": "tool calls",
    "objects": "boxes to be filled in",
    "chosen": "preferences",
    "rejected": "preferences",
    "rejected_response": "preferences",
    "rejected_messages": "preferences",
    "rejected_images": "preferences",
    "kto_tag": "preferences",
}
_TRAIN_KEYS = ("train", "loss", "weight")


def are_turns(value: Any, keys: tuple[str, str], roles: Mapping[str, Role]) -> bool:
    """Whether a value is a list of turns with these keys and roles, each with text."""
    role_key, text_key = keys
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict)
            and isinstance(turn.get(text_key), str)
            and isinstance(role := turn.get(role_key), str)
            and role in roles
            for turn in value
        )
    )


def parse_turns(
    value: Any, place: str, keys: tuple[str, str], roles: Mapping[str, Role]
) -> list[Turn]:
    """A list of turns. Raises `FormatError`, naming the first fault."""
    role_key, text_key = keys
    if not isinstance(value, list) or not value:
        raise FormatError(must_be(repr(place), "a list with at least one turn", value))
    turns = []
    for i, turn in enumerate(value):
        where = f"{place}[{i}]"
        if not isinstance(turn, dict):
            raise FormatError(must_be(where, f"an object with {role_key!r} and {text_key!r}", turn))
        name, text = turn.get(role_key), turn.get(text_key)
        if (isinstance(name, str) and name in _TOOL_ROLES) or turn.get("tool_calls"):
            raise FormatError(
                f"{where} is part of a tool call, which cannot be learnt here; leave the row out"
            )
        if not isinstance(name, str) or name not in roles:
            raise FormatError(
                f"{where}.{role_key} is {shown(name)}; expected {listed(list(roles), 'or')}; write "
                "one of them, or leave the row out"
            )
        if not isinstance(text, str):
            raise FormatError(must_be(f"{where}.{text_key}", "a string", text))
        turns.append(Turn(roles[name], text, roles[name] != "assistant" or _train(turn, where)))
    return turns


def parse_pairs(value: Any, place: str) -> list[Turn]:
    """The `history` of LLaMA-Factory and ms-swift: pairs of question and answer, learnt too."""
    if not value:
        return []
    if not isinstance(value, list):
        raise FormatError(must_be(repr(place), "a list of pairs", value))
    turns = []
    for i, pair in enumerate(value):
        if not isinstance(pair, Sequence) or len(pair) != 2 or isinstance(pair, str | bytes):
            raise FormatError(must_be(f"{place}[{i}]", "a question and its answer", pair))
        for j, (role, text) in enumerate(zip(("user", "assistant"), pair, strict=True)):
            if not isinstance(text, str):
                raise FormatError(must_be(f"{place}[{i}][{j}]", "a string", text))
            turns.append(Turn(role, text))
    return turns


def with_system(row: dict[Any, Any], turns: list[Turn]) -> list[Turn]:
    """The turns after the one in the column `system`, if that holds anything.

    Raises `FormatError` where the turns have another of their own: LLaMA-Factory lets that one win,
    by which the column would be lost.
    """
    system = row.get("system")
    if system is None:
        return turns
    if not isinstance(system, str):
        raise FormatError(must_be("'system'", "a string", system))
    own = [turn.text for turn in turns if turn.role == "system" and turn.text.strip()]
    if not system.strip() or own == [system]:
        return turns
    if own:
        raise FormatError("has both a column 'system' and a system turn; keep one of them")
    return [Turn("system", system), *turns]


def refuse_more_than_images(row: dict[Any, Any]) -> None:
    """Raise `FormatError` where a column holds what would be lost: videos, tools, preferences."""
    for key, what in _BEYOND_IMAGES.items():
        if (value := row.get(key)) not in (None, "", "[]", [], {}) and value is not False:
            raise FormatError(
                f"{key!r} holds {what}, which cannot be learnt here; leave the row out, or remove "
                "the column"
            )
    if isinstance(row.get("label"), bool) or row.get("kto_tag") is False:
        raise FormatError(
            "is marked as a good or bad answer (KTO), which cannot be learnt here; keep the good "
            "rows without the mark"
        )


def _train(turn: dict[Any, Any], where: str) -> bool:
    """Whether an answer is learnt: ms-swift says so by `loss`, others by `weight` or `train`."""
    train = True
    for key in _TRAIN_KEYS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise FormatError(must_be(f"{where}.{key}", "true or false", value))
        train &= bool(value)
    return train
