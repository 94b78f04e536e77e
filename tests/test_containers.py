"""Every container against the plain rows; what is kept in the cache; what is refused, and how."""

import csv
import gzip
import io
import json
import os
import pickle
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data.containers import (
    Container,
    Stream,
    cached,
    cleaning,
    documents,
    files,
    json_rows,
    json_text,
    open_container,
    open_hub,
    open_hub_stream,
    open_stream,
    shards,
)
from finetune.data.containers.files import FileStamp
from finetune.data.images import load_image
from finetune.data.sources import Row, open_source, open_stream_source
from finetune.errors import DataError
from finetune.recipe import Columns, DataSection, DataSource

ROWS = [
    {"image": f"{i}.png", "question": f"Wie groß\nist “{i}”, 你好?", "answer": f"{i} m"}
    for i in range(7)
]
NUM_WITHOUT_ANSWER = 3
ROWS[NUM_WITHOUT_ANSWER]["answer"] = None  # type: ignore[assignment]


def jsonl(rows: list[dict[str, Any]], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode("utf-8-sig")


def tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def samples(rows: list[dict[str, Any]]) -> bytes:
    return tar({f"s/{i:03}.json": json.dumps(row).encode() for i, row in enumerate(rows)})


def arrow(rows: list[dict[str, Any]], new: Callable[..., Any]) -> bytes:
    sink = io.BytesIO()
    content = pa.Table.from_pylist(rows)
    with new(sink, content.schema) as out:
        out.write_table(content, max_chunksize=3)
    return sink.getvalue()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2)
    return sink.getvalue()


def in_frames(content: bytes) -> bytes:
    half = len(content) // 2
    return b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))


def pretty(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()


FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "plain": ("rows.jsonl", lambda: jsonl(ROWS)),
    "ndjson": ("rows.ndjson", lambda: jsonl(ROWS)),
    "BOM, CRLF, blank": (
        "rows.jsonl",
        lambda: b"\xef\xbb\xbf\r\n" + jsonl(ROWS, "\r\n \t\r\n").strip(),
    ),
    "gzip": ("rows.jsonl.gz", lambda: gzip.compress(jsonl(ROWS))),
    "gzip, two members": (
        "rows.jsonl.gz",
        lambda: gzip.compress(jsonl(ROWS[:2])) + gzip.compress(jsonl(ROWS[2:])),
    ),
    "gzip under a plain name": ("rows.jsonl", lambda: gzip.compress(jsonl(ROWS))),
    "plain under gzip's name": ("rows.jsonl.gz", lambda: jsonl(ROWS)),
    "zstd": ("rows.jsonl.zst", lambda: in_frames(jsonl(ROWS))),
    "list": ("rows.json", lambda: json.dumps(ROWS).encode()),
    "pretty list": ("rows.json", lambda: b"\xef\xbb\xbf" + pretty(ROWS)),
    "list in an object": ("rows.json", lambda: pretty({"info": {"a": []}, "data": ROWS, "n": 1})),
    "lines under a document's name": ("rows.json", lambda: jsonl(ROWS)),
    "list, gzip": ("rows.json.gz", lambda: gzip.compress(pretty(ROWS))),
    "csv": ("rows.csv", lambda: table(ROWS, ",")),
    "csv with semicolons": ("rows.csv", lambda: table(ROWS, ";")),
    "tsv": ("rows.tsv", lambda: table(ROWS, "\t")),
    "csv, gzip": ("rows.csv.gz", lambda: gzip.compress(table(ROWS, ","))),
    "parquet": ("rows.parquet", lambda: parquet(ROWS)),
    "arrow stream": ("rows.arrow", lambda: arrow(ROWS, pa.ipc.new_stream)),
    "arrow file": ("rows.arrow", lambda: arrow(ROWS, pa.ipc.new_file)),
    "tar": ("rows.tar", lambda: samples(ROWS)),
    "tar, gzip": ("rows.tar.gz", lambda: gzip.compress(samples(ROWS))),
}


def write_folder(name: str, folder: Path) -> Path:
    """The same rows as a folder, or as a pattern of files."""
    match name:
        case "saved":
            datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved", num_shards=2)
            return folder / "saved"
        case "folder of parts" | "glob" | "braces":
            for i in range(3):
                (folder / f"part-{i:02}.jsonl").write_bytes(jsonl(ROWS[3 * i : 3 * i + 3]))
            return folder / {"glob": "part-*.jsonl", "braces": "part-{00..02}.jsonl"}.get(name, "")
        case "folder of parquet":
            for i in range(2):
                (folder / f"p{i}.parquet").write_bytes(parquet(ROWS[4 * i : 4 * i + 4]))
            return folder
        case "folder of tars":
            for i in range(2):
                (folder / f"p{i}.tar").write_bytes(samples(ROWS[4 * i : 4 * i + 4]))
            return folder
    renamed = [{"file_name": row["image"]} | row for row in ROWS]
    for row in renamed:
        del row["image"]
    content = jsonl(renamed) if name == "metadata.jsonl" else table(renamed, ",")
    (folder / name).write_bytes(content)
    (folder / "0.png").write_bytes(b"")
    return folder


FOLDERS = (
    *("saved", "folder of parts", "glob", "braces", "folder of parquet", "folder of tars"),
    *("metadata.jsonl", "metadata.csv"),
)


