"""Did the adapter help: answers of the base and of what was trained to the held-out rows, and their
figures.
"""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from data_formats.chat import Conversation
from finetune.asking import Answer, HeldOut, KeptAnswers, ask_rows
from finetune.data.images import load_image
from finetune.data.sources import Row
from finetune.gallery import CARDS_PER_STATUS, status_of
from finetune.metrics import Measured, differences, measure
from finetune.processes import is_first
from finetune.recipe import EvaluationSection
from finetune.rundir import PREDICTIONS, THUMBNAILS, replacing, write_jsonl
from finetune.sides import Side

THUMBNAIL_EDGE_PX = 320
MAX_PNG_BYTES = 50_000
JPEG_QUALITY = 80


@dataclass(frozen=True)
class Judgement:
    """Each side's answers measured, by its name, over the same `num_rows` held-out rows."""

    measured: Mapping[str, Measured]
    num_rows: int

    def figures(self) -> dict[str, Any]:
        """As they stand in `summary.json`."""
        found: dict[str, Any] = {"base": {}, "adapter": {}}
        found |= {who: each.figures() for who, each in self.measured.items()}
        found |= {"num_eval_rows": self.num_rows, "intervals": {}, "differences": {}}
        found["intervals"] = {who: each.intervals() for who, each in self.measured.items()}
        if "adapter" in self.measured and "base" in self.measured:
            found["differences"] = differences(self.measured["base"], self.measured["adapter"])
        return found


def judge(
    sides: Mapping[str, Side],
    asked: HeldOut,
    settings: EvaluationSection,
    folder: Path,
    partial: Path,
    console: Console,
) -> Judgement:
    """Ask every side every held-out row, and write `folder` whole; until then answers are kept in
    `partial`, and not asked for again.

    The question is the conversation up to its last answer, which is the reference. In several
    processes each asks its share of the rows, and the first writes. Raises `DataError`.
    """
    asked = asked.first(settings.max_rows)
    rows = asked.rows
    question = f"{asked.digest()}:{settings.max_new_tokens}:{settings.prompt_suffix}"
    kept = KeptAnswers(partial, question)
    answers: dict[str, list[Answer]] = {}
    for who, side in sides.items():
        same = next((each for each in answers if sides[each] is side), None)
        answers[who] = (
            answers[same] if same else ask_rows(side, asked, settings, console, who, kept)
        )
    references = [list(row.conversation.references()) for row in rows]
    # a side with a vocabulary of its own parts the same text into other tokens
    num_learnt = {tuple(each.num_tokens for each in given) for given in answers.values()}
    shared = num_learnt.pop() if len(num_learnt) == 1 else None
    measured = {
        who: measure(
            [each.text for each in given],
            references,
            settings.metrics,
            losses_of(given) if shared else None,
        )
        for who, given in answers.items()
    }
    if is_first():
        _write(folder, rows, references, answers, measured, shared)
        shutil.rmtree(partial, ignore_errors=True)
    return Judgement(measured, len(rows))


def losses_of(answers: Sequence[Answer]) -> np.ndarray:
    """Summed loss and learnt tokens of each row [N, 2]."""
    return np.array([(each.loss, each.num_tokens) for each in answers], np.float64).reshape(-1, 2)


def _write(
    folder: Path,
    rows: Sequence[Row],
    references: Sequence[list[str]],
    answers: Mapping[str, Sequence[Answer]],
    measured: Mapping[str, Measured],
    num_learnt: Sequence[int] | None,
) -> None:
    scores = {who: each.scores() for who, each in measured.items()}
    seen: Counter[str] = Counter()
    with replacing(folder) as temporary:
        (temporary / THUMBNAILS).mkdir(parents=True)
        lines = []
        for i, row in enumerate(rows):
            line = {
                "where": row.where,
                "question": _question(row.conversation),
                "references": references[i],
                **{who: given[i].text for who, given in answers.items()},
                "scores": {who: scores[who][i] for who in answers},
                **({"num_learnt_tokens": num_learnt[i]} if num_learnt else {}),
                "views": [given[i].views for given in answers.values()][-1],
            }
            seen[status_of(line)] += 1
            if seen[status_of(line)] <= CARDS_PER_STATUS:
                line["images"] = _save_thumbnails(row, temporary, i)
            lines.append(line)
        write_jsonl(temporary / PREDICTIONS, lines)


def _question(conversation: Conversation) -> str:
    """The words of the user's last turn before the answer."""
    users = [m for m in conversation.before_last_answer().messages if m.role == "user"]
    return users[-1].text.strip() if users else ""


def _save_thumbnails(row: Row, folder: Path, number: int) -> list[str]:
    """Small copies of the row's images, for the report; paths relative to the evaluation folder."""
    names = []
    for k, part in enumerate(row.conversation.before_last_answer().images()):
        image = load_image(part.source, row.image_access)
        image.thumbnail((THUMBNAIL_EDGE_PX, THUMBNAIL_EDGE_PX))
        ending, content = encoded(image)
        names.append(f"{THUMBNAILS}/{number:04d}-{k}.{ending}")
        (folder / names[-1]).write_bytes(content)
    return names


def encoded(image: Image.Image) -> tuple[str, bytes]:
    """How the file's name ends, and its bytes: as PNG, or where that is large, as of photographs,
    as JPEG.
    """
    file = BytesIO()
    image.save(file, "png")
    if len(file.getbuffer()) <= MAX_PNG_BYTES:
        return "png", file.getvalue()
    file = BytesIO()
    image.save(file, "jpeg", quality=JPEG_QUALITY)
    return "jpg", file.getvalue()
