"""Held-out rows put to a model: what it answers, and how likely it holds each row's own answer.
Shared out over processes, and gone on with where an earlier attempt was broken off.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import Progress

from data_formats.chat import Conversation, Text
from finetune.data.collate import collate
from finetune.data.examples import Encoder, Example
from finetune.data.pictures import Pictures
from finetune.data.sources import Row
from finetune.errors import DataError
from finetune.model.generate import generate_answers
from finetune.model.loss import sum_losses
from finetune.out_of_memory import out_of_memory_asking, told_apart
from finetune.processes import process, wait_for_all
from finetune.recipe import EvaluationSection
from finetune.rundir import append_jsonl, read_jsonl
from finetune.sides import Side


@dataclass(frozen=True)
class Answer:
    """What a model makes of a row: its own words, and of the row's last answer the loss, in nats
    and summed, and its number of tokens.
    """

    text: str
    loss: float
    num_tokens: int
    views: list[list[list[int]]]
    """Of each picture its views: left, upper, right and lower edge in the picture, and width and
    height as they were shown, in pixels.
    """


@dataclass(frozen=True)
class HeldOut:
    """Rows to ask, what they are long in tokens [N], and keys of what a model sees of them [N]."""

    rows: Sequence[Row]
    num_tokens: np.ndarray
    keys: np.ndarray

    def first(self, num_rows: int | None) -> "HeldOut":
        """The first ones of them; all for None."""
        return HeldOut(self.rows[:num_rows], self.num_tokens[:num_rows], self.keys[:num_rows])

    def digest(self) -> str:
        """SHA-256 over what a model sees of them."""
        return sha256(self.keys.tobytes()).hexdigest()


class KeptAnswers:
    """Answers on disk, a line a row, so that a process that is killed loses one batch at most."""

    def __init__(self, folder: Path, question: str):
        """`question` stands for all but the model: which rows they are, and how they are asked."""
        self.folder = folder
        self.question = question

    def known(self, side: Side) -> dict[int, Answer]:
        """Those that this side gave to these rows, whichever process wrote them."""
        found = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in read_jsonl(file):
                if line.pop("key") == self._key(side):
                    number = line.pop("row")
                    found[number] = Answer(**line)
        return found

    def add(self, side: Side, numbers: Sequence[int], answers: Sequence[Answer]) -> None:
        """Keep the answers to the rows of these numbers."""
        append_jsonl(
            self.folder / f"{process()[0]}.jsonl",
            (
                {"key": self._key(side), "row": number, **asdict(answer)}
                for number, answer in zip(numbers, answers, strict=True)
            ),
        )

    def _key(self, side: Side) -> str:
        # what the loss is of: a version before this one summed it over every learnt turn
        return f"{side.key}:{self.question}:last answer"


def ask_rows(
    side: Side,
    asked: HeldOut,
    settings: EvaluationSection,
    console: Console,
    who: str,
    kept: KeptAnswers | None = None,
) -> list[Answer]:
    """An answer a row, in their order; the same ones in every process.

    The longest are asked first, so that memory runs out at once or never. Raises `DataError`, and
    `AskingOutOfMemoryError` where it does.
    """
    rank, num_processes = process()
    found = kept.known(side) if kept else {}
    wait_for_all()  # or one would read what another has answered by then, and share out other rows
    encoder = with_room(side.encoder, settings.prompt_suffix)
    rows, num_tokens = asked.rows, asked.num_tokens
    left = [i for i in np.argsort(-num_tokens, kind="stable").tolist() if i not in found]
    console.print(
        f"answering {len(left):,} held-out rows ({who})"
        + (f"; {len(found):,} were answered before" if found else "")
    )
    own = left[rank::num_processes]
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"answering ({who})", total=len(own))
        if own:
            with side.opened() as model:
                for numbers in batches_of(own, num_tokens, settings):
                    batch = [with_suffix(rows[i], settings.prompt_suffix) for i in numbers]
                    answers = []
                    with told_apart() as told:
                        answers = _ask(model, encoder, batch, settings)
                    if told:
                        lengths = num_tokens[numbers].tolist()
                        places = [row.where for row in batch]
                        raise out_of_memory_asking(list(zip(places, lengths, strict=True)), *told)
                    found |= zip(numbers, answers, strict=True)
                    if kept:
                        kept.add(side, numbers, answers)
                    bar.advance(task, len(numbers))
    if num_processes > 1:
        found = dict(gather_object(list(found.items())))
    return [found[i] for i in range(len(rows))]


def batches_of(
    numbers: Iterable[int], num_tokens: np.ndarray, settings: EvaluationSection
) -> Iterator[list[int]]:
    """Rows that are answered at once: like goes with like where they come by their length, the
    longest first.
    """
    batch: list[int] = []
    for number in numbers:
        longest = int(num_tokens[batch[0] if batch else number]) + settings.max_new_tokens
        budget = settings.batch_tokens or longest * settings.batch_size
        if batch and (len(batch) == settings.batch_size or (len(batch) + 1) * longest > budget):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def with_room(encoder: Encoder, suffix: str | None) -> Encoder:
    """The encoder with as many tokens more allowed as `suffix` may take: rows are examined without
    it.
    """
    if not suffix or encoder.max_tokens is None:
        return encoder
    tokens = encoder.processor.tokenizer(f"\n{suffix}", add_special_tokens=False).input_ids
    return replace(encoder, max_tokens=encoder.max_tokens + len(tokens) + 1)


def with_suffix(row: Row, suffix: str | None) -> Row:
    """The row with `suffix` on a line of its own at the end of the last question."""
    if not suffix:
        return row
    messages = list(row.conversation.messages)
    asked = max(
        (
            i
            for i, message in enumerate(messages[: _last_answer(messages)])
            if message.role == "user"
        ),
        default=None,
    )
    if asked is None:
        return row
    *before, last = messages[asked].content
    if isinstance(last, Text):
        content = (*before, Text(f"{last.text.rstrip()}\n{suffix}"))
    else:
        content = (*before, last, Text(suffix))
    messages[asked] = replace(messages[asked], content=content)
    return replace(row, conversation=Conversation(tuple(messages)))


def with_last_answer_learnt(row: Row) -> Row:
    """The row with its last answer to be learnt, whatever it says itself, and no other turn."""
    messages = row.conversation.messages
    last = _last_answer(messages)
    learnt = tuple(replace(message, train=i == last) for i, message in enumerate(messages))
    return replace(row, conversation=Conversation(learnt))


def _last_answer(messages: Sequence[Any]) -> int:
    return max(i for i, message in enumerate(messages) if message.role == "assistant")


def _encode_last_answer(encoder: Encoder, row: Row, pictures: Pictures) -> Example:
    """The row with its last answer alone to be learnt. An answer of `train: false` that shares a
    token with its prompt has nothing to learn: only where it is learnt was that refused before.
    """
    try:
        return encoder.encode(with_last_answer_learnt(row), pictures=pictures)
    except DataError:
        messages = row.conversation.messages
        if messages[_last_answer(messages)].train:
            raise
        example = encoder.encode(row, pictures=pictures)  # which has every other fault again
        return replace(example, loss_mask=[False] * len(example.loss_mask))


def _ask(
    model: Any, encoder: Encoder, rows: Sequence[Row], settings: EvaluationSection
) -> list[Answer]:
    """One batch, asked and scored; each picture is decoded once."""
    pictures = encoder.new_pictures()
    prompts, examples = [], []
    for row in rows:
        prompts.append(encoder.encode_prompt(row, pictures))
        examples.append(_encode_last_answer(encoder, row, pictures))
    texts = generate_answers(
        model,
        encoder.processor,
        encoder.family,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        batch_size=len(prompts),
        packed_vision=encoder.packed_vision,
    )
    batch = collate(
        examples, encoder.processor, encoder.family, packed_vision=encoder.packed_vision
    )
    losses = sum_losses(model, batch).tolist()
    views = [
        [[[*v.box, v.width_px, v.height_px] for v in plan.views] for plan in prompt.plans]
        for prompt in prompts
    ]
    return [
        Answer(text, loss, int(num_tokens), shown)
        for text, (loss, num_tokens), shown in zip(texts, losses, views, strict=True)
    ]
