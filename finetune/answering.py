"""A run's model, asked: one conversation with its words as they come, or the rows of a file."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TextStreamer

from data_formats.chat import Conversation, Message
from finetune.data.examples import Example
from finetune.data.images import ImageAccess
from finetune.data.pictures import Pictures
from finetune.data.sources import Row, Source
from finetune.errors import DataError
from finetune.model.generate import generate_answers
from finetune.preparation import load_encoder
from finetune.recipe import Recipe
from finetune.rundir import append_jsonl, read_jsonl
from finetune.sides import Side, sides_of_run

BLOCK = 8
"""Batches whose rows are sorted by length and held in memory at once."""


class Words(TextStreamer):
    """Hands over an answer's words as soon as they are sure."""

    def __init__(self, tokenizer: Any, on_words: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_words = on_words

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """The library's hook, which would print."""
        self._on_words(text)


@dataclass
class Asker:
    """One side of a run, loaded, with the image settings and prompts of its training."""

    model: Any
    side: Side
    recipe: Recipe

    def answer(
        self, conversation: Conversation, on_words: Callable[[str], None] | None = None
    ) -> str:
        """The answer to a conversation that ends with a question; `on_words` hears it grow.

        Pictures are looked up from the current folder. Raises `DataError`.
        """
        anywhere = ImageAccess(Path.cwd(), allow_outside_root=True)
        prompt = self.prompt(Row("the question", _open_ended(conversation), anywhere))
        streamer = Words(self.side.encoder.processor.tokenizer, on_words) if on_words else None
        return self.answers([prompt], streamer=streamer)[0]

    def prompt(self, row: Row, pictures: Pictures | None = None) -> Example:
        """A row up to its last answer, as this side reads it. Raises `DataError`."""
        return self.side.encoder.encode_prompt(row, pictures)

    def answers(
        self, prompts: Sequence[Example], *, batch_size: int = 1, streamer: Any = None
    ) -> list[str]:
        """An answer a prompt, in their order."""
        encoder = self.side.encoder
        return generate_answers(
            self.model,
            encoder.processor,
            encoder.family,
            prompts,
            max_new_tokens=self.recipe.evaluation.max_new_tokens,
            batch_size=batch_size,
            packed_vision=encoder.packed_vision,
            streamer=streamer,
        )


def _open_ended(conversation: Conversation) -> Conversation:
    """With a place for the answer, which the prompt ends before."""
    return Conversation((*conversation.messages, Message("assistant", ())))


Opened = Callable[[], AbstractContextManager[Asker]]


def open_sides(
    recipe: Recipe, adapter: Path, console: Console, *, compare: bool
) -> dict[str, Opened]:
    """Ways to open what a run trained, as `adapter`, and with `compare` the `base` before it.

    Where the base is another model than the trained one, each is in memory only while it is open.
    Raises `FinetuneError`.
    """
    sides = sides_of_run(recipe, adapter, load_encoder(recipe, console))
    found = {"base": sides.base} if compare else {}
    found["adapter"] = sides.adapter or sides.base  # of a frozen run they are one

    def opening(side: Side) -> Opened:
        @contextmanager
        def opened() -> Iterator[Asker]:
            with side.opened() as model:
                yield Asker(model, side, recipe)

        return opened

    return {name: opening(side) for name, side in found.items()}


def predict(
    sides: Mapping[str, Opened],
    source: Source,
    out: Path,
    *,
    batch_size: int,
    on_rows: Callable[[int], None] = lambda _: None,
) -> int:
    """Answer every row of a source into a JSONL file, a line a row in their order: `where`,
    `question`, `references` where the row has an answer, and what each side says. A row that cannot
    be asked has `error` in its place.

    Goes on after the last whole line that is there. Gives the number of rows answered now. Raises
    `DataError` where what is there belongs to other rows or sides.
    """
    num_done = _num_answered(out, source, sides.keys())
    on_rows(num_done)
    block = BLOCK * batch_size
    for start in range(num_done, len(source), block):
        numbers = range(start, min(start + block, len(source)))
        lines = [_line(source, number) for number in numbers]
        for name, opened in sides.items():
            with opened() as asker:
                _answer(asker, name, lines, batch_size)
        append_jsonl(out, [line for line, _ in lines])
        on_rows(len(lines))
    return len(source) - num_done


def _num_answered(out: Path, source: Source, names: Collection[str]) -> int:
    lines = read_jsonl(out)
    for number, line in enumerate(lines):
        is_row = number < len(source) and line.get("where") == source.container.where(number)
        if not is_row or not ("error" in line or set(names) <= line.keys()):
            raise DataError(
                f"{out}:{number + 1}: is no answer to the same row of {source.container.shown} by "
                f"{' and '.join(names)}; give --out another file"
            )
    return len(lines)


def _line(source: Source, number: int) -> tuple[dict[str, Any], Row | None]:
    """What is known of a row before it is asked, and the row, if it can be."""
    line: dict[str, Any] = {"where": source.container.where(number)}
    try:
        raw = source.container.read(number)
        is_open = _ends_with_question(raw)
        if is_open:  # which no row to learn from may
            raw = raw | {"messages": [*raw["messages"], {"role": "assistant", "content": "?"}]}
        row = source.reader.row(line["where"], raw)
    except DataError as error:
        return line | {"error": str(error)}, None
    line["question"] = row.conversation.before_last_answer().messages[-1].text.strip()
    if not is_open:
        line["references"] = list(row.conversation.references())
    return line, row


def _ends_with_question(raw: Any) -> bool:
    messages = raw.get("messages") if isinstance(raw, dict) else None
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "user"


def _answer(
    asker: Asker, name: str, lines: Sequence[tuple[dict[str, Any], Row | None]], batch_size: int
) -> None:
    """Put a side's answers into the lines of the rows that it can be asked."""
    prompts, asked = [], []
    pictures = asker.side.encoder.new_pictures()
    for line, row in lines:
        if row is None or "error" in line:
            continue
        try:
            prompts.append(asker.prompt(row, pictures))
            asked.append(line)
        except DataError as error:
            line["error"] = str(error)
    answers = asker.answers(prompts, batch_size=batch_size)
    for line, answer in zip(asked, answers, strict=True):
        line[name] = answer
