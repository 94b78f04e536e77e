"""What is promised in docs/security.md: what was written by others is data, and never runs, fills
the memory, leads out of its folder, or comes to stand in a page as more than text.
"""

import struct
import time
import zlib
from pathlib import Path

import pytest

from data_formats import mmmu
from data_formats.chat import FormatError
from data_formats.mmmu import MAX_LIST_CHARACTERS
from finetune.data.images import ImageAccess, load_image, name_of
from finetune.data.signatures import why_no_image
from finetune.errors import DataError, RecipeError
from finetune.patterns import written_out
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.syntax import MAX_BYTES, MAX_DEPTH, MAX_DIGITS, MAX_VALUES, parse_yaml

HERE = ImageAccess(Path())
RECIPE = "model: {name: nano}\ndata: {train: [{hub: user/name}]}\n"


# The recipe.


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def laughs(levels: int = 9) -> str:
    """A few lines that stand for ten to the power of `levels` values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    return "\n".join(lines)


MANY_KEYS = ", ".join(f"key{i}: {i}" for i in range(1000))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(), f"line 4: holds more than {MAX_VALUES:,} values up to here"),
        (
            f"a: &a {{{MANY_KEYS}}}\nb: {{<<: [{', '.join(['*a'] * 1000)}]}}",
            f"line 2: holds more than {MAX_VALUES:,} values up to here",
        ),
        ("- x\n" * 2 * MAX_VALUES, f"line {MAX_VALUES + 1}: holds more than {MAX_VALUES:,} values"),
        ("a: &a [*a]", "line 1: *a stands within &a"),
        ("a: &a {<<: *a}", "line 1: *a stands within &a"),
        ("[" * 100_000, f"line 1: is nested more than {MAX_DEPTH} levels deep"),
        ("? " * 100_000, f"line 1: is nested more than {MAX_DEPTH} levels deep"),
        (
            "a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 100)),
            f"is nested more than {MAX_DEPTH} levels deep",
        ),
        ("a: 1" + ":1" * 100_000, "line 1: holds a number of 200,001 characters"),
        ("a: 0x" + "f" * MAX_DIGITS, f"line 1: holds a number of {MAX_DIGITS + 2} characters"),
    ],
)
def test_yaml_that_stands_for_more_than_a_recipe_holds_is_refused_at_once(
    tmp_path: Path, text: str, message: str
) -> None:
    began = time.perf_counter()
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text)
    assert time.perf_counter() - began < 5
    assert message in str(caught.value)
    with pytest.raises(RecipeError, match=r"adapter\.rank: the value after '=': "):
        load(tmp_path, RECIPE, f"adapter.rank={text}")


@pytest.mark.parametrize(
    "text",
    [
        "a: !!bool maybe",
        "a: !!timestamp soon",
        "a: !!int ''",
        "a: !!float x",
        "a: 1" + ":1" * 49 + ".5",
        "a: !!python/object/apply:os.system ['touch marker']",
        "a: !!python/name:os.system",
    ],
)
def test_a_tag_that_leads_the_parser_astray_is_a_message(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError):
        load(tmp_path, text)
    assert not (tmp_path / "marker").exists()


def test_a_file_too_large_for_a_recipe_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole: to read it would take hours
    with pytest.raises(
        RecipeError, match=rf"rows.yaml: is no recipe: .*1,099,511,627,776 .*{MAX_BYTES:,}; give"
    ):
        load_recipe(path)


def test_anchors_and_merges_are_of_use_all_the_same(tmp_path: Path) -> None:
    text = (
        "model: {name: nano}\n"
        "data:\n"
        "  train: [&source {hub: user/name, split: train}]\n"
        "  eval: [{<<: *source, split: test}, *source]\n"
    )
    recipe = load(tmp_path, text, "data.eval.1.split=validation")
    splits = [source.split for source in (*recipe.data.train, *recipe.data.eval)]
    assert splits == ["train", "test", "validation"]  # the override changed no other


def test_braces_stand_for_no_more_files_than_a_list_can_hold() -> None:
    assert len(written_out("{0..999999}{0..999999}")) == len(written_out("{a,b}" * 50)) == 100_001
    assert written_out("{a,b}" * 5000) == ["{a,b}" * 5000]


def test_a_place_of_many_digits_is_no_place(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a list of 1 entry, numbered from 0"):
        load(tmp_path, RECIPE, f"data.train.{'9' * 5000}=x")


def test_a_key_of_any_length_has_a_message_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, f"{RECIPE}? {'k' * 100_000}\n: x")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["https://me:a-password@host/model", "hf_" + "aB3" * 12])
def test_a_recipe_that_holds_a_secret_is_refused_without_saying_it(
    tmp_path: Path, name: str
) -> None:
    for arguments in ((f"{RECIPE}output: {{dir: '{name}'}}",), (RECIPE, f"model.revision={name}")):
        with pytest.raises(RecipeError, match="looks like a password or token") as caught:
            load(tmp_path, *arguments)
        assert name not in str(caught.value)
    assert parse_yaml(f"model: {name}")[0]  # it is readable YAML


# Rows and their pictures.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("[{[]: 1}]", "is no list"),
        ("[{{}}]", "is no list"),
        ("[" * 50_000, "is no list"),
        ("[1" + "+1" * 40_000 + "]", "is no list"),
        (f"['{'x' * MAX_LIST_CHARACTERS}']", "more than the 100,000 of a list"),
        ("[__import__('os').system('touch marker')]", "is no list"),
    ],
)
def test_a_list_written_as_python_is_read_and_never_run(
    options: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"question": "Which?", "image_1": "a.png", "options": options, "answer": "A"}
    with pytest.raises(FormatError, match=message):
        mmmu.parse(row)
    assert not (tmp_path / "marker").exists()


def test_a_picture_of_a_number_without_end_is_none() -> None:
    row = {"question": f"<image {'1' * 5000}>", "image_1": "a.png", "options": [], "answer": "A"}
    assert mmmu.parse(row).messages[0].text == row["question"]


@pytest.mark.parametrize("comment", [b"<!--", b"<!---->", b"<!-- -->\n", b"<?xml"])
def test_what_is_no_image_is_told_in_a_time_that_does_not_double(comment: bytes) -> None:
    began = time.perf_counter()
    for end in (b"x", b"<html>", b"<svg>"):
        why_no_image(comment * 500 + end)
    assert time.perf_counter() - began < 1


def test_a_web_page_and_a_drawing_are_known_behind_comments() -> None:
    assert "(HTML)" in why_no_image(b" <!-- a --> <!-- b --><!doctype html>")
    for start in (b"<?xml version='1.0'?><!-- a -->", b" <!-- a -->", b""):
        assert "is an SVG drawing" in why_no_image(start + b"<svg/>")


def test_a_tiff_that_names_its_strips_a_thousand_times_is_read_once() -> None:
    num_tags, num_strips = 65_535, 500_000
    entry = struct.pack("<HHII", 273, 1, num_strips, 8)
    head = b"II*\0" + struct.pack("<I", 8 + num_strips) + bytes(num_strips)
    data = head + struct.pack("<H", num_tags) + entry * num_tags + bytes(4)
    began = time.perf_counter()
    with pytest.raises(DataError):
        load_image(data, HERE)
    assert time.perf_counter() - began < 10


def test_an_icon_whose_pictures_are_all_the_same_bytes_is_refused() -> None:
    empty = struct.pack(">I4sI", 0, b"none", 0)
    end = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
    png = b"\x89PNG\r\n\x1a\n" + empty * 20_000 + end
    count, first = 65_535, 6 + 16 * 65_535
    entry = struct.pack("<BBBBHHII", 1, 1, 0, 0, 1, 32, len(png), first)
    began = time.perf_counter()
    with pytest.raises(DataError, match="its pictures lie over one another"):
        load_image(b"\0\0\1\0" + struct.pack("<H", count) + entry * count + png, HERE)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("https://me:pw@host:8/a@2.png?sig=pw", "https://...@host:8/a@2.png?..."),
        ("https://host/a.png?X-Amz-Signature=pw", "https://host/a.png?..."),
        ("s3://pw@host/a.png", "s3://...@host/a.png"),
        ("https://host/a?pw=a@b", "https://host/a?..."),
        ("scans/pw?.png", "scans/pw?.png"),
        ("data:image/png;base64,pw", "(data URI)"),
        (b"pw", "(bytes in the row)"),
    ],
)
def test_a_picture_s_name_shows_where_it_is_and_not_what_lets_one_in(
    source: str | bytes, shown: str
) -> None:
    assert name_of(source) == shown
    if isinstance(source, str) and "://" in source:
        with pytest.raises(DataError) as caught:
            load_image(source, HERE)
        assert repr(shown) in str(caught.value)
        assert "pw" not in str(caught.value)