def write(name: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    if name not in FILES:
        return write_folder(name, folder)
    file, content = FILES[name]
    (folder / file).write_bytes(content())
    return folder / file


def without_key(row: Any) -> Any:
    if isinstance(row, dict):
        row.pop("__key__", None)
    return row


def rows_of(container: Container) -> list[Any]:
    return [without_key(row) for _, row in container.read_range(0, len(container))]


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_every_container_gives_the_rows_of_the_plain_file(name: str, tmp_path: Path) -> None:
    path = write(name, tmp_path / "data")
    for _ in range(2):  # the second time from the cache
        container = open_container(path, tmp_path / "cache")
        assert len(container) == len(ROWS)
        assert rows_of(container) == ROWS
        assert [without_key(container.read(i)) for i in range(len(ROWS))] == ROWS
        assert list(container.read_range(2, 5)) == list(container.read_range(0, 99))[2:5]
        places = [where for where, _ in container.read_range(0, len(ROWS))]
        assert places == [container.where(i) for i in range(len(ROWS))]
        assert len(set(places)) == len(ROWS)
        assert container.root.resolve() == tmp_path / "data" / ("saved" if name == "saved" else "")
        assert json.loads(json.dumps(container.identity())) == container.identity()
        assert rows_of(pickle.loads(pickle.dumps(container))) == ROWS
        with pytest.raises(IndexError):
            container.read(len(ROWS))


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_cache_that_cannot_be_written_stops_nothing(name: str, tmp_path: Path) -> None:
    path = write(name, tmp_path / "data")
    (tmp_path / "file").write_text("")
    container = open_container(path, tmp_path / "file" / "cache")
    assert rows_of(container) == ROWS
    assert rows_of(pickle.loads(pickle.dumps(container))) == ROWS


STREAMED = [
    name
    for name in (*FILES, *FOLDERS)
    if not any(word in name for word in ("list", "document", "arrow", "saved", "metadata"))
    and name != "tar, gzip"
]


def deals_whole_files(stream: Stream, num_consumers: int) -> bool:
    """Whether no file's rows come to two consumers."""
    files_of = [
        {where.rpartition(":")[0] for where, _ in stream.iterate(consumer, num_consumers)}
        for consumer in range(num_consumers)
    ]
    return sum(map(len, files_of)) == len(set().union(*files_of))


@pytest.mark.parametrize("name", STREAMED)
def test_every_row_goes_to_one_consumer_and_skip_resumes(name: str, tmp_path: Path) -> None:
    path = write(name, tmp_path / "data")
    container = open_container(path, tmp_path / "cache")
    expected = [(where, without_key(row)) for where, row in container.read_range(0, 99)]
    stream = pickle.loads(pickle.dumps(open_stream(path)))
    assert stream.root.resolve() == container.root.resolve()
    assert stream.identity() == container.identity()
    for count in range(1, 8):
        dealt, sizes = [], []
        for consumer in range(count):
            mine = [(where, without_key(row)) for where, row in stream.iterate(consumer, count)]
            for skip in range(len(mine) + 2):
                rest = [without_key(row) for _, row in stream.iterate(consumer, count, skip)]
                assert rest == [row for _, row in mine[skip:]]
            dealt += mine
            sizes.append(len(mine))
        assert deals_whole_files(stream, count) or max(sizes) - min(sizes) <= 1
        assert sorted(dealt, key=lambda pair: expected.index(pair)) == expected


@pytest.mark.parametrize(
    ("names", "path", "message"),
    [
        (["a.json"], "a.json", "a .json file cannot be streamed; write it as JSON Lines"),
        (["a.jsonl", "b.csv"], "", "is no folder of JSON Lines, CSV, Parquet or tar files of one"),
        (["train.jsonl", "test.jsonl"], "", "holds several splits"),
        ([], "a.jsonl", "cannot be read .No such file"),
    ],
)
def test_what_cannot_be_streamed_is_refused(
    names: list[str], path: str, message: str, tmp_path: Path
) -> None:
    write_files(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        open_stream(tmp_path / path)


def test_a_compressed_archive_is_not_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(samples(ROWS)))
    with pytest.raises(DataError, match="a compressed archive cannot be streamed; decompress it"):
        open_stream(tmp_path / "a.tar.gz")


def test_whole_shards_are_dealt_out_only_where_that_is_even(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.jsonl").write_bytes(jsonl(ROWS))
    whole = [deals_whole_files(open_stream(tmp_path), count) for count in range(1, 6)]
    assert whole == [True, True, False, True, False]
    (tmp_path / "3.jsonl").write_bytes(jsonl(ROWS[:1]))
    assert not deals_whole_files(open_stream(tmp_path), 4)


def test_skipped_rows_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(ROWS))
    stream = open_stream(tmp_path / "rows.jsonl")
    decoded = []
    monkeypatch.setattr(shards.json_text, "parse_json", decoded.append)
    list(stream.iterate(0, 1, skip=5))
    assert len(decoded) == 2


@pytest.mark.parametrize("name", ["plain", "gzip", "csv", "parquet", "tar"])
def test_a_stream_whose_file_is_written_again_is_refused(name: str, tmp_path: Path) -> None:
    path = write(name, tmp_path)
    stream = open_stream(path)
    first = [row for _, row in stream.iterate(0, 1)]
    assert not any(isinstance(row, DataError) for row in first)
    os.utime(path, ns=(1, 1))  # the same rows, but who knows
    changed = f"^{re.escape(files.shown_path(path))}: the file has changed since it was indexed"
    with pytest.raises(DataError, match=changed):
        list(stream.iterate(0, 1))
    with pytest.raises(DataError, match=changed):
        list(stream.iterate(0, 1, skip=2))
    assert len(list(open_stream(path).iterate(0, 1))) == len(first)


@pytest.mark.parametrize("name", ["plain", "csv", "parquet"])
def test_a_file_written_again_while_it_is_streamed_does_not_end_in_silence(
    name: str, tmp_path: Path
) -> None:
    path = write(name, tmp_path)
    rows = open_stream(path).iterate(0, 1)
    next(rows)
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="the file has changed since it was indexed"):
        list(rows)


def test_passed_row_groups_are_not_read(tmp_path: Path) -> None:
    """The first group is damaged, which only its reader can notice."""
    content = bytearray(parquet(ROWS))
    content[4:60] = b"\xff" * 56
    (tmp_path / "rows.parquet").write_bytes(content)
    stream = open_stream(tmp_path / "rows.parquet")
    assert [row for _, row in stream.iterate(0, 1, skip=2)] == ROWS[2:]
    with pytest.raises(DataError, match="damaged"):
        list(stream.iterate(0, 1))


# --- the index -----------------------------------------------------------------------------------


def test_lines_are_looked_up_once_and_again_when_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = []

    def counting(data: Any) -> Any:
        scans.append(data.path)
        return scan(data)

    scan = json_rows.scan_lines
    monkeypatch.setattr(json_rows, "scan_lines", counting)
    path, cache = tmp_path / "rows.jsonl", tmp_path / "cache"

    def opened() -> tuple[int, list[Any]]:
        before = len(scans)
        rows = rows_of(open_container(path, cache))
        return len(scans) - before, rows

    path.write_bytes(jsonl(ROWS))
    assert opened() == (1, ROWS)
    assert opened() == (0, ROWS)
    [index] = cache.glob("*.npy")
    assert {file.name for file in cache.iterdir()} == {index.name, "used"}  # nothing else is left

    path.write_bytes(jsonl(ROWS[:4]))
    assert opened() == (1, ROWS[:4])
    assert opened() == (0, ROWS[:4])

    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert opened() == (1, ROWS[:4])

    (tmp_path / "other").mkdir()
    shutil.copy(path, tmp_path / "other" / "rows.jsonl")
    whole = index.read_bytes()
    for damaged in (b"", b"\x93NUMPY", whole[:-30], whole[:-24], b"PK\x03\x04", whole[:-24] * 2):
        index.write_bytes(damaged)
        assert opened() == (1, ROWS[:4])
        assert index.read_bytes() == whole


