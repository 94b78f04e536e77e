"""A conversation as the model reads it: token ids, and which of them it learns.

The ids are the processor's own, by construction: its chat template writes the text, and its text
path expands the images and tokenises. What is added here is the loss mask, and the count of views
for images that differ in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from data_formats.chat import Conversation, Image
from finetune.errors import DataError
from finetune.families.family import Family


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids, and for each of them whether the model learns it; equally long."""

    input_ids: list[int]
    loss_mask: list[bool]


def render(
    processor: Any, family: Family, conversation: Conversation, num_views: Sequence[int]
) -> Rendered:
    """The whole conversation; learnt are the assistants' words and the token that ends their turn.

    `num_views` holds the number of views of each image, in order. Raises `DataError` for text that
    holds a special token of the model, which would be read as more than text.
    """
    messages = _template_messages(conversation)
    _refuse_special_tokens(processor, conversation)
    text = _apply_template(processor, messages)
    ids, offsets = _tokenise(processor, family, text, num_views)
    ends = _turn_ends(processor, family, ids, len(messages))

    never_learnt = set(processor.tokenizer.convert_tokens_to_ids(list(family.image_tokens)))
    loss_mask = [False] * len(ids)
    for i, message in enumerate(conversation.messages):
        if message.role != "assistant" or not message.train:
            continue
        prompt = _apply_template(processor, messages[:i], add_generation_prompt=True)
        if not text.startswith(prompt):
            raise DataError("the chat template does not continue its own prompt with the answer")
        # From the end of the turn before to the first letter of this answer stands the template's
        # header alone, in which no image is expanded: so its length in the text is its length in
        # the tokeniser's offsets, too.
        header = (
            prompt[prompt.rindex(family.turn_end_token) + len(family.turn_end_token) :]
            if i
            else prompt
        )
        first = ends[i - 1] + 1 if i else 0
        answer_start = (offsets[ends[i - 1]][1] if i else 0) + len(header)
        for k in range(first, ends[i] + 1):
            start, end = offsets[k]
            if start < answer_start < end:
                raise DataError("a token spans the end of the prompt and the start of the answer")
            loss_mask[k] = start >= answer_start and ids[k] not in never_learnt
    return Rendered(ids, loss_mask)


def render_prompt(
    processor: Any, family: Family, conversation: Conversation, num_views: Sequence[int]
) -> list[int]:
    """Token ids of the conversation so far and the words that call for an answer, as at
    inference.
    """
    _refuse_special_tokens(processor, conversation)
    messages = _template_messages(conversation)
    text = _apply_template(processor, messages, add_generation_prompt=True)
    return _tokenise(processor, family, text, num_views)[0]


def _template_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """Messages in the shape of chat templates: typed parts always, since string content renders as
    nothing.
    """
    return [
        {
            "role": message.role,
            "content": [
                {"type": "image"}
                if isinstance(part, Image)
                else {"type": "text", "text": part.text}
                for part in message.content
            ]
            or [{"type": "text", "text": ""}],
        }
        for message in conversation.messages
    ]


def _apply_template(
    processor: Any, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False
) -> str:
    if not messages and not add_generation_prompt:
        return ""
    return processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _tokenise(
    processor: Any, family: Family, text: str, num_views: Sequence[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character offsets from the processor's own text path, each image expanded to its
    views.
    """
    image_token = family.image_tokens[0]
    pieces = text.split(image_token)
    assert len(pieces) == len(num_views) + 1, "the template wrote another number of images"
    # A split image is one placeholder to a processor that splits; where each image decides for
    # itself the processor does not split, and one placeholder a view gives the same text, since
    # adjacent images share their fake token.
    views_each = family.views_when_split if processor.image_processor.do_image_splitting else 1
    expanded = pieces[0] + "".join(
        image_token * (views // views_each) + piece
        for views, piece in zip(num_views, pieces[1:], strict=True)
    )
    encoded = processor(text=[expanded], return_offsets_mapping=True)
    return encoded["input_ids"][0], encoded["offset_mapping"][0]


def _turn_ends(processor: Any, family: Family, ids: list[int], num_turns: int) -> list[int]:
    """The position of each turn's closing token."""
    end_id = processor.tokenizer.convert_tokens_to_ids(family.turn_end_token)
    ends = [k for k, token in enumerate(ids) if token == end_id]
    if len(ends) != num_turns:
        raise DataError(
            f"the chat template closes {len(ends)} of {num_turns} turns with "
            f"{family.turn_end_token}; "
            "use the template that belongs to the model"
        )
    return ends


def _refuse_special_tokens(processor: Any, conversation: Conversation) -> None:
    for i, message in enumerate(conversation.messages):
        for token in _special_tokens(processor.tokenizer):
            if token in message.text:
                raise DataError(
                    f"messages[{i}] holds {token!r} as text, which the model reads as a special "
                    "token; "
                    "remove it or write it differently"
                )


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))
