"""What `scripts.fuzz` and tests/test_fuzz.py try: recipes, rows and pictures, made of good ones by
mutation. Each must be read, or refused by the error that is promised; anything else is a fault.
"""

import io
import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
MAX_INPUT_BYTES = 4096
MAX_MEGAPIXELS = 1.0


# What is tried: bytes in, whether they could be used out. Whatever else is raised is a fault.


def try_recipe(data: bytes) -> bool:
    """A recipe file, and after each NUL an override; one that is read is written and read again."""
    from finetune.errors import RecipeError
    from finetune.recipe import load_recipe, recipe_warnings
    from finetune.recipe.loading import dump_recipe

    text, *overrides = data.split(b"\0")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(text)
        given = [override.decode("utf-8", "surrogateescape") for override in overrides[:8]]
        try:
            recipe = load_recipe(path, given, check_paths=False)
        except RecipeError:
            return False
        recipe_warnings(recipe)
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(path, check_paths=False) == recipe, "it reads back as another"
    return True


def try_row(data: bytes) -> bool:
    """A line of JSON, as a row of every format there is."""
    from data_formats.chat import FormatError
    from finetune.data.containers.json_text import parse_json
    from finetune.errors import DataError

    try:
        row = parse_json(data)
    except DataError:
        return False
    with suppress(FormatError):
        _recognised(row)
    read = [_converted(name, row) for name in _formats()]
    return any(read)


def _formats() -> dict[str, Any]:
    from data_formats.formats import FORMATS

    return FORMATS


def _recognised(row: Any) -> None:
    from data_formats.formats import recognise

    recognise([row, row])


def _converted(name: str, row: Any) -> bool:
    """Whether a row of this format is read; what is read must come back from its own chat row."""
    from data_formats.chat import FormatError, dump_chat, parse_chat
    from data_formats.formats import converter
    from data_formats.rules import refuse_odd_turns

    columns = {"image": "image", "question": "question", "answer": "answer"}
    _formats()[name].fits(row)
    try:
        found = converter(name, columns=columns if name == "columns" else None)(row)
    except FormatError:
        return False
    if all(isinstance(image.source, str) for image in found.images()):
        assert parse_chat(dump_chat(found)) == found, "it reads back as another"
    try:
        refuse_odd_turns(found)
    except FormatError:
        return False
    found.references()
    return True


def try_image(data: bytes) -> bool:
    """A picture's bytes, whole and at a reduced size, and as the text of a path or data URI."""
    from finetune.data.images import ImageAccess, decode_image, jpeg_size, load_image
    from finetune.errors import DataError

    access = ImageAccess(Path("/nonexistent"), max_megapixels=MAX_MEGAPIXELS)
    with suppress(DataError):
        load_image(data[:200].decode("latin-1"), access)
    with suppress(DataError):
        decode_image("it", data, access, reduction=4, keep_grey=True)
    announced = None
    with suppress(DataError):
        announced = jpeg_size("it", data, access)
    try:
        image = load_image(data, access)
    except DataError:
        return False
    assert image.mode == "RGB"
    assert image.width * image.height <= MAX_MEGAPIXELS * 1e6
    assert announced in (None, image.size)
    return True


# What mutation starts from.


def recipe_seeds() -> Iterator[bytes]:
    """Every shipped recipe, and one with anchors; some with overrides."""
    for number, path in enumerate(sorted((ROOT / "recipes").rglob("*.yaml"))):
        text = b"\n".join(
            line for line in path.read_bytes().splitlines() if not line.strip().startswith(b"#")
        )
        yield text + (b"\0adapter.rank=16\0data.train.0.weight=2" if number % 4 == 0 else b"")
    yield b"model: {name: nano}\ndata: {train: [&a {hub: u/n}], eval: [{<<: *a, split: x}, *a]}"


