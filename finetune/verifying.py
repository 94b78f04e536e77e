"""Whether two models are the same, by what they say: logits of rows that they did not see, and
answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage
from rich.console import Console

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.collate import IGNORED_LABEL, collate
from finetune.data.examples import Encoder, Example
from finetune.data.images import ImageAccess
from finetune.data.sources import Row, Rows
from finetune.errors import DataError, ModelError
from finetune.model.generate import generate_answers
from finetune.preparation import open_sources
from finetune.recipe import Recipe

FLOAT32_BOUND = 1e-4
"""Most that a logit may differ by in float32, where only the order of additions is another; where
the largest is above 1, as a share of that.
"""

AGREEMENT_BOUND = 0.95
"""Least share of tokens on which half precision must agree: a weight that is rounded once more
turns the order of two tokens that are next to equal, and no others.
"""


@dataclass(frozen=True)
class Asked:
    """Rows to ask, and where they come from, in words."""

    rows: Sequence[Row]
    origin: str


@dataclass(frozen=True)
class Said:
    """What a model makes of some rows: logits float32 [learnt tokens, vocabulary] and an answer a
    row.
    """

    logits: Sequence[torch.Tensor]
    answers: Sequence[str]


@dataclass(frozen=True)
class Likeness:
    """How far two models that were asked the same are apart."""

    num_rows: int
    num_tokens: int
    largest_difference: float
    largest_logit: float
    agreement: float
    """Share of tokens that both hold for the likeliest."""
    num_equal_answers: int

    @classmethod
    def of(cls, one: Said, other: Said) -> "Likeness":
        """Of what both said, row by row."""
        pairs = list(zip(one.logits, other.logits, strict=True))
        agreed = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
        num_tokens = sum(len(a) for a, _ in pairs)
        return cls(
            len(pairs),
            num_tokens,
            max(_largest(a - b) for a, b in pairs),
            max(_largest(a) for a, _ in pairs),
            agreed / num_tokens,
            sum(a == b for a, b in zip(one.answers, other.answers, strict=True)),
        )

    def refuse_unlike(self, dtype: torch.dtype) -> None:
        """Raise `ModelError` where they are further apart than rounding explains."""
        if dtype == torch.float32:
            most = FLOAT32_BOUND * max(1.0, self.largest_logit)
            all_equal = self.num_equal_answers == self.num_rows
            same = self.largest_difference <= most and all_equal
            bound = f"at most {most:.2g}, and all answers equal"
        else:
            same, bound = self.agreement >= AGREEMENT_BOUND, f"agreement on {AGREEMENT_BOUND:.0%}"
        if not same:
            raise ModelError(
                f"the merged weights are not what was trained: logits differ by up to "
                f"{self.largest_difference:.3g}, the likeliest token agrees on "
                f"{self.agreement:.1%} of {self.num_tokens:,}, {self.num_equal_answers} of "
                f"{self.num_rows} answers are equal; expected {bound}. Nothing was kept"
            )

    def in_words(self) -> str:
        """One line."""
        return (
            f"{self.num_rows} rows, {self.num_tokens:,} tokens: logits differ by "
            f"{self.largest_difference:.2g} at the most, the likeliest token agrees on "
            f"{self.agreement:.1%}, {self.num_equal_answers} of {self.num_rows} answers equal"
        )


def _largest(values: torch.Tensor) -> float:
    largest = values.abs().max().item()
    return float("inf") if math.isnan(largest) else largest  # which is like nothing


def rows_to_ask(recipe: Recipe, cache: Path, console: Console, num_rows: int) -> Asked:
    """Some of the run's held-out rows; of the trained ones where it has none, and a made-up one
    where none can be read.
    """
    for what in ("eval", "train"):
        entries = [entry for entry in getattr(recipe.data, what) if not entry.streaming]
        try:
            (sources,) = open_sources([entries], recipe.data, cache, console)
        except DataError as error:
            console.print(f"warning: data.{what} cannot be read: {error}", style="yellow")
            continue
        rows = Rows(sources, np.arange(sum(map(len, sources))))
        found = []
        for index in range(len(rows)):
            _, row = rows.row_or_error(index)
            if isinstance(row, Row):
                found.append(row)
            if len(found) == num_rows:
                break
        if found:
            return Asked(found, "held-out rows" if what == "eval" else "rows of data.train")
    return Asked([_made_up_row()], "a made-up row, since no data can be read")


def _made_up_row() -> Row:
    pixels = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    file = BytesIO()
    PillowImage.fromarray(pixels).save(file, "PNG")
    content = (Image(file.getvalue()), Text("What is to be seen in this picture?"))
    answer = (Text("Noise of many colours, and nothing else that could be named."),)
    conversation = Conversation((Message("user", content), Message("assistant", answer)))
    return Row("a made-up row", conversation, ImageAccess(Path.cwd()))


def ask(
    model: Any, encoder: Encoder, asked: Asked, *, max_new_tokens: int, batch_size: int = 1
) -> Said:
    """Logits of the learnt tokens, row by row and teacher-forced, and the answers that the model
    itself gives. Rows that are too long, or whose pictures are gone, are left out.

    Raises `DataError` where none is left.
    """
    # the library's own way to the features: what is loaded from the folder has no other
    encoder = replace(encoder, packed_vision=False, layouting=None)
    examples: list[Example] = []
    prompts: list[Example] = []
    for row in asked.rows:
        try:
            examples.append(encoder.encode(row))
            prompts.append(encoder.encode_prompt(row))
        except DataError:
            del examples[len(prompts) :]
    if not prompts:
        raise DataError("none of the rows to verify on can be read; bring the data back")
    model.eval()
    logits = [_logits(model, encoder, example) for example in examples]
    answers = generate_answers(
        model,
        encoder.processor,
        encoder.family,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    return Said(logits, answers)


def _logits(model: Any, encoder: Encoder, example: Example) -> torch.Tensor:
    batch = collate([example], encoder.processor, encoder.family)
    is_learnt_T = batch.pop("labels")[0, 1:] != IGNORED_LABEL
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.inference_mode():
        logits_TV = model(**inputs).logits[0, :-1]
    return logits_TV[is_learnt_T.to(logits_TV.device)].float().cpu()
