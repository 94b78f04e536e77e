"""A conversation as the model reads it: token ids, and which of them it learns.

The chat template writes the text, the family puts each image's tokens in the place of its
placeholder, and the tokenizer makes ids of it: the same ones as the library's own processor, which
tests hold it to. What is added here is the loss mask, and images that differ in their views.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.views import ImagePlan
from finetune.errors import DataError
from finetune.families.family import Family

TEMPLATE_FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)
"""What a chat template, a program of whoever made the checkpoint, may fail with besides Jinja's own
errors: 1 / 0, or a range beyond the sandbox's limit.
"""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids, and for each of them whether the model learns it; equally long."""

    input_ids: list[int]
    loss_mask: list[bool]


class Renderer:
    """Renders conversations for one processor, many at a time: a call of the tokenizer costs more
    than a short row does.

    `plans` holds the plan of each image, in order.
    """

    def __init__(self, processor: Any, family: Family):
        self.family = family
        self.template = family.template_of(processor)
        self._processor = processor
        self._known_shapes: set[tuple[Any, ...]] = set()

    def render(self, conversation: Conversation, plans: Sequence[ImagePlan]) -> Rendered:
        """The whole conversation; learnt are the assistants' words and the token that ends their
        turn.

        Raises `DataError` for text that holds a special token of the model, which would be read as
        more than text.
        """
        rendered = self.render_many([(conversation, plans)])[0]
        if isinstance(rendered, DataError):
            raise rendered
        return rendered

    def render_many(
        self, rows: Sequence[tuple[Conversation, Sequence[ImagePlan]]]
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
        texts = self._apply_template(messages) if accepted else []
        ids_of = self._tokenise(texts, [rows[i][1] for i in accepted])
        for i, ids in zip(accepted, ids_of, strict=True):
            try:
                results[i] = Rendered(ids, self._loss_mask(rows[i][0], rows[i][1], ids))
            except DataError as error:
                results[i] = error
        return [result for result in results if result is not None]

    def render_prompt(self, conversation: Conversation, plans: Sequence[ImagePlan]) -> list[int]:
        """Token ids of the conversation so far and the words that call for an answer, as at
        inference. Raises `DataError`.
        """
        self._refuse_special_tokens(conversation)
        return self._prompt_ids(conversation, plans)

    def _prompt_ids(self, conversation: Conversation, plans: Sequence[ImagePlan]) -> list[int]:
        text = self._template_text(conversation, add_generation_prompt=True)
        return self._tokenise([text], [plans])[0]

    def _template_text(
        self, conversation: Conversation, *, add_generation_prompt: bool = False
    ) -> str:
        messages = _template_messages(conversation)
        if not messages and not add_generation_prompt:
            return ""
        return self._apply_template([messages], add_generation_prompt=add_generation_prompt)[0]

    def _apply_template(
        self, conversations: list[Any], *, add_generation_prompt: bool = False
    ) -> list[str]:
        try:
            return self._processor.apply_chat_template(
                conversations,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.family.template_variables,
            )
        except SecurityError as error:
            raise DataError(
                "the model's chat template reaches for Python's insides, which its sandbox refuses "
                f"({error}); do not trust this checkpoint"
            ) from error
        except TemplateError as error:
            raise DataError(
                f"the model's chat template refuses this order of turns: {error}"
            ) from error
        except TEMPLATE_FAULTS as error:
            raise DataError(
                f"the model's chat template fails ({type(error).__name__}: {str(error)[:200]}); "
                "use the template that belongs to the model"
            ) from error

    def _tokenise(
        self, texts: Sequence[str], plans: Sequence[Sequence[ImagePlan]]
    ) -> list[list[int]]:
        """Ids of each text, with its images expanded."""
        # The tokenizer's core, asked directly, leaves out the offsets: a short row costs 29
        # microseconds instead of 46
        backend = self._processor.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        expanded = [self._expand(text, of) for text, of in zip(texts, plans, strict=True)]
        # as the library does: a template that writes the BOS token itself is not given another
        bos = self._processor.tokenizer.bos_token
        has_bos = bool(expanded) and bos is not None and expanded[0].startswith(bos)
        encodings = backend.encode_batch_fast(expanded, add_special_tokens=not has_bos)
        return [encoding.ids for encoding in encodings]

    def _expand(self, text: str, plans: Sequence[ImagePlan]) -> str:
        if not plans:
            return text
        pieces = text.split(self.family.image_tokens[0])
        assert len(pieces) == len(plans) + 1, "the template wrote another number of images"
        expanded = pieces[0] + "".join(
            self.family.image_text(self._processor, plan, number) + piece
            for number, (plan, piece) in enumerate(zip(plans, pieces[1:], strict=True), start=1)
        )
        return self.family.finish_text(self._processor, expanded)

    def _loss_mask(
        self, conversation: Conversation, plans: Sequence[ImagePlan], ids: list[int]
    ) -> list[bool]:
        """True from the first token after an answer's header to the token that ends the turn."""
        messages = conversation.messages
        every = self.template.closes_every_turn
        closed = [i for i, message in enumerate(messages) if every or message.role == "assistant"]
        ends = [k for k, token in enumerate(ids) if token == self._turn_end_id]
        # a template may open with a turn of its own, such as the system's
        num_own = len(ends) - len(closed)
        if num_own not in (0, 1):
            raise DataError(
                f"the chat template closes {len(ends)} of {len(closed)} turns with "
                f"{self.template.turn_end_token}; use the template that belongs to the model"
            )
        end_of = dict(zip(closed, ends[num_own:], strict=True))
        mask = [False] * len(ids)
        for i, message in enumerate(messages):
            if message.role != "assistant" or not message.train:
                continue
            start = self._start_of_answer(conversation, plans, i, ids, end_of, ends[:num_own])
            if start is None:
                raise DataError(
                    f"messages[{i}]: the end of the prompt and the start of the answer are one "
                    "token, so the model would be asked with other tokens than it learnt from; "
                    "start the answer with another character"
                )
            span = slice(start, end_of[i] + 1)
            mask[span] = [token not in self._never_learnt for token in ids[span]]
        return mask

    def _start_of_answer(
        self,
        conversation: Conversation,
        plans: Sequence[ImagePlan],
        i: int,
        ids: list[int],
        end_of: dict[int, int],
        own_ends: list[int],
    ) -> int | None:
        """The place of the first token of message `i`, or None where the ids before it are not
        those of the prompt at inference.
        """
        if not self.template.closes_every_turn:
            before = Conversation(conversation.messages[:i])
            prompt = self._prompt_ids(before, plans[: sum(1 for _ in before.images())])
            return len(prompt) if ids[: len(prompt)] == prompt else None
        # Every turn ends in a special token, which parts what the tokenizer sees: so the header of
        # an answer has the same ids wherever it stands
        previous = [end_of[i - 1]] if i else own_ends
        first = previous[-1] + 1 if previous else 0
        header = self._later_header if previous else self._first_header
        start = first + len(header)
        return start if ids[first:start] == header else None

    @cached_property
    def _turn_end_id(self) -> int:
        return self._processor.tokenizer.convert_tokens_to_ids(self.template.turn_end_token)

    @cached_property
    def _never_learnt(self) -> frozenset[int]:
        tokens = self._processor.tokenizer.convert_tokens_to_ids(list(self.family.image_tokens))
        return frozenset(tokens)

    @cached_property
    def _first_header(self) -> list[int]:
        """Ids that stand before an answer at the very start."""
        return self._prompt_ids(Conversation(()), ())

    @cached_property
    def _later_header(self) -> list[int]:
        """Ids between the end of a turn and an answer."""
        ids = self._prompt_ids(Conversation((Message("user", (Text("a"),)),)), ())
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
        text = self._template_text(conversation)
        for i, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            before = Conversation(conversation.messages[:i])
            if not text.startswith(self._template_text(before, add_generation_prompt=True)):
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
