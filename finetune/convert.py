"""`finetune convert`: a file of any format as chat rows."""

import itertools
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from data_formats.chat import Conversation, Image, Text, dump_chat
from finetune.data.images import page_of, read_image_file
from finetune.data.signatures import image_format, why_no_image
from finetune.data.sources import Row, Source, open_source
from finetune.errors import DataError, RecipeError, RunDirError, summarise_problems
from finetune.recipe import DataSection, make_source
from finetune.rundir import replacing

SUFFIXES = {
    **{
        "JPEG": ".jpg",
        "PNG": ".png",
        "GIF": ".gif",
        "WEBP": ".webp",
        "BMP": ".bmp",
        "TIFF": ".tif",
    },
    **{"PPM": ".ppm", "AVIF": ".avif", "HEIF": ".heic", "ICO": ".ico", "PDF": ".pdf"},
}
"""By the formats that `image_format` knows."""


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
        data = DataSection(train=(settings,))
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
    and with `copy_all` those named by paths, too. What is copied is a picture or a PDF below the
    root of the source, since rows are foreign, and what they name is handed on with the output.
    """

    def __init__(self, source: Source, images: Path, name: str, *, copy_all: bool = False):
        self.source = source
        self.images = images
        self.name = name
        self.copy_all = copy_all
        self.problems: list[str] = []
        self.num_rows = self.num_by_path = self.num_held = 0
        self.pdfs: dict[str, str] = {}  # by path the copy, which the rows of all its pages share

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
                    self.problems.append(f"{where}: {_as_options(str(error))}")
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
        # of several folders no image_root would serve, which reading says
        is_clear = not row.image_access.folders or (
            isinstance(source, str) and Path(source).is_absolute()
        )
        if isinstance(source, str) and is_clear and not self.copy_all:
            self.num_by_path += 1
            return image
        page = page_of(source)
        fragment = "" if page is None else f"#page={page}"
        path = str(source).removesuffix(fragment) if fragment else ""
        if path in self.pdfs:
            return Image(f"{self.name}/{self.pdfs[path]}{fragment}")
        shown, data = read_image_file(source, row.image_access)
        found = image_format(data)
        if found is None:
            raise DataError(f"image {shown} {why_no_image(data)}")
        if fragment and found != "PDF":
            raise DataError(
                f"image {shown} is {found}, not a PDF, and has no pages; leave {fragment} out"
            )
        file = f"{self.num_rows + 1:07d}-{number}{SUFFIXES[found]}"
        (self.images / file).write_bytes(data)
        self.num_held += 1
        if fragment:
            self.pdfs[path] = file
        return Image(f"{self.name}/{file}{fragment}")


def _as_options(message: str) -> str:
    """Without what only a recipe can set."""
    return (
        message.replace("set format: columns, columns:", "give --columns")
        .replace("set format", "give --from")
        .replace("set question:", "give --question")
        .replace(
            "move it there, set image_root, or set data.allow_outside_root: true", "move it there"
        )
        .replace("starts; set image_root", "starts; convert the files of each folder by themselves")
        .replace(", or set data.allow_urls: true", "")
    )


def parse_columns(text: str) -> dict[str, str]:
    """`image=scan,question=q,answer=a` as a mapping. Raises `RecipeError`."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if bad := [key for key, equals, value in pairs if not (key.strip() and equals and value)]:
        raise RecipeError(
            f"--columns: {bad[0]!r} names no column; write image=scan,question=q,answer=a"
        )
    return {key.strip(): value.strip() for key, _, value in pairs}
