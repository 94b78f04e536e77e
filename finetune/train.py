"""`finetune train`: a recipe becomes a run directory."""

import json
import os
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import load_peft_weights, set_peft_model_state_dict
from rich.console import Console
from transformers import set_seed

from finetune.callbacks import MetricsFile, ProgressDisplay, StopOnDivergence, StopOnSignal
from finetune.data.collate import Collator
from finetune.data.examination import BAD, OVERLONG, Examination, Finding
from finetune.data.examples import Encoder
from finetune.data.sampling import EpochSampler
from finetune.data.sources import Rows, StreamSource
from finetune.data.streaming import ExampleStream
from finetune.environment import environment, peak_memory_gib
from finetune.errors import ModelError, RecipeError, RunDirError, summarise_problems
from finetune.judging import Judgement, judge
from finetune.model.adapters import add_adapter, count_parameters, save_adapter
from finetune.model.load import (
    best_device,
    load_model,
    quiet_libraries,
)
from finetune.preparation import (
    PreparedRows,
    cache_of,
    load_encoder,
    open_streams,
    prepare_held_out,
    prepare_rows,
    write_lists,
)
from finetune.recipe import Recipe, dump_recipe, load_recipe, recipe_warnings
from finetune.report import write_report
from finetune.rundir import (
    RunDir,
    check_run_dir,
    create_run_dir,
    read_json,
    read_jsonl,
    replacing,
    write_json,
    write_jsonl,
    write_text,
)
from finetune.tables import (
    dry_run_table,
    messages_console,
    print_summary,
    results_console,
)
from finetune.trainer import VisionSFTTrainer, read_stream_state, training_arguments

