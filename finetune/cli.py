"""The verbs: parse, call, print. What needs torch is imported inside the verb, so that --help
answers at once.
"""

import json
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import FinetuneError, RecipeError

app = typer.Typer(
    name="finetune",
    help="Fine-tune vision-language models from one YAML recipe, and measure whether it helped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes_app = typer.Typer(help="The shipped recipes: list, show, copy.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="The run directory of `finetune train`.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the recipe's: adapter.rank=16"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the run directory.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check recipe and data; write nothing.")] = False,
) -> None:
    """Train an adapter, judge it on held-out rows, write the run directory."""
    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other; give one of them")
    # What can be told without torch is told before its import takes its seconds
    from finetune.recipe import load_recipe
    from finetune.rundir import check_run_dir

    loaded = load_recipe(recipe, overrides or ())
    if not dry_run:
        check_run_dir(loaded.output.dir, resume=resume, overwrite=overwrite)
    from finetune.train import train as run_train

    command = shlex.join([recipe, *(overrides or ())])
    raise typer.Exit(
        run_train(loaded, command, resume=resume, overwrite=overwrite, dry_run=dry_run)
    )


@app.command(name="eval")
def evaluate(run: RunFolder, as_json: AsJson = False) -> None:
    """Judge a run's adapter against its base on the held-out rows."""
    from finetune.rundir import open_run_dir

    open_run_dir(run)
    from finetune.evaluate import evaluate as run_evaluate
    from finetune.tables import figures_table, results_console

    judgement = run_evaluate(run)
    if as_json:
        print(
            json.dumps(
                {
                    "base": judgement.base,
                    "adapter": judgement.adapter,
                    "num_eval_rows": judgement.num_rows,
                }
            )
        )
    else:
        title = f"{run}: {judgement.num_rows:,} held-out rows"
        results_console().print(figures_table(title, judgement.base, judgement.adapter))


@app.command()
def chat(
    run: RunFolder,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="An image file; repeat for more.")
    ] = None,
) -> None:
    """Ask a run's adapter one question."""
    from finetune.rundir import open_run_dir

    open_run_dir(run)
    from finetune.chat import answer

    print(answer(run, image or [], question))


@app.command()
def report(run: RunFolder) -> None:
    """Write a run's report.html again."""
    from finetune.report import write_report
    from finetune.rundir import open_run_dir

    print(write_report(open_run_dir(run)))


@recipes_app.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """The names of the shipped recipes."""
    from finetune.recipe.files import shipped_recipes

    names = list(shipped_recipes())
    print(json.dumps(names) if as_json else "\n".join(names))


@recipes_app.command("show")
def show_recipe(name: RecipeName) -> None:
    """Print a shipped recipe."""
    from finetune.recipe.copying import shipped_recipe

    print(shipped_recipe(name).read_text(encoding="utf-8"), end="")


@recipes_app.command("copy")
def copy_recipe(
    name: RecipeName,
    to: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; never overwritten.")],
) -> None:
    """Copy a shipped recipe and its data, to be changed."""
    from finetune.recipe.copying import copy_recipe as copy

    print("\n".join(map(str, copy(name, to))))


def main() -> None:
    """The `finetune` command. Exit 0 done, 2 for what the user can mend, 1 for a fault of ours."""
    # Nothing is sent anywhere unasked, and forked data workers do not draw the tokenizer's warning
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # On a CPU, torch's threads otherwise spin while they wait for each other. Alone on two cores
    # the quickstart then runs at 61 to 66 samples a second instead of 40, but beside one other
    # busy process at 10 to 19 instead of 37 to 43; OMP_WAIT_POLICY=ACTIVE takes that chance
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except FinetuneError as error:
        print(f"error: {_message(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; a run that had begun goes on with --resume", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `finetune ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if "No space left" in str(error) or "quota exceeded" in str(error).lower():
            # from the system, or in the words of the libraries that write weights
            print(f"error: the disk is full ({error}); make room, then --resume", file=sys.stderr)
            raise SystemExit(2) from None
        traceback.print_exc()
        print(
            "error: this is a fault of finetune itself; please report it with the lines above",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def _message(error: FinetuneError) -> str:
    """The message alone, without the worker's traceback that PyTorch wraps around an error of a
    loading process.
    """
    text = str(error)
    marker = f"{type(error).__module__}.{type(error).__name__}: "
    return text.rpartition(marker)[2].strip() if text.startswith("Caught ") else text