def test_another_files_index_is_not_taken(tmp_path: Path) -> None:
    for name, rows in (("a", ROWS[:2]), ("b", ROWS[1:3])):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(rows).ljust(400) + b"\n")
        os.utime(tmp_path / f"{name}.jsonl", ns=(0, 0))
    cache = tmp_path / "cache"
    open_container(tmp_path / "a.jsonl", cache)
    [index] = cache.glob("*.npy")
    foreign = index.read_bytes()
    open_container(tmp_path / "b.jsonl", cache)
    [other] = set(cache.glob("*.npy")) - {index}
    other.write_bytes(foreign)
    assert rows_of(open_container(tmp_path / "b.jsonl", cache)) == ROWS[1:3]
    assert other.read_bytes() != foreign


@pytest.mark.parametrize("name", ["gzip", "csv", "parquet", "tar", "tar, gzip", "list, gzip"])
def test_a_copy_is_made_once_and_replaced_when_the_source_changes(
    name: str, tmp_path: Path
) -> None:
    path, cache = write(name, tmp_path / "data"), tmp_path / "cache"
    open_container(path, cache)

    def kept() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}

    before = kept()
    assert rows_of(open_container(path, cache)) == ROWS
    assert kept() == before
    for file in before:  # cut short
        file.write_bytes(file.read_bytes()[:-5])
    assert rows_of(open_container(path, cache)) == ROWS
    os.utime(path, ns=(1, 1))
    assert rows_of(open_container(path, cache)) == ROWS
    of_source = [file for file in kept() if file.parent.name == FileStamp.of(path).digest]
    assert len(of_source) == len([file for file in before if file.parent == of_source[0].parent])


def test_a_copy_made_by_another_process_meanwhile_is_kept(tmp_path: Path) -> None:
    """Its readers would else find the file changed under them."""
    path = write("csv", tmp_path / "data")
    source, cache = FileStamp.of(path), tmp_path / "cache"

    def slowly(sink: Any) -> None:
        made.append(cached.write_derived(source, cache, "table", lambda sink: sink.write(b"[]")))
        sink.write(b"[]")

    made: list[FileStamp] = []
    assert cached.write_derived(source, cache, "table", slowly) == made[0]
    assert cached.find_derived(source, cache, "table") == made[0]


def test_a_file_that_has_gone_is_an_error_of_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(ROWS))
    container = open_container(tmp_path / "rows.jsonl", tmp_path / "cache")
    (tmp_path / "rows.jsonl").unlink()
    monkeypatch.setattr(files, "_DESCRIPTORS", type(files._DESCRIPTORS)(1, files._Descriptor))
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        container.read(1)
    errors = [row for _, row in container.read_range(0, 7)]
    assert len(errors) == 7
    assert all(isinstance(row, DataError) for row in errors)


def test_a_file_that_changes_while_it_is_open_is_no_wrong_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(ROWS))
    container = open_container(path, tmp_path / "cache")
    path.write_bytes(jsonl(ROWS)[5:])
    with pytest.raises(DataError, match="has changed since it was indexed"):
        container.read(1)
    assert all(isinstance(row, DataError) for _, row in container.read_range(0, 7))


@pytest.mark.parametrize("name", ["csv", "coco", "tar", "gzip", "parquet"])
def test_a_copy_made_by_other_code_is_not_taken(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = tmp_path / "coco.json", tmp_path / "cache"
    if name == "coco":
        image, caption = {"id": 1, "file_name": "1.jpg"}, {"image_id": 1, "caption": "One."}
        path.write_text(json.dumps({"images": [image], "annotations": [caption]}))
    else:
        path = write(name, tmp_path / "data")
    rows = rows_of(open_container(path, cache))
    of_path = cache / FileStamp.of(path).digest
    [before] = [file for file in of_path.iterdir() if file.suffix != ".npy"]
    monkeypatch.setattr(cached, "code_digest", lambda: "f" * 64)
    assert rows_of(open_container(path, cache)) == rows
    [after] = [file for file in of_path.iterdir() if file.suffix != ".npy"]
    assert after.name != before.name  # and the other one is gone


def test_an_index_made_by_other_code_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(ROWS))
    data, cache = FileStamp.of(tmp_path / "rows.jsonl"), tmp_path / "cache"
    open_container(tmp_path / "rows.jsonl", cache)
    assert cached.load_index(data, cache)
    monkeypatch.setattr(cached, "code_digest", lambda: "f" * 64)
    assert cached.load_index(data, cache) is None


def test_the_digest_of_the_code_is_that_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest() -> str:
        cached.code_digest.cache_clear()
        return cached.code_digest()

    here = digest()
    shutil.copytree(Path(cached.__file__).parent, tmp_path / "containers")
    shutil.copytree(Path(cached.data_formats.__path__[0]), tmp_path / "formats")
    monkeypatch.setattr(cached, "__file__", str(tmp_path / "containers" / "cached.py"))
    monkeypatch.setattr(cached.data_formats, "__path__", [str(tmp_path / "formats")])
    try:
        assert digest() == here
        for file in ("containers/delimited.py", "formats/coco_captions.py"):
            before = digest()
            with (tmp_path / file).open("a") as out:
                out.write("# mended\n")
            assert digest() != before
    finally:
        cached.code_digest.cache_clear()


def age(path: Path, days: float) -> None:
    then = time.time() - days * 86_400
    for file in (*path.rglob("*"), path):
        os.utime(file, (then, then))


def test_what_nobody_needs_any_more_is_taken_out_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    kept, removed = set(), set()
    for name in ("used", "gone", "just gone", "unused", "of old code"):
        path = tmp_path / f"{name}.csv"
        path.write_bytes(table(ROWS, ","))
        lines = tmp_path / f"{name}.jsonl"
        lines.write_bytes(jsonl(ROWS))
        for file in (path, lines):
            open_container(file, cache)
            digest = FileStamp.of(file).digest
            place = cache / (digest if file == path else f"{digest}.npy")
            assert place.exists()
            age(place, 40)
            note = cache / "used" / digest
            age(note, {"just gone": 0.5, "gone": 2, "unused": 31}.get(name, 2))
            if name == "of old code":
                note.unlink()
            if name in ("gone", "just gone"):
                file.unlink()
            (kept if name in ("used", "just gone") else removed).add(place)
    leftovers = [
        (".rows-0f.123.tmp", True, 2, False),
        (".rows-0e.124.tmp", True, 0.5, True),
        (f"{'0' * 32}.npy.12-0123abcd.part", False, 2, False),
        (f"{'1' * 32}.npy.12-0123abcd.part", False, 0.5, True),
        ("rows-0f", True, 99, True),
        ("downloads", True, 99, True),
        ("notes.npy", False, 99, True),
        (".hidden", False, 99, True),
        (f"{'2' * 31}", True, 99, True),
    ]
    for name, is_folder, days, stays in leftovers:
        place = cache / name
        if is_folder:
            place.mkdir()
            (place / "inner.txt").write_text("x")
        else:
            place.write_text("x")
        age(place, days)
        (kept if stays else removed).add(place)
    foreign = cache / FileStamp.of(tmp_path / "unused.csv").digest / "readme.txt"
    foreign.write_text("not ours")
    copies = cache / FileStamp.of(tmp_path / "used.csv").digest
    part = copies / "1.2.table.7-0123abcd.part"
    part.write_text("x")
    age(part, 2)
    (cache / ("3" * 32)).symlink_to(tmp_path)
    kept.add(cache / ("3" * 32))

    monkeypatch.setattr(cleaning, "_cleaned", set())
    (tmp_path / "new.jsonl").write_bytes(jsonl(ROWS))
    open_container(tmp_path / "new.jsonl", cache)  # which writes something new
    assert {place for place in kept if not place.exists()} == set()
    left = {place for place in removed if place.exists()}
    assert left == {foreign.parent}
    assert list(foreign.parent.iterdir()) == [foreign]
    assert not part.exists()
    assert len(list(copies.iterdir())) == 2  # the copy and its index
    assert rows_of(open_container(tmp_path / "used.csv", cache))


