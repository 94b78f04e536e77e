"""Whether a run may go on: with the recipe and the rows that it was begun with."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import RunDirError
from finetune.metrics import lower_is_better
from finetune.recipe import EvaluationSection, Recipe, load_recipe
from finetune.rundir import RunDir, read_json

FREE = {
    *("training.num_workers", "training.bad_loss", "training.spike_factor", "training.on_oom"),
    *("data.read_timeout_seconds", "data.read_retries"),
}
"""Settings that a run may go on with otherwise than it was begun: what was learnt so far does not
depend on them, and they are what helps where a run has ended by a fault.
"""


def refuse_another_run(recipe: Recipe, rows_sha256: str, run: RunDir) -> None:
    """Raise `RunDirError` where a run would go on with a recipe or rows it was not begun with."""
    begun = load_recipe(run.recipe, check_paths=False).model_dump()
    now = recipe.model_dump()
    streams = any(source.streaming for source in recipe.data.train)
    free = FREE - ({"training.num_workers"} if streams else set())  # workers share a stream out
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


def other_processes(run: RunDir, num_processes: int) -> Iterator[str]:
    """What is then not as in a run that was not broken off, where it was begun in another number of
    processes.
    """
    begun = read_json(run.environment).get("num_processes", 1)
    if begun != num_processes:
        yield (
            f"{run.path} was begun in {begun} processes and goes on in {num_processes}: steps have "
            "other rows from here on, some rows of this epoch come twice or not at all, and the "
            "adapter is not bit-equal to that of an unbroken run"
        )


def is_finished(checkpoint: Path, evaluation: EvaluationSection) -> bool:
    """Whether a checkpoint stands at the last step of its run, or where its patience ended."""
    state = read_json(checkpoint / "trainer_state.json")
    if state["global_step"] >= state["max_steps"]:
        return True
    return out_of_patience(state["log_history"], evaluation)


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


def best_checkpoint(checkpoint: Path) -> Path:
    """The best one of the run that a checkpoint belongs to; itself where none was found best."""
    best = read_json(checkpoint / "trainer_state.json").get("best_model_checkpoint")
    return checkpoint.with_name(Path(best).name) if best else checkpoint
