"""The steps of a run: from a recipe to rows and batches, and through the trainer."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from finetune.arguments import training_arguments
from finetune.asking import ask_rows
from finetune.bad_steps import BadSteps
from finetune.callbacks import (
    MetricsFile,
    Patience,
    ProgressDisplay,
    StopOnSignal,
)
from finetune.data.augment import Augmentation
from finetune.data.collate import BatchRow, Collator
from finetune.data.examination import BAD, OVERLONG, Examination
from finetune.data.examples import Encoder
from finetune.data.sampling import Batching, EpochBatches, EpochSampler
from finetune.data.sources import Rows, StreamSource
from finetune.data.streaming import ExampleStream
from finetune.errors import DataError, ModelError
from finetune.fitting import ways_to_fit
from finetune.metrics import measure
from finetune.model.adapters import base_of
from finetune.out_of_memory import AskingOutOfMemoryError, OutOfMemoryError
from finetune.planning import Planner
from finetune.preparation import (
    PreparedRows,
    cache_of,
    load_encoder,
    open_streams,
    prepare_held_out,
    prepare_rows,
    row_sizes,
)
from finetune.preview_page import PreviewRow, write_preview
from finetune.processes import process
from finetune.recipe import Recipe
from finetune.resuming import Share
from finetune.rundir import RunDir
from finetune.saving import StepsAreOverError
from finetune.sides import Side
from finetune.stream_lists import StreamLists
from finetune.trainer import VisionSFTTrainer


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the weights are loaded.

    `train` is None where the rows are streamed, and `streams` are empty where they are not.
    `worst_first` puts the heaviest rows in front.
    """

    recipe: Recipe
    encoder: Encoder
    train: PreparedRows | None
    streams: list[StreamSource]
    held_out: PreparedRows | None
    worst_first: bool = False

    def examinations(self) -> list[Examination]:
        """Of train and eval entries; one, where the held-out rows were carved out of the first."""
        both = [rows for rows in (self.train, self.held_out) if rows]
        return list({id(rows.examination): rows.examination for rows in both}.values())

    @property
    def num_held_out(self) -> int:
        """Rows to judge on."""
        return len(self.held_out.rows) if self.held_out else 0

    def num_left_out(self) -> int:
        """Rows that were found to be bad or too long before training."""
        return sum(e.num_of(BAD) + e.num_of(OVERLONG) for e in self.examinations())

    def digest(self) -> str:
        """What the model will see of all rows, pictures included, as a digest."""
        digests = [examination.digest() for examination in self.examinations()]
        # of a stream nothing is read beforehand; its files' names and sizes stand for it
        digests += [sha256(repr(each.summary()).encode()).hexdigest() for each in self.streams]
        return "-".join(digests)


def prepare(recipe: Recipe, console: Console) -> Prepared:
    """Read and examine all rows with the model's own processor."""
    encoder = load_encoder(recipe, console)
    recipe = recipe.model_copy(update={"images": encoder.images})
    cache = cache_of(recipe.output.dir)
    if any(source.streaming for source in recipe.data.train):
        streams = open_streams(recipe, cache, console)
        held_out = prepare_held_out(recipe, encoder, cache, console)
        return Prepared(recipe, encoder, None, streams, held_out)
    train_rows, held_out = prepare_rows(recipe, encoder, cache, console)
    return Prepared(recipe, encoder, train_rows, [], held_out)