def test_a_use_is_noted_about_once_a_day(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "rows.csv").write_bytes(table(ROWS, ","))
    cache = tmp_path / "cache"
    for name in ("rows.jsonl", "rows.csv"):
        open_container(tmp_path / name, cache)
        note = cache / "used" / FileStamp.of(tmp_path / name).digest
        age(note, 20)
        open_container(tmp_path / name, cache)
        assert time.time() - note.stat().st_mtime < 86_400


def test_a_cache_that_cannot_be_cleaned_stops_nothing(tmp_path: Path) -> None:
    cleaning.clean(tmp_path / "none")
    (tmp_path / "used").write_text("a file, not our folder")
    (tmp_path / f".x.{'9' * 9}.tmp").write_text("")
    age(tmp_path / f".x.{'9' * 9}.tmp", 2)
    cleaning.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


LINES = st.lists(
    st.one_of(
        st.sampled_from([b"", b" ", b"\t\r", b"{", b"null", b"\xff", b"\0", b" {} ", b'{"a": 1}']),
        st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=5), max_size=3).map(
            lambda row: json.dumps(row).encode()
        ),
    ),
    max_size=30,
)


@settings(max_examples=100, deadline=None)
@given(LINES, st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.booleans(), st.integers(4, 40))
def test_any_lines_are_read_as_a_naive_reader_does(
    lines: list[bytes], end: bytes, last_end: bool, bom: bool, scan_bytes: int
) -> None:
    content = b"\xef\xbb\xbf" * bom + end.join(lines) + end * last_end
    expected = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            try:
                expected.append((number, json.loads(line)))
            except ValueError:
                expected.append((number, DataError))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_SCAN_BYTES", scan_bytes)
        patch.setattr(json_rows, "_BLOCK_BYTES", scan_bytes)
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(content)
        if content.removeprefix(b"\xef\xbb\xbf").lstrip()[:2] in (b"{", b"{\n", b"{\r", b"{\0"):
            return  # refused as a whole
        container = open_container(path, Path(folder) / "cache")
        for rows in (
            container.read_range(0, len(container)),
            open_stream(path).iterate(0, 1),
        ):
            found = [
                (int(where.rpartition(":")[2]), DataError if isinstance(row, DataError) else row)
                for where, row in rows
            ]
            assert found == expected


ROW_LISTS = st.lists(
    st.dictionaries(
        st.text(max_size=3), st.integers() | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=5) | st.lists(st.booleans(), max_size=2), max_size=3
    ) | st.integers() | st.text(max_size=3),
    max_size=9,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(ROW_LISTS, st.sampled_from([None, 1]), st.booleans(), st.booleans(), st.integers(1, 20))
def test_any_document_is_read_as_json_reads_it(
    rows: list[Any], indent: int | None, ascii_only: bool, wrapped: bool, piece_bytes: int
) -> None:
    document = {"info": [1, 2], "rows": rows} if wrapped and rows else rows
    if isinstance(document, dict) and not all(isinstance(row, dict) for row in rows):
        document = rows
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_PIECE_BYTES", piece_bytes)
        path = Path(folder) / "rows.json"
        text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
        path.write_bytes(text.encode())
        assert rows_of(open_container(path, Path(folder) / "cache")) == rows


# --- rows that cannot be read --------------------------------------------------------------------

