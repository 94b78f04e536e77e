"""The verbs: parse, call, print. What needs torch is imported inside the verb, so that --help
answers at once.
"""

import errno
import json
import logging
import os
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from finetune.cli_deploy import RunFolder, deploy_app, run_folder
from finetune.cli_judge import judge_app
from finetune.errors import FinetuneError, RecipeError, message_of
from finetune.stopping import INTERRUPTED, stop_means_resume_me

SPEAKS_AFTER_SECONDS = 10

_STOPPED = {
    "train": "stopped; a run that had begun goes on with --resume",
    "eval": "stopped; the same command goes on with the rows that are left",
}


class _Verbs(typer.core.TyperGroup):
    """Ctrl-C is told of; typer itself ends without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if not int(os.environ.get("RANK") or 0):
                told = _STOPPED.get(ctx.invoked_subcommand, "stopped")
                print(f"\n{told}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Verbs,
    name="finetune",
    help="Fine-tune vision-language models from one YAML recipe, and measure whether it helped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes_app = typer.Typer(help="The shipped recipes: list, show, copy.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(judge_app)
app.add_typer(deploy_app)

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
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
    resume: Annotated[
        bool,
        typer.Option(help="Go on from the last checkpoint; with auto, begin where no run is."),
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the run directory.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check recipe and data; write nothing.")] = False,
    worst_first: Annotated[
        bool, typer.Option(help="Begin with the heaviest rows: fail in the first minute or never.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Train in so many processes, each on a device.")
    ] = None,
) -> None:
    """Train an adapter, judge it on held-out rows, write the run directory."""
    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other; give one of them")
    if not dry_run:
        stop_means_resume_me()
    # `--resume auto`: a flag takes no value, and neither a setting nor a recipe is called so
    words = [recipe, *(overrides or ())]
    auto = resume and "auto" in words
    recipe, *overrides = [each for each in words if not (auto and each == "auto")] or words
    # What can be told without torch is told before its import takes its seconds
    from finetune.recipe import load_recipe
    from finetune.rundir import RunDir, check_run_dir

    if recipe.startswith("hub://"):
        recipe = str(run_folder(recipe) / "recipe.yaml")
    loaded = load_recipe(recipe, overrides)
    if auto:
        resume = RunDir(loaded.output.dir).is_run()
    rank, num_processes = (
        int(os.environ.get(name) or n) for name, n in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    if processes and num_processes not in (1, processes):
        raise RecipeError(
            f"--processes {processes}: {num_processes} are running already, started by a launcher; "
            "leave it out"
        )
    from finetune.launch import end_with_the_launcher, launch, num_nodes

    if not processes and not dry_run and num_processes == 1 and num_nodes() > 1:
        raise RecipeError(
            f"PET_NNODES: each of {num_nodes()} machines would train a run of its own into one "
            "folder; add --processes N"
        )
    if not dry_run and not rank:
        check_run_dir(loaded.output.dir, resume=resume, overwrite=overwrite)
    if processes and processes * num_nodes() > num_processes:
        flags = {"--resume": resume, "--overwrite": overwrite}
        flags |= {"--dry-run": dry_run, "--worst-first": worst_first}
        given = [flag for flag, is_set in flags.items() if is_set]
        raise typer.Exit(launch(["train", recipe, *overrides, *given], processes))
    end_with_the_launcher()  # before an import of seconds, in which it may be killed
    from finetune.processes import part
    from finetune.train import train as run_train

    exit_code = run_train(
        loaded,
        shlex.join([recipe, *overrides]),
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
        worst_first=worst_first,
    )
    part()
    raise typer.Exit(exit_code)


@app.command()
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; by default beside the run.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read, decode, render and count every row; exit 2 if any cannot be used."""
    from finetune.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from finetune.check import check as run_check
    from finetune.check import print_check

    result = run_check(loaded, recipe, out=out)
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        print_check(result)
    raise typer.Exit(2 if result.num_problems else 0)


