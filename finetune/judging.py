"""Did the adapter help: the base's and the adapter's answers to the held-out rows, and their
figures.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from data_formats.chat import Conversation
from finetune.data.examples import Encoder
from finetune.data.images import load_image
from finetune.data.sources import Row
from finetune.metrics import mean_scores, score
from finetune.model.adapters import IMAGE_SETTINGS, refuse_unfinished
from finetune.model.generate import generate_answers
from finetune.model.load import best_device, load_model, load_processor
from finetune.model.methods import is_adapter, load_trained
from finetune.model.vocabulary import extra_tokens_of
from finetune.recipe import EvaluationSection, Recipe
from finetune.rundir import RunDir, replacing, write_jsonl

MAX_THUMBNAILS = 200
THUMBNAIL_EDGE_PX = 320


@dataclass(frozen=True)
class Judgement:
    """Mean figures by metric, over the same `num_rows` held-out rows."""

    base: dict[str, float]
    adapter: dict[str, float]
    num_rows: int

    def figures(self) -> dict[str, Any]:
        """As they stand in `summary.json`."""
        return {
            "base": self.base,
            "adapter": self.adapter,
            "num_eval_rows": self.num_rows,
        }


@dataclass(frozen=True)
class Side:
    """One of the two models that are compared: a way to have it for as long as it is asked, and
    what its prompts are made with.
    """

    opened: Callable[[], AbstractContextManager[Any]]
    encoder: Encoder


@dataclass(frozen=True)
class Sides:
    """The plain base, and what was trained; None where nothing was, so that all stays the same."""

    base: Side
    adapter: Side | None


def sides_of_adapted(model: Any, encoder: Encoder, recipe: Recipe) -> Sides:
    """Both sides of a model with an adapter on a plain base: the base is asked without it."""
    tokens = extra_tokens_of(recipe)
    plain = encoder
    if tokens:
        # The base never saw the new tokens, so its prompts hold none, and its answers must not
        processor, _ = load_processor(recipe.model, encoder.images)
        plain = replace(encoder, processor=processor)
    ids = encoder.processor.tokenizer.convert_tokens_to_ids(list(tokens))

    @contextmanager
    def base() -> Iterator[Any]:
        generation = model.get_base_model().generation_config
        before = generation.suppress_tokens
        generation.suppress_tokens = [*(before or []), *ids] or None
        try:
            with model.disable_adapter():
                yield model
        finally:
            generation.suppress_tokens = before

    @contextmanager
    def adapter() -> Iterator[Any]:
        yield model

    return Sides(Side(base, plain), Side(adapter, encoder))


def sides_of_run(recipe: Recipe, folder: Path, encoder: Encoder) -> Sides:
    """Both sides as a finished run left them in `folder`: loaded once where the base is in the
    adapted model, otherwise one after the other.

    Raises `RunDirError`.
    """
    if is_adapter(recipe):
        model, _ = load_trained(recipe, folder, encoder.processor)
        return sides_of_adapted(model.to(best_device()), encoder, recipe)
    plain = replace(encoder, processor=load_processor(recipe.model, encoder.images)[0])
    base = Side(lambda: _loaded(lambda: load_model(recipe.model)[0]), plain)
    if recipe.adapter.method == "frozen":
        refuse_unfinished(folder, IMAGE_SETTINGS, recipe)
        return Sides(base, None)
    trained = lambda: load_trained(recipe, folder, encoder.processor).model  # noqa: E731
    return Sides(base, Side(lambda: _loaded(trained), encoder))


@contextmanager
def _loaded(load: Callable[[], Any]) -> Iterator[Any]:
    model = load()
    if model.device != best_device():  # quantised ones are there, and some refuse to be moved
        model.to(best_device())
    try:
        yield model
    finally:
        del model
        free_memory()


def free_memory() -> None:
    """Let go of models that nothing refers to any more but themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def judge(
    sides: Sides,
    rows: Sequence[Row],
    settings: EvaluationSection,
    run: RunDir,
    console: Console,
) -> Judgement:
    """Ask the base and what was trained every held-out row, and write `evaluation/`.

    The question is the conversation up to its last answer, which is the reference. Raises
    `DataError`.
    """
    rows = rows[: settings.max_rows]
    answers = {"base": _answer(sides.base, rows, settings, console, "base")}
    answers["adapter"] = (
        _answer(sides.adapter, rows, settings, console, "adapter")
        if sides.adapter
        else answers["base"]
    )
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
    side: Side, rows: Sequence[Row], settings: EvaluationSection, console: Console, who: str
) -> list[str]:
    """Answers in the order of the rows; views of one block of rows at a time are held in memory."""
    block = settings.batch_size * 8  # so that batches of like length can be formed within it
    answers: list[str] = []
    encoder = side.encoder
    with side.opened() as model, Progress(console=console, disable=not console.is_terminal) as bar:
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
                packed_vision=encoder.packed_vision,
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