ROWS = """
{"question": "Is <image 1> red?", "image_1": "a.png", "options": "['red', 'blue']", "answer": "A"}
{"question": "How far?", "image_1": {"path": "a.png"}, "options": "[]", "answer": "['24.5', '24']"}
{"question": "What?", "image": "a.png", "answers": ["a", "b"], "questionId": 1, "docId": 2}
{"question": "What?", "image": "a.png", "answers": [{"answer": "a"}], "multiple_choice_answer": "a"}
{"image": "a.png", "ground_truth": "{\\"gt_parse\\": {\\"menu\\": [{\\"nm\\": \\"tea\\"}]}}"}
{"image": {"path": "a.png", "bytes": null}, "captions": ["A cat.", "Cats."]}
{"filename": "a.jpg", "sentences": [{"raw": "A cat.", "tokens": ["a", "cat"]}]}
{"images": ["a.png"], "texts": [{"user": "What?", "assistant": "A cat.", "source": "VQAv2"}]}
{"images": ["a.png"], "conversation": [{"role": "user", "content": "<image> What?"},
 {"role": "assistant", "content": "A cat."}]}
{"image": ["a.png"], "question": "What?", "answer": [3, "three"]}
"""


def row_seeds() -> Iterator[bytes]:
    """A row of each format, most from the documentation."""
    for path in sorted((ROOT / "docs" / "examples" / "data").rglob("*.json*")):
        if path.name in ("rows.json", "captions.json"):
            document = json.loads(path.read_text(encoding="utf-8"))
            rows = document if isinstance(document, list) else [document]
            yield from (json.dumps(row).encode() for row in rows[:3])
        elif path.suffix == ".jsonl":
            yield from path.read_bytes().splitlines()[:3]
    yield from (row.encode() for row in ROWS.replace("},\n", "}, ").split("\n") if row)


def image_seeds() -> Iterator[bytes]:
    """A small picture in every format that is read, and most ways in which it may be stored."""
    from PIL import Image

    picture = Image.effect_noise((24, 16), 90)

    def saved(kind: str, mode: str = "RGB", **settings: Any) -> bytes:
        file = io.BytesIO()
        picture.convert(mode).save(file, kind, **settings)
        return file.getvalue()

    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    second = picture.rotate(180).convert("RGB")
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        yield saved("PNG", mode)
    jpegs: list[dict[str, Any]] = [{}, {"progressive": True}, {"exif": exif}]
    jpegs += [{"restart_marker_rows": 1}]
    for settings in jpegs:
        yield saved("JPEG", **settings)
    yield saved("JPEG", "L")
    yield saved("JPEG", "CMYK")
    webps: list[dict[str, Any]] = [{}, {"lossless": True}]
    webps += [{"save_all": True, "append_images": [second]}]
    for settings in webps:
        yield saved("WEBP", **settings)
    yield saved("GIF", "P", save_all=True, append_images=[second.convert("P")])
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield saved("BMP", mode)
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        yield saved("TIFF", compression=compression)
    yield saved("TIFF", "I;16")
    yield saved("TIFF", "RGB", big_tiff=True)
    yield saved("PPM")
    yield b"P3\n# made by hand\n2 1\n255\n0 1 2 3 4 5\n"
    yield b"P1\n2 1\n0 1\n"
    for bitmap in ("png", "bmp"):
        yield saved("ICO", "RGBA", sizes=[(16, 16)], bitmap_format=bitmap)
    with suppress(OSError, KeyError):  # a Pillow without it
        yield saved("AVIF")
    yield saved("PDF")


class Target(NamedTuple):
    """`listed` are the words that a mutation puts in, besides bytes at random."""

    title: str
    attempt: Callable[[bytes], bool]
    seeds: Callable[[], Iterator[bytes]]
    listed: bytes

    @property
    def words(self) -> list[bytes]:
        return self.listed.split(b" ")


