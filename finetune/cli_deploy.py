"""The verbs for what comes after training: asking, merging, publishing, serving."""

from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import RecipeError

deploy_app = typer.Typer()

RunFolder = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="The run directory of `finetune train`, or hub://USER/NAME."
    ),
]


def run_folder(run: str) -> Path:
    """Where a run is, fetched if it is on the Hub. Raises `FinetuneError` where there is none."""
    if run.startswith("hub://"):
        from finetune.hub import fetch_run

        return fetch_run(run)
    from finetune.rundir import open_run_dir

    return open_run_dir(run).path


@deploy_app.command()
def chat(
    run: RunFolder,
    question: Annotated[
        str | None, typer.Argument(help="What to ask; left out, a conversation begins.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image file; repeat for more.")
    ] = None,
    compare: Annotated[bool, typer.Option(help="Ask the base as well.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Answer every row of this file instead, into --out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A JSONL file; what is there already is kept.")
    ] = None,
) -> None:
    """Ask a run's adapter one question, talk to it, or have it answer a file."""
    if (data is None) != (out is None):
        raise RecipeError("--data and --out go together: rows to answer, and where to")
    if data and (question or image):
        raise RecipeError("--data brings its own questions and images; leave the others out")
    folder = run_folder(run)
    from finetune import chat as verb

    if data and out:
        num_rows = verb.answer_file(folder, data, out, compare=compare)
        print(f"{out}: {num_rows:,} rows answered")
    elif question is None:
        verb.talk(folder, image or [], compare=compare)
    else:
        found = verb.answers(folder, image or [], question, compare=compare)
        for name, text in found.items():
            print(f"{name}: {text}" if compare else text)


@deploy_app.command()
def merge(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="The new folder, for the merged weights.")],
    add: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN=WEIGHT", help="Another run's adapter on top; repeat for more."),
    ] = None,
    weight: Annotated[float, typer.Option(help="How much of RUN's own adapter.")] = 1.0,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the recipe's by default.")
    ] = None,
    quantize: Annotated[str, typer.Option(help="nf4 or int8: save a quantised folder.")] = "none",
    rows: Annotated[int, typer.Option(min=1, help="Rows to verify on.")] = 8,
    dry_run: Annotated[
        bool, typer.Option(help="Say what would be written; write nothing.")
    ] = False,
) -> None:
    """Put an adapter into its base's weights, and verify that they say the same."""
    folder = run_folder(run)
    added = [_weighed(each) for each in add or ()]
    from finetune.merge import merge as run_merge
    from finetune.merge import print_merged
    from finetune.tables import results_console

    merged = run_merge(
        folder,
        out,
        added=added,
        weight=weight,
        dtype=dtype,
        quantize=quantize,
        num_rows=rows,
        dry_run=dry_run,
    )
    print_merged(merged, out, results_console())


def _weighed(text: str) -> tuple[str, float]:
    """`RUN=0.5` -> the run and its weight, which is 1 where none is given."""
    run, equals, number = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return run, float(number)
    except ValueError:
        raise RecipeError(f"--add {text}: {number!r} is no number; write RUN=0.5") from None


@deploy_app.command()
def push(
    run: RunFolder,
    to: Annotated[str, typer.Option(metavar="USER/NAME", help="The repository on the Hub.")],
    merged: Annotated[bool, typer.Option(help="Whole weights, merged and verified.")] = False,
    private: Annotated[bool, typer.Option(help="Keep a new repository private.")] = False,
    revision: Annotated[str, typer.Option(help="A branch, made if need be.")] = "main",
    base: Annotated[
        str | None, typer.Option(help="The base's name on the Hub, if the recipe has a folder.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Show files and card; send nothing.")] = False,
) -> None:
    """Upload a run's adapter, or its merged weights, to the Hub, with a model card."""
    folder = run_folder(run)
    from finetune.push import print_pushed
    from finetune.push import push as run_push
    from finetune.tables import results_console

    pushed = run_push(
        folder, to, merged=merged, private=private, revision=revision, base=base, dry_run=dry_run
    )
    print_pushed(pushed, results_console())


@deploy_app.command()
def serve(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run directory, a folder of finetune merge, or hub://USER/NAME."
        ),
    ],
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="FINETUNE_API_KEY", help="What clients must send as their key."),
    ] = None,
    allow_remote_images: Annotated[
        bool, typer.Option(help="Fetch pictures that requests name by URL.")
    ] = False,
) -> None:
    """Answer OpenAI's chat completions, images included; a run is merged once before."""
    from finetune.serve import serve as run_serve

    folder = run_folder(run) if run.startswith("hub://") else Path(run)
    run_serve(
        folder, host=host, port=port, api_key=api_key, allow_remote_images=allow_remote_images
    )
