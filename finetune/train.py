"""`finetune train`: a recipe becomes a run directory."""

from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from rich.console import Console
from transformers import set_seed

from finetune.callbacks import MetricsFile, ProgressDisplay, StopOnDivergence, StopOnSignal
from finetune.data.collate import Collator
from finetune.data.examples import Encoder
from finetune.environment import environment, peak_memory_gib
from finetune.errors import ModelError, RecipeError, RunDirError, summarise_problems
from finetune.judging import Judgement, judge
from finetune.model.adapters import add_adapter, count_parameters, save_adapter
from finetune.model.load import (
    best_device,
    load_config,
    load_model,
    load_processor,
    quiet_libraries,
)
from finetune.preparation import PreparedRows, prepare_rows
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
    counts_in_words,
    dry_run_table,
    messages_console,
    print_summary,
    results_console,
)
from finetune.trainer import VisionSFTTrainer, training_arguments

INTERRUPTED = 130  # what a shell expects of a command that SIGINT ended


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the weights are loaded."""

    recipe: Recipe
    encoder: Encoder
    train: PreparedRows
    held_out: PreparedRows

    def digest(self) -> str:
        """SHA-256 over the usable rows, texts and image paths, in their order."""
        rows = [*self.train.rows, *self.held_out.rows]
        return sha256("\n".join(repr(row.conversation) for row in rows).encode()).hexdigest()


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
    if dry_run:
        results.print(dry_run_table(recipe, prepared.train.counts, len(prepared.held_out.rows)))
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
    skipped = prepared.train.skipped + prepared.held_out.skipped
    write_jsonl(run.skipped, ({"where": p.where, "reason": p.reason} for p in skipped))
    return _train_and_judge(prepared, model, run, source, resume, console, results)


def prepare(recipe: Recipe, console: Console) -> Prepared:
    """Read and examine all rows with the model's own processor."""
    _, family = load_config(recipe.model)
    encoder = Encoder(load_processor(recipe.model, recipe.images), family, recipe.images)
    train_rows = prepare_rows(recipe.data.train, recipe.data, encoder, console, "train")
    held_out = PreparedRows([], [])
    if recipe.data.eval:
        held_out = prepare_rows(recipe.data.eval, recipe.data, encoder, console, "eval")
    for what, rows in (("train", train_rows), ("held-out", held_out)):
        if rows.rows or rows.skipped:
            console.print(f"{what}: {counts_in_words(rows.counts, len(rows.skipped))}")
    return Prepared(recipe, encoder, train_rows, held_out)


def refuse_what_cannot_run(recipe: Recipe, source: str) -> None:
    """Raise `RecipeError` for settings that this version or this machine cannot carry out.

    None of them is passed over in silence.
    """
    adapter, training, data = recipe.adapter, recipe.training, recipe.data
    unbuilt = {
        f"model.quantize: {recipe.model.quantize}": recipe.model.quantize != "none",
        f"adapter.method: {adapter.method}": adapter.method not in ("lora", "dora", "rslora"),
        "training.learning_rate by part": isinstance(training.learning_rate, dict),
        "training.packing": training.packing,
        "training.vision_cache": training.vision_cache != "off",
        f"data.overlong: {data.overlong}": data.overlong not in ("stop", "skip"),
        "data.*.weight other than 1": any(s.weight != 1 for s in (*data.train, *data.eval)),
    }
    problems = [
        f"{setting}: not available in this version" for setting, used in unbuilt.items() if used
    ]
    needed = {f"output.trackers: {name}": name for name in recipe.output.trackers}
    if "bnb" in training.optimizer or "paged" in training.optimizer:
        needed[f"training.optimizer: {training.optimizer}"] = "bitsandbytes"
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
    else:
        stop = StopOnSignal(console)
        steps, max_steps = _run_trainer(prepared, model, run, checkpoint, stop, console)
        if stop.stopped:
            console.print(
                f"stopped at step {steps} of {max_steps}; go on with: finetune train {source} "
                "--resume",
                soft_wrap=True,
            )
            return INTERRUPTED
    with replacing(run.adapter) as folder:
        save_adapter(model, encoder.processor, recipe, folder)
    judgement = Judgement({}, {}, 0)
    if prepared.held_out.rows:
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
            "num_train_rows": len(prepared.train.rows),
            "num_skipped_rows": len(prepared.train.skipped) + len(prepared.held_out.skipped),
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
) -> tuple[int, int]:
    """Train; the steps done and the steps planned, which differ where a signal stopped it."""
    metrics, display = MetricsFile(run), ProgressDisplay(console)
    trainer = VisionSFTTrainer(
        model,
        training_arguments(prepared.recipe, run, num_eval_rows=len(prepared.held_out.rows)),
        Collator(prepared.encoder, [*prepared.train.rows, *prepared.held_out.rows]),
        num_train_rows=len(prepared.train.rows),
        callbacks=[metrics, StopOnDivergence(), display, stop],
    )
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
    return trainer.state.global_step, trainer.state.max_steps


def _bytes_on_disk(model: Any, recipe: Recipe) -> int:
    """The adapter and, for each checkpoint kept and the one being written, it and Adam's state."""
    adapter_bytes = 4 * count_parameters(model)[0]
    checkpoints = recipe.training.keep_checkpoints + 1
    return adapter_bytes * (1 + 3 * checkpoints) + 2**24


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint stands at the last step of its run."""
    state = read_json(checkpoint / "trainer_state.json")
    return state["global_step"] >= state["max_steps"]
