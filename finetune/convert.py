"""`finetune convert`: a file of any format as chat rows."""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from data_formats.chat import Conversation, Image, dump_chat
from finetune.data.sources import open_source
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
    folder = out.with_name(f"{out.stem}-images")
    for place in (out, folder):
        if place.exists():
            raise RunDirError(f"{place}: is there already; name another --out, or move it away")
    settings = make_source(
        {"path": str(path), "format": format_name, "columns": columns, "question": question}
    )
    problems: list[str] = []
    num_rows = 0
    has_paths = False
    with tempfile.TemporaryDirectory(prefix="finetune-") as cache:
        source = open_source(settings, DataSection(train=(settings,)), Path(cache))
        try:
            with replacing(folder) as images, replacing(out) as temporary:
                images.mkdir()
                with temporary.open("w", encoding="utf-8") as file:
                    for where, row in source.rows(0, len(source)):
                        if isinstance(row, DataError):
                            problems.append(f"{where}: {row}")
                            continue
                        num_rows += 1
                        has_paths |= any(_is_path(image) for image in row.conversation.images())
                        written = _with_images_in(images, row.conversation, num_rows, folder.name)
                        file.write(json.dumps(dump_chat(written), ensure_ascii=False) + "\n")
                if problems and not skip_bad:
                    raise DataError(
                        summarise_problems(source.container.shown, problems)
                        + "\nMend them, or leave them out with --skip-bad"
                    )
        except OSError as error:
            if isinstance(error, RunDirError):
                raise
            raise RunDirError(f"{out}: cannot be written ({error.strerror})") from error
        if not any(folder.iterdir()):
            folder.rmdir()
    root = source.container.root
    elsewhere = has_paths and root.resolve() != out.parent.resolve()
    return Converted(
        out,
        source.reader.format_name,
        num_rows,
        problems,
        root if elsewhere else None,
        folder if folder.is_dir() else None,
    )


def parse_columns(text: str) -> dict[str, str]:
    """`image=scan,question=q,answer=a` as a mapping. Raises `RecipeError`."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if bad := [key for key, equals, value in pairs if not (key.strip() and equals and value)]:
        raise RecipeError(
            f"--columns: {bad[0]!r} names no column; write image=scan,question=q,answer=a"
        )
    return {key.strip(): value.strip() for key, _, value in pairs}


def _is_path(image: Image) -> bool:
    source = image.source
    return isinstance(source, str) and not source.startswith(("data:", "http://", "https://"))


def _with_images_in(
    images: Path, conversation: Conversation, number: int, name: str
) -> Conversation:
    """Images held as bytes written to the folder, and named by their paths from beside it."""
    messages = []
    count = 0
    for message in conversation.messages:
        content = []
        for part in message.content:
            if isinstance(part, Image) and isinstance(part.source, bytes):
                suffix = next((s for m, s in SUFFIXES.items() if part.source.startswith(m)), ".img")
                file = f"{number:07d}-{count}{suffix}"
                (images / file).write_bytes(part.source)
                content.append(Image(f"{name}/{file}"))
                count += 1
            else:
                content.append(part)
        messages.append(replace(message, content=tuple(content)))
    return Conversation(tuple(messages))