BAD_LINES: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (b'{"a": "caf\xe9"}', r"is not UTF-8 \(byte 11 of the row\); save the file as"),
    "NaN": (b'{"a": NaN}', "holds NaN, which is no finite number; write null"),
    "infinity": (b'{"a": [-Infinity]}', "holds -Infinity, which is no finite number"),
    "infinite by its exponent": (b'{"a": {"b": 1e999}}', "holds 1e999, which is no finite number"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", "a number too large to be read; write it as a"),
    "nested": (b"[" * 100_000, "is nested too deeply"),
    "nested and whole": (b'{"a":' * 2000 + b"1" + b"}" * 2000, "is nested too deeply"),
    "tab in a string": (b'{"a": "x\ty"}', r"raw control character \(U\+0009\) at column 9"),
    "cut in a string": (b'{"a": "x', "is cut short: the string that starts at column 7"),
    "cut after a value": (b'{"a": 1', "is cut short after column 7"),
    "cut after a key": (b'{"a":', "is cut short after column 5"),
    "NUL bytes": (b"\0" * 64, "is all NUL bytes: the file was not written to its end"),
    "NUL inside": (b'{"a": \0}', "NUL bytes, so the file may be damaged"),
    "two objects": (b'{"a": 1} {"b": 2}', r"two objects in one line \(the second at column 10\)"),
    "two with a comma": (b'{"a": 1}, {"b": 2}', "two values with a comma between at column 9"),
    "comma after": (b'{"a": 1},', "ends with a comma at column 9"),
    "words after": (b'{"a": 1} # note', r"goes on after its end \(at column 10\)"),
    "trailing comma": (b'{"a": 1,}', "has a trailing comma before '}' at column"),
    "trailing comma in a list": (b'{"a": [1,]}', r"has a trailing comma before '\]' at column"),
    "Python": (b"{'a': 1}", r"written as Python, not as JSON \(a single quote at column 2\)"),
    "Python's None": (b'{"a": None}', "holds Python's None at column 7"),
    "backslash": (b'{"a": "C:\\data"}', "holds an escape at column 10 that JSON does not know"),
    "carriage returns": (b'{"a": 1}\r{"b": 2}', "ends its lines with a bare carriage return"),
    "bare word": (b"hello", "is not JSON: Expecting value at column 1; write one object a line"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_costs_its_row_alone_and_says_why(kind: str, tmp_path: Path) -> None:
    line, message = BAD_LINES[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\n' + line + b'\n{"n": 3}\n')
    container = open_container(path, tmp_path / "cache")
    with pytest.raises(DataError, match=message) as raised:
        container.read(1)
    assert str(path) not in str(raised.value)
    for rows in (container.read_range(0, 3), open_stream(path).iterate(0, 1)):
        (_, first), (where, error), (_, third) = rows
        assert (first, third) == ({"n": 1}, {"n": 3})
        assert where == f"{path}:2"
        assert isinstance(error, DataError)
        assert str(error) == str(raised.value)


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (b"[1, 2]", [1, 2]),
        (b"null", None),
        (b'"text"', "text"),
        (b"12345678901234567890123", 12345678901234567890123),  # not rounded
        (b'{"a": "\\ud83d"}', {"a": "\ud83d"}),  # for the converter to refuse in its own words
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),  # files put together with cat
    ],
)
def test_other_values_are_passed_on_as_they_are(line: bytes, row: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n" + line + b"\n")
    container = open_container(path, tmp_path / "cache")
    assert container.read(1) == row
    assert rows_of(container) == [{}, row]


def test_a_row_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MAX_ROW_BYTES", 1 << 20)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\n{"a": "' + b"x" * (3 << 20) + b'"}\n{"n": 3}\n')
    container = open_container(path, tmp_path / "cache")
    for rows in (container.read_range(0, 3), open_stream(path).iterate(0, 1)):
        (_, first), (where, error), (_, third) = rows
        assert (first, third, where) == ({"n": 1}, {"n": 3}, f"{path}:2")
        assert "is 3 MiB long" in str(error)


def test_a_bad_element_of_a_document_costs_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": 1}, {"a": NaN}, 5, {"a": "caf\xe9"}, {"a": "x\ty"}, {"a": 6}]')
    container = open_container(path, tmp_path / "cache")
    rows = rows_of(container)
    assert [rows[0], rows[2], rows[5]] == [{"a": 1}, 5, {"a": 6}]
    for i, message in ((1, "holds NaN"), (3, "is not UTF-8"), (4, "raw control character")):
        assert isinstance(rows[i], DataError)
        assert message in str(rows[i])
    assert container.where(3) == f"{path}:4"


BAD_RECORDS = [
    (b"1,2,3", "has 3 fields, where the header names 2"),
    (b"1", "has 1 fields, where the header names 2"),
    (b"1,caf\xe9", "column 'b' is not UTF-8"),
    (b'1,"x"y', "has text after a closing double quote"),
]


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS)
def test_a_bad_record_costs_its_row_alone(record: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\r\n"x\r\ny",\r\n\r\n' + record + b"\r\n5,6")
    container = open_container(path, tmp_path / "cache")
    for rows in (container.read_range(0, 3), open_stream(path).iterate(0, 1)):
        (first_place, first), (place, error), (last_place, last) = rows
        assert (first, last) == ({"a": "x\r\ny", "b": None}, {"a": "5", "b": "6"})
        assert (first_place, place, last_place) == (f"{path}:2", f"{path}:5", f"{path}:6")
        assert isinstance(error, DataError)
        assert message in str(error)


def test_a_quote_left_open_does_not_swallow_the_rest_unseen(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\n1,2\n3,"4\n5,6\n7,8\n')
    (_, row), (where, error) = open_container(path, tmp_path / "cache").read_range(0, 9)
    assert (row, where) == ({"a": "1", "b": "2"}, f"{path}:3")
    assert "never closed (it takes the last 3 lines" in str(error)


# --- files that cannot be read at all ------------------------------------------------------------

UTF16 = '{"a": 1}\n'.encode("utf-16")
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "UTF-16": ("a.jsonl", UTF16, "a.jsonl: is UTF-16; save it as UTF-8"),
    "UTF-16, no BOM": ("a.json", UTF16[2:], "is UTF-16; save it as UTF-8"),
    "UTF-16 CSV": ("a.csv", "a,b\n1,2".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    "LFS": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1", "run 'git lfs pull'"),
    "web page": ("a.json", b"\n<!DOCTYPE html><html>", "is a web page or XML"),
    "zip by content": ("a.csv", b"PK\x03\x04....", "zip, Parquet, bzip2 or xz file under another"),
    "document as lines": ("a.jsonl", pretty(ROWS), "one JSON document over many lines.*name it"),
    "gzip cut": ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:-20], "a.jsonl.gz: is cut short"),
    "gzip damaged": (
        "a.jsonl.gz",
        gzip.compress(jsonl(ROWS))[:-6] + b"\0" * 6,
        "is damaged gzip data",
    ),
    "zstd cut": ("a.jsonl.zst", zstandard.compress(jsonl(ROWS))[:-9], "is cut short"),
    "zstd damaged": (
        "a.jsonl.zst",
        zstandard.compress(jsonl(ROWS))[:9] + b"\xff" * 20,
        "is damaged zstandard data",
    ),
    "list cut": ("a.json", pretty(ROWS)[:-60], "is cut short: this value has no end .line 32, "),
    "list without end": ("a.json", b'[{"a": 1},\n{"a": 2}', "is cut short: the list or object"),
    "no comma": ("a.json", b'[{"a": 1}\n {"a": 2}]', r"',' was expected \(line 2, column 2\)"),
    "comma at the end": (
        "a.json",
        b'[{"a": 1},\n]',
        r"has a comma before a closing bracket \(line 2, column 1\)",
    ),
    "two documents": ("a.json", b'[{"a": 1}]\n[{"a": 2}]', r"goes on after its end \(line 2, col"),
    "one string": ("a.json", b'"text"', "starts with '\"' .line 1, column 1.; expected a list"),
    "one object": ("a.json", b'{"messages": [{"role": "user"}]}', "is one object .'messages' in"),
    "two lists": ("a.json", b'{"train": [{}], "test": [{}]}', r"several lists .*'train', 'test'"),
    "deep": ("a.json", b"[" + b"[" * 99_999, "is nested too deeply"),
    "COCO boxes": (
        "a.json",
        b'{"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": []}], "data": [{}]}',
        "holds several lists of rows",
    ),
    "header twice": ("a.csv", b"a,a\n1,2", "a.csv:1: two columns are called 'a'"),
    "blank header": ("a.csv", b"\na,b\n1,2", "a.csv:1: is blank"),
    "header not UTF-8": ("a.csv", b"caf\xe9,b\n1,2", "a.csv:1: the header is not UTF-8"),
    "not Parquet": ("a.parquet", b"hello", "is not a Parquet file, or is damaged"),
    "Parquet cut": ("a.parquet", parquet(ROWS)[:-30], "is not a Parquet file, or is damaged"),
    "not Arrow": ("a.arrow", b"hello", "is not an Arrow file, or is damaged"),
    "Parquet by LFS": ("a.parquet", b"version https://git-lfs.github.com", "run 'git lfs pull'"),
    "not tar": ("a.tar", b"hello", "is not a tar archive"),
    "spreadsheet": ("a.xlsx", b"PK", "save the sheet as CSV"),
    "pickle": ("a.pkl", b"", "pickles are never loaded"),
    "weights": ("a.pt", b"", "pickles are never loaded"),
    "archive": ("a.zip", b"PK", "unpack it"),
    "bzip2": ("a.jsonl.bz2", b"BZh", "unpack it"),
    "XML": ("a.xml", b"<a/>", "convert it to a JSON object a line"),
    "text": ("a.txt", b"hello", "a text file has no columns"),
    "PDF": ("a.pdf", b"%PDF", "a row names a PDF as its image"),
    "image": ("a.png", b"", "one image is no rows"),
    "script": ("a.py", b"", "scripts are never run"),
    "unknown": ("a.foo", b"", "the suffix .foo does not tell what it holds; expected .jsonl"),
    "no suffix": ("rows", b"{}", "a name without a suffix does not tell"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_at_all_is_refused_with_what_to_do(kind: str, tmp_path: Path) -> None:
    name, content, message = REFUSED[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        open_container(tmp_path / name, tmp_path / "cache")
    assert str(tmp_path / name) in str(raised.value)
    if (tmp_path / "cache").exists():
        assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\xef\xbb\xbf\n \r\n"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("a.json", b"[]"),
        ("a.json", b" \n"),
        ("a.json", b'[ ]'),
        ("a.csv", b""),
        ("a.csv", b"a,b\n\n"),
        ("a.parquet", parquet([{"a": 1}][:0] or [])),
        ("a.tar", tar({})),
    ],
)  # fmt: skip
def test_an_empty_file_is_no_rows(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    for _ in range(2):
        container = open_container(tmp_path / name, tmp_path / "cache")
        assert len(container) == 0
        assert rows_of(container) == []


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(b"{}")
    with pytest.raises(DataError, match=r"tran.jsonl: cannot be read \(No such file.*did you mean"):
        open_container(tmp_path / "tran.jsonl", tmp_path / "cache")
    with pytest.raises(DataError, match="there is no folder"):
        open_container(tmp_path / "x" / "tran.jsonl", tmp_path / "cache")
    with pytest.raises(DataError, match="no file fits this pattern"):
        open_container(tmp_path / "*.parquet", tmp_path / "cache")
    with pytest.raises(DataError, match=r"shard-1.jsonl: is not there"):
        open_container(tmp_path / "shard-{1..2}.jsonl", tmp_path / "cache")


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="is no regular file"):
        open_container(tmp_path / "rows.jsonl", tmp_path / "cache")


def test_a_small_archive_may_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached, "FREE_DISK_KEPT_BYTES", 1 << 60)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\0" * 1000))
    with pytest.raises(DataError, match=r"a.jsonl.gz: an uncompressed copy .* does not fit"):
        open_container(tmp_path / "a.jsonl.gz", tmp_path / "cache")
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


