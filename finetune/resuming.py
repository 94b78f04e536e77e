"""Whether a run may go on: with the recipe and the rows that it was begun with."""

from pathlib import Path

from finetune.errors import RunDirError
from finetune.recipe import Recipe, load_recipe
from finetune.rundir import RunDir, read_json


def refuse_another_run(recipe: Recipe, rows_sha256: str, run: RunDir) -> None:
    """Raise `RunDirError` where a run would go on with a recipe or rows it was not begun with."""
    begun = load_recipe(run.recipe, check_paths=False).model_dump()
    now = recipe.model_dump()
    changed = [
        f"{section}.{key}"
        for section, settings in now.items()
        for key in settings
        if settings[key] != begun[section][key] and section != "output"
    ]
    if not changed and read_json(run.environment).get("rows_sha256") != rows_sha256:
        changed = ["the rows in the data files"]
    if changed:
        raise RunDirError(
            f"{run.path}: was begun with other settings ({', '.join(changed)}); "
            "resume with the same ones, or start a new run in another output.dir"
        )


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint stands at the last step of its run."""
    state = read_json(checkpoint / "trainer_state.json")
    return state["global_step"] >= state["max_steps"]
