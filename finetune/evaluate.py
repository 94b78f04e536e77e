"""`finetune eval`: a finished run's figures again, on its own held-out rows."""

from pathlib import Path

from rich.console import Console

from finetune.errors import DataError
from finetune.judging import Judgement, judge, sides_of_run
from finetune.model.load import quiet_libraries
from finetune.preparation import cache_of, load_encoder, prepare_held_out
from finetune.recipe import load_recipe
from finetune.report import write_report
from finetune.rundir import open_run_dir, read_json, write_json
from finetune.tables import messages_console


def evaluate(path: str | Path, *, console: Console | None = None) -> Judgement:
    """Judge the adapter of a run against its base; `evaluation/`, `summary.json` and the report are
    written anew.

    Raises `FinetuneError`.
    """
    console = console or messages_console()
    quiet_libraries()
    run = open_run_dir(path)
    # a file that is missing is told of where it is opened: those trained on are not all needed
    recipe = load_recipe(run.recipe, check_paths=False)
    if not recipe.data.eval and not recipe.data.eval_fraction:
        raise DataError(
            f"{run.recipe}: data.eval is empty, so there is nothing to judge on; name held-out "
            "rows there"
        )
    known = read_json(run.environment).get("rows_sha256") if run.environment.is_file() else None
    if recipe.data.eval_fraction and known is None:
        raise DataError(
            f"{path}: its held-out rows were drawn from the training data (data.eval_fraction), "
            "and it does not say which data that was, so that trained rows could be judged as held "
            "out; evaluate the run where it was trained"
        )
    encoder = load_encoder(recipe, console)
    sides = sides_of_run(recipe, run.adapter, encoder)
    held_out = prepare_held_out(recipe, encoder, cache_of(run.path), console)
    assert held_out
    if recipe.data.eval_fraction and held_out.examination.digest() != known:
        raise DataError(
            f"{path}: the data files have changed since the training, so that rows it was trained "
            "on would be judged as held out; bring the files back, or train with data.eval"
        )
    judgement = judge(sides, held_out.rows, recipe.evaluation, run, console)
    summary = read_json(run.summary) if run.summary.is_file() else {}
    by_source = held_out.rows[: judgement.num_rows].num_of_sources()
    write_json(run.summary, summary | judgement.figures() | {"eval_rows_by_source": by_source})
    write_report(run)
    return judgement
