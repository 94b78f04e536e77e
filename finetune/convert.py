"""`finetune convert`: a file of any format as chat rows."""

import itertools
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from data_formats.chat import Conversation, Image, Text, dump_chat
from finetune.data.images import read_image_file
from finetune.data.sources import Row, Source, open_source
from finetune.errors import DataError, RecipeError, RunDirError, summarise_problems
from finetune.recipe import DataSection, make_source
from finetune.rundir import replacing

SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp"}


@dataclass(frozen=True)
class Converted:
    """What was written. `image_root` is where its relative image paths start, where that is not
    the folder of `out`; `images` the folder of pictures that were inside the rows.
    """

    out: Path
    format_name: str
    num_rows: int
    problems: list[str]
    image_root: Path | None
    images: Path | None


def convert(
    path: Path,
    out: Path,
    *,
    format_name: str = "auto",
    columns: dict[str, str] | None = None,
    question: str | None = None,
    skip_bad: bool = False,
) -> Converted:
    """Write the rows of `path` to the JSONL file `out`, pictures held in rows to a folder beside
    it.

    Raises `DataError` naming the rows that cannot be read, unless `skip_bad` leaves them out, and
    `RunDirError` where `out` is there already or cannot be written.
    """
    if out.suffix != ".jsonl":
        raise RunDirError(f"{out}: must end in .jsonl, by which its rows are known; rename it")
    folder = out.with_name(f"{out.stem}-images")
    for place in (out, folder):
        if place.exists():
            raise RunDirError(f"{place}: is there already; name another --out, or move it away")
    settings = make_source(
        {"path": str(path), "format": format_name, "columns": columns, "question": question},
        names={"path": "FILE", "format": "--from", "columns": "--columns"},
    )
    with tempfile.TemporaryDirectory(prefix="finetune-") as cache:
        data = DataSection(train=(settings,), allow_outside_root=True)
        try:
            source = open_source(settings, data, Path(cache))
        except DataError as error:  # told in a recipe's words
            raise DataError(_as_options(str(error))) from error
        try:
            with replacing(folder) as images, replacing(out) as temporary:
                writer = _Writer(source, images, folder.name)
                writer.write(temporary)
                if writer.num_by_path and writer.num_held:
                    # no image_root would serve both kinds, so that all go into the folder
                    writer = _Writer(source, images, folder.name, copy_all=True)
                    writer.write(temporary)
                if writer.problems and not skip_bad:
                    raise DataError(
                        summarise_problems(source.container.shown, writer.problems)
                        + "\nMend them, or leave them out with --skip-bad"
                    )
        except OSError as error:
            if isinstance(error, RunDirError):
                raise
            raise RunDirError(f"{out}: cannot be written ({error.strerror})") from error
        if not any(folder.iterdir()):
            folder.rmdir()
    root = source.container.root
    elsewhere = writer.num_by_path and root.resolve() != out.parent.resolve()
    return Converted(
        out,
        source.reader.format_name,
        writer.num_rows,
        writer.problems,
        root if elsewhere else None,
        folder if folder.is_dir() else None,
    )


class _Writer:
    """Writes the rows of a source; pictures held in rows become files of the folder `images`,
    and with `copy_all` those named by paths, too.
    """

    def __init__(self, source: Source, images: Path, name: str, *, copy_all: bool = False):
        self.source = source
        self.images = images
        self.name = name
        self.copy_all = copy_all
        self.problems: list[str] = []
        self.num_rows = self.num_by_path = self.num_held = 0

    def write(self, out: Path) -> None:
        """One file, and the folder emptied before."""
        shutil.rmtree(self.images, ignore_errors=True)
        self.images.mkdir()
        with out.open("w", encoding="utf-8") as file:
            for where, row in self.source.rows(0, len(self.source)):
                try:
                    if isinstance(row, DataError):
                        raise row
                    written = self._with_files(row)
                except DataError as error:
                    self.problems.append(f"{where}: {error}")
                    continue
                self.num_rows += 1
                file.write(json.dumps(dump_chat(written), ensure_ascii=False) + "\n")

    def _with_files(self, row: Row) -> Conversation:
        count = itertools.count()

        def part_of(part: Text | Image) -> Text | Image:
            return self._file_of(part, row, next(count)) if isinstance(part, Image) else part

        return Conversation(
            tuple(
                replace(message, content=tuple(map(part_of, message.content)))
                for message in row.conversation.messages
            )
        )

    def _file_of(self, image: Image, row: Row, number: int) -> Image:
        source = image.source
        if isinstance(source, str) and source.startswith(("data:", "http://", "https://")):
            return image
        if isinstance(source, str) and not self.copy_all:
            self.num_by_path += 1
            return image
        self.num_held += isinstance(source, bytes)
        _, data = read_image_file(source, row.image_access)
        suffix = next((s for magic, s in SUFFIXES.items() if data.startswith(magic)), ".img")
        file = f"{self.num_rows + 1:07d}-{number}{suffix}"
        (self.images / file).write_bytes(data)
        return Image(f"{self.name}/{file}")


def _as_options(message: str) -> str:
    return (
        message.replace("set format: columns, columns:", "give --columns")
        .replace("set format", "give --from")
        .replace("set question:", "give --question")
    )


def parse_columns(text: str) -> dict[str, str]:
    """`image=scan,question=q,answer=a` as a mapping. Raises `RecipeError`."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if bad := [key for key, equals, value in pairs if not (key.strip() and equals and value)]:
        raise RecipeError(
            f"--columns: {bad[0]!r} names no column; write image=scan,question=q,answer=a"
        )
    return {key.strip(): value.strip() for key, _, value in pairs}
