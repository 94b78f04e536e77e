"""`finetune train`: a recipe becomes a run directory."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import set_seed

from finetune.callbacks import StopOnSignal
from finetune.checkpoints import last_whole, move_newer_aside
from finetune.data.sampling import was_worst_first
from finetune.data_summary import data_summary
from finetune.endings import Ending
from finetune.engines import use_engine
from finetune.environment import environment
from finetune.errors import RecipeError, RunDirError
from finetune.finished import nothing_is_left, still_owes_evaluation
from finetune.judging import Judgement, judge
from finetune.model import pissa
from finetune.model.adapters import count_parameters
from finetune.model.load import best_device, quiet_libraries
from finetune.model.methods import (
    is_adapter,
    load_checkpoint,
    load_trainable,
    pissa_start,
    save_trained,
)
from finetune.model.sharding import whole_weights
from finetune.model.vision_cache import keeping_features, stage_to_keep
from finetune.preparation import (
    cache_of,
    write_lists,
)
from finetune.processes import (
    engine,
    first_before_others,
    is_first,
    lists_of_all,
    process,
    processes_here,
    wait_for_all,
)
from finetune.recipe import Recipe, dump_recipe, recipe_warnings
from finetune.report import write_report
from finetune.requirements import refuse_what_cannot_run
from finetune.resuming import (
    Share,
    and_now,
    best_so_far,
    best_step,
    is_finished,
    other_processes,
    refuse_another_run,
    refuse_other_processes,
    shares_of,
)
from finetune.rundir import (
    RunDir,
    RunLock,
    check_run_dir,
    create_run_dir,
    replacing,
    write_json,
    write_text,
)
from finetune.sides import Sides, free_memory, sides_of_adapted, sides_of_run
from finetune.stream_progress import read_num_streamed
from finetune.summary import figures_of
from finetune.tables import (
    dry_run_table,
    messages_console,
    print_summary,
    results_console,
)
from finetune.training import (
    Prepared,
    answer_figures,
    epoch_batches,
    prepare,
    rows_of_steps,
    run_trainer,
)


def train(
    recipe: Recipe,
    source: str = "RECIPE",
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    worst_first: bool = False,
    console: Console | None = None,
    results: Console | None = None,
) -> int:
    """Train, judge and report; the exit code: 0, or that of the signal that ended it, when it goes
    on with `resume`.

    `source` is what the user called the recipe, for messages. `worst_first` begins with the
    heaviest rows; a resumed run keeps the order that it was begun with. `console` takes progress
    and messages, `results` the table.
    Raises `FinetuneError` for what the user can mend, before anything is written.
    """
    recipe = use_engine(recipe, source, resume=resume, dry_run=dry_run)
    console = (console or messages_console()) if is_first() else Console(quiet=True)
    results = (results or results_console()) if is_first() else Console(quiet=True)
    quiet_libraries()
    for warning in recipe_warnings(recipe):
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    refuse_what_cannot_run(recipe, source)
    if worst_first and any(entry.streaming for entry in recipe.data.train):
        raise RecipeError(
            f"{source}: --worst-first needs to know all rows before training, and streamed ones "
            "come later; leave it out, or data.train.0.streaming"
        )
    is_there = False
    if not dry_run and is_first():
        is_there = check_run_dir(recipe.output.dir, resume=resume, overwrite=overwrite).is_run()
    with RunLock(RunDir(recipe.output.dir)) as lock, StopOnSignal(console) as stop:
        if is_there:
            lock.take()
        with first_before_others():
            prepared = prepare(recipe, console)
        recipe = prepared.recipe
        if dry_run:
            if prepared.train:
                batches = epoch_batches(prepared)
                results.print(dry_run_table(recipe, prepared.train, batches, prepared.num_held_out))
            else:
                results.print(
                    "dry run: nothing was written; streamed rows are checked as they come"
                )
            return 0
        if resume:
            worst_first = was_worst_first(RunDir(recipe.output.dir), asked=worst_first)
        prepared = replace(prepared, worst_first=worst_first)
        run = RunDir(recipe.output.dir)
        if resume:
            _check_it_may_go_on(prepared, console)
            if nothing_is_left(prepared):
                console.print(f"{run.path} is finished; its report: {run.report}", soft_wrap=True)
                if is_first():
                    run.ended.unlink(missing_ok=True)
                    write_report(run)
                    print_summary(run, recipe, results)
                return 0
        with Ending(run, stop, console) as ending:
            done = _train_and_save(prepared, resume, overwrite, lock, stop, ending, console)
            if stop.exit_code is not None:
                console.print(
                    f"stopped at step {done.stopped_at}; go on with: finetune train {source} "
                    "--resume" + (f" --processes {processes_here()}" if process()[1] > 1 else ""),
                    soft_wrap=True,
                )
                ending.write()
                wait_for_all()  # or the launcher ends the first when another has ended
                return stop.exit_code
            _judge_and_report(prepared, done, console, results)
    return 0


def _check_it_may_go_on(prepared: Prepared, console: Console) -> None:
    """Raise `RunDirError` where the recipe, the rows or the number of processes do not let a run go
    on; warn where it will not be as one that was not broken off.
    """
    recipe, run, num_processes = prepared.recipe, RunDir(prepared.recipe.output.dir), process()[1]
    before, now = shares_of(run), Share.of(recipe, num_processes)
    same_number = same_rows = True
    if {share.num_processes for share in before} != {num_processes}:
        shared_out = [rows_of_steps(prepared, share) for share in (before[0], now)]
        same_number = len(shared_out[0]) == len(shared_out[1])
        same_rows = shared_out[0] == shared_out[1]
    refuse_other_processes(recipe, run, num_processes, same_number_of_steps=same_number)
    refuse_another_run(recipe, prepared.digest(), run, num_processes)
    for warning in other_processes(recipe, run, num_processes, same_rows=same_rows):
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)


@dataclass(frozen=True)
class Trained:
    """How far the steps of a run have come, and what is left of them in memory."""

    run: RunDir
    trainable: int
    total: int
    stopped_at: str = ""
    """The step that the trainer came to."""
    best_step: int | None = None
    """Where the weights are from, where the best evaluation's were taken."""
    num_streamed: dict[str, int] = field(default_factory=dict)
    """Rows taken from a stream, and what became of them."""
    sides: Sides | None = None
    """What is judged, where that is the trained model itself and not what was saved of it."""