def run_trainer(
    prepared: Prepared,
    model: Any,
    run: RunDir,
    checkpoint: Path | None,
    stop: StopOnSignal,
    console: Console,
    figures: Callable[[], dict[str, float]] | None,
    owes_evaluation: bool = False,
) -> VisionSFTTrainer:
    """Train; the trainer, whose step falls short of its last one where a signal stopped it.

    With `owes_evaluation` that of the checkpoint's step is made before.
    """
    metrics, display = MetricsFile(run), ProgressDisplay(console)
    rows = prepared.train.rows if prepared.train else Rows((), np.zeros(0, np.int64))
    both = rows
    if prepared.held_out:
        # those that are judged: the loss of all of a large set would be computed again and again
        both = rows + prepared.held_out.rows[: prepared.recipe.evaluation.max_rows]
    batches = epoch_batches(prepared)
    trainer = VisionSFTTrainer(
        model,
        training_arguments(prepared.recipe, run, num_eval_rows=prepared.num_held_out),
        Collator(
            prepared.encoder,
            both,
            augmentation=Augmentation.of_recipe(prepared.recipe),
            sampler=batches.sampler,
            num_train_rows=len(rows),
            names_rows=True,
        ),
        batches,
        num_train_rows=len(rows),
        stream=_stream(prepared) if prepared.streams else None,
        on_findings=StreamLists(run).add,
        recipe=prepared.recipe,
        answer_figures=figures,
        callbacks=[
            metrics,
            display,
            Patience(prepared.recipe.evaluation, console),
            stop,
        ],
        bad_steps=BadSteps(
            prepared.recipe.training,
            run,
            None if prepared.streams else _page_of(prepared, rows),
            lambda message: console.print(f"warning: {message}", style="yellow", soft_wrap=True),
            prepared.recipe.model.dtype,
        ),
    )
    if checkpoint:
        trainer.go_on_from(checkpoint, owes_evaluation=owes_evaluation)
    metrics.trainer = trainer
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except StepsAreOverError:
        trainer.end_without_steps()
    except AskingOutOfMemoryError as error:
        raise ModelError(
            f"evaluation of step {trainer.state.global_step}: {error}",
            resume_with=error.resume_with,
        ) from error
    except OutOfMemoryError as error:
        if not model.training:  # as the trainer has it in an evaluation alone
            helps = "lower evaluation.batch_size, with which the run may go on (--resume)"
            batch_size = prepared.recipe.evaluation.batch_size
            resume_with = (f"evaluation.batch_size={batch_size // 2}",)
            if batch_size == 1:
                helps = "make its images smaller, or leave it out of data.eval, and start again"
                resume_with = None
            raise ModelError(
                f"{error}. This is held out: {helps}", resume_with=resume_with
            ) from error
        helps, resume_with = what_helps(prepared.recipe, console)
        raise ModelError(f"{error}. {helps}", resume_with=resume_with) from error
    except torch.OutOfMemoryError as error:
        step, told = trainer.state.global_step + 1, str(error).partition("\n")[0]
        raise ModelError(
            f"step {step}: out of memory beside the batches, most often in the optimizer ({told}). "
            f"{what_helps(prepared.recipe, console)[0]}",
            resume_with=None,
        ) from error
    except (RuntimeError, EOFError, ConnectionError) as error:
        # the last two where it was killed as it handed over a batch, and torch finds it alive still
        is_cut_off = not isinstance(error, RuntimeError) and prepared.recipe.training.num_workers
        if not is_cut_off and "DataLoader worker (pid" not in str(error):
            raise
        raise DataError(
            f"a loading process was killed ({str(error) or 'it no longer answers'}): most often "
            "the memory, or /dev/shm, was full; lower training.num_workers, and go on with --resume"
        ) from error
    finally:
        trainer.settle()
        display.close()  # or the terminal is left without a cursor
        stop.steps_are_over()
    return trainer


def _page_of(prepared: Prepared, rows: Rows) -> Callable[[Sequence[BatchRow], Path], None]:
    """What shows rows of a batch in a file."""
    encoder, recipe = prepared.encoder, prepared.recipe

    def write(batch: Sequence[BatchRow], out: Path) -> None:
        numbers = dict.fromkeys(row.feature["row"] for row in batch if row.feature)
        shown = [PreviewRow.of_fitted(*encoder.encode_fitted(rows[each])) for each in numbers]
        write_preview(
            shown,
            encoder.processor,
            out,
            title=f"{recipe.output.dir}: {out.stem}",
            model=recipe.model.name,
            images=encoder.images,
            num_rows=len(rows),
        )

    return write


