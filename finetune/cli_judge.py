"""The verbs that measure: runs, their answers compared, and predictions made anywhere."""

import json
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli_deploy import RunFolder, run_folder
from finetune.errors import RecipeError

judge_app = typer.Typer()

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Metrics = Annotated[
    str | None, typer.Option(metavar="NAME,...", help="Instead of the recipe's: anls,cer")
]


@judge_app.command(name="eval")
def evaluate(
    run: RunFolder,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="evaluation.max_rows=200, and such"),
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Rows of this file instead; repeat for more.")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="docvqa, textvqa, vqav2, chartqa or mmmu, from the Hub.")
    ] = None,
    metrics: Metrics = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the base alone.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Ask the merged weights, too.")] = False,
    name: Annotated[
        str | None, typer.Option(help="Folder for the figures, in the run's evaluations/.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge a run's adapter against its base, on its held-out rows or on others."""
    if base and merged:
        raise RecipeError("--base and --merged exclude each other: --base asks nothing else")
    folder = run_folder(run)
    from finetune.evaluate import Asked
    from finetune.evaluate import evaluate as run_evaluate
    from finetune.processes import is_first, part
    from finetune.tables import figures_table, results_console

    asked = Asked(data or (), suite, _named(metrics, "eval"), base, merged, settings or (), name)
    done = run_evaluate(folder, asked)
    shows = is_first()
    part()
    if not shows:
        return
    if as_json:
        print(json.dumps(done.figures))
        return
    console = results_console()
    title = f"{run}: {done.figures['num_eval_rows']:,} held-out rows"
    console.print(figures_table(title, done.figures))
    if done.suite and any(done.suite.metric in done.figures[who] for who in ("base", "adapter")):
        console.print(f"beside it: {done.suite.beside()}", soft_wrap=True)
    console.print(f"answers: {done.folder}", soft_wrap=True)


@judge_app.command()
def score(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help='Lines {"prediction": ..., "references": [...]}.')
    ],
    metrics: Annotated[str, typer.Option(metavar="NAME,...", help="anls,vqa_accuracy")],
    field: Annotated[
        str, typer.Option(help="The field with the answer: adapter, in predictions.jsonl.")
    ] = "prediction",
    as_json: AsJson = False,
) -> None:
    """Figures for predictions made anywhere."""
    from finetune.score import score as run_score
    from finetune.tables import results_console, scores_table

    scored = run_score(file, _named(metrics, "score"), field)
    found = scored.to_json()
    if as_json:
        print(json.dumps(found))
    else:
        console = results_console()
        console.print(f"{file}: {scored.num_rows:,} rows", soft_wrap=True)
        console.print(scores_table(found["figures"], found["intervals"]))


@judge_app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Run directories.")],
    metrics: Metrics = None,
    name: Annotated[
        str | None, typer.Option(help="Their evaluations of that name: finetune eval ... --name")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Several runs in one table, over the rows that all were judged on."""
    from finetune.compare import compare as run_compare
    from finetune.tables import compared_table, messages_console, results_console

    folders = [run_folder(run) for run in runs]
    compared = run_compare(folders, _named(metrics, "compare"), name)
    for setting, values in compared.asked_otherwise.items():
        told = ", ".join(f"{json.dumps(value)} in {run}" for run, value in values.items())
        messages_console().print(
            f"warning: runs were asked in different ways: {setting} is {told}; a difference may "
            "come from that",
            style="yellow",
            soft_wrap=True,
        )
    found = compared.to_json()
    if as_json:
        print(json.dumps(found))
        return
    console = results_console()
    console.print(
        f"{compared.num_rows:,} held-out rows; better or worse than {found['first']}",
        soft_wrap=True,
    )
    console.print(compared_table(found))
    for run, count in compared.left_out.items():
        if count:
            console.print(f"{run}: {count:,} rows left out, which not all runs have")


def _named(metrics: str | None, verb: str) -> list[str]:
    """What `--metrics` names; nothing without it. Raises `RecipeError`."""
    if metrics is None:
        return []
    from finetune.score import metrics_named

    names = [name.strip() for name in metrics.split(",")]
    return metrics_named([name for name in names if name], verb=verb)
