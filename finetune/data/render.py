"""A conversation as the model reads it: token ids, and which of them it learns.

The ids are the processor's own, by construction: its chat template writes the text, and its text
path expands the images and tokenises. What is added here is the loss mask, and the count of views
for images that differ in it.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data_formats.chat import Conversation, Image, Message, Text
from finetune.errors import DataError
from finetune.families.family import Family


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids, and for each of them whether the model learns it; equally long."""

    input_ids: list[int]
    loss_mask: list[bool]


class Renderer:
    """Renders conversations for one processor, many at a time: a call of the processor costs more
    than a short row does.

    `num_views` holds the number of views of each image, in order.
    """

    def __init__(self, processor: Any, family: Family):
        self.family = family
        # One placeholder a view to a processor that does not split gives the same text as one an
        # image to one that does, since adjacent images share their fake token; and each image may
        # then have its own number of views.
        self._processor = copy.copy(processor)
        self._processor.image_processor = copy.copy(processor.image_processor)
        self._processor.image_processor.do_image_splitting = False
        self._known_shapes: set[tuple[Any, ...]] = set()

    def render(self, conversation: Conversation, num_views: Sequence[int]) -> Rendered:
        """The whole conversation; learnt are the assistants' words and the token that ends their
        turn.

        Raises `DataError` for text that holds a special token of the model, which would be read as
        more than text.
        """
        rendered = self.render_many([(conversation, num_views)])[0]
        if isinstance(rendered, DataError):
            raise rendered
        return rendered

    def render_many(
        self, rows: Sequence[tuple[Conversation, Sequence[int]]]
    ) -> list[Rendered | DataError]:
        """As `render` for each row, the `DataError` standing in the place of a row that has one."""
        results: list[Rendered | DataError | None] = [None] * len(rows)
        accepted = []
        for i, (conversation, _) in enumerate(rows):
            try:
                self._refuse_special_tokens(conversation)
                self._refuse_another_prompt(conversation)
                accepted.append(i)
            except DataError as error:
                results[i] = error
        messages = [_template_messages(rows[i][0]) for i in accepted]
        texts = self._processor.apply_chat_template(messages, tokenize=False) if accepted else []
        ids_of = self._tokenise(texts, [rows[i][1] for i in accepted])
        for i, ids in zip(accepted, ids_of, strict=True):
            try:
                results[i] = Rendered(ids, self._loss_mask(rows[i][0], ids))
            except DataError as error:
                results[i] = error
        return [result for result in results if result is not None]

    def render_prompt(self, conversation: Conversation, num_views: Sequence[int]) -> list[int]:
        """Token ids of the conversation so far and the words that call for an answer, as at
        inference. Raises `DataError`.
        """
        self._refuse_special_tokens(conversation)
        text = self._template(conversation, add_generation_prompt=True)
        return self._tokenise([text], [num_views])[0]

    def _template(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
        messages = _template_messages(conversation)
        if not messages and not add_generation_prompt:
            return ""
        return self._processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _tokenise(
        self, texts: Sequence[str], num_views: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Ids from the processor's own text path, each image expanded to its views."""
        # Where there is no image, that path is the tokenizer and nothing else; asked directly, it
        # leaves out the offsets, and a short row costs 29 microseconds instead of 46
        plain = [i for i, views in enumerate(num_views) if not views]
        pictured = [i for i, views in enumerate(num_views) if views]
        ids_of: list[list[int]] = [[]] * len(texts)
        backend = self._processor.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        encodings = backend.encode_batch_fast([texts[i] for i in plain])
        for i, encoding in zip(plain, encodings, strict=True):
            ids_of[i] = encoding.ids
        if pictured:
            expanded = [self._expand(texts[i], num_views[i]) for i in pictured]
            encoded = self._processor(
                text=expanded, return_attention_mask=False, return_token_type_ids=False
            )
            for i, ids in zip(pictured, encoded["input_ids"], strict=True):
                ids_of[i] = ids
        return ids_of

    def _expand(self, text: str, num_views: Sequence[int]) -> str:
        image_token = self.family.image_tokens[0]
        pieces = text.split(image_token)
        assert len(pieces) == len(num_views) + 1, "the template wrote another number of images"
        return pieces[0] + "".join(
            image_token * views + piece for views, piece in zip(num_views, pieces[1:], strict=True)
        )

    def _loss_mask(self, conversation: Conversation, ids: list[int]) -> list[bool]:
        """True from the first token after an answer's header to the token that ends the turn.

        Every turn ends in a special token, which parts what the tokeniser sees: so the header of
        an answer has the same ids wherever it stands, and those of the prompt at inference.
        """
        ends = [k for k, token in enumerate(ids) if token == self._turn_end_id]
        if len(ends) != len(conversation.messages):
            raise DataError(
                f"the chat template closes {len(ends)} of {len(conversation.messages)} turns with "
                f"{self.family.turn_end_token}; use the template that belongs to the model"
            )
        mask = [False] * len(ids)
        for i, message in enumerate(conversation.messages):
            if message.role != "assistant" or not message.train:
                continue
            header = self._later_header if i else self._first_header
            first = ends[i - 1] + 1 if i else 0
            answer = first + len(header)
            if ids[first:answer] != header:
                raise DataError(
                    f"messages[{i}]: the end of the prompt and the start of the answer are one "
                    "token, so the model would be asked with other tokens than it learnt from; "
                    "start the answer with another character"
                )
            span = slice(answer, ends[i] + 1)
            mask[span] = [token not in self._never_learnt for token in ids[span]]
        return mask

    @cached_property
    def _turn_end_id(self) -> int:
        return self._processor.tokenizer.convert_tokens_to_ids(self.family.turn_end_token)

    @cached_property
    def _never_learnt(self) -> frozenset[int]:
        tokens = self._processor.tokenizer.convert_tokens_to_ids(list(self.family.image_tokens))
        return frozenset(tokens)

    @cached_property
    def _first_header(self) -> list[int]:
        """Ids that stand before an answer at the very start."""
        return self._tokenise([self._template(Conversation(()), add_generation_prompt=True)], [[]])[
            0
        ]

    @cached_property
    def _later_header(self) -> list[int]:
        """Ids between the end of a turn and an answer."""
        asked = Conversation((Message("user", (Text("a"),)),))
        ids = self._tokenise([self._template(asked, add_generation_prompt=True)], [[]])[0]
        last_end = len(ids) - 1 - ids[::-1].index(self._turn_end_id)
        return ids[last_end + 1 :]

    def _refuse_another_prompt(self, conversation: Conversation) -> None:
        """Raise `DataError` where the template writes the turns before an answer otherwise once the
        answer is there.

        It is asked once for every order of roles and parts, on which alone templates depend.
        """
        shape = tuple(
            (message.role, tuple(type(part) for part in message.content))
            for message in conversation.messages
        )
        if shape in self._known_shapes:
            return
        text = self._template(conversation)
        for i, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            before = Conversation(conversation.messages[:i])
            if not text.startswith(self._template(before, add_generation_prompt=True)):
                raise DataError(
                    f"messages[{i}]: the chat template does not continue its own prompt with the "
                    "answer; use the template that belongs to the model"
                )
        if len(self._known_shapes) < 10_000:
            self._known_shapes.add(shape)

    def _refuse_special_tokens(self, conversation: Conversation) -> None:
        for i, message in enumerate(conversation.messages):
            for part in message.content:
                if isinstance(part, Image):
                    continue
                if found := self._special_tokens.search(part.text):
                    raise DataError(
                        f"messages[{i}] holds {found.group()!r} as text, which the model reads as "
                        "a special token; remove it or write it differently"
                    )

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        tokenizer = self._processor.tokenizer
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        tokens = dict.fromkeys([*tokenizer.all_special_tokens, *added])
        return re.compile("|".join(re.escape(token) for token in tokens))


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