@app.command()
def preview(
    recipe: RecipeName,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows, drawn at random.")] = 8,
    row: Annotated[
        list[str] | None, typer.Option(help="A row by its place, file:line; repeat for more.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws other rows.")] = 0,
    held_out: Annotated[bool, typer.Option(help="Show rows of data.eval.")] = False,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("preview.html"),
    as_json: AsJson = False,
) -> None:
    """Show rows as the model reads them: views, text, and which of it is learnt."""
    from finetune.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from finetune.preview import preview as run_preview
    from finetune.preview import write_page

    shown = run_preview(loaded, num_rows=rows, chosen=row or (), seed=seed, held_out=held_out)
    for where, reason in shown.problems:
        print(f"{where}: {reason}", file=sys.stderr)
    if as_json:
        for line in shown.to_json():
            print(json.dumps(line))
    else:
        print(write_page(shown, loaded, recipe, out))
    raise typer.Exit(2 if shown.problems else 0)


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of one card: 24GiB, 80GB.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Plan for a run without a GPU.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a run would take, without weights: parameters, steps, arithmetic, memory. Exit 2 if
    that does not fit on the card.
    """
    if gpu and cpu:
        raise RecipeError("--gpu and --cpu exclude each other; give one of them")
    from finetune.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from finetune.plan import plan as run_plan
    from finetune.plan import print_plan

    result = run_plan(loaded, gpu=gpu, device="cpu" if cpu else "cuda")
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        print_plan(result)
    raise typer.Exit(2 if result.fits is False else 0)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A data file or folder.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write; never overwritten.")],
    format_name: Annotated[
        str, typer.Option("--from", metavar="FORMAT", help="Its format; auto tells it by itself.")
    ] = "auto",
    columns: Annotated[
        str | None,
        typer.Option(metavar="KEY=COLUMN,...", help="For tables: image=scan,question=q,answer=a"),
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="What is asked where rows hold no question.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option(help="Leave bad rows out, and list them.")] = False,
) -> None:
    """Write a file of any format as chat rows."""
    from finetune.convert import convert as run_convert
    from finetune.convert import parse_columns

    done = run_convert(
        file,
        out,
        format_name=format_name,
        columns=parse_columns(columns) if columns else None,
        question=question,
        skip_bad=skip_bad,
    )
    for problem in done.problems:
        print(f"left out: {problem}", file=sys.stderr)
    print(f"{done.out}: {done.num_rows:,} rows, read as {done.format_name}")
    if done.images:
        print(f"{done.images}: the pictures that were inside the rows")
    if done.image_root:
        print(f"its pictures stay where they are; in the recipe, set image_root: {done.image_root}")


@app.command()
def report(
    run: RunFolder,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve it on this machine, as the run goes on.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="For --watch; by default, or with 0, a free one."),
    ] = None,
) -> None:
    """Write a run's report.html again, or show it as the run goes on."""
    from finetune.rundir import open_run_dir

    folder = open_run_dir(run_folder(run))
    if not watch:
        if port is not None:
            raise FinetuneError(f"--port {port}: is for --watch; add that, or leave it out")
        from finetune.report import write_report

        print(write_report(folder))
        return
    from finetune.watching import watching

    with watching(folder, port or 0) as server:
        print(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


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
    # When it is imported, by PEFT, it warns of a faster kernel for CPUs that it did not find
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except FinetuneError as error:
        rank = int(os.environ.get("RANK") or 0)
        if rank:
            _let_others_speak()  # what all processes find, the first one says
        who = f"process {rank}: " if rank else ""
        print(f"error: {who}{message_of(error)}", file=sys.stderr)
        _end(2)
    except BrokenPipeError:  # `finetune ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if "No space left" in str(error) or "quota exceeded" in str(error).lower():
            # from the system, or in the words of the libraries that write weights
            print(f"error: the disk is full ({error}); make room, {_again()}", file=sys.stderr)
            raise SystemExit(2) from None
        if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES):
            print(f"error: {error}; mend the folder, {_again()}", file=sys.stderr)
            raise SystemExit(2) from None
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            _let_others_speak()  # most often of one that was lost, and says why
            from finetune.processes import is_of_a_lost_process

            if is_of_a_lost_process(error):
                who = f"process {os.environ.get('RANK')}"
                print(f"error: {who}: another was lost; go on with --resume", file=sys.stderr)
                _end(2)
        traceback.print_exc()
        print(
            "error: this is a fault of finetune itself; please report it with the lines above",
            file=sys.stderr,
        )
        _end(1)


def _again() -> str:
    trains = sys.argv[1:2] == ["train"]
    return "and go on with --resume" if trains else "and give the command again"


def _end(code: int) -> NoReturn:
    """Of several processes at once, so that the launcher ends the others before they speak: not by
    the interpreter's end, which waits for loading processes, and at which one that has not parted
    may abort (processes.part). Loading processes see that it is gone, and end.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code) from None


def _let_others_speak() -> None:
    """Wait; of several processes the launcher ends all when one has."""
    time.sleep(SPEAKS_AFTER_SECONDS)