def _train_and_save(
    prepared: Prepared,
    resume: bool,
    overwrite: bool,
    lock: RunLock,
    stop: StopOnSignal,
    ending: Ending,
    console: Console,
) -> Trained:
    """Load the model, make the run directory, train and save.

    The model is let go of where it is not what is judged: two large ones may not fit.
    """
    recipe, encoder = prepared.recipe, prepared.encoder
    checkpoint = _choose_checkpoint(RunDir(recipe.output.dir), console) if resume else None
    console.print(f"loading {recipe.model.name}", soft_wrap=True)
    set_seed(recipe.training.seed)  # the adapter's first weights are random
    so_far = RunDir(recipe.output.dir)
    pissa_file, is_pissa = pissa_start(so_far), recipe.adapter.method == "pissa"
    go_on_from = None
    # a checkpoint is of use with its own start alone, so one whose start is lost is refused
    if is_pissa and resume and (pissa_file.is_file() or checkpoint):
        go_on_from = pissa_file
    model, _ = load_trainable(recipe, encoder.processor, go_on_from=go_on_from)
    stage_to_keep(model, recipe)  # refuses a cache of what changes, before there is a run
    run = RunDir(recipe.output.dir)
    if is_first():
        create_run_dir(
            run.path,
            resume=resume,
            overwrite=overwrite,
            needed_bytes=_bytes_on_disk(model, recipe),
            lock=lock,
        )
        _begin(prepared, run, resume)
        ending.begin()
        if is_pissa and not go_on_from:
            pissa.save_start(model, pissa_file)
    wait_for_all()
    trainable, total = count_parameters(model)
    console.print(f"training {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    done = Trained(run, trainable, total)
    if trainable:
        done = _train(prepared, model, done, checkpoint, stop, console)
    if stop.exit_code is not None:
        return done
    in_shares = engine() != "ddp" and trainable > 0
    weights = whole_weights(model) if in_shares else None
    if is_first():
        with replacing(run.adapter) as folder:
            start = pissa_file if is_pissa else None
            save_trained(model, encoder.processor, recipe, folder, start=start, weights=weights)
    wait_for_all()
    # of a model in shares all processes would have to generate as many tokens
    if is_adapter(recipe) and not is_pissa and not in_shares:
        done = replace(done, sides=sides_of_adapted(model, encoder, recipe, run.adapter))
    return done


def _begin(prepared: Prepared, run: RunDir, resume: bool) -> None:
    """Write what is known before the first step."""
    share = Share.of(prepared.recipe, process()[1])
    shares = and_now(shares_of(run) if resume else [], share)
    begun_with = {
        "rows_sha256": prepared.digest(),
        "worst_first": prepared.worst_first,
        "num_processes": share.num_processes,
        "num_processes_here": processes_here(),
        "shares": [asdict(each) for each in shares],
    }
    write_json(run.environment, environment() | begun_with)
    # after the environment: with both a run has begun
    write_text(run.recipe, dump_recipe(prepared.recipe))
    write_json(run.data, data_summary({"train": prepared.train, "eval": prepared.held_out}))
    if not (resume and prepared.streams):  # a stream adds to the lists as it goes
        write_lists(run.path, prepared.examinations())


def _choose_checkpoint(run: RunDir, console: Console) -> Path | None:
    """The one to go on from, as the first process finds it: another might find another. Damaged
    ones after it are moved aside.

    Raises `RunDirError` in all processes where one cannot be read.
    """
    checkpoint, fault, damages = None, None, []
    if is_first():
        try:
            checkpoint = last_whole(run.checkpoints, damages.append)
            move_newer_aside(run.checkpoints, checkpoint)
        except OSError as error:
            fault = str(error)
    told = lists_of_all([checkpoint, fault] if is_first() else [])
    checkpoint, fault = told
    if fault:
        raise RunDirError(fault)
    for damage in damages:
        console.print(f"warning: {damage}", style="yellow", soft_wrap=True)
    if checkpoint:
        chosen = f"resuming from {checkpoint}"
    elif damages:
        num = len(damages)
        which = f"all {num} checkpoints are" if num > 1 else "the only checkpoint is"
        chosen = f"{which} damaged: starting over"
    else:
        chosen = "no checkpoint yet: starting over"
    console.print(chosen, soft_wrap=True)
    return checkpoint


def _train(
    prepared: Prepared,
    model: Any,
    done: Trained,
    checkpoint: Path | None,
    stop: StopOnSignal,
    console: Console,
) -> Trained:
    """Take the steps, or those that are left after a checkpoint."""
    evaluation = prepared.recipe.evaluation
    best = best_so_far(checkpoint, console) if checkpoint and evaluation.load_best else None
    owes = bool(checkpoint and still_owes_evaluation(prepared, checkpoint))
    if checkpoint and is_finished(checkpoint, evaluation) and not owes:
        # Trained to the end and killed afterwards: the trainer would take one step too many
        load_checkpoint(model, best or checkpoint)
        model.to(best_device())
        streamed = read_num_streamed(checkpoint) if prepared.streams else {}
        step = best_step(checkpoint) if best else None
        return replace(done, num_streamed=streamed, best_step=step)
    cache = cache_of(prepared.recipe.output.dir)
    figures = answer_figures(prepared, model, stop)
    with keeping_features(model, prepared.encoder, prepared.recipe, cache, console) as encoder:
        prepared = replace(prepared, encoder=encoder)
        trainer = run_trainer(
            prepared, model, done.run, checkpoint, stop, console, figures, owes_evaluation=owes
        )
    state = trainer.state
    return replace(
        done,
        best_step=state.best_global_step
        if evaluation.load_best and state.best_model_checkpoint
        else None,
        stopped_at=f"{state.global_step} of {state.max_steps}",
        num_streamed=trainer.progress.num_rows if trainer.progress else {},
    )


def _judge_and_report(
    prepared: Prepared, done: Trained, console: Console, results: Console
) -> None:
    recipe, run, streamed = prepared.recipe, done.run, done.num_streamed
    if streamed:
        taken, trained, left = (streamed[key] for key in ("taken", "trained", "left out"))
        console.print(f"stream: {taken:,} rows taken = {trained:,} trained + {left:,} left out")
    judgement = Judgement({}, 0)
    if prepared.held_out:
        free_memory()
        sides = done.sides or sides_of_run(recipe, run.adapter, prepared.encoder)
        judgement = judge(
            {"base": sides.base, "adapter": sides.adapter or sides.base},
            prepared.held_out.to_ask(),
            recipe.evaluation,
            run.evaluation,
            run.partial,
            console,
        )
    if not is_first():
        return
    figures = figures_of(
        prepared,
        judgement,
        streamed=streamed,
        trainable=done.trainable,
        total=done.total,
        best_step=done.best_step,
    )
    write_json(run.summary, figures)
    write_report(run)
    print_summary(run, recipe, results)


def _bytes_on_disk(model: Any, recipe: Recipe) -> int:
    """What is saved, and the checkpoints kept and being written, each with Adam's state."""
    trained, total = count_parameters(model)
    saved = total if recipe.adapter.method == "full" else trained
    checkpoints = recipe.training.keep_checkpoints + 1
    return 4 * (saved + (saved + 2 * trained) * checkpoints) + 2**24