# --- folders -------------------------------------------------------------------------------------


def write_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}\n" if name.endswith("jsonl") else b"a\n1\n")
    return folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["README.md", "src/x.py"], "holds README.md, src/; expected .jsonl"),
        ([".hidden.jsonl"], "holds nothing; expected"),
        (["train.jsonl", "test.jsonl"], r"several splits .*; point at one.*, such as .*/train\*"),
        (["train-0.csv", "val-0.csv"], r"several splits .*, such as .*/train\*"),
        (["a.jsonl", "b.tar"], r"files of several kinds .a.jsonl, b.tar.; point at .*\*.jsonl"),
        (["train/a/1.png", "test/a/1.png"], "several splits .test, train."),
        (["1.png", "2.png"], "holds 1.png, 2.png; expected"),
        (["metadata.jsonl", "metadata.csv"], "several metadata files"),
    ],
)
def test_a_folder_that_fits_nothing_says_what_it_holds(
    names: list[str], message: str, tmp_path: Path
) -> None:
    write_files(tmp_path / "data", *names)
    with pytest.raises(DataError, match=message):
        open_container(tmp_path / "data", tmp_path / "cache")


def test_text_files_of_several_kinds_are_read_as_one(tmp_path: Path) -> None:
    write_files(tmp_path / "data", "a.jsonl", "b.csv", "notes.txt")
    container = open_container(tmp_path / "data", tmp_path / "cache")
    assert rows_of(container) == [{}, {"a": "1"}]
    assert container.where(1) == f"{tmp_path}/data/b.csv:2"


def test_a_saved_dictionary_of_splits_names_them(tmp_path: Path) -> None:
    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"point at one of them: .*/saved/train, .*/saved/test"):
        open_container(tmp_path / "saved", tmp_path / "cache")
    assert rows_of(open_container(tmp_path / "saved" / "test", tmp_path / "cache")) == ROWS


def test_folders_of_images_are_labels(tmp_path: Path) -> None:
    folder = write_files(
        tmp_path / "pets", "dog/2.JPG", "cat/1.png", "cat/.3.png", ".x/4.png", "0.png", "cat/a.txt"
    )
    (folder / "loop").symlink_to(folder)
    container = pickle.loads(pickle.dumps(open_container(folder, tmp_path / "cache")))
    assert rows_of(container) == [
        {"image": "0.png"},
        {"image": "cat/1.png", "label": "cat"},
        {"image": "dog/2.JPG", "label": "dog"},
    ]
    assert container.where(1) == f"{folder}/cat/1.png"
    assert container.root == folder
    before = container.identity()
    write_files(folder, "cat/5.png")
    assert open_container(folder, tmp_path / "cache").identity() != before


def test_file_names_become_images(tmp_path: Path) -> None:
    rows = [{"file_names": ["1.png"], "text": "x"}, {"file_name": "a", "image": "b"}, 3]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    container = open_container(tmp_path, tmp_path / "cache")
    assert rows_of(container) == [{"images": ["1.png"], "text": "x"}, rows[1], 3]
    assert container.where(0) == f"{tmp_path}/metadata.jsonl:1"


# --- COCO ----------------------------------------------------------------------------------------


