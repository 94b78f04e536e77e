"""Did the adapter help: the base's and the adapter's answers to the held-out rows, and their
figures.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress

from data_formats.chat import Conversation
from finetune.data.examples import Encoder
from finetune.data.images import load_image
from finetune.data.sources import Row
from finetune.metrics import mean_scores, score
from finetune.model.generate import generate_answers
from finetune.recipe import EvaluationSection
from finetune.rundir import RunDir, replacing, write_jsonl

MAX_THUMBNAILS = 200
THUMBNAIL_EDGE_PX = 320


@dataclass(frozen=True)
class Judgement:
    """Mean figures by metric, over the same `num_rows` held-out rows."""

    base: dict[str, float]
    adapter: dict[str, float]
    num_rows: int


def judge(
    model: Any,
    encoder: Encoder,
    rows: Sequence[Row],
    settings: EvaluationSection,
    run: RunDir,
    console: Console,
) -> Judgement:
    """Ask an adapted model every held-out row, without its adapter and with it, and write
    `evaluation/`.

    The question is the conversation up to its last answer, which is the reference. Raises
    `DataError`.
    """
    rows = rows[: settings.max_rows]
    answers: dict[str, list[str]] = {}
    for who in ("base", "adapter"):
        without = model.disable_adapter() if who == "base" else contextlib.nullcontext()
        with without:
            answers[who] = _answer(model, encoder, rows, settings, console, who)
    references = [list(row.conversation.references()) for row in rows]
    scores = {
        who: [score(a, r, settings.metrics) for a, r in zip(given, references, strict=True)]
        for who, given in answers.items()
    }
    with replacing(run.evaluation) as folder:
        thumbnails = RunDir(run.path).thumbnails.relative_to(run.evaluation)
        (folder / thumbnails).mkdir(parents=True)
        lines = []
        for i, row in enumerate(rows):
            line = {
                "where": row.where,
                "question": _question(row.conversation),
                "references": references[i],
                "base": answers["base"][i],
                "adapter": answers["adapter"][i],
                "scores": {who: scores[who][i] for who in answers},
            }
            if i < MAX_THUMBNAILS:
                line["images"] = _save_thumbnails(row, folder, str(thumbnails), i)
            lines.append(line)
        write_jsonl(folder / run.predictions.name, lines)
    return Judgement(mean_scores(scores["base"]), mean_scores(scores["adapter"]), len(rows))


def _answer(
    model: Any,
    encoder: Encoder,
    rows: Sequence[Row],
    settings: EvaluationSection,
    console: Console,
    who: str,
) -> list[str]:
    """Answers in the order of the rows; views of one block of rows at a time are held in memory."""
    block = settings.batch_size * 8  # so that batches of like length can be formed within it
    answers: list[str] = []
    with Progress(console=console, disable=not console.is_terminal) as bar:
        if not console.is_terminal:
            console.print(f"answering {len(rows):,} held-out rows ({who})")
        task = bar.add_task(f"answering ({who})", total=len(rows))
        for start in range(0, len(rows), block):
            prompts = [encoder.encode_prompt(row) for row in rows[start : start + block]]
            answers += generate_answers(
                model,
                encoder.processor,
                encoder.family,
                prompts,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                on_batch=lambda num_rows: bar.advance(task, num_rows),
            )
    return answers


def _question(conversation: Conversation) -> str:
    """The words of the user's last turn before the answer."""
    users = [m for m in conversation.before_last_answer().messages if m.role == "user"]
    return users[-1].text.strip() if users else ""


def _save_thumbnails(row: Row, folder: Any, subfolder: str, number: int) -> list[str]:
    """Small copies of the row's images, for the report; paths relative to the evaluation folder."""
    names = []
    for k, part in enumerate(row.conversation.before_last_answer().images()):
        image = load_image(part.source, row.image_access)
        image.thumbnail((THUMBNAIL_EDGE_PX, THUMBNAIL_EDGE_PX))
        names.append(f"{subfolder}/{number:04d}-{k}.png")
        image.save(folder / names[-1])
    return names
