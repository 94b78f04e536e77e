"""What `finetune convert` copies out of a data set that may be hostile."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_formats.chat import parse_chat
from finetune.convert import Converted, convert
from finetune.data.images import ImageAccess, load_image
from finetune.errors import DataError

RED, GREEN = (255, 0, 0), (0, 255, 0)


def picture(form: str = "PNG", colour: tuple[int, int, int] = RED) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(out, form)
    return out.getvalue()


def pdf(*colours: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    first, *others = [Image.new("RGB", (30, 20), colour) for colour in colours]
    first.save(out, "PDF", save_all=True, append_images=others)
    return out.getvalue()


def mixed(folder: Path, *images: str | bytes) -> Path:
    """Rows of paths, and one that holds its picture, for which all must go into one folder."""
    folder.mkdir(exist_ok=True)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells: list[dict[str, Any]] = [
        {"bytes": image if isinstance(image, bytes) else None, "path": None}
        | ({} if isinstance(image, bytes) else {"path": image})
        for image in (*images, picture())
    ]
    asked = [f"q{number}" for number in range(len(cells))]
    content = {"image": pa.array(cells, kind), "q": asked, "a": asked}
    pq.write_table(pa.table(content), folder / "rows.parquet")
    return folder / "rows.parquet"


def converted(path: Path, out: Path, **settings: Any) -> Converted:
    columns = {"image": "image", "question": "q", "answer": "a"}
    return convert(path, out, columns=columns, **settings)


def sources(out: Path) -> list[str]:
    rows = [parse_chat(json.loads(line)) for line in out.read_text().splitlines()]
    return [str(image.source) for row in rows for image in row.images()]


@pytest.mark.parametrize(
    "name",
    [
        lambda folder: "../secret.png",
        lambda folder: str(folder / "secret.png"),
        lambda folder: "link.png",
    ],
    ids=["..", "absolute", "link"],
)
def test_nothing_outside_the_data_sets_folder_is_copied(
    name: Callable[[Path], str], tmp_path: Path
) -> None:
    (tmp_path / "secret.png").write_bytes(picture(colour=GREEN))
    path = mixed(tmp_path / "in", name(tmp_path))
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    out = tmp_path / "out" / "rows.jsonl"
    with pytest.raises(DataError, match=r"rows\.parquet:1: image .* lies outside image_root") as e:
        converted(path, out)
    assert "data.allow_outside_root" not in str(e.value)  # no recipe is at hand
    assert not out.exists()
    done = converted(path, out, skip_bad=True)
    assert len(done.problems) == 1
    assert done.num_rows == 1
    assert [file.read_bytes() for file in (out.parent / "rows-images").iterdir()] == [picture()]


@pytest.mark.parametrize("content", [b"root:x:0:0:", b"", b"\x80\x04\x95abc", b"RIFF1234WAVE"])
@pytest.mark.parametrize("held", [False, True])
def test_bytes_that_are_no_picture_are_a_problem(
    content: bytes, held: bool, tmp_path: Path
) -> None:
    path = mixed(tmp_path / "in", content if held else "a.png")
    (tmp_path / "in" / "a.png").write_bytes(content)
    out = tmp_path / "out" / "rows.jsonl"
    done = converted(path, out, skip_bad=True)
    assert [problem.split(": ")[0][-15:] for problem in done.problems] == ["/rows.parquet:1"]
    assert [file.read_bytes() for file in (out.parent / "rows-images").iterdir()] == [picture()]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO"])
def test_each_kind_of_picture_gets_its_own_suffix(form: str, tmp_path: Path) -> None:
    path = mixed(tmp_path / "in", picture(form))
    done = converted(path, tmp_path / "rows.jsonl")
    assert not done.problems
    name = sources(tmp_path / "rows.jsonl")[0]
    assert Image.registered_extensions()[Path(name).suffix] == form
    assert (tmp_path / name).read_bytes() == picture(form)


def test_pages_of_a_pdf_stay_pages_of_one_copy(tmp_path: Path) -> None:
    path = mixed(tmp_path / "in", "scan.pdf#page=2", "scan.pdf#page=1", pdf(GREEN))
    (tmp_path / "in" / "scan.pdf").write_bytes(pdf(RED, GREEN))
    out = tmp_path / "rows.jsonl"
    assert not converted(path, out).problems
    second, first, single, _ = sources(out)
    assert second == first.replace("#page=1", "#page=2") != first
    assert len(list((tmp_path / "rows-images").iterdir())) == 3
    for name, colour in ((second, GREEN), (first, RED), (single, GREEN)):
        pixel = load_image(name, ImageAccess(tmp_path)).getpixel((20, 20))
        assert isinstance(pixel, tuple)
        assert max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) < 10


def test_a_page_of_what_is_no_pdf_is_a_problem(tmp_path: Path) -> None:
    path = mixed(tmp_path / "in", "scan.pdf#page=2")
    (tmp_path / "in" / "scan.pdf").write_bytes(picture())
    with pytest.raises(DataError, match=r"is PNG, not a PDF, and has no pages; leave #page=2 out"):
        converted(path, tmp_path / "rows.jsonl")


def test_paths_of_files_of_several_folders_are_problems(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "x.png").write_bytes(picture())
        row = {"image": "x.png", "q": "What?", "a": "This."}
        (tmp_path / "in" / name / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"several folders \(.*where 'x\.png' starts; convert the"):
        converted(tmp_path / "in" / "*" / "rows.jsonl", tmp_path / "rows.jsonl")
    done = converted(tmp_path / "in" / "a" / "rows.jsonl", tmp_path / "a.jsonl")
    assert done.image_root == tmp_path / "in" / "a"