def what_helps(recipe: Recipe, console: Console) -> tuple[str, tuple[str, ...] | None]:
    """The settings that would take less memory, as `finetune plan` finds them for this card, and
    those with which the run may go on.
    """
    may_split = (
        recipe.training.on_oom == "stop"
        and process()[1] == 1
        and not any(source.streaming for source in recipe.data.train)
    )
    split = " Or go on with --resume and training.on_oom: split" if may_split else ""
    resume_with = ("training.on_oom=split",) if may_split else None
    general = (
        "Lower training.batch_size or its budgets (and raise gradient_accumulation as much), set "
        "gradient_checkpointing: true, or make images smaller, and start again."
    )
    if not torch.cuda.is_available():
        return general + split, resume_with
    size = torch.cuda.mem_get_info()[1]
    console.print("out of memory: planning what would fit", soft_wrap=True)
    ways = []
    with suppress(Exception):  # a fault in planning must not take the place of the message
        found = ways_to_fit(Planner.of_recipe(recipe, Console(quiet=True)), size)
        ways = [way for way in found if way.fits]
    if not ways:
        return general + split, resume_with
    told = "; ".join(f"{way.in_words()} ({way.peak_bytes / 2**30:.1f} GiB)" for way in ways[:4])
    return f"By finetune plan, start again with one of these: {told}.{split}", resume_with


def answer_figures(
    prepared: Prepared, model: Any, stop: StopOnSignal
) -> Callable[[], dict[str, float]] | None:
    """What gives the metrics of the model's answers to some held-out rows, as it is by then; when a
    signal has come it may raise `LeftEvaluationError`.
    """
    settings = prepared.recipe.evaluation
    if not prepared.held_out or not settings.rows_in_training:
        return None
    asked = prepared.held_out.to_ask().first(settings.max_rows).first(settings.rows_in_training)
    side = Side(lambda: nullcontext(model), prepared.encoder, key="")

    def figures() -> dict[str, float]:
        # compiled layers would be compiled again for every length of an answer
        with torch.compiler.set_stance("force_eager"), stop.answering(base_of(model)):
            answers = ask_rows(side, asked, settings, Console(quiet=True), "adapter")
        references = [list(row.conversation.references()) for row in asked.rows]
        texts = [answer.text for answer in answers]
        return measure(texts, references, settings.metrics).figures()

    return figures


def epoch_batches(prepared: Prepared) -> EpochBatches:
    """The batches to train; none where rows are streamed."""
    recipe, train = prepared.recipe, prepared.train
    batching = Batching.of_recipe(recipe.training, worst_first=prepared.worst_first)
    sampler = EpochSampler(train.spans() if train else [], recipe.training.seed)
    sizes = row_sizes(recipe, prepared.encoder, train) if train else None
    return EpochBatches(sampler, batching, sizes)


def rows_of_steps(prepared: Prepared, share: Share) -> list[set[int]]:
    """Of the first epoch, shared out so; none where rows are streamed."""
    if not prepared.train:
        return []
    batches = epoch_batches(prepared)
    batching = replace(
        batches.batching,
        limits=replace(batches.batching.limits, rows=share.batch_size),
        accumulation=share.gradient_accumulation,
        num_processes=share.num_processes,
    )
    batches = EpochBatches(batches.sampler, batching, batches.sizes)
    found, a_step = batches.of_epoch(0), share.gradient_accumulation * share.num_processes
    return [
        {row for batch in found[start : start + a_step] for row in batch} - {batches.idle_row}
        for start in range(0, len(found), a_step)
    ]


def _stream(prepared: Prepared) -> ExampleStream:
    data = prepared.recipe.data
    return ExampleStream(
        prepared.streams,
        prepared.encoder,
        seed=prepared.recipe.training.seed,
        skip_bad=data.bad_rows == "skip",
        skip_overlong=data.overlong == "skip",
        augmentation=Augmentation.of_recipe(prepared.recipe),
    )