def write_scattered(folder: Path) -> Path:
    """Two files of one name in two folders, and the pattern that takes both."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "rows.jsonl").write_bytes(jsonl(ROWS[:1]))
    return folder / "*" / "rows.jsonl"


@pytest.mark.parametrize("opener", [lambda path: open_container(path, path.parent), open_stream])
def test_files_of_several_folders_name_them(opener: Callable[[Path], Any], tmp_path: Path) -> None:
    opened = opener(write_scattered(tmp_path / "gl"))
    assert opened.root.resolve() == tmp_path / "gl"
    assert opened.roots == (tmp_path / "gl" / "a", tmp_path / "gl" / "b")
    (tmp_path / "gl" / "a" / "more.jsonl").write_bytes(jsonl(ROWS[:1]))
    same = opener(tmp_path / "gl" / "a" / "*.jsonl")
    assert same.root == tmp_path / "gl" / "a"
    assert same.roots == ()


def source_of(path: Path, *, streaming: bool, **settings: Any) -> list[Row]:
    columns = Columns(image="image", question="question", answer="answer")
    entry = DataSource(path=str(path), columns=columns, streaming=streaming, **settings)
    section, cache = DataSection(train=(entry,)), path.parent.parent.parent / "cache"
    if streaming:
        found = open_stream_source(entry, section, cache).iterate()
    else:
        opened = open_source(entry, section, cache)
        found = opened.rows(0, len(opened))
    return [row for _, row in found if isinstance(row, Row)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_relative_path_of_rows_of_several_folders_is_refused(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One picture would else be taken for both, or none found."""
    monkeypatch.chdir(tmp_path)
    pattern = write_scattered(tmp_path / "gl")
    folders = [tmp_path / "gl", tmp_path / "gl" / "a", tmp_path / "gl" / "b"]
    for number, folder in enumerate(folders):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(folder / "0.png")
    first, second = source_of(pattern, streaming=streaming)
    for row in (first, second):
        with pytest.raises(DataError) as caught:
            load_image("0.png", row.image_access)
        assert str(caught.value) == (
            "rows come from several folders (gl/a, gl/b), so that it is not clear where '0.png' "
            "starts; set image_root"
        )
        for clear in (str(tmp_path / "gl" / "b" / "0.png"), (folders[2] / "0.png").read_bytes()):
            assert load_image(clear, row.image_access).getpixel((0, 0)) == (2, 0, 0)
    named = source_of(pattern, streaming=streaming, image_root=str(tmp_path / "gl"))
    assert load_image("0.png", named[0].image_access).size == (2, 2)
    [alone] = source_of(tmp_path / "gl" / "a" / "*.jsonl", streaming=streaming)
    assert load_image("0.png", alone.image_access).getpixel((0, 0)) == (1, 0, 0)


def test_coco_captions_are_joined_to_their_images(tmp_path: Path) -> None:
    document = {
        "info": {},
        "annotations": [
            {"id": 1, "image_id": 7, "caption": "A cat."},
            {"id": 2, "image_id": 9, "caption": "Lost."},
            {"id": 3, "image_id": 7, "caption": "A dog."},
        ],
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "8.jpg"}],
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(document))
    for _ in range(2):
        container = open_container(path, tmp_path / "cache")
        first, second, third = rows_of(container)
        assert first == {"image": "7.jpg", "captions": ["A cat.", "A dog."]}
        assert second == {"image": "8.jpg", "captions": []}
        assert isinstance(third, DataError)
        assert "annotation 2 is about image_id 9, which 'images' does not hold" in str(third)


# --- Arrow values --------------------------------------------------------------------------------


def test_values_of_tables_become_plain_ones(tmp_path: Path) -> None:
    content = pa.table(
        {
            "when": [datetime(2026, 1, 2), None],
            "price": [Decimal("1.50"), Decimal("2.00")],
            "score": [float("nan"), 0.5],
            "inner": [{"t": [datetime(2026, 1, 2)]}, None],
            "map": pa.array([[("a", 1)], [("b", 2)]], pa.map_(pa.string(), pa.int64())),
            "word": pa.array(["x", "y"]).dictionary_encode(),
            "image": [{"bytes": b"\x89PNG", "path": None}, {"bytes": None, "path": "a.png"}],
        }
    )
    pq.write_table(content, tmp_path / "rows.parquet")
    assert rows_of(open_container(tmp_path / "rows.parquet", tmp_path / "cache")) == [
        {
            "when": "2026-01-02 00:00:00",
            "price": "1.50",
            "score": None,
            "inner": {"t": ["2026-01-02 00:00:00"]},
            "map": {"a": 1},
            "word": "x",
            "image": {"bytes": b"\x89PNG", "path": None},
        },
        {
            "when": None,
            "price": "2.00",
            "score": 0.5,
            "inner": None,
            "map": {"b": 2},
            "word": "y",
            "image": {"bytes": None, "path": "a.png"},
        },
    ]


def test_a_bad_value_of_a_table_costs_its_row_alone(tmp_path: Path) -> None:
    text = pa.array([b"ok", b"\xff", b"fine"]).cast(pa.binary()).view(pa.string())
    content = pa.table({"text": text, "x": [1.0, 2.0, float("inf")]})
    with pa.ipc.new_file(tmp_path / "rows.arrow", content.schema) as out:
        out.write_table(content)
    container = open_container(tmp_path / "rows.arrow", tmp_path / "cache")
    first, second, third = rows_of(container)
    assert first == {"text": "ok", "x": 1.0}
    assert isinstance(second, DataError)
    assert "cannot be read" in str(second)
    assert "holds inf, which is no finite number" in str(third)
    with pytest.raises(DataError, match="cannot be read"):
        container.read(1)