INTERRUPTED = 130  # what a shell expects of a command that SIGINT ended


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the weights are loaded.

    `train` is None where the rows are streamed, and `streams` are empty where they are not.
    """

    recipe: Recipe
    encoder: Encoder
    train: PreparedRows | None
    streams: list[StreamSource]
    held_out: PreparedRows | None

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


def train(
    recipe: Recipe,
    source: str = "RECIPE",
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
    results: Console | None = None,
) -> int:
    """Train, judge and report; the exit code.

    `source` is what the user called the recipe, for messages. `console` takes progress and
    messages, `results` the table.
    Raises `FinetuneError` for what the user can mend, before anything is written.
    """
    console = console or messages_console()
    results = results or results_console()
    quiet_libraries()
    for warning in recipe_warnings(recipe):
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    refuse_what_cannot_run(recipe, source)
    if not dry_run:
        check_run_dir(recipe.output.dir, resume=resume, overwrite=overwrite)
    prepared = prepare(recipe, console)
    recipe = prepared.recipe
    if dry_run:
        if prepared.train:
            results.print(dry_run_table(recipe, prepared.train, prepared.num_held_out))
        else:
            results.print("dry run: nothing was written; streamed rows are checked as they come")
        return 0
    if resume:
        refuse_another_run(prepared, RunDir(recipe.output.dir))
    console.print(f"loading {recipe.model.name}", soft_wrap=True)
    set_seed(recipe.training.seed)  # the adapter's first weights are random
    base, family = load_model(recipe.model)
    model = add_adapter(base, family, recipe.adapter, recipe.model.name)
    run = create_run_dir(
        recipe.output.dir,
        resume=resume,
        overwrite=overwrite,
        needed_bytes=_bytes_on_disk(model, recipe),
    )
    write_text(run.recipe, dump_recipe(recipe))
    write_json(run.environment, environment() | {"rows_sha256": prepared.digest()})
    if not (resume and prepared.streams):  # a stream adds to the lists as it goes
        write_lists(run.path, prepared.examinations())
    return _train_and_judge(prepared, model, run, source, resume, console, results)


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


def refuse_what_cannot_run(recipe: Recipe, source: str) -> None:
    """Raise `RecipeError` for settings that this version or this machine cannot carry out.

    None of them is passed over in silence.
    """
    adapter, training = recipe.adapter, recipe.training
    unbuilt = {
        f"adapter.method: {adapter.method}": adapter.method not in ("lora", "dora", "rslora"),
        "training.learning_rate by part": isinstance(training.learning_rate, dict),
        "training.packing": training.packing,
        "training.vision_cache": training.vision_cache != "off",
        "several processes (WORLD_SIZE)": int(os.environ.get("WORLD_SIZE") or 1) > 1,
    }
    problems = [
        f"{setting}: not available in this version" for setting, used in unbuilt.items() if used
    ]
    needed = {f"output.trackers: {name}": name for name in recipe.output.trackers}
    if "bnb" in training.optimizer or "paged" in training.optimizer:
        needed[f"training.optimizer: {training.optimizer}"] = "bitsandbytes"
    if recipe.model.quantize != "none":
        needed[f"model.quantize: {recipe.model.quantize}"] = "bitsandbytes"
    if recipe.model.attention == "flash_attention_2":
        needed["model.attention: flash_attention_2"] = "flash_attn"
    on_gpu = torch.cuda.is_available()
    if recipe.model.dtype == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported():
        problems.append("model.dtype: bfloat16 is not computed by this GPU; set float16")
    problems += [
        f"{setting}: needs the package {package}, which is not installed; pip install {package}"
        for setting, package in needed.items()
        if find_spec(package) is None
    ]
    if problems:
        raise RecipeError(summarise_problems(source, problems))


def refuse_another_run(prepared: Prepared, run: RunDir) -> None:
    """Raise `RunDirError` where a run would go on with a recipe or rows it was not begun with."""
    begun = load_recipe(run.recipe, check_paths=False).model_dump()
    now = prepared.recipe.model_dump()
    changed = [
        f"{section}.{key}"
        for section, settings in now.items()
        for key in settings
        if settings[key] != begun[section][key] and section != "output"
    ]
    if not changed and read_json(run.environment).get("rows_sha256") != prepared.digest():
        changed = ["the rows in the data files"]
    if changed:
        raise RunDirError(
            f"{run.path}: was begun with other settings ({', '.join(changed)}); "
            "resume with the same ones, or start a new run in another output.dir"
        )


def _train_and_judge(
    prepared: Prepared,
    model: Any,
    run: RunDir,
    source: str,
    resume: bool,
    console: Console,
    results: Console,
) -> int:
    recipe, encoder = prepared.recipe, prepared.encoder
    trainable, total = count_parameters(model)
    console.print(f"training {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    checkpoint = run.last_checkpoint() if resume else None
    if resume:
        console.print(
            f"resuming from {checkpoint}" if checkpoint else "no checkpoint yet: starting over",
            soft_wrap=True,
        )
    if checkpoint and is_finished(checkpoint):
        # Trained to the end and killed afterwards: the trainer would take one step too many
        set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device="cpu"))
        model.to(best_device())
        num_streamed = read_stream_state(checkpoint, 0)[1] if prepared.streams else {}
    else:
        stop = StopOnSignal(console)
        trainer = _run_trainer(prepared, model, run, checkpoint, stop, console)
        num_streamed = trainer.num_streamed
        if stop.stopped:
            console.print(
                f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; "
                f"go on with: finetune train {source} --resume",
                soft_wrap=True,
            )
            return INTERRUPTED
    if prepared.streams:
        taken, trained, left = (num_streamed[key] for key in ("taken", "trained", "left out"))
        console.print(f"stream: {taken:,} rows taken = {trained:,} trained + {left:,} left out")
    with replacing(run.adapter) as folder:
        save_adapter(model, encoder.processor, recipe, folder)
    judgement = Judgement({}, {}, 0)
    if prepared.held_out:
        judgement = judge(model, encoder, prepared.held_out.rows, recipe.evaluation, run, console)
    logged = [line for line in read_jsonl(run.metrics) if "loss" in line]
    write_json(
        run.summary,
        {
            "first_loss": logged[0]["loss"],
            "last_loss": logged[-1]["loss"],
            "base": judgement.base,
            "adapter": judgement.adapter,
            "num_eval_rows": judgement.num_rows,
            "num_train_rows": len(prepared.train.rows)
            if prepared.train
            else num_streamed["trained"],
            "num_skipped_rows": prepared.num_left_out() + num_streamed.get("left out", 0),
            "steps": logged[-1]["step"],
            "train_seconds": logged[-1]["seconds"],
            "samples_per_second": round(logged[-1]["samples"] / logged[-1]["seconds"], 3),
            "peak_memory_gib": round(peak_memory_gib(), 3),
            "trainable_parameters": trainable,
            "total_parameters": total,
            "device": environment()["device"],
        },
    )
    write_report(run)
    print_summary(run, results)
    return 0


def _run_trainer(
    prepared: Prepared,
    model: Any,
    run: RunDir,
    checkpoint: Path | None,
    stop: StopOnSignal,
    console: Console,
) -> VisionSFTTrainer:
    """Train; the trainer, whose step falls short of its last one where a signal stopped it."""
    metrics, display = MetricsFile(run), ProgressDisplay(console)
    rows = prepared.train.rows if prepared.train else Rows((), np.zeros(0, np.int64))
    held_out = prepared.held_out
    trainer = VisionSFTTrainer(
        model,
        training_arguments(prepared.recipe, run, num_eval_rows=prepared.num_held_out),
        Collator(prepared.encoder, rows + held_out.rows if held_out else rows),
        EpochSampler(
            prepared.train.spans() if prepared.train else [], prepared.recipe.training.seed
        ),
        num_train_rows=len(rows),
        stream=_stream(prepared) if prepared.streams else None,
        on_findings=FindingsLists(run).add,
        callbacks=[metrics, StopOnDivergence(), display, stop],
    )
    if checkpoint:
        trainer.go_on_with_stream(checkpoint)
    metrics.trainer = trainer
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(
            f"out of GPU memory at step {trainer.state.global_step + 1}; lower training.batch_size "
            "(and raise gradient_accumulation as much), set gradient_checkpointing: true, or make "
            "images smaller"
        ) from error
    finally:
        display.close()  # or the terminal is left without a cursor
        stop.release()
    return trainer


def _stream(prepared: Prepared) -> ExampleStream:
    data = prepared.recipe.data
    return ExampleStream(
        prepared.streams,
        prepared.encoder,
        seed=prepared.recipe.training.seed,
        skip_bad=data.bad_rows == "skip",
        skip_overlong=data.overlong == "skip",
    )


class FindingsLists:
    """skipped.jsonl and changed.jsonl of a run whose rows are streamed, written as it goes.

    A row is listed once, though a resumed run comes by it again, and so does every epoch.
    """

    def __init__(self, run: RunDir):
        self.run = run
        for path in (run.skipped, run.changed):
            if path.is_file():
                write_jsonl(path, read_jsonl(path))  # without a last line that was not finished
        self._listed = {
            path: {line["where"] for line in read_jsonl(path)}
            for path in (run.skipped, run.changed)
        }

    def add(self, findings: list[Finding]) -> None:
        """List those that are not yet listed."""
        for finding in findings:
            path = self.run.changed if finding.kind == "changed" else self.run.skipped
            if finding.where in self._listed[path]:
                continue
            self._listed[path].add(finding.where)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finding.to_json()) + "\n")


def _bytes_on_disk(model: Any, recipe: Recipe) -> int:
    """The adapter and, for each checkpoint kept and the one being written, it and Adam's state."""
    adapter_bytes = 4 * count_parameters(model)[0]
    checkpoints = recipe.training.keep_checkpoints + 1
    return adapter_bytes * (1 + 3 * checkpoints) + 2**24


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint stands at the last step of its run."""
    state = read_json(checkpoint / "trainer_state.json")
    return state["global_step"] >= state["max_steps"]
