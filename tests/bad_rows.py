"""The table of bad rows: each kind, how its files are written, and the message it gets.

`tests/test_bad_rows.py` writes every kind to a folder of its own, which is called /data in the
messages; `python -m scripts.bad_rows_table` writes the table for people to docs/bad-rows.md.
"""

import base64
import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True, slots=True)
class Hole:
    """Zero bytes that take no room on the disk, between two pieces of a line."""

    before: bytes
    num_bytes: int
    after: bytes


FOLDER, PIPE = Link("a folder instead"), Link("a named pipe instead")
Beside = Mapping[str, bytes | Hole | Link]  # what stands in the folder, by its name


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is refused with this message, while a good one in the same file is not.

    `row` is a line's bytes or a JSON value, in a table its record, in a tar shard its members, in
    Parquet its cells. `header` is a table's first line; `cut_at` is where an archive ends early.
    After a row that `ends_file` no other can be read. The recipe's `source`, `data` and `images`
    settings are given where they are not the defaults.
    """

    kind: str
    message: str
    row: Any
    beside: Beside = field(default_factory=dict)
    container: Literal["jsonl", "csv", "tsv", "tar", "parquet"] = "jsonl"
    good: Any = None
    header: bytes = b"question,answer"
    source: Mapping[str, Any] = field(default_factory=lambda: {"format": "chat"})
    data: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)
    ends_file: bool = False
    cut_at: int | None = None


@dataclass(frozen=True, slots=True)
class BadFile:
    """A file that is refused as a whole; `path` is what the recipe names."""

    kind: str
    message: str
    path: str
    files: Beside
    source: Mapping[str, Any] = field(default_factory=dict)


USER = {"role": "user", "content": "What is the total?"}
ANSWER = {"role": "assistant", "content": "12.50"}
TURNS = [{"from": "human", "value": "What is the total?"}, {"from": "gpt", "value": "12.50"}]
MESSAGES = [USER, ANSWER]
LINE = json.dumps({"messages": MESSAGES}).encode()

GOOD: dict[str, Any] = {
    "chat": {"messages": MESSAGES},
    "openai": {"messages": MESSAGES},
    "llava": {"conversations": TURNS},
    "sharegpt": {"conversations": TURNS},
    "llama-factory": {"instruction": "What is the total?", "output": "12.50"},
    "ms-swift": {"query": "What is the total?", "response": "12.50"},
    "mantis": {"conversation": MESSAGES},
    "cauldron": {"texts": [{"user": "What is the total?", "assistant": "12.50"}]},
    "docvqa": {"question": "Which?", "docId": 1, "image": "good.png", "answers": ["12"]},
    "textvqa": {"question": "Which?", "image_id": "a", "image": "good.png", "answers": ["12"]},
    "vqav2": {
        "question": "Which?",
        "image": "good.png",
        "multiple_choice_answer": "12",
        "answers": [{"answer": "12"}],
    },
    "chartqa": {"query": "Which?", "image": "good.png", "label": ["12"]},
    "mmmu": {"question": "Which?", "image_1": "good.png", "options": ["x"], "answer": "A"},
    "cord": {"image": "good.png", "ground_truth": '{"gt_parse": {"total": "12"}}'},
    "coco-captions": {"image": "good.png", "captions": ["A man on a moped."]},
    "columns": {"scan": "good.png", "asked": "Which?", "given": "12"},
}
COLUMNS = {"image": "scan", "question": "asked", "answer": "given"}


GOOD_RECORDS: dict[str, Any] = {
    "csv": b"What is the total?,12.50",
    "tsv": b"What is the total?\t12.50",
    "tar": {"0001.json": LINE},
}


def line(kind: str, message: str, row: Any, **others: Any) -> BadRow:
    return BadRow(kind, message, row, **others)


def chat(kind: str, message: str, *messages: Any, **beside: Any) -> BadRow:
    return BadRow(kind, message, {"messages": list(messages)} | beside)


def part(kind: str, message: str, content: Any) -> BadRow:
    return chat(kind, message, {"role": "user", "content": [content]}, ANSWER)


def of(name: str, kind: str, message: str, *, change: Any = None, **row: Any) -> BadRow:
    """A row of a format; `change` keeps the good row but for some columns."""
    return BadRow(
        f"{name}: {kind}",
        message,
        GOOD[name] | change if change else row,
        source={"columns": COLUMNS} if name == "columns" else {"format": name},
    )


def shows(source: Any) -> dict[str, Any]:
    """A chat row with one image."""
    content = [{"type": "image", "image": source}, {"type": "text", "text": "What is this?"}]
    return {"messages": [{"role": "user", "content": content}, ANSWER]}


def image(kind: str, message: str, named: str, *, beside: Any = None, **settings: Any) -> BadRow:
    """A row whose image is named like this."""
    return BadRow(kind, message, shows(named), beside or {}, **settings)


def content(kind: str, message: str, data: bytes | Hole, name: str = "scan.png") -> BadRow:
    """A row whose image file holds these bytes."""
    return BadRow(kind, message, shows(name), {name: data})


def saved(form: str, size: tuple[int, int] = (30, 20), mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A few bytes that promise many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
    return buffer.getvalue()


def pdf(num_pages: int, edge_points: int = 72) -> bytes:
    """Pages half as high as wide."""
    pages = [Image.new("RGB", (edge_points, edge_points // 2), "red") for _ in range(num_pages)]
    buffer = io.BytesIO()
    pages[0].save(buffer, "PDF", save_all=True, append_images=pages[1:], resolution=72)
    return buffer.getvalue()


def tar(members: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def parquet(rows: Sequence[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


def encoded(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


PNG, JPEG = saved("PNG"), saved("JPEG")
# A page that no password at all opens
LOCKED_PDF = (
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
    b"2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 72 72]>>endobj\n"
    b"4 0 obj<</Filter/Standard/V 1/R 2/P -4/O<"
    + b"11" * 32
    + b">/U<"
    + b"22" * 32
    + b">>>endobj\n"
    b"trailer<</Root 1 0 R/Encrypt 4 0 R/ID[<aa><aa>]>>\n%%EOF\n"
)
URLS = {"allow_urls": True}
TABLE = {"columns": {"question": "question", "answer": "answer"}}

BAD_ROWS: dict[str, list[BadRow]] = {
    "Lines that are not JSON": [
        line(
            "cut short within a string",
            "is cut short: the string that starts at column 43 has no end; write the row again",
            b'{"messages": [{"role": "user", "content": "Wha',
        ),
        line(
            "cut short after a value",
            "is cut short after column 29: a bracket or a value is missing; write the row again",
            b'{"messages": [{"role": "user"',
        ),
        line(
            "a closing bracket too few",
            "is cut short after column 107: a bracket or a value is missing; write the row again",
            LINE[:-1],
        ),
        line(
            "a closing bracket too many",
            "goes on after its end (at column 109); write one object a line, and nothing else",
            LINE + b"}",
        ),
        line(
            "the wrong closing bracket",
            "is not JSON: Expecting ',' delimiter at column 107; mend it there, or write the "
            "row with json.dumps",
            LINE[:-2] + b"}}",
        ),
        line(
            "a trailing comma in an object",
            "has a trailing comma before '}' at column 109; remove it",
            LINE[:-1] + b",}",
        ),
        line(
            "a trailing comma in a list",
            "has a trailing comma before ']' at column 108; remove it",
            LINE[:-2] + b",]}",
        ),
        line(
            "a comma after the row",
            "ends with a comma at column 109; write one object a line, without commas between",
            LINE + b",",
        ),
        line(
            "two rows in one line",
            "holds two objects in one line (the second at column 110); write one object a line",
            LINE + b" " + LINE,
        ),
        line(
            "two rows in one line with a comma between",
            "holds two values with a comma between at column 109; write one object a line",
            LINE + b", " + LINE,
        ),
        line(
            "a remark after the row",
            "goes on after its end (at column 110); write one object a line, and nothing else",
            LINE + b" # checked",
        ),
        line(
            "a missing comma",
            "is not JSON: Expecting ',' delimiter at column 31; mend it there, or write the "
            "row with json.dumps",
            LINE.replace(b'"user",', b'"user"'),
        ),
        line(
            "a missing colon",
            "is not JSON: Expecting ':' delimiter at column 23; mend it there, or write the "
            "row with json.dumps",
            LINE.replace(b'"role":', b'"role"'),
        ),
        line(
            "a key without quotes",
            "is not JSON: Expecting property name enclosed in double quotes at column 2; "
            "mend it there, or write the row with json.dumps",
            b"{messages: []}",
        ),
        line(
            "single quotes",
            "is written as Python, not as JSON (a single quote at column 2); write it with "
            "json.dumps",
            str({"messages": MESSAGES}).encode(),
        ),
        line(
            "Python's None",
            "holds Python's None at column 24, not JSON's null, true or false; write it with "
            "json.dumps",
            b'{"messages": [], "id": None}',
        ),
        line(
            "Python's True",
            "holds Python's True at column 26, not JSON's null, true or false; write it with "
            "json.dumps",
            b'{"messages": [], "seen": True}',
        ),
        line(
            "NaN",
            "holds NaN, which is no finite number; write null, or a string",
            b'{"messages": [], "score": NaN}',
        ),
        line(
            "Infinity",
            "holds -Infinity, which is no finite number; write null, or a string",
            b'{"messages": [], "score": -Infinity}',
        ),
        line(
            "a number beyond every float",
            "holds 1e999, which is no finite number; write null, or a string",
            b'{"messages": [], "score": 1e999}',
        ),
        line(
            "a number of 5,000 digits",
            "holds a number too large to be read; write it as a string",
            b'{"messages": [], "id": ' + b"9" * 5000 + b"}",
        ),
        line(
            "brackets 2,000 deep",
            "is nested too deeply to be read (a chat row has four levels); write it flatter",
            b'{"a":' * 2000 + b"1" + b"}" * 2000,
        ),
        line(
            "100,000 opening brackets",
            "is nested too deeply to be read (a chat row has four levels); write it flatter",
            b"[" * 100_000,
        ),
        line(
            "a raw tab in a string",
            "holds a raw control character (U+0009) at column 55 within a string; write it "
            "as an escape such as \\n or \\u0009",
            LINE.replace(b"the total", b"the\ttotal"),
        ),
        line(
            "a Windows path with single backslashes",
            "holds an escape at column 14 that JSON does not know; write each backslash as "
            "\\\\ (json.dumps does)",
            rb'{"image": "C:\scans\1.png"}',
        ),
        line(
            "a word without quotes",
            "is not JSON: Expecting value at column 1; write one object a line",
            b"hello there",
        ),
        line(
            "a record of a CSV file",
            "goes on after its end (at column 2); write one object a line, and nothing else",
            b"1.png,What is the total?,12.50",
        ),
        line(
            "a mark of a merge conflict",
            "is not JSON: Expecting value at column 1; write one object a line",
            b"<<<<<<< HEAD",
        ),
        line(
            "a NUL between two values",
            "is not JSON: at column 31 it holds NUL bytes, so the file may be damaged; write "
            "or copy it again",
            LINE.replace(b'"user",', b'"user",\0'),
        ),
        line(
            "NULs before the row",
            "is not JSON: at column 1 it holds NUL bytes, so the file may be damaged; write "
            "or copy it again",
            b"\0" * 16 + LINE,
        ),
        line(
            "a line of NULs alone",
            "is all NUL bytes: the file was not written to its end; write or copy it again",
            b"\0" * 64,
        ),
        line(
            "Latin-1 text",
            "is not UTF-8 (byte 58 of the row); save the file as UTF-8",
            LINE.replace(b"total", b"Gr\xf6\xdfe"),
        ),
        line(
            "half of a UTF-8 character",
            "is not UTF-8 (byte 56 of the row); save the file as UTF-8",
            LINE.replace(b"total", b"\xe4\xbd"),
        ),
        line(
            "UTF-16 text in a UTF-8 file",
            "is not JSON: at column 3 it holds NUL bytes, so the file may be damaged; write "
            "or copy it again",
            b" " + LINE.decode().encode("utf-16-le"),
        ),
        line(
            "a byte order mark within the row",
            "is not JSON: Expecting value at column 13; mend it there, or write the row with "
            "json.dumps",
            b'{"messages":\xef\xbb\xbf []}',
        ),
        line(
            "rows parted by carriage returns alone",
            "ends its lines with a bare carriage return; save the file with line feeds",
            LINE + b"\r" + LINE,
        ),
        line(
            "a line of 257 MiB",
            "is 257 MiB long, more than the 256 MiB that a row may have; keep images in "
            "files of their own, or split the row",
            Hole(b'{"messages": "', 257 << 20, b'"}'),
        ),
    ],
    "JSON that is no row": [
        line(
            "a list",
            "expected an object with 'messages', found a list; write the row so",
            [USER, ANSWER],
        ),
        line(
            "an empty list",
            "expected an object with 'messages', found an empty list; write the row so",
            [],
        ),
        line(
            "a string",
            "expected an object with 'messages', found a string; write the row so",
            "What is the total?",
        ),
        line(
            "a row that was encoded twice",
            "expected an object with 'messages', found a string; write the row so",
            LINE.decode(),
        ),
        line(
            "a number", "expected an object with 'messages', found a number; write the row so", 41
        ),
        line(
            "null", "expected an object with 'messages', found nothing; write the row so", b"null"
        ),
        line(
            "true",
            "expected an object with 'messages', found true or false; write the row so",
            True,
        ),
        line(
            "an empty object",
            "'messages' is missing (found nothing); a chat row has a list of messages; add "
            "it, or leave the row out",
            {},
        ),
    ],
    "Chat rows": [
        line(
            "another format's row",
            "'messages' is missing (found 'id', 'conversations'); a chat row has a list of "
            "messages; add it, or leave the row out",
            {"id": "7", "conversations": TURNS},
        ),
        line(
            "a misspelt 'messages'",
            "'messages' is missing (found 'mesages'); a chat row has a list of messages; is "
            "'mesages' meant to be 'messages'?",
            {"mesages": MESSAGES},
        ),
        line(
            "'messages' is null",
            "'messages' must be a list with at least one message, found nothing; add it, or "
            "leave the row out",
            {"messages": None},
        ),
        line(
            "'messages' is a string",
            "'messages' must be a list with at least one message, found a string; write it so",
            {"messages": "What is the total?"},
        ),
        line(
            "'messages' is one message",
            "'messages' must be a list with at least one message, found an object; write it so",
            {"messages": USER},
        ),
        chat(
            "no message",
            "'messages' must be a list with at least one message, found an empty list; fill "
            "it, or leave the row out",
        ),
        chat(
            "a message that is a string",
            "messages[0] must be an object with 'role' and 'content', found a string; write it so",
            "What is the total?",
            ANSWER,
        ),
        chat(
            "a message that is a list of parts",
            "messages[0] must be an object with 'role' and 'content', found a list; write it so",
            [{"type": "text", "text": "?"}],
            ANSWER,
        ),
        chat(
            "an unknown role",
            "messages[0].role is 'human'; expected system, user or assistant; write one of "
            "them, or leave the row out",
            {"role": "human", "content": "?"},
            ANSWER,
        ),
        chat(
            "a tool's turn",
            "messages[1].role is 'tool'; expected system, user or assistant; write one of "
            "them, or leave the row out",
            USER,
            {"role": "tool", "content": "3"},
            ANSWER,
        ),
        chat(
            "no role",
            "messages[0].role is nothing; expected system, user or assistant; write one of "
            "them, or leave the row out",
            {"content": "?"},
            ANSWER,
        ),
        chat(
            "a role that is a number",
            "messages[0].role is a number; expected system, user or assistant; write one of "
            "them, or leave the row out",
            {"role": 1, "content": "?"},
            ANSWER,
        ),
        chat(
            "a misspelt 'content'",
            "messages[0] has an unknown key 'contnet'; did you mean 'content'?",
            {"role": "user", "contnet": "?"},
            ANSWER,
        ),
        chat(
            "no content",
            "messages[0].content is missing; give a string or a list of text and image parts",
            {"role": "user"},
            ANSWER,
        ),
        chat(
            "content that is null",
            "messages[0].content must be a string or a list of parts, found nothing; add it, "
            "or leave the row out",
            {"role": "user", "content": None},
            ANSWER,
        ),
        chat(
            "content that is a number",
            "messages[1].content must be a string or a list of parts, found a number; put it "
            "in quotes",
            USER,
            ANSWER | {"content": 12.5},
        ),
        chat(
            "content that is one part",
            "messages[0].content must be a string or a list of parts, found an object; write it so",
            USER | {"content": {"type": "text"}},
            ANSWER,
        ),
        chat(
            "an image beside the content",
            "messages[0] has an unknown key 'image'; expected role, content, train, "
            "references; remove it",
            USER | {"image": "1.png"},
            ANSWER,
        ),
        chat(
            "a misspelt 'train'",
            "messages[1] has an unknown key 'trian'; did you mean 'train'?",
            USER,
            ANSWER | {"trian": False},
        ),
        chat(
            "'train' is a string",
            "messages[1].train must be true or false, found a string; write it so",
            USER,
            ANSWER | {"train": "no"},
        ),
        chat(
            "'train' is a number",
            "messages[1].train must be true or false, found a number; write it so",
            USER,
            ANSWER | {"train": 0},
        ),
        chat(
            "references for a question",
            "messages[0].references are given for a user turn; move them to the assistant's answer",
            USER | {"references": ["12.50"]},
            ANSWER,
        ),
        chat(
            "references that are one string",
            "messages[1].references must be a list of strings, found a string; write it so",
            USER,
            ANSWER | {"references": "12.50"},
        ),
        chat(
            "references that are numbers",
            "messages[1].references must be a list of strings, found a number in it; write "
            "each as a string",
            USER,
            ANSWER | {"references": [12.5]},
        ),
        part(
            "a part that is a string",
            "messages[0].content[0] must be a text or image part, found a string; write it so",
            "What is the total?",
        ),
        part(
            "a part without a type",
            "messages[0].content[0].type is nothing; expected 'text' or 'image'; write one, "
            "or leave the row out",
            {"text": "What is the total?"},
        ),
        part(
            "a video",
            "messages[0].content[0].type is 'video'; expected 'text' or 'image'; write one, "
            "or leave the row out",
            {"type": "video", "video": "1.mp4"},
        ),
        part(
            "an image as OpenAI writes it",
            "messages[0].content[0].type is 'image_url'; expected 'text' or 'image'; set "
            "format: openai for such parts",
            {"type": "image_url", "image_url": "1.png"},
        ),
        part(
            "text that is missing",
            "messages[0].content[0].text must be a string, found nothing; add it, or leave "
            "the row out",
            {"type": "text"},
        ),
        part(
            "text that is a number",
            "messages[0].content[0].text must be a string, found a number; put it in quotes",
            {"type": "text", "text": 12.5},
        ),
        part(
            "an image within a text part",
            "messages[0].content[0] has an unknown key 'image'; expected type, text; remove it",
            {"type": "text", "text": "?", "image": "1.png"},
        ),
        part(
            "an image part without an image",
            "messages[0].content[0].image must be a path, a data URI, a URL or bytes, found "
            "nothing; name the image there, or remove it",
            {"type": "image"},
        ),
        part(
            "an image that is an empty string",
            "messages[0].content[0].image must be a path, a data URI, a URL or bytes, found "
            "an empty string; name the image there, or remove it",
            {"type": "image", "image": ""},
        ),
        part(
            "an image that is a number",
            "messages[0].content[0].image must be a path, a data URI, a URL or bytes, found "
            "a number; name the image there, or remove it",
            {"type": "image", "image": 41},
        ),
        part(
            "an image that is an empty object",
            "messages[0].content[0].image must be a path, a data URI, a URL or bytes, found "
            "nothing under 'bytes', 'path' and 'url'; name the image there, or remove it",
            {"type": "image", "image": {}},
        ),
        part(
            "an image with a path that is a list",
            "messages[0].content[0].image must be a path, a data URI, a URL or bytes, found "
            "a list under 'bytes', 'path' and 'url'; name the image there, or remove it",
            {"type": "image", "image": {"path": [1]}},
        ),
        chat(
            "images that no part shows",
            "'images' stands beside 'messages'; put each image where it is shown, as a part "
            '{"type": "image", "image": ...} of a message\'s content',
            USER,
            ANSWER,
            images=["1.png"],
        ),
        chat(
            "both 'image' and 'images'",
            "has both 'image' and 'images'; put every image into 'images'",
            USER,
            ANSWER,
            images=["1.png"],
            image="1.png",
        ),
        chat(
            "more image parts than images",
            "2 image parts without an image but 1 in 'images'; write one part {\"type\": "
            '"image"} for each image',
            {"role": "user", "content": [{"type": "image"}, {"type": "image"}]},
            ANSWER,
            images=["1.png"],
        ),
        chat(
            "more images than image parts",
            "1 image parts without an image but 2 in 'images'; write one part {\"type\": "
            '"image"} for each image',
            {"role": "user", "content": [{"type": "image"}]},
            ANSWER,
            images=["1.png", "2.png"],
        ),
    ],
    "Turns that teach nothing or cannot be shown": [
        chat(
            "only a question",
            "has no assistant turn to learn from; add one, or leave the row out (train: "
            "false turns do not count)",
            USER,
        ),
        chat(
            "only a system turn",
            "has no assistant turn to learn from; add one, or leave the row out (train: "
            "false turns do not count)",
            {"role": "system", "content": "Be short."},
        ),
        chat(
            "only an empty system turn",
            "'messages' holds nothing but an empty system turn; add a user turn",
            {"role": "system", "content": ""},
        ),
        chat(
            "no answer to learn",
            "has no assistant turn to learn from; add one, or leave the row out (train: "
            "false turns do not count)",
            USER,
            ANSWER | {"train": False},
        ),
        chat(
            "an answer that comes first",
            "turn 1 (assistant) comes first, so nothing was asked; put a user turn before "
            "it, or set train: false on it",
            ANSWER,
            USER,
            ANSWER,
        ),
        chat(
            "an empty question",
            "turn 1 (user) is empty; give it text or an image, or leave the row out",
            USER | {"content": ""},
            ANSWER,
        ),
        chat(
            "a question without a part",
            "turn 1 (user) is empty; give it text or an image, or leave the row out",
            USER | {"content": []},
            ANSWER,
        ),
        chat(
            "an empty answer",
            "turn 2 (assistant) is empty; give it text, or leave the row out",
            USER,
            ANSWER | {"content": ""},
        ),
        chat(
            "an answer of white space",
            "turn 2 (assistant) is empty; give it text, or leave the row out",
            USER,
            ANSWER | {"content": " \n\u3000"},
        ),
        chat(
            "a system turn in the middle",
            "turn 2 is a system turn after the first user turn; move it to the start, or "
            "make it part of a user turn",
            USER,
            {"role": "system", "content": "!"},
            ANSWER,
        ),
        chat(
            "an image in an answer",
            "turn 2 (assistant) holds an image, which the model cannot learn to write; move "
            "it to a user turn, or set train: false on the assistant turn",
            USER,
            ANSWER | {"content": [{"type": "image", "image": "good.png"}]},
        ),
        chat(
            "a NUL in the text",
            "turn 2 (assistant) holds a NUL character; remove it (it often stands for text "
            "read in the wrong encoding)",
            USER,
            ANSWER | {"content": "12\0.50"},
        ),
        chat(
            "half of an emoji",
            "turn 1 (user) holds half of a character (a lone surrogate, \\ud83d); write it whole",
            USER | {"content": "\ud83d?"},
            ANSWER,
        ),
        chat(
            "half of an emoji in a reference",
            "turn 2 (assistant) holds half of a character (a lone surrogate, \\ude00); write "
            "it whole",
            USER,
            ANSWER | {"references": ["\ude00"]},
        ),
        chat(
            "the image token as text",
            "messages[0] holds '<image>' as text, which the model reads as a special token; "
            "remove it or write it differently",
            USER | {"content": "<image>What?"},
            ANSWER,
        ),
        chat(
            "the end of a turn as text",
            "messages[1] holds '<end_of_utterance>' as text, which the model reads as a "
            "special token; remove it or write it differently",
            USER,
            ANSWER | {"content": "<end_of_utterance>"},
        ),
        chat(
            "the end of a text as text",
            "messages[0] holds '</s>' as text, which the model reads as a special token; "
            "remove it or write it differently",
            USER | {"content": "What does </s> do?"},
            ANSWER,
        ),
    ],
    "OpenAI's lines": [
        of(
            "openai",
            "no messages",
            "'messages' is missing (found 'prompt', 'completion'); an openai row has a list "
            "of messages; add it, or leave the row out",
            prompt="What?",
            completion="This.",
        ),
        of(
            "openai",
            "a message that is a string",
            "messages[0] must be an object with 'role' and 'content', found a string; write it so",
            messages=["What?"],
        ),
        of(
            "openai",
            "an unknown role",
            "messages[0].role is 'human'; expected system, developer, user or assistant; "
            "write one of them, or leave the row out",
            messages=[USER | {"role": "human"}, ANSWER],
        ),
        of(
            "openai",
            "a tool's answer",
            "messages[1] is part of a tool call, which cannot be learnt here; leave the row out",
            messages=[USER, {"role": "tool", "content": "3"}],
        ),
        of(
            "openai",
            "a tool call",
            "messages[1].tool_calls cannot be learnt here, where answers are text; leave the "
            "row out",
            messages=[USER, ANSWER | {"tool_calls": [{"id": "1"}]}],
        ),
        of(
            "openai",
            "tools",
            "'tools' is about tool calls, which cannot be learnt here; leave the row out, or "
            "remove it",
            messages=MESSAGES,
            tools=[{"type": "function"}],
        ),
        of(
            "openai",
            "a column of images",
            "'images' stands beside 'messages'; put each image where it is shown, as a part "
            '{"type": "image_url", "image_url": {"url": ...}}',
            messages=MESSAGES,
            images=["1.png"],
        ),
        of(
            "openai",
            "no content",
            "messages[1].content must be a string or a list of parts, found nothing; add it, "
            "or leave the row out",
            messages=[USER, {"role": "assistant"}],
        ),
        of(
            "openai",
            "a part that is a string",
            "messages[0].content[0] must be a text or image_url part, found a string; write it so",
            messages=[USER | {"content": ["?"]}, ANSWER],
        ),
        of(
            "openai",
            "a chat row's image part",
            "messages[0].content[0].type is 'image'; expected 'text' or 'image_url'; set "
            "format: chat for such parts",
            messages=[USER | {"content": [{"type": "image", "image": "1.png"}]}, ANSWER],
        ),
        of(
            "openai",
            "sound",
            "messages[0].content[0].type is 'input_audio'; expected 'text' or 'image_url'; "
            "write one, or leave the row out",
            messages=[USER | {"content": [{"type": "input_audio"}]}, ANSWER],
        ),
        of(
            "openai",
            "text that is null",
            "messages[0].content[0].text must be a string, found nothing; add it, or leave "
            "the row out",
            messages=[USER | {"content": [{"type": "text", "text": None}]}, ANSWER],
        ),
        of(
            "openai",
            "an image without a URL",
            "messages[0].content[0].image_url must be a path, a data URI, a URL or bytes, "
            "found nothing under 'bytes', 'path' and 'url'; name the image there, or remove "
            "it",
            messages=[USER | {"content": [{"type": "image_url", "image_url": {}}]}, ANSWER],
        ),
        of(
            "openai",
            "a weight of 0.5",
            "messages[1].weight must be 0 or 1, found a number; write it so",
            messages=[USER, ANSWER | {"weight": 0.5}],
        ),
        of(
            "openai",
            "a weight for a question",
            "messages[0].weight is given for a user turn; remove it, or move it to the answer",
            messages=[USER | {"weight": 1}, ANSWER],
        ),
        of(
            "openai",
            "only an empty system turn",
            "'messages' holds nothing but an empty system turn; add a user turn",
            messages=[USER | {"role": "system", "content": ""}],
        ),
    ],
    "Conversations with placeholders": [
        of(
            "llava",
            "no conversations",
            "'conversations' is missing (found 'messages'); a llava row has turns of human "
            "and gpt; add it, or leave the row out",
            messages=MESSAGES,
        ),
        of(
            "llava",
            "no turns",
            "'conversations' must be a list with at least one turn, found an empty list; "
            "fill it, or leave the row out",
            conversations=[],
        ),
        of(
            "llava",
            "a turn that is a string",
            "conversations[0] must be an object with 'from' and 'value', found a string; "
            "write it so",
            conversations=["What?", "This."],
        ),
        of(
            "llava",
            "another name for the model",
            "conversations[1].from is 'bot'; expected 'human' or 'gpt'; write one of them, "
            "or leave the row out",
            conversations=[TURNS[0], TURNS[1] | {"from": "bot"}],
        ),
        of(
            "llava",
            "a value that is null",
            "conversations[1].value must be a string, found nothing; add it, or leave the row out",
            conversations=[TURNS[0], {"from": "gpt", "value": None}],
        ),
        of(
            "llava",
            "an image without a placeholder",
            "no <image> placeholders but 1 image; write <image> once for each image, where "
            "it is shown, or set format: ms-swift, which puts others first",
            conversations=TURNS,
            image="good.png",
        ),
        of(
            "llava",
            "a placeholder without an image",
            "1 <image> placeholder but no images; write <image> once for each image, where "
            "it is shown",
            conversations=[{"from": "human", "value": "<image>What?"}, TURNS[1]],
        ),
        of(
            "llava",
            "a column of images",
            "'images' is no column of llava's; set format: sharegpt to have it",
            conversations=TURNS,
            images=["good.png"],
        ),
        of(
            "llava",
            "a video",
            "'video' holds videos, which cannot be learnt here; leave the row out, or remove "
            "the column",
            conversations=TURNS,
            video="1.mp4",
        ),
        of(
            "llava",
            "an empty answer",
            "turn 2 (assistant) is empty; give it text, or leave the row out",
            conversations=[TURNS[0], {"from": "gpt", "value": ""}],
        ),
        of(
            "llava",
            "a placeholder in an answer",
            "turn 2 (assistant) holds an image, which the model cannot learn to write; move "
            "it to a user turn, or set train: false on the assistant turn",
            conversations=[TURNS[0], {"from": "gpt", "value": "<image>"}],
            image="good.png",
        ),
        of(
            "sharegpt",
            "no conversations",
            "'conversations' is missing (found 'id'); a sharegpt row has turns of 'from' and "
            "'value'; is 'conversation' meant to be 'conversations'?",
            conversation=None,
            id=1,
        ),
        line(
            "llava: a list of turns",
            "expected an object, found a list; write the row so",
            TURNS,
            source={"format": "llava"},
        ),
        of(
            "sharegpt",
            "one turn that is no list",
            "'conversations' must be a list with at least one turn, found an object; write it so",
            conversations=TURNS[0],
        ),
        of(
            "sharegpt",
            "a tool's turn",
            "conversations[2] is part of a tool call, which cannot be learnt here; leave the "
            "row out",
            conversations=[*TURNS, {"from": "tool", "value": "3"}],
        ),
        of(
            "sharegpt",
            "two system prompts",
            "has both a column 'system' and a system turn; keep one of them",
            conversations=[{"from": "system", "value": "A"}, *TURNS],
            system="B",
        ),
        of(
            "sharegpt",
            "a system prompt that is a list",
            "'system' must be a string, found a list; write it so",
            conversations=TURNS,
            system=["Be short."],
        ),
        of(
            "sharegpt",
            "an image that is a number",
            "images[0] must be a path, a data URI, a URL or bytes, found a number; name the "
            "image there, or remove it",
            conversations=TURNS,
            images=[41],
        ),
        of(
            "sharegpt",
            "both 'image' and 'images'",
            "has both 'image' and 'images'; put every image into 'images'",
            conversations=TURNS,
            image="1.png",
            images=["1.png"],
        ),
        of(
            "llama-factory",
            "none of its columns",
            "'messages' is missing (found 'prompt', 'answer'); expected messages, "
            "conversations, or instruction and output; add it, or leave the row out",
            prompt="What?",
            answer="This.",
        ),
        of(
            "llama-factory",
            "no output",
            "'output' must be a string, found nothing; add it, or leave the row out",
            instruction="What?",
        ),
        of(
            "llama-factory",
            "an output that is a number",
            "'output' must be a string, found a number; put it in quotes",
            instruction="What?",
            output=12.5,
        ),
        of(
            "llama-factory",
            "a history that is a string",
            "'history' must be a list of pairs, found a string; write it so",
            instruction="What?",
            output="This.",
            history="Hello",
        ),
        of(
            "llama-factory",
            "a history without answers",
            "history[0] must be a question and its answer, found a list; write it so",
            instruction="What?",
            output="This.",
            history=[["Hello"]],
        ),
        of(
            "llama-factory",
            "a null in the history",
            "history[0][1] must be a string, found nothing; add it, or leave the row out",
            instruction="What?",
            output="This.",
            history=[["Hello", None]],
        ),
        of(
            "llama-factory",
            "preferences",
            "'chosen' holds preferences, which cannot be learnt here; leave the row out, or "
            "remove the column",
            conversations=TURNS,
            chosen=TURNS[1],
            rejected=TURNS[1],
        ),
        of(
            "llama-factory",
            "a good or bad answer (KTO)",
            "is marked as a good or bad answer (KTO), which cannot be learnt here; keep the "
            "good rows without the mark",
            messages=MESSAGES,
            label=True,
        ),
        of(
            "llama-factory",
            "an image without a placeholder",
            "no <image> placeholders but 1 image; write <image> once for each image, where "
            "it is shown, or set format: ms-swift, which puts others first",
            messages=MESSAGES,
            images=["good.png"],
        ),
        of(
            "llama-factory",
            "two placeholders for one image",
            "2 <image> placeholders but 1 image; write <image> once for each image, where it "
            "is shown",
            messages=[USER | {"content": "<image><image>?"}, ANSWER],
            images=["good.png"],
        ),
        of(
            "ms-swift",
            "no response",
            "'response' must be a string, found nothing; add it, or leave the row out",
            query="What?",
        ),
        of(
            "ms-swift",
            "a conversation without answers",
            "conversation[0] must be an object with 'human' and 'assistant', each a string; "
            "write it so, or leave the row out",
            conversation=[{"human": "What?"}],
        ),
        of(
            "ms-swift",
            "an empty conversation",
            "'conversation' must be a list of turns, found an empty list; fill it, or leave "
            "the row out",
            conversation=[],
        ),
        of(
            "ms-swift",
            "a loss that is a string",
            "messages[1].loss must be true or false, found a string; write it so",
            messages=[USER, ANSWER | {"loss": "no"}],
        ),
        of(
            "ms-swift",
            "only an empty system turn",
            "holds no turn but an empty system turn; add a user turn",
            messages=[USER | {"role": "system", "content": ""}],
        ),
        of(
            "ms-swift",
            "boxes to be filled in",
            "'objects' holds boxes to be filled in, which cannot be learnt here; leave the "
            "row out, or remove the column",
            messages=MESSAGES,
            objects={"bbox": [[1, 2, 3, 4]]},
        ),
        of(
            "ms-swift",
            "an image and nobody who asks",
            "has 1 image but no user turn to show it in; add one",
            messages=[ANSWER],
            images=["good.png"],
        ),
        of(
            "ms-swift",
            "a placeholder without an image",
            "1 <image> placeholder but no images; write <image> once for each image, where "
            "it is shown",
            query="<image>What?",
            response="This.",
        ),
        of(
            "mantis",
            "no conversation",
            "'conversation' is missing (found 'id', 'images'); a mantis row has a list of "
            "turns; add it, or leave the row out",
            id="nlvr2_0",
            images=["good.png"],
        ),
        of(
            "mantis",
            "a turn without a role",
            "conversation[0].role is nothing; expected 'system', 'user', 'assistant', "
            "'human', 'gpt', 'chatgpt', 'bing' or 'bard'; write one of them, or leave the "
            "row out",
            conversation=[{"content": "What?"}, ANSWER],
        ),
        of(
            "mantis",
            "fewer placeholders than images",
            "1 <image> placeholder but 2 images; write <image> once for each image, where it "
            "is shown, or set format: ms-swift, which puts others first",
            conversation=[USER | {"content": "<image>What?"}, ANSWER],
            images=["good.png", "good.png"],
        ),
        of(
            "mantis",
            "sound",
            "'audio' holds sound, which cannot be learnt here; leave the row out, or remove "
            "the column",
            conversation=MESSAGES,
            audio="1.wav",
        ),
    ],
    "Questions, answers and captions": [
        of(
            "cauldron",
            "no texts",
            "'texts' is missing (found 'images'); a cauldron row has 'images' and 'texts'; "
            "add it, or leave the row out",
            images=["good.png"],
        ),
        of(
            "cauldron",
            "texts that are a string",
            "'texts' must be a list of exchanges, found a string; write it so",
            texts="What?",
        ),
        of(
            "cauldron",
            "an exchange that is a list",
            "texts[0] must be an object with 'user' and 'assistant', found a list; write it so",
            texts=[["What?", "This."]],
        ),
        of(
            "cauldron",
            "no assistant",
            "texts[0].assistant must be a string, found nothing; add it, or leave the row out",
            texts=[{"user": "What?"}],
        ),
        of(
            "cauldron",
            "fewer images than placeholders",
            "2 <image> placeholders but 1 image; write <image> once for each image, where it "
            "is shown",
            texts=[{"user": "<image><image>?", "assistant": "No."}],
            images=["good.png"],
        ),
        of(
            "docvqa",
            "no question",
            "'question' is missing (found 'answers', 'docId', 'image'); this format needs "
            "it; add it, or leave the row out",
            answers=["12"],
            docId=1,
            image="good.png",
        ),
        of(
            "docvqa",
            "an empty question",
            "'question' must be a text, found nothing; add it, or leave the row out",
            change={"question": ""},
        ),
        of(
            "docvqa",
            "a question that is a number",
            "'question' must be a text, found a number; put it in quotes",
            change={"question": 12},
        ),
        of(
            "docvqa",
            "a row of the test split",
            "'answers' holds nothing: test splits come without answers; use the training or "
            "validation split",
            change={"answers": None},
        ),
        of(
            "docvqa",
            "an empty list of answers",
            "'answers' holds an empty list: test splits come without answers; use the "
            "training or validation split",
            change={"answers": []},
        ),
        of(
            "docvqa",
            "an answer that is an object",
            "answers[0] must be a text or a number, found an object; write it so",
            change={"answers": [{"text": "12"}]},
        ),
        of(
            "docvqa",
            "no image",
            "has no image (found 'question', 'docId', 'answers'); give its path or bytes in "
            "the column 'image'",
            change={"image": None},
        ),
        of(
            "docvqa",
            "an image that is an empty object",
            "'image' must be a path, a data URI, a URL or bytes, found nothing under "
            "'bytes', 'path' and 'url'; name the image there, or remove it",
            change={"image": {"bytes": None, "path": None}},
        ),
        of(
            "docvqa",
            "more placeholders than images",
            "2 <image> placeholders but 1 image; write <image> once for each image, where it "
            "is shown",
            change={"question": "<image><image>?"},
        ),
        of(
            "textvqa",
            "a row of the test split",
            "'answers' holds an empty list: the test split comes without answers; use the "
            "training or validation split",
            change={"answers": []},
        ),
        of(
            "textvqa",
            "an answer that is null",
            "answers[1] must be a text or a number, found nothing; add it, or leave the row out",
            change={"answers": ["12", None]},
        ),
        of(
            "textvqa",
            "a photo that is not there",
            "image '0054c9.jpg' not found in /data; mend the path, or set image_root",
            change={"image": None, "image_id": "0054c9"},
        ),
        of(
            "vqav2",
            "a row of the test split",
            "'multiple_choice_answer' holds nothing: the test splits come without answers; "
            "use the training or validation split",
            change={"multiple_choice_answer": None, "answers": None},
        ),
        of(
            "vqav2",
            "answers that are strings",
            "answers[0] must be an object with a text 'answer', found a string; write it so",
            change={"answers": ["12"]},
        ),
        of(
            "vqav2",
            "answers that are one string",
            "'answers' must be a list, found a string; write it so",
            change={"answers": "12"},
        ),
        of(
            "chartqa",
            "no label",
            "'label' is missing (found 'query', 'image'); a chartqa row has the answer "
            "there; add it, or leave the row out",
            change={"label": None},
        ),
        of(
            "chartqa",
            "a label that is true",
            "'label' is true; write it as a text, such as 'yes'",
            change={"label": True},
        ),
        of(
            "chartqa",
            "an image that is a list",
            "'image' must be a path, a data URI, a URL or bytes, found a list; name the "
            "image there, or remove it",
            change={"image": [1]},
        ),
        of(
            "mmmu",
            "an answer that is no option",
            "'answer' is 'B', and the options have the letters A; write one of these (test "
            "splits come without answers)",
            change={"answer": "B"},
        ),
        of(
            "mmmu",
            "an image that is not there",
            "<image 2> is mentioned, and 'image_2' holds nothing; give it there",
            change={"question": "Which is <image 2>?"},
        ),
        of(
            "cord",
            "no ground_truth",
            "'ground_truth' is missing (found 'image'); this format needs it; add it, or "
            "leave the row out",
            image="good.png",
        ),
        of(
            "cord",
            "a gt_parse that is not JSON",
            "'ground_truth' is not JSON (Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)); write the fields as JSON in a string",
            change={"ground_truth": "{'gt_parse': 1}"},
        ),
        of(
            "cord",
            "a ground_truth that holds a list",
            "'ground_truth' must hold an object, found an empty list; fill it, or leave the "
            "row out",
            change={"ground_truth": "[]"},
        ),
        of(
            "cord",
            "no gt_parse",
            "'ground_truth' has neither 'gt_parse' nor 'gt_parses' (found 'meta'); give the "
            "fields under one of them",
            change={"ground_truth": '{"meta": {}}'},
        ),
        of(
            "cord",
            "a ground_truth too deep",
            "'ground_truth' is nested too deeply to be read; write it flatter",
            change={"ground_truth": "[" * 100_000},
        ),
        of(
            "cord",
            "a NaN among the fields",
            "the fields cannot be written as JSON, which has no NaN, infinite numbers or "
            "bytes; write null or a string instead",
            change={"ground_truth": '{"gt_parse": {"total": NaN}}'},
        ),
        of(
            "coco-captions",
            "no caption",
            "has no caption; expected one in the column 'captions', 'caption', "
            "'sentences_raw' or 'sentences'; add it, or leave the row out",
            image="good.png",
        ),
        of(
            "coco-captions",
            "a caption that is a number",
            "captions[0] must be a text, found a number; put it in quotes",
            change={"captions": [12]},
        ),
        of(
            "coco-captions",
            "no image",
            "has no image (found 'captions'); give its path or bytes in the column 'image'",
            captions=["A man."],
        ),
        of(
            "columns",
            "a column that is not there",
            "has no column 'given' (found 'scan', 'asked', 'givn'); did you mean 'givn'?",
            scan="good.png",
            asked="Which?",
            givn="12",
        ),
        line(
            "columns: a system prompt that is a number",
            "'told' must be a text, found a number; put it in quotes",
            GOOD["columns"] | {"told": 41},
            good=GOOD["columns"] | {"told": "Be short."},
            source={"columns": COLUMNS | {"system": "told"}},
        ),
        of(
            "columns",
            "a column with nothing like its name",
            "has no column 'given' (found 'scan', 'asked', 'n'); name one of them under "
            "columns.answer",
            scan="good.png",
            asked="Which?",
            n=12,
        ),
        of(
            "columns",
            "an empty question",
            "'asked' must hold the question's text, found nothing; add it, or leave the row out",
            change={"asked": " "},
        ),
        of(
            "columns",
            "no answer",
            "'given' holds no answer; leave the row out",
            change={"given": None},
        ),
        of(
            "columns",
            "an empty list of answers",
            "'given' holds no answer; leave the row out",
            change={"given": []},
        ),
        of(
            "columns",
            "an empty answer",
            "turn 2 (assistant) is empty; give it text, or leave the row out",
            change={"given": ""},
        ),
        of(
            "columns",
            "an answer that is false",
            "'given' is false; write it as a text, such as 'yes'",
            change={"given": False},
        ),
        of(
            "columns",
            "an image that is a number",
            "'scan' must be a path, a data URI, a URL or bytes, found a number; name the "
            "image there, or remove it",
            change={"scan": 41},
        ),
    ],
    "Images by path": [
        image(
            "a file that is not there",
            "image '1.png' not found in /data; mend the path, or set image_root",
            "1.png",
        ),
        image(
            "a name written in capitals",
            "image 'INVOICE.PNG' not found in /data; did you mean 'invoice.png'? mend the "
            "path, or set image_root",
            "INVOICE.PNG",
            beside={"invoice.png": PNG},
        ),
        image(
            "another suffix",
            "image 'invoice.jpg' not found in /data; did you mean 'invoice.png'? mend the "
            "path, or set image_root",
            "invoice.jpg",
            beside={"invoice.png": PNG},
        ),
        image(
            "a letter too few",
            "image 'invoce-7.png' not found in /data; did you mean 'invoice-7.png'? mend the "
            "path, or set image_root",
            "invoce-7.png",
            beside={"invoice-7.png": PNG},
        ),
        image(
            "a number with fewer zeros",
            "image '41.png' not found in /data; did you mean '0041.png'? mend the path, or "
            "set image_root",
            "41.png",
            beside={"0041.png": PNG},
        ),
        image(
            "a file in a folder below",
            "image '1.png' not found in /data; it is in /data/scans: set image_root to that",
            "1.png",
            beside={"scans/1.png": PNG},
        ),
        image(
            "a folder too many in the path",
            "image 'images/1.png' not found in /data; '1.png' is there: mend the path, or "
            "set image_root",
            "images/1.png",
            beside={"1.png": PNG},
        ),
        image(
            "an image_root one folder too deep",
            "image 'scans/1.png' not found in /data/scans; it is in /data: set image_root to that",
            "scans/1.png",
            beside={"scans/1.png": PNG},
            source={"format": "chat", "image_root": "/data/scans"},
        ),
        image(
            "an image_root that is not there",
            "image '1.png' not found in /data/images; that folder is not there; set image_root",
            "1.png",
            source={"format": "chat", "image_root": "/data/images"},
            good=GOOD["chat"],
        ),
        image(
            "backslashes",
            "image 'scans\\\\1.png' not found in /data; write / for \\ in the path",
            r"scans\1.png",
            beside={"scans/1.png": PNG},
        ),
        image(
            "a path from the home folder",
            "image '~/scans/1.png' not found in /data; ~ is not expanded, write the whole path",
            "~/scans/1.png",
        ),
        image(
            "a path out of the folder",
            "image '../1.png' lies outside image_root (/data); move it there, set "
            "image_root, or set data.allow_outside_root: true",
            "../1.png",
        ),
        image(
            "an absolute path elsewhere",
            "image '/etc/passwd' lies outside image_root (/data); move it there, set "
            "image_root, or set data.allow_outside_root: true",
            "/etc/passwd",
        ),
        image(
            "a link out of the folder",
            "image '1.png' lies outside image_root (/data); move it there, set image_root, "
            "or set data.allow_outside_root: true",
            "1.png",
            beside={"1.png": Link("/etc/passwd")},
        ),
        image(
            "a link to a folder outside",
            "image 'etc/passwd' lies outside image_root (/data); move it there, set "
            "image_root, or set data.allow_outside_root: true",
            "etc/passwd",
            beside={"etc": Link("/etc")},
        ),
        image(
            "a link to nothing",
            "image '1.png' not found in /data; it is a link to what is not there; mend the link",
            "1.png",
            beside={"1.png": Link("gone.png")},
        ),
        image(
            "a link to itself",
            "image '1.png' cannot be read (Too many levels of symbolic links); mend or replace it",
            "1.png",
            beside={"1.png": Link("1.png")},
        ),
        image(
            "a folder",
            "image 'scans' is a folder, not a file; mend the path",
            "scans",
            beside={"scans": FOLDER},
        ),
        image(
            "a named pipe",
            "image '1.png' is a device, pipe or socket, not a file; mend the path",
            "1.png",
            beside={"1.png": PIPE},
        ),
        image(
            "a device",
            "image '/dev/zero' is a device, pipe or socket, not a file; mend the path",
            "/dev/zero",
            data={"allow_outside_root": True},
        ),
        image(
            "a NUL in the path",
            "turn 1 (user) holds a NUL character; remove it (it often stands for text read "
            "in the wrong encoding)",
            "scans/\0.png",
        ),
        image(
            "half of an emoji in the path",
            "turn 1 (user) holds half of a character (a lone surrogate, \\ud83d); write it whole",
            "\ud83d.png",
        ),
        image(
            "a name of 5,000 letters",
            "image '" + "x" * 80 + "'... cannot be read (File name too long); mend or replace it",
            "x" * 5000,
        ),
    ],
    "Image files": [
        content("an empty file", "image 'scan.png' is an empty file; mend or replace it", b""),
        content(
            "a file of zeros",
            "image 'scan.png' holds only zero bytes, as a download that was never filled; "
            "get it again",
            bytes(4096),
        ),
        content(
            "a JPEG cut short",
            "image 'scan.jpg' is cut short (its end marker is missing); mend or replace it",
            JPEG[: len(JPEG) // 2],
            "scan.jpg",
        ),
        content(
            "a JPEG without its end marker",
            "image 'scan.jpg' is cut short (its end marker is missing); mend or replace it",
            JPEG[:-2],
            "scan.jpg",
        ),
        content(
            "a PNG cut short",
            "image 'scan.png' is cut short (its IDAT chunk is not whole); mend or replace it",
            PNG[: len(PNG) // 2],
        ),
        content(
            "a PNG without its last chunk",
            "image 'scan.png' is cut short (its structure goes on beyond its end); mend or "
            "replace it",
            PNG[:-12],
        ),
        content(
            "a PNG of four bytes",
            "image 'scan.png' is no image that can be read; convert it to PNG or JPEG",
            PNG[:4],
        ),
        content(
            "a PNG with a byte changed",
            "image 'scan.png' is damaged (wrong checksum in IDAT at 33); mend or replace it",
            PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:],
        ),
        content(
            "a WEBP cut short",
            "image 'scan.webp' is cut short (693 of 702 bytes); mend or replace it",
            saved("WEBP")[:-9],
            "scan.webp",
        ),
        content(
            "a GIF cut short",
            "image 'scan.gif' is cut short (only 1,478 bytes); mend or replace it",
            saved("GIF", mode="P")[:-40],
            "scan.gif",
        ),
        content(
            "a TIFF cut short",
            "image 'scan.tif' is cut short (its pixels go on beyond its end); mend or replace it",
            saved("TIFF")[:-9],
            "scan.tif",
        ),
        content(
            "a BMP cut short",
            "image 'scan.bmp' is cut short (only 1,885 bytes); mend or replace it",
            saved("BMP")[:-9],
            "scan.bmp",
        ),
        content(
            "an icon cut short",
            "image 'scan.ico' is cut short (one of its pictures goes on beyond its end); "
            "mend or replace it",
            saved("ICO")[:-9],
            "scan.ico",
        ),
        content(
            "a pixmap whose last number may be cut",
            "image 'scan.pgm' is cut short (its last number may be cut; end the file with a "
            "newline); mend or replace it",
            b"P2 2 1 255\n255 128",
            "scan.pgm",
        ),
        content(
            "a photo as HEIC",
            "image 'scan.heic' is HEIF, which this Pillow cannot read; convert it to PNG or JPEG",
            b"\0\0\0\x18ftypheic\0\0\0\0",
            "scan.heic",
        ),
        content(
            "a file of 513 MiB",
            "image 'scan.png' is too large a file (513 MiB, at most 512); give an image file",
            Hole(PNG, 513 << 20, b"\0"),
        ),
        content(
            "a TIFF of floating-point pixels",
            "image 'scan.tif' holds floating-point pixels, whose white nothing tells; save "
            "it as 8-bit",
            saved("TIFF", mode="F"),
            "scan.tif",
        ),
        content(
            "an SVG drawing",
            "image 'scan.svg' is an SVG drawing, which has no pixels; convert it to PNG",
            b'<svg xmlns="http://www.w3.org/2000/svg"/>',
            "scan.svg",
        ),
        content(
            "a web page",
            "image 'scan.jpg' is a web page (HTML) that was saved instead of the image; "
            "download the image itself",
            b"<!DOCTYPE html><p>Not found</p>",
            "scan.jpg",
        ),
        content(
            "a server's error in XML",
            "image 'scan.jpg' is XML, often a server's error message; download the image again",
            b'<?xml version="1.0"?><Error/>',
            "scan.jpg",
        ),
        content(
            "a server's error in JSON",
            "image 'scan.jpg' is JSON, often a server's error message; download the image again",
            b'{"error": "rate limit"}',
            "scan.jpg",
        ),
        content(
            "a text file",
            "image 'scan.jpg' is text, not an image (it begins '404: Not Found'); give an "
            "image file",
            b"404: Not Found",
            "scan.jpg",
        ),
        content(
            "a Git LFS pointer",
            "image 'scan.png' is a Git LFS pointer, not the image itself; run git lfs pull "
            "in its repository",
            b"version https://git-lfs.github.com/spec/v1\noid 0",
        ),
        content(
            "a pickle",
            "image 'scan.pkl' is a pickle, which may hold code and is never opened; save the "
            "image as PNG",
            pickle.dumps({"pixels": [1, 2]}),
            "scan.pkl",
        ),
        content(
            "a NumPy array",
            "image 'scan.npy' is a NumPy array; save it as PNG",
            b"\x93NUMPY\x01\0v\0",
            "scan.npy",
        ),
        content(
            "a PyTorch file",
            "image 'scan.pt' is a PyTorch file, which may hold code and is never opened; "
            "save the image as PNG",
            zipped("scan/data.pkl"),
            "scan.pt",
        ),
        content(
            "a zip archive",
            "image 'scan.zip' is a zip archive; unpack it",
            zipped("scan.png"),
            "scan.zip",
        ),
        content(
            "a file compressed with gzip",
            "image 'scan.png.gz' is compressed with gzip; unpack it",
            gzip.compress(PNG),
            "scan.png.gz",
        ),
        content(
            "PostScript",
            "image 'scan.eps' is PostScript, a program that is never run; convert it to PNG",
            b"%!PS-Adobe-3.0 EPSF-3.0\n",
            "scan.eps",
        ),
        content(
            "a shell script",
            "image 'scan.png' is a script, not an image; give an image file",
            b"#!/bin/sh\nrm -rf ~\n",
        ),
        content(
            "a program",
            "image 'scan.png' is a program, not an image; give an image file",
            b"\x7fELF\x02\x01\x01",
        ),
        content(
            "a video instead of an image",
            "image 'scan.mp4' is a video; save the frame that is meant as PNG or JPEG",
            b"\0\0\0\x20ftypisom\0\0\x02\0",
            "scan.mp4",
        ),
        content(
            "a Photoshop file",
            "image 'scan.psd' is a Photoshop file; export it as PNG",
            b"8BPS\0\x01" + bytes(20),
            "scan.psd",
        ),
        content(
            "a DICOM file",
            "image 'scan.dcm' is a DICOM file; convert it to PNG",
            bytes(128) + b"DICM",
            "scan.dcm",
        ),
        content(
            "a JPEG 2000 file",
            "image 'scan.jp2' is JPEG 2000, which is not read; convert it to PNG",
            b"\0\0\0\x0cjP  \r\n\x87\n",
            "scan.jp2",
        ),
        content(
            "a JPEG XL file",
            "image 'scan.jxl' is JPEG XL, which is not read; convert it to PNG",
            b"\xff\x0a\xfa\x1f",
            "scan.jxl",
        ),
        content(
            "a Parquet file",
            "image 'scan.parquet' is a table (Parquet or Arrow); give it as a data source",
            b"PAR1\x15\x04",
            "scan.parquet",
        ),
        content(
            "bytes of no known format",
            "image 'scan.raw' is no image that can be read; convert it to PNG or JPEG",
            bytes(range(200, 256)),
            "scan.raw",
        ),
        content(
            "a PNG that unpacks to 2 gigapixels",
            "image 'scan.png' is too large (50,000 x 40,000 pixels, more than 100 "
            "megapixels); scale it down, or raise data.max_megapixels",
            png_header(50_000, 40_000),
        ),
        image(
            "an image over max_megapixels",
            "image 'scan.png' is too large (30 x 20 pixels, more than 0.0005 megapixels); "
            "scale it down, or raise data.max_megapixels",
            "scan.png",
            beside={"scan.png": PNG},
            data={"max_megapixels": 0.0005},
        ),
        image(
            "an image one pixel high, to be split",
            "image 'line.png' is 30 x 1 pixels, too small to be split in four; leave it out, "
            "or set images.split: never",
            "line.png",
            beside={"line.png": saved("PNG", (30, 1))},
            images={"split": "always"},
        ),
        content(
            "a GIF cut within its header",
            "image 'scan.png' is damaged at its beginning; mend or replace it",
            saved("GIF", mode="P")[:30],
        ),
    ],
    "Images within the row": [
        image(
            "a data URI without base64",
            "image (data URI) must read data:image/...;base64,...; encode it as base64",
            "data:image/png,%89PNG",
        ),
        image(
            "a data URI of SVG text",
            "image (data URI) must read data:image/...;base64,...; encode it as base64",
            "data:image/svg+xml;utf8,<svg/>",
        ),
        image(
            "a data URI without a comma",
            "image (data URI) must read data:image/...;base64,...; encode it as base64",
            "data:image/png;base64",
        ),
        image(
            "a data URI without data",
            "image (data URI) is an empty file; mend or replace it",
            "data:image/png;base64,",
        ),
        image(
            "a percent-encoded data URI",
            "image (data URI) is percent-encoded (it holds '%'); write its base64 as it is",
            "data:image/png;base64,iVBORw0K%2BGgo",
        ),
        image(
            "a data URI with a letter missing",
            "image (data URI) is not valid base64 (Incorrect padding); encode it again",
            encoded(PNG)[:-1],
        ),
        image(
            "a data URI with other letters",
            "image (data URI) is not valid base64 (other letters); encode it again",
            "data:image/png;base64,iVBÖ",
        ),
        image(
            "a data URI with asterisks",
            "image (data URI) is not valid base64 (Only base64 data is allowed); encode it again",
            "data:image/png;base64,iVBO*w0K",
        ),
        image(
            "a data URI of text",
            "image (data URI) is text, not an image (it begins 'hello there'); give an image file",
            encoded(b"hello there"),
        ),
        image(
            "a data URI of half an image",
            "image (data URI) is cut short (its IDAT chunk is not whole); mend or replace it",
            encoded(PNG[:700]),
        ),
        image(
            "base64 with a letter missing",
            "image (base64 in the row) is not valid base64 (Incorrect padding); encode it again",
            base64.b64encode(PNG).decode()[:-1],
        ),
        image(
            "base64 of half an image",
            "image (base64 in the row) is cut short (its IDAT chunk is not whole); mend or "
            "replace it",
            base64.b64encode(PNG[:699]).decode(),
        ),
    ],
    "Images by URL": [
        image(
            "a URL where none are allowed",
            "image 'https://example.com/1.png' is a URL, and nothing is downloaded; save it "
            "as a file, or set data.allow_urls: true",
            "https://example.com/1.png",
        ),
        image(
            "a file:// URL",
            "image 'file:///etc/passwd' is a file:// URL; give the path alone",
            "file:///etc/passwd",
            data=URLS,
        ),
        image(
            "an ftp:// URL",
            "image 'ftp://example.com/1.png' is a ftp:// URL, which is not read; save it as a file",
            "ftp://example.com/1.png",
            data=URLS,
        ),
        image(
            "an s3:// URL",
            "image 's3://bucket/1.png' is a s3:// URL, which is not read; save it as a file",
            "s3://bucket/1.png",
            data=URLS,
        ),
        image(
            "a URL of this machine",
            "image 'http://localhost:8000/1.png' leads to localhost (127.0.0.1), which is "
            "not a public address; save it as a file",
            "http://localhost:8000/1.png",
            data=URLS,
        ),
        image(
            "a URL of 127.0.0.1",
            "image 'http://127.0.0.1/1.png' leads to 127.0.0.1 (127.0.0.1), which is not a "
            "public address; save it as a file",
            "http://127.0.0.1/1.png",
            data=URLS,
        ),
        image(
            "127.0.0.1 as one number",
            "image 'http://2130706433/1.png' leads to 2130706433 (127.0.0.1), which is not a "
            "public address; save it as a file",
            "http://2130706433/1.png",
            data=URLS,
        ),
        image(
            "a URL within the network",
            "image 'http://10.0.0.7/1.png' leads to 10.0.0.7 (10.0.0.7), which is not a "
            "public address; save it as a file",
            "http://10.0.0.7/1.png",
            data=URLS,
        ),
        image(
            "a cloud's own data",
            "image 'http://169.254.169.254/latest/meta-data' leads to 169.254.169.254 "
            "(169.254.169.254), which is not a public address; save it as a file",
            "http://169.254.169.254/latest/meta-data",
            data=URLS,
        ),
        image(
            "a name that leads within the network",
            "image 'https://wiki.example/1.png' leads to wiki.example (10.1.2.3), which is "
            "not a public address; save it as a file",
            "https://wiki.example/1.png",
            data=URLS,
        ),
        image(
            "an IPv6 loopback",
            "image 'http://[::1]/1.png' leads to ::1 (::1), which is not a public address; "
            "save it as a file",
            "http://[::1]/1.png",
            data=URLS,
        ),
        image(
            "an IPv4 address within IPv6",
            "image 'http://[::ffff:10.0.0.7]/1.png' leads to ::ffff:10.0.0.7 "
            "(::ffff:10.0.0.7), which is not a public address; save it as a file",
            "http://[::ffff:10.0.0.7]/1.png",
            data=URLS,
        ),
        image(
            "a URL with a password",
            "image 'https://...@example.com/1.png' is a URL with a user name or "
            "password; save it as a file",
            "https://me:secret@example.com/1.png",
            data=URLS,
        ),
        image(
            "a URL with a space",
            "image 'https://example.com/scan 1.png' is a URL with a space or control "
            "character; write %20 for a space",
            "https://example.com/scan 1.png",
            data=URLS,
        ),
        image(
            "a URL without a host",
            "image 'https:///1.png' is a URL without a host; mend it",
            "https:///1.png",
            data=URLS,
        ),
        image(
            "a URL with a port beyond all ports",
            "image 'https://example.com:99999/1.png' is not a URL that can be read (Port out "
            "of range 0-65535); mend it",
            "https://example.com:99999/1.png",
            data=URLS,
        ),
        image(
            "a host that is not found",
            "image 'https://gone.example/1.png' cannot be downloaded (the host gone.example "
            "is not found); try again, or mend the URL",
            "https://gone.example/1.png",
            data=URLS,
        ),
    ],
    "Pages of PDFs": [
        image(
            "a PDF of several pages",
            "image '1.pdf' is a PDF of 2 pages; name one as FILE.pdf#page=1",
            "1.pdf",
            beside={"1.pdf": pdf(2)},
        ),
        image(
            "a page beyond the last one",
            "image '1.pdf#page=3' is a PDF of 2 pages and has no page 3; name another",
            "1.pdf#page=3",
            beside={"1.pdf": pdf(2)},
        ),
        image(
            "page 0",
            "image '1.pdf#page=0' names no page by '#page=0'; write FILE.pdf#page=1",
            "1.pdf#page=0",
            beside={"1.pdf": pdf(1)},
        ),
        image(
            "a page that is only a number",
            "image '1.pdf#2' names no page by '#2'; write FILE.pdf#page=1",
            "1.pdf#2",
            beside={"1.pdf": pdf(2)},
        ),
        image(
            "a page of a PNG",
            "image '1.pdf#page=1' is PNG, not a PDF, and has no pages; leave #page=1 out",
            "1.pdf#page=1",
            beside={"1.pdf": PNG},
        ),
        image(
            "a PDF cut short",
            "image '1.pdf' is a PDF that is cut short (its end is missing); mend or replace it",
            "1.pdf",
            beside={"1.pdf": pdf(1)[:-10]},
        ),
        image(
            "a PDF with nothing in it",
            "image '1.pdf' is a PDF that cannot be read (Failed to load document (PDFium: "
            "Data format error).); mend it",
            "1.pdf",
            beside={"1.pdf": b"%PDF-1.7\n%%EOF"},
        ),
        image(
            "a PDF with a password",
            "image '1.pdf' is a PDF with a password; save it without one",
            "1.pdf",
            beside={"1.pdf": LOCKED_PDF},
        ),
        image(
            "a page over max_megapixels",
            "image '1.pdf' is a PDF page of 144 x 72 pixels at 144 dpi, more than 0.005 "
            "megapixels; lower data.pdf_dpi, or raise data.max_megapixels",
            "1.pdf",
            beside={"1.pdf": pdf(1)},
            data={"max_megapixels": 0.005},
        ),
    ],
    "Rows over max_tokens": [
        chat(
            "too long a text",
            "is too long (2,715 > 512 tokens, 0 views); raise data.max_tokens, or set "
            "data.overlong: skip",
            USER | {"content": "many words " * 300},
            ANSWER,
        ),
        line(
            "too long a text, to be skipped",
            "is too long (2,715 > 512 tokens, 0 views); raise data.max_tokens",
            {"messages": [USER | {"content": "many words " * 300}, ANSWER]},
            data={"overlong": "skip"},
        ),
        line(
            "too long a last exchange under drop_turns",
            "is too long (2,734 > 512 tokens, 0 views), even its last exchange alone; raise "
            "data.max_tokens, or set data.overlong: skip",
            {"messages": [*MESSAGES, USER | {"content": "many words " * 300}, ANSWER]},
            data={"overlong": "drop_turns"},
        ),
        line(
            "too long a text under fewer_views",
            "is too long (2,715 > 512 tokens, 0 views), even with every picture in one view; "
            "raise data.max_tokens, or set data.overlong: skip",
            {"messages": [USER | {"content": "many words " * 300}, ANSWER]},
            data={"overlong": "fewer_views"},
        ),
        image(
            "too many views",
            "is too long (148 > 100 tokens, 5 views); raise data.max_tokens, or set "
            "data.overlong: skip or fewer_views",
            "scan.png",
            beside={"scan.png": PNG},
            images={"split": "always"},
            data={"max_tokens": 100},
        ),
        line(
            "too many images under fewer_views",
            "is too long (765 > 100 tokens, 30 views), even with every picture in one view; "
            "raise data.max_tokens, or set data.overlong: skip",
            {
                "messages": [
                    USER | {"content": [{"type": "image", "image": "good.png"}] * 6},
                    ANSWER,
                ]
            },
            images={"split": "always"},
            data={"overlong": "fewer_views", "max_tokens": 100},
        ),
    ],
    "Records of CSV and TSV tables": [
        line(
            "a field too few",
            "has 1 fields, where the header names 2; put fields that hold a delimiter or a "
            "line break in double quotes",
            b"What is the total?",
            container="csv",
            source=TABLE,
        ),
        line(
            "a comma without quotes",
            "has 3 fields, where the header names 2; put fields that hold a delimiter or a "
            "line break in double quotes",
            b"What, then?,12.50",
            container="csv",
            source=TABLE,
        ),
        line(
            "text after a closing quote",
            "has text after a closing double quote; write a quote within a field twice",
            b'"What" is it?,1',
            container="csv",
            source=TABLE,
        ),
        line(
            "an empty answer in a table",
            "'answer' holds no answer; leave the row out",
            b"What is it?,",
            container="csv",
            source=TABLE,
        ),
        line(
            "a quote that is never closed",
            "opens a double quote that is never closed (it takes the last 1 lines of the "
            "file); close it, or write a quote within a field twice",
            b'"What is it?,12.50',
            container="csv",
            source=TABLE,
            ends_file=True,
        ),
        line(
            "Latin-1 text in a table",
            "column 'question' is not UTF-8; save the file as UTF-8",
            b"Gr\xf6\xdfe?,3 m",
            container="csv",
            source=TABLE,
        ),
        line(
            "a NUL in a table",
            "turn 1 (user) holds a NUL character; remove it (it often stands for text read "
            "in the wrong encoding)",
            b"What\0?,12.50",
            container="csv",
            source=TABLE,
        ),
        line(
            "a tab too many",
            "has 3 fields, where the header names 2; put fields that hold a delimiter or a "
            "line break in double quotes",
            b"What is it?\t\t12",
            container="tsv",
            header=b"question\tanswer",
            source=TABLE,
        ),
    ],
    "Samples of tar shards": [
        line(
            "a sample without its JSON",
            "has no .json or .txt member (found 0002.png); add one with the text of the sample",
            {"0002.png": PNG},
            container="tar",
        ),
        line(
            "a sample with broken JSON",
            "0002.json is cut short: the string that starts at column 99 has no end; write "
            "the row again",
            {"0002.json": LINE[:-9]},
            container="tar",
        ),
        line(
            "a sample with a list",
            "0002.json must hold one object, the row; write it so",
            {"0002.json": b"[1, 2]"},
            container="tar",
        ),
        line(
            "a sample of two JSON files",
            "has 2 JSON members (0002.a.json, 0002.b.json); put the row into one",
            {"0002.a.json": LINE, "0002.b.json": LINE},
            container="tar",
        ),
        line(
            "a sample with another format's row",
            "'messages' is missing (found '__key__', 'prompt'); a chat row has a list of "
            "messages; add it, or leave the row out",
            {"0002.json": b'{"prompt": "?"}'},
            container="tar",
        ),
        line(
            "a sample with Latin-1 text",
            "0002.txt is not UTF-8 (byte 3); save it as UTF-8",
            {"0002.txt": b"Gr\xf6\xdfe"},
            container="tar",
        ),
        line(
            "a sample with a damaged image",
            "image (bytes in the row) is cut short (its IDAT chunk is not whole); mend or "
            "replace it",
            {"0002.json": json.dumps(shows("0002.png")).encode(), "0002.png": PNG[:700]},
            container="tar",
        ),
        line(
            "a sample of two text files",
            "has 2 text members (0002.a.txt, 0002.b.txt); keep one, or write a .json",
            {"0002.a.txt": b"A", "0002.b.txt": b"B"},
            container="tar",
        ),
        line(
            "a sample that names another's image",
            "image '0003.png' not found in /data; mend the path, or set image_root",
            {"0002.json": json.dumps(shows("0003.png")).encode()},
            container="tar",
        ),
        line(
            "an archive cut short",
            "'0002.json' is cut short: the archive ends 68 bytes early; write or copy it again",
            {"0002.json": LINE},
            container="tar",
            ends_file=True,
            cut_at=3 * 512 + 40,
        ),
        line(
            "a member with a path out of the archive",
            "has a name that leads out of the archive; use relative names without '..'",
            {"../0002.json": LINE},
            container="tar",
        ),
    ],
    "Rows of Parquet tables": [
        line(
            "a null for the messages",
            "'messages' must be a list with at least one message, found nothing; add it, or "
            "leave the row out",
            {"messages": None},
            container="parquet",
        ),
        line(
            "an empty list of messages",
            "'messages' must be a list with at least one message, found an empty list; fill "
            "it, or leave the row out",
            {"messages": []},
            container="parquet",
        ),
        line(
            "a null for the image's bytes",
            "'scan' must be a path, a data URI, a URL or bytes, found nothing under 'bytes', "
            "'path' and 'url'; name the image there, or remove it",
            {"scan": {"bytes": None, "path": None}, "asked": "?", "given": "1"},
            container="parquet",
            good={"scan": {"bytes": PNG, "path": None}, "asked": "?", "given": "1"},
            source={"columns": COLUMNS},
        ),
        line(
            "a null for the answer",
            "'given' holds no answer; leave the row out",
            {"scan": PNG, "asked": "?", "given": None},
            container="parquet",
            good={"scan": PNG, "asked": "?", "given": "1"},
            source={"columns": COLUMNS},
        ),
        line(
            "bytes that are no image",
            "image (bytes in the row) is text, not an image (it begins '404: Not Found'); "
            "give an image file",
            {"scan": b"404: Not Found", "asked": "?", "given": "1"},
            container="parquet",
            good={"scan": PNG, "asked": "?", "given": "1"},
            source={"columns": COLUMNS},
        ),
        line(
            "an infinite number",
            "holds inf, which is no finite number; write null, or a text",
            {"asked": "?", "given": float("inf")},
            container="parquet",
            good={"asked": "?", "given": 1.5},
            source={"columns": {"question": "asked", "answer": "given"}},
        ),
        line(
            "a missing number (NaN)",
            "'given' holds no answer; leave the row out",
            {"asked": "?", "given": float("nan")},
            container="parquet",
            good={"asked": "?", "given": 1.5},
            source={"columns": {"question": "asked", "answer": "given"}},
        ),
    ],
}

BAD_FILES: list[BadFile] = [
    BadFile(
        "a data file that is not there",
        "cannot be read (No such file or directory); '/data' does not hold it; mend the path",
        "train.jsonl",
        {},
    ),
    BadFile(
        "a misspelt name",
        "cannot be read (No such file or directory); did you mean '/data/train.jsonl'?",
        "trian.jsonl",
        {"train.jsonl": LINE},
    ),
    BadFile(
        "an empty file of rows",
        "holds no rows; give a file with one JSON object a line",
        "train.jsonl",
        {"train.jsonl": b""},
    ),
    BadFile(
        "a file of blank lines",
        "holds no rows; give a file with one JSON object a line",
        "train.jsonl",
        {"train.jsonl": b"\n \n\r\n"},
    ),
    BadFile(
        "an empty list of rows",
        "holds no rows; give a file with one JSON object a line",
        "train.json",
        {"train.json": b"[]"},
    ),
    BadFile(
        "a UTF-16 file",
        "is UTF-16; save it as UTF-8",
        "train.jsonl",
        {"train.jsonl": LINE.decode().encode("utf-16")},
    ),
    BadFile(
        "one JSON document, named .jsonl",
        "is one JSON document over many lines, not an object a line; name it .json",
        "train.jsonl",
        {"train.jsonl": b"[\n" + LINE + b"\n]"},
    ),
    BadFile(
        "a document cut short",
        "is cut short: this value has no end (line 1, column 112); write the file again",
        "train.json",
        {"train.json": b"[" + LINE + b", " + LINE[:40]},
    ),
    BadFile(
        "a document with a trailing comma",
        "has a comma before a closing bracket (line 1, column 111); remove it",
        "train.json",
        {"train.json": b"[" + LINE + b",]"},
    ),
    BadFile(
        "a document without a comma",
        "',' was expected (line 1, column 110); mend the document",
        "train.json",
        {"train.json": b"[" + LINE + LINE + b"]"},
    ),
    BadFile(
        "a document that is one object",
        "is one object (no list in it), not rows; give a list of objects, or an object "
        "with such a list under 'data'",
        "train.json",
        {"train.json": b'{"version": 1}'},
    ),
    BadFile(
        "a document with two lists of rows",
        "holds several lists of rows ('train', 'test'); save the one to read as a file of its own",
        "train.json",
        {"train.json": b'{"train": [{}], "test": [{}]}'},
    ),
    BadFile(
        "a document with text after its end",
        "goes on after its end (line 1, column 112); one document holds one list; name a "
        "file with an object a line .jsonl",
        "train.json",
        {"train.json": b"[" + LINE + b"] done"},
    ),
    BadFile(
        "rows of no known format",
        "no known format has the keys 'a', 'b'; set format to the one that made the "
        "rows, or name the columns, such as columns: {image: photo, question: asked, "
        "answer: given}",
        "train.jsonl",
        {"train.jsonl": b'{"a": 1, "b": 2}'},
    ),
    BadFile(
        "rows with columns that look usable",
        "no known format has the keys 'photo', 'query_de', 'reply'; if these are the "
        "columns, set format: columns, columns: {image: photo, question: query_de, "
        "answer: reply}",
        "train.jsonl",
        {"train.jsonl": b'{"photo": "1.png", "query_de": "?", "reply": "A"}'},
    ),
    BadFile(
        "rows of two formats",
        "some rows look like 'docvqa' and others like 'cord'; keep rows of one format in "
        "a file, or set format",
        "train.jsonl",
        {
            "train.jsonl": json.dumps(GOOD["docvqa"]).encode()
            + b"\n"
            + json.dumps(GOOD["cord"]).encode()
        },
    ),
    BadFile(
        "rows that two formats read differently",
        "fits both 'llama-factory' and 'ms-swift', which read it differently; set format "
        "to the one that made the rows",
        "train.jsonl",
        {
            "train.jsonl": json.dumps(
                GOOD["ms-swift"] | GOOD["llama-factory"] | {"images": ["a"]}
            ).encode()
        },
    ),
    BadFile(
        "columns without a question",
        "columns.question is missing; name the column, or set question: to a fixed text",
        "train.csv",
        {"train.csv": b"a,b\n1,2"},
        {"columns": {"image": "a", "answer": "b"}},
    ),
    BadFile(
        "columns and a question beside them",
        "columns.question and question are both given; keep one of them",
        "train.csv",
        {"train.csv": b"a,b\n1,2"},
        {"columns": {"question": "a", "answer": "b"}, "question": "What?"},
    ),
    BadFile(
        "columns for another format",
        "columns has no effect with format 'chat'; set format: columns",
        "train.jsonl",
        {"train.jsonl": LINE},
        {"columns": {"question": "a", "answer": "b"}, "format": "chat"},
    ),
    BadFile(
        "a question for rows with their own",
        "question has no effect with format 'chat', whose rows have their own; remove it",
        "train.jsonl",
        {"train.jsonl": LINE},
        {"question": "What?", "format": "chat"},
    ),
    BadFile(
        "rows that are no objects",
        "each row is a list; name the file .json, or write one object a line",
        "train.jsonl",
        {"train.jsonl": b"[1]\n[2]"},
    ),
    BadFile(
        "a Git LFS pointer for the rows",
        "is a Git LFS pointer, not the file itself; run 'git lfs pull'",
        "train.jsonl",
        {"train.jsonl": b"version https://git-lfs.github.com/spec/v1\n"},
    ),
    BadFile(
        "a web page for the rows",
        "is a web page or XML, perhaps an error message saved in place of the file; "
        "download it again",
        "train.jsonl",
        {"train.jsonl": b"<!DOCTYPE html><p>Sign in</p>"},
    ),
    BadFile(
        "a zip archive under another name",
        "is a zip, Parquet, bzip2 or xz file under another name; name it after what it "
        "is, or unpack it",
        "train.jsonl",
        {"train.jsonl": zipped("train.jsonl")},
    ),
    BadFile(
        "a pickle of rows",
        "a .pkl file cannot be read; pickles are never loaded, since they may run code; "
        "write the rows as JSON Lines",
        "train.pkl",
        {"train.pkl": pickle.dumps([1])},
    ),
    BadFile(
        "a spreadsheet",
        "a .xlsx file cannot be read; save the sheet as CSV (UTF-8)",
        "train.xlsx",
        {"train.xlsx": zipped("xl/workbook.xml")},
    ),
    BadFile(
        "a text file of rows",
        "a .txt file cannot be read; a text file has no columns; write a JSON object a "
        "line into a .jsonl file",
        "train.txt",
        {"train.txt": LINE},
    ),
    BadFile(
        "a script that makes rows",
        "a .py file cannot be read; scripts are never run; load the dataset and save it "
        "as Parquet or JSON Lines",
        "train.py",
        {"train.py": b"print(1)"},
    ),
    BadFile(
        "an image for the rows",
        "a .png file cannot be read; one image is no rows; give the file that has the "
        "questions, or the folder of the images",
        "scan.png",
        {"scan.png": PNG},
    ),
    BadFile(
        "a name without a suffix",
        "a name without a suffix does not tell what it holds; expected .jsonl, .json, "
        ".csv, .tsv (each also .gz or .zst), .parquet, .arrow, .tar, a folder of those, "
        "a folder of save_to_disk, or a folder of images with metadata.jsonl or with a "
        "folder for each label; name it so",
        "train",
        {"train": LINE},
    ),
    BadFile(
        "gzip cut short",
        "is cut short (the compressed data have no end); copy or download it again",
        "train.jsonl.gz",
        {"train.jsonl.gz": gzip.compress(LINE)[:-9]},
    ),
    BadFile(
        "zstandard cut short",
        "is cut short (the compressed data have no end); copy or download it again",
        "train.jsonl.zst",
        {"train.jsonl.zst": b"\x28\xb5\x2f\xfd\x20\x60"},
    ),
    BadFile(
        "a named pipe for the rows",
        "is no regular file; save its rows to one",
        "train.jsonl",
        {"train.jsonl": PIPE},
    ),
    BadFile(
        "gzip with a byte changed",
        "is damaged gzip data (Incorrect length of data produced); copy or compress it again",
        "train.jsonl.gz",
        {"train.jsonl.gz": gzip.compress(LINE * 9)[:-5] + b"\0" * 5},
    ),
    BadFile(
        "a table with a column twice",
        "two columns are called 'question'; give each its own name",
        "train.csv",
        {"train.csv": b"question,question\n1,2"},
    ),
    BadFile(
        "a table with a blank first line",
        "is blank; write the names of the columns there",
        "train.csv",
        {"train.csv": b"\nquestion,answer\n1,2"},
    ),
    BadFile(
        "a table whose header opens a quote",
        "the header cannot be read (unexpected end of data); mend its quotes",
        "train.csv",
        {"train.csv": b'"question,answer'},
    ),
    BadFile(
        "a table with Latin-1 column names",
        "the header is not UTF-8; save the file as UTF-8",
        "train.csv",
        {"train.csv": b"gr\xf6\xdfe,answer\n1,2"},
    ),
    BadFile(
        "Parquet cut short",
        "is not a Parquet file, or is damaged (Parquet magic bytes not found in footer. "
        "Either the file is corrupted or this is not a parquet file); write or copy it "
        "again",
        "train.parquet",
        {"train.parquet": parquet([{"a": "b"}])[:-4]},
    ),
    BadFile(
        "a tar archive that is text",
        "is not a tar archive, or is damaged at its start (invalid header); write or copy it again",
        "train.tar",
        {"train.tar": b"hello there" * 90},
    ),
    BadFile(
        "an empty folder",
        "holds nothing; expected .jsonl, .json, .csv, .tsv (each also .gz or .zst), "
        ".parquet, .arrow, .tar, a folder of those, a folder of save_to_disk, or a "
        "folder of images with metadata.jsonl or with a folder for each label; give one",
        "train",
        {"train": FOLDER},
    ),
    BadFile(
        "a folder of two kinds of files",
        "holds files of several kinds (a.jsonl, b.parquet); point at the ones to read, "
        "such as /data/train/*.jsonl",
        "train",
        {"train/a.jsonl": LINE, "train/b.parquet": b"PAR1"},
    ),
    BadFile(
        "a folder with two metadata files",
        "holds several metadata files (metadata.jsonl, metadata.csv); keep one",
        "scans",
        {"scans/metadata.jsonl": LINE, "scans/metadata.csv": b"a"},
    ),
    BadFile(
        "a saved dataset of several splits",
        "holds several splits; point at one of them: /data/saved/train, /data/saved/test",
        "saved",
        {"saved/dataset_dict.json": b'{"splits": ["train", "test"]}'},
    ),
    BadFile(
        "a saved dataset with a damaged state",
        "cannot be read; save the dataset again",
        "saved",
        {"saved/dataset_info.json": b"{}", "saved/state.json": b"{"},
    ),
    BadFile(
        "a folder of two splits",
        "holds several splits (test.jsonl, train.jsonl); point at one of them, such as "
        "/data/rows/train*",
        "rows",
        {"rows/train.jsonl": LINE, "rows/test.jsonl": LINE},
    ),
    BadFile(
        "a folder of images without questions",
        "holds 1.png; expected .jsonl, .json, .csv, .tsv (each also .gz or .zst), "
        ".parquet, .arrow, .tar, a folder of those, a folder of save_to_disk, or a "
        "folder of images with metadata.jsonl or with a folder for each label; give one",
        "scans",
        {"scans/1.png": PNG},
    ),
    BadFile(
        "a pattern that nothing fits",
        "no file fits this pattern; look at it with ls, and mind the folder it starts from",
        "train-*.jsonl",
        {},
    ),
    BadFile(
        "a shard missing from a range",
        "is not there; did you mean '/data/train-0.jsonl'?",
        "train-{0..1}.jsonl",
        {"train-0.jsonl": LINE},
    ),
]