def test_images_stay_undecoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the way: these bytes are no image, and only decoding would notice."""
    features = datasets.Features({"images": datasets.List(datasets.Image())})
    stored = {"bytes": b"no image", "path": "a.png"}
    made = datasets.Dataset.from_dict({"images": [[stored]]}, features=features)
    monkeypatch.chdir(tmp_path)
    made.save_to_disk("saved")
    Path("user/name").mkdir(parents=True)
    made.to_parquet("user/name/train.parquet")
    hub: dict[str, Any] = {"config": None, "split": "train", "revision": "main"}
    containers = [
        open_container(Path("saved"), Path("cache")),
        open_container(Path("user/name/train.parquet"), Path("cache")),
        open_hub("user/name", **hub, cache=Path("cache")),
    ]
    assert [rows_of(container) for container in containers] == [[{"images": [stored]}]] * 3
    for stream in (
        open_stream(Path("user/name/train.parquet")),
        open_hub_stream("user/name", **hub),
    ):
        assert [row for _, row in stream.iterate(0, 1)] == [{"images": [stored]}]


# --- tar -----------------------------------------------------------------------------------------


def open_tar_of(members: dict[str, bytes], folder: Path) -> list[tuple[str, Any]]:
    (folder / "a.tar").write_bytes(tar(members))
    container = open_container(folder / "a.tar", folder / "cache")
    found = list(container.read_range(0, len(container)))
    assert [where for where, _ in found] == [container.where(i) for i in range(len(container))]
    return [(where.rpartition("/")[2], row) for where, row in found]


def test_members_of_one_name_are_one_sample(tmp_path: Path) -> None:
    """Wherever they stand in the archive."""
    found = open_tar_of(
        {
            "./b.jpg": b"JB",
            "a.1.png": b"A1",
            "a.0.png": b"A0",
            "b.json": b'{"question": "?", "image": "originals/77.jpg"}',
            "a.txt": "ein Bär".encode(),
            "b.cls": b"3",
            "._b.jpg": b"",
        },
        tmp_path,
    )
    assert found == [
        ("a.tar:b", {"__key__": "b", "question": "?", "image": b"JB"}),
        ("a.tar:a", {"__key__": "a", "caption": "ein Bär", "images": [b"A0", b"A1"]}),
    ]


def test_names_of_members_in_the_json_become_their_bytes(tmp_path: Path) -> None:
    content = [
        {"type": "image", "image": "x.b.png"},
        {"type": "image_url", "image_url": {"url": "./d/x.a.png"}},
        {"type": "text", "text": "x.a.png"},
    ]
    row = {"messages": [{"role": "user", "content": content}], "images": ["x.a.png", "y.png"]}
    [(_, found)] = open_tar_of(
        {"d/x.a.png": b"A", "d/x.b.png": b"B", "d/x.json": json.dumps(row).encode()}, tmp_path
    )
    parts = found["messages"][0]["content"]
    assert parts[0]["image"] == b"B"
    assert parts[1]["image_url"] == {"url": b"A"}
    assert parts[2]["text"] == "x.a.png"
    assert found["images"] == [b"A", "y.png"]
    assert "image" not in found


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"A"}, r"has no .json or .txt member \(found a.png\)"),
        ({"a.json": b"{'x': 1}"}, "a.json is written as Python"),
        ({"a.json": b"[1]"}, "a.json must hold one object"),
        ({"a.x.json": b"{}", "a.y.json": b"{}"}, "has 2 JSON members"),
        ({"a.txt": b"x", "a.b.txt": b"y"}, "has 2 text members"),
        ({"a.txt": b"\xff"}, "a.txt is not UTF-8"),
        ({"/a.json": b"{}"}, "has a name that leads out of the archive"),
        ({"x/../../a.json": b"{}"}, "has a name that leads out of the archive"),
    ],
)
def test_a_bad_sample_costs_its_row_alone(
    members: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    found = open_tar_of(members | {"z.json": b'{"n": 1}'}, tmp_path)
    assert len(found) == 2
    assert isinstance(found[0][1], DataError)
    assert message.replace("\\", "") in str(found[0][1]) or pytest.fail(str(found[0][1]))
    assert found[1] == ("a.tar:z", {"__key__": "z", "n": 1})


def test_links_in_an_archive_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("a.json")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    container = open_container(tmp_path / "a.tar", tmp_path / "cache")
    with pytest.raises(DataError, match="is a link, a device"):
        container.read(0)


def test_a_member_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for content in (b'{"n": 1}', b'{"n": 2}'):
            info = tarfile.TarInfo("a.json")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match=r"holds 'a.json' twice"):
        open_container(tmp_path / "a.tar", tmp_path / "cache").read(0)


def test_an_archive_cut_anywhere_loses_no_sample_unseen(tmp_path: Path) -> None:
    """Each sample takes a header and one block of 512 bytes, the last one padded with zeros."""
    whole = samples(ROWS)
    path = tmp_path / "a.tar"
    for cut in range(512, 1024 * len(ROWS), 100):
        path.write_bytes(whole[:cut])
        rows = rows_of(open_container(path, tmp_path / "cache"))
        num_begun, rest = divmod(cut, 1024)
        whole_bytes = 512 + len(json.dumps(ROWS[num_begun]))
        num_whole = num_begun + (rest >= whole_bytes)
        assert rows[:num_whole] == ROWS[:num_whole]
        assert all(isinstance(row, DataError) for row in rows[num_whole:])
        assert len(rows) == num_whole + (rest > 0)


def test_a_damaged_header_is_no_quiet_end(tmp_path: Path) -> None:
    whole = bytearray(samples(ROWS))
    whole[2048:2148] = b"\x07" * 100
    (tmp_path / "a.tar").write_bytes(whole)
    rows = rows_of(open_container(tmp_path / "a.tar", tmp_path / "cache"))
    assert rows[:2] == ROWS[:2]
    assert len(rows) == 3
    assert "cannot be read from byte 2,048" in str(rows[2])


# --- the Hub -------------------------------------------------------------------------------------

HUB: dict[str, Any] = {"config": None, "split": "train", "revision": "main"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset of four shards, standing in for one of the Hub."""
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        file = Path(f"user/name/data/train-{i}-of-4.parquet")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(parquet(ROWS[2 * i : 2 * i + 2]))
    return "user/name"


def test_a_hub_dataset_gives_the_rows_of_the_plain_file(hub: str, tmp_path: Path) -> None:
    container = open_hub(hub, **HUB, cache=tmp_path / "cache")
    for same in (container, pickle.loads(pickle.dumps(container))):
        assert rows_of(same) == ROWS
        assert [same.read(i) for i in range(7)] == ROWS
        assert (same.shown, same.where(1)) == ("user/name/train", "user/name/train:2")
    assert json.loads(json.dumps(container.identity())) == container.identity()
    part = open_hub(hub, config=None, split="train[2:4]", revision="main", cache=tmp_path / "cache")
    assert rows_of(part) == ROWS[2:4]
    assert part.identity() != container.identity()


def test_every_row_of_a_hub_stream_goes_to_one_consumer(hub: str) -> None:
    stream = pickle.loads(pickle.dumps(open_hub_stream(hub, **HUB)))
    assert [row for _, row in stream.iterate(0, 1)] == ROWS
    for count in range(1, 8):
        dealt = []
        for consumer in range(count):
            mine = list(stream.iterate(consumer, count))
            assert list(stream.iterate(consumer, count, 1)) == mine[1:]
            dealt += mine
        assert len({where for where, _ in dealt}) == len(ROWS)
        assert sorted((row for _, row in dealt), key=ROWS.index) == ROWS


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "test"}, "has no split 'test'; it has: train"),
        ({"config": "big"}, "has no config 'big'; it has: default"),
    ],
)
def test_another_split_or_config_names_those_there_are(
    changed: dict[str, Any], message: str, hub: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        open_hub(hub, **(HUB | changed), cache=tmp_path / "cache")
    with pytest.raises(DataError, match=message):
        open_hub_stream(hub, **(HUB | changed))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DatasetNotFoundError("Dataset 'u/n' doesn't exist on the Hub"), "mind the spelling"),
        (DatasetNotFoundError("Dataset 'u/n' is a gated dataset"), "hf auth login"),
        (DatasetNotFoundError("Revision 'main' doesn't exist for"), "has no revision 'main'"),
        (ConnectionError("Couldn't reach"), "could not be reached"),
        (RuntimeError("Dataset scripts are no longer supported"), "code from the Hub is never run"),
        (ValueError("Config name is missing.\nPick one: ['a', 'b']"), "config to one of: a, b"),
        (KeyError("odd"), r"cannot be read \(KeyError: 'odd'\)"),
    ],
)  # fmt: skip
def test_errors_of_the_hub_say_what_to_do(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", failing)
    with pytest.raises(DataError, match=f"^u/n: .*{message}"):
        open_hub("u/n", **HUB, cache=tmp_path)
