"""Whether a run may go on: with the recipe and the rows that it was begun with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune.checkpoints import WEIGHTS, fault_of
from finetune.errors import RunDirError
from finetune.metrics import lower_is_better
from finetune.processes import as_the_first_finds
from finetune.recipe import EvaluationSection, Recipe, load_recipe
from finetune.rundir import RunDir, read_json

FREE = {
    *("training.num_workers", "training.bad_loss", "training.spike_factor", "training.on_oom"),
    *("data.read_timeout_seconds", "data.read_retries"),
    *("evaluation.batch_size", "evaluation.batch_tokens"),
}
"""Settings that a run may go on with otherwise than it was begun: what was learnt so far does not
depend on them, and they are what helps where a run has ended by a fault.
"""


@dataclass(frozen=True)
class Share:
    """How a run's steps are shared out over processes."""

    num_processes: int
    batch_size: int | None
    gradient_accumulation: int

    @classmethod
    def of(cls, recipe: Recipe, num_processes: int) -> "Share":
        """By a recipe in so many processes."""
        training = recipe.training
        return cls(num_processes, training.batch_size, training.gradient_accumulation)

    @property
    def rows_a_step(self) -> int | None:
        """Of all processes together; None where budgets make batches of any number of rows."""
        if self.batch_size is None:
            return None
        return self.num_processes * self.batch_size * self.gradient_accumulation


def shares_of(run: RunDir) -> list[Share]:
    """How a run was begun, and how it went on after that where it was otherwise."""
    known = read_json(run.environment)
    if "shares" in known:
        return [Share(**share) for share in known["shares"]]
    # of a run by a version that did not write it
    recipe = load_recipe(run.recipe, check_paths=False)
    return [Share.of(recipe, known.get("num_processes", 1))]


def and_now(shares: Sequence[Share], now: Share) -> list[Share]:
    """The shares of a run that goes on."""
    return [*shares] if shares and shares[-1] == now else [*shares, now]


def refuse_another_run(recipe: Recipe, rows_sha256: str, run: RunDir, num_processes: int) -> None:
    """Raise `RunDirError` where a run would go on with a recipe or rows it was not begun with.

    In another number of processes each may have another share of a step.
    """
    begun = load_recipe(run.recipe, check_paths=False).model_dump()
    now = recipe.model_dump()
    streams = any(source.streaming for source in recipe.data.train)
    free = FREE - ({"training.num_workers"} if streams else set())  # workers share a stream out
    share, shares = Share.of(recipe, num_processes), shares_of(run)
    if _numbers(and_now(shares, share))[1:] and share.rows_a_step == shares[0].rows_a_step:
        free |= {"training.batch_size", "training.gradient_accumulation"}
    changed = [
        f"{section}.{key}"
        for section, settings in now.items()
        for key in settings
        if settings[key] != begun[section][key]
        and section != "output"
        and f"{section}.{key}" not in free
    ]
    if not changed and read_json(run.environment).get("rows_sha256") != rows_sha256:
        changed = ["the rows in the data files"]
    if changed:
        raise RunDirError(
            f"{run.path}: was begun with other settings ({', '.join(changed)}); "
            "resume with the same ones, or start a new run in another output.dir"
        )


def refuse_other_processes(
    recipe: Recipe, run: RunDir, num_processes: int, *, same_number_of_steps: bool
) -> None:
    """Raise `RunDirError` where a run cannot go on in another number of processes: the trainer
    counts epochs by steps. `same_number_of_steps` tells that an epoch has as many as before.
    """
    shares, now = shares_of(run), Share.of(recipe, num_processes)
    first, before = shares[0], shares[-1]
    if before.num_processes == num_processes:
        return
    begun = f"{run.path}: was begun in {_in_words(before.num_processes)}"
    if recipe.training.max_steps is not None:
        return
    if first.rows_a_step is not None and first.rows_a_step != now.rows_a_step:
        raise RunDirError(
            f"{begun} with {first.rows_a_step} rows a step, by which epochs are counted: "
            + (_way_to_share(first.rows_a_step, now) or f"resume in {before.num_processes}")
        )
    if first.rows_a_step is None or not same_number_of_steps:
        raise RunDirError(
            f"{begun}, and in {num_processes} an epoch has another number of steps, as batches "
            "have not one size (training.batch_tokens, batch_patches, or share_images): resume in "
            "as many"
        )


