"""`finetune chat`: a run's adapter asked one question, talked to, or given the rows of a file."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.prompt import Prompt

from data_formats.chat import Conversation, Image, Message, Text
from finetune.answering import Opened, open_sides, predict
from finetune.data.sources import open_source
from finetune.errors import DataError
from finetune.model.load import quiet_libraries
from finetune.preparation import cache_of, progress
from finetune.recipe import DataSource, Recipe, load_recipe
from finetune.rundir import RunDir, open_run_dir
from finetune.tables import messages_console, results_console

HELP = "/image FILE shows a picture with the next question, /reset begins anew, /quit ends"


def answer(path: str | Path, images: Sequence[Path], question: str) -> str:
    """The adapter's answer, with the image settings and prompt of its training. Raises
    `FinetuneError`.
    """
    return answers(path, images, question, compare=False)["adapter"]


def answers(
    path: str | Path, images: Sequence[Path], question: str, *, compare: bool
) -> dict[str, str]:
    """The answer of the `adapter`, with `compare` of the `base` as well. Raises `FinetuneError`."""
    run, recipe = _opened_run(path)
    asked = Conversation((_turn(images, question),))
    found = {}
    sides = open_sides(recipe, run.adapter, messages_console(), compare=compare)
    for name, opened in sides.items():
        with opened() as asker:
            found[name] = asker.answer(asked)
    return found


def answer_file(
    path: str | Path, data: Path, out: Path, *, compare: bool, console: Console | None = None
) -> int:
    """Answer the last question of every row of a data file of any format, a line of `out` a row,
    going on where an earlier call ended. Gives the number of rows. Raises `FinetuneError`.
    """
    console = console or messages_console()
    run, recipe = _opened_run(path)
    source = open_source(DataSource(path=str(data)), recipe.data, cache_of(run.path))
    sides = open_sides(recipe, run.adapter, console, compare=compare)
    num_told = 0
    with progress(console, "answering") as on_progress:

        def on_rows(count: int) -> None:
            nonlocal num_told
            num_told += count
            on_progress(num_told, len(source))

        predict(sides, source, out, batch_size=recipe.evaluation.batch_size, on_rows=on_rows)
    return len(source)


def talk(
    path: str | Path,
    images: Sequence[Path],
    *,
    compare: bool,
    ask: Callable[[], str] | None = None,
    console: Console | None = None,
) -> None:
    """A conversation with history, until the input ends. `ask` gives the user's next line, and
    raises `EOFError` at the end; by default it is read from the terminal.

    The trained side's answers are the history, with `compare` too. Raises `FinetuneError`.
    """
    console = console or results_console()
    run, recipe = _opened_run(path)
    sides = open_sides(recipe, run.adapter, messages_console(), compare=compare)
    console.print(f"{run.path}: {HELP}", style="dim", soft_wrap=True)
    Talk(sides, console, images).until_end(ask or (lambda: Prompt.ask("you", console=console)))


class Talk:
    """What has been said so far, and pictures to be shown with the next question."""

    def __init__(self, sides: Mapping[str, Opened], console: Console, images: Sequence[Path]):
        self.sides = sides
        self.console = console
        self.images = list(images)
        self.messages: list[Message] = []

    def until_end(self, ask: Callable[[], str]) -> None:
        """Take lines until there are no more, or one says so."""
        while True:
            try:
                line = ask().strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line in ("/quit", "/exit"):
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """A command or a question; what is wrong with it is said, and nothing is lost."""
        if line.startswith("/"):
            self._command(line)
            return
        asked = [*self.messages, _turn(self.images, line)]
        said = ""
        try:
            for name, opened in self.sides.items():
                self.console.print(f"{name}: ", style="bold", end="")
                with opened() as asker:
                    said = asker.answer(
                        Conversation(tuple(asked)),
                        lambda words: self.console.print(words, end="", soft_wrap=True),
                    )
                self.console.print()
        except DataError as error:
            self.console.print(f"\n{error}", style="yellow", soft_wrap=True)
            return
        self.messages = [*asked, Message("assistant", (Text(said),))]
        self.images = []

    def _command(self, line: str) -> None:
        try:
            name, *arguments = shlex.split(line)
        except ValueError as error:
            self.console.print(f"{line}: {error}", style="yellow")
            return
        if name == "/reset":
            self.messages, self.images = [], []
            self.console.print("begun anew", style="dim")
        elif name == "/image" and arguments:
            for file in map(Path, arguments):
                if file.is_file():
                    self.images.append(file)
                    self.console.print(f"{file} comes with the next question", style="dim")
                else:
                    self.console.print(f"{file}: no such file", style="yellow")
        else:
            self.console.print(HELP, style="yellow")


def _turn(images: Sequence[Path], question: str) -> Message:
    return Message("user", (*(Image(str(image)) for image in images), Text(question)))


def _opened_run(path: str | Path) -> tuple[RunDir, Recipe]:
    quiet_libraries()
    run = open_run_dir(path)
    return run, load_recipe(run.recipe, check_paths=False)