TARGETS = {
    "recipe": Target(
        "recipes and overrides",
        try_recipe,
        recipe_seeds,
        b"&a *a <<:*a !!bool !!int !!timestamp !!set !!binary ? - \n : { } [ ] | > --- %TAG "
        b".nan .inf 1e400 0x1F 1:1:1 2025-13-01 null ~ true {a,b} {0..9} * ../ hub:// \xef\xbb\xbf "
        b"\xff \0 = model name data train eval path hub columns method rank learning_rate "
        b"max_steps batch_tokens vision_cache 20GiB",
    ),
    "converters": Target(
        "rows, as each of the formats",
        try_row,
        row_seeds,
        b'"messages" "conversations" "role" "content" "from" "value" "images" "image" "texts" '
        b'"user" "assistant" "system" "type" "image_url" "url" "path" "bytes" "answers" "answer" '
        b'"query" "label" "options" "ground_truth" "gt_parse" "references" "train" <image> null '
        b"true [] {} [ { ] } 1e999 -1 99999999999999999999 \\ud800 \\u0000 '{[]:1}'",
    ),
    "images": Target(
        "pictures and pages of PDFs",
        try_image,
        image_seeds,
        b"\x89PNG\r\n\x1a\n IHDR IDAT IEND PLTE tRNS iCCP zTXt \xff\xd8\xff \xff\xd9 \xff\xda "
        b"\xff\xc4 Exif\0\0 RIFF WEBP VP8L VP8X ANIM ANMF GIF89a BM II*\0 MM\0* P3\n \0\0\1\0 "
        b"ftypavif %PDF- %%EOF <!-- <?xml <svg PK\x03\x04 \xff\xff\xff\xff \x7f\xff\xff\xff "
        b"\0\0\0\0 \0\0\0\1 \xff\xff \x80\0",
    ),
}


# Mutation.


def mutated(rng: random.Random, target: Target, seeds: list[bytes]) -> bytes:
    """One of the seeds with some of it changed: half of the rows and recipes in their values."""
    data = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        if rng.random() < 0.5 and (changed := with_other_value(rng, data)) is not None:
            data = changed
            continue
        at = rng.randrange(len(data) + 1)
        to = min(at + rng.choice((1, 1, 2, 4, 30)), len(data))
        match rng.randrange(6):
            case 0:
                data = data[:at] + rng.choice(target.words) + data[at:]
            case 1:
                data = data[:at] + rng.choice(target.words) + data[to:]
            case 2:
                data = data[:at] + data[to:]
            case 3:
                data = data[:at] + rng.randbytes(to - at) + data[to:]
            case 4:
                data = data[:at] + data[at:to] * rng.choice((2, 10)) + data[to:]
            case _:
                data = data[:at] + rng.choice(seeds)[at:]
    return data[:MAX_INPUT_BYTES]


def with_other_value(rng: random.Random, data: bytes) -> bytes | None:
    """A document with one of its values odd, missing or doubled; None for what is no document."""
    from finetune.recipe.syntax import parse_yaml

    if not re.match(rb"\s*[a-z{\[]", data):
        return None
    text, null, overrides = data.partition(b"\0")
    try:
        value = parse_yaml(text.decode())[0] if text[:1] not in b"{[" else json.loads(text)
        return json.dumps(other_value(rng, value), default=str).encode() + null + overrides
    except (ValueError, TypeError, RecursionError):
        return None


ODD_VALUES: list[Any] = json.loads(
    """[null, true, false, 0, -1, 1.5, 1e308, NaN, 1000000000000000000000000000000, "", " ", "x",
    [], {}, [null], {"": null}, [[]], {"a": {"b": []}}, "1e-4", "null", "a\\u0000b", "../x",
    "<image>", "<image 9>", "\\ud800"]"""
)


def other_value(rng: random.Random, value: Any) -> Any:
    """A value as JSON has it with one place in it odd, missing, doubled or under another key."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {
                    rng.choice((f"{key}s", "", "x", k)) if k == key else k: v
                    for k, v in value.items()
                }
            case 2:
                return value | {"x": value[key]}
            case _:
                return value | {key: other_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        i = rng.randrange(len(value))
        match rng.randrange(6):
            case 0:
                return value[:i] + value[i + 1 :]
            case 1:
                return value[: i + 1] + value[i:]
            case _:
                return [*value[:i], other_value(rng, value[i]), *value[i + 1 :]]
    return rng.choice(ODD_VALUES)