def _way_to_share(rows: int, now: Share) -> str:
    """The settings with which so many processes have so many rows a step, of which the first takes
    no more memory; empty where there are none.
    """
    number, words = now.num_processes, f"in {_in_words(now.num_processes)} set training."
    accumulation, rest = divmod(rows, number * (now.batch_size or 1))
    if not rest:
        return f"{words}gradient_accumulation={accumulation}"
    batch_size, rest = divmod(rows, number * now.gradient_accumulation)
    if not rest:
        return f"{words}batch_size={batch_size}"
    batch_size, rest = divmod(rows, number)
    return "" if rest else f"{words}batch_size={batch_size} training.gradient_accumulation=1"


def other_processes(
    recipe: Recipe, run: RunDir, num_processes: int, *, same_rows: bool
) -> Iterator[str]:
    """What is then not as in a run that was not broken off, where it was begun in another number of
    processes. `same_rows` tells that each step has the rows that it would have had.
    """
    now = Share.of(recipe, num_processes)
    shares = and_now(shares_of(run), now)
    first, *later = _numbers(shares)
    if not later:
        return
    if now.rows_a_step != shares[0].rows_a_step:
        what = "steps have more or fewer rows, and some rows come more often than others"
    elif same_rows:
        what = "dropout draws anew, and sums are made in another order"
    else:
        what = "steps have other rows, some of an epoch twice or not at all"
    went = "".join(f", went on in {number}" for number in later[:-1])
    yield (
        f"{run.path} was begun in {_in_words(first)}{went} and goes on in {later[-1]}: from where "
        f"the number changed {what}; the adapter is not bit-equal to that of an unbroken run"
    )


def _numbers(shares: Sequence[Share]) -> list[int]:
    """Of processes, one after the other."""
    return [number for number, _ in groupby(share.num_processes for share in shares)]


def _in_words(num_processes: int) -> str:
    return "1 process" if num_processes == 1 else f"{num_processes} processes"


def is_finished(checkpoint: Path, evaluation: EvaluationSection) -> bool:
    """Whether a checkpoint stands at the last step of its run, or where its patience ended."""
    state = read_json(checkpoint / "trainer_state.json")
    if state["global_step"] >= state["max_steps"]:
        return True
    return out_of_patience(state["log_history"], evaluation)


def owes_evaluation(checkpoint: Path, evaluation: EvaluationSection) -> bool:
    """Whether a signal has ended a run before the evaluation of the checkpoint's step, which a run
    that has held-out rows makes before it saves.
    """
    state = read_json(checkpoint / "trainer_state.json")
    step = state["global_step"]
    is_last = step >= state["max_steps"] and (evaluation.load_best or evaluation.patience)
    if step % evaluation.every_steps and not is_last:
        return False
    return not any(line["step"] == step and "eval_loss" in line for line in state["log_history"])


def out_of_patience(log_history: Sequence[Mapping[str, Any]], settings: EvaluationSection) -> bool:
    """Whether so many evaluations have passed without a better one, as the recipe allows."""
    if settings.patience is None:
        return False
    name = f"eval_{settings.best_metric}"
    figures = [line[name] for line in log_history if name in line]
    if lower_is_better(settings.best_metric):
        figures = [-figure for figure in figures]
    return bool(figures) and len(figures) - 1 - figures.index(max(figures)) >= settings.patience


def best_step(checkpoint: Path) -> int | None:
    """That of the best evaluation of the run that a checkpoint belongs to."""
    return read_json(checkpoint / "trainer_state.json").get("best_global_step")


def best_so_far(checkpoint: Path, console: Console) -> Path | None:
    """The best checkpoint of the run that goes on from one, beside that, wherever the run has been
    moved to; None where none was found best, or that is no longer there, which is told.

    Raises `RunDirError` where its weights are not as they were written.
    """
    step = best_step(checkpoint)
    if not step:
        return None
    best = checkpoint.with_name(f"checkpoint-{step}")
    if best == checkpoint:  # which was verified
        return best
    if as_the_first_finds(best.is_dir):
        refuse_damaged_weights(best)
        return best
    console.print(
        f"warning: {best}, of the best evaluation so far, is not there: the last step's weights "
        "are taken, unless a later evaluation is better",
        style="yellow",
        soft_wrap=True,
    )
    return None


def refuse_damaged_weights(best: Path) -> None:
    """Raise `RunDirError` where the weights of the best checkpoint, which are to be the run's, are
    not as they were written, or cannot be read; in all processes as the first finds it.
    """

    def told() -> str | None:
        try:
            fault = fault_of(best, only=WEIGHTS)
        except RunDirError as error:
            return str(error)
        return fault and (
            f"{best}: is damaged ({fault}), and holds the weights of the best evaluation "
            "(evaluation.load_best); bring its files back, or remove the folder, then go on with "
            "--resume: without it the last step's weights are taken, or those of a better one"
        )

    if fault := as_the_first_finds(told):
        raise RunDirError(fault)
