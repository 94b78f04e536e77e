import base64
import io
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.idefics2.image_processing_pil_idefics2 import (
    Idefics2ImageProcessorPil,
    get_resize_output_image_size,
)

from finetune.data.images import cut_view, load_image, plan_views, resize_to_fit, to_rgb
from finetune.errors import DataError

EDGES = {"shortest_edge_px": 378, "longest_edge_px": 980}
NANO_EDGES = {"shortest_edge_px": 28, "longest_edge_px": 224}


def library_size(width: int, height: int, edges: dict[str, int]) -> tuple[int, int]:
    """The oracle, which wants an array for its shape alone."""
    processor = Idefics2ImageProcessorPil(
        size={"shortest_edge": edges["shortest_edge_px"], "longest_edge": edges["longest_edge_px"]}
    )
    shape_only = np.broadcast_to(np.uint8(0), (3, height, width))
    h, w = get_resize_output_image_size(shape_only, processor.size)  # type: ignore[arg-type]
    return w, h


@settings(max_examples=3000, deadline=None)
@given(
    width=st.integers(1, 6000),
    height=st.integers(1, 6000),
    edges=st.sampled_from([EDGES, NANO_EDGES]),
)
def test_sizes_are_the_librarys(width: int, height: int, edges: dict[str, int]) -> None:
    assert resize_to_fit(width, height, **edges) == library_size(width, height, edges)


def test_a_very_long_image_is_bent_as_the_model_was_trained() -> None:
    assert resize_to_fit(100, 5000, **EDGES) == (378, 980)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(2, 700), height=st.integers(2, 700), split=st.booleans())
def test_pixels_are_the_processors(width: int, height: int, split: bool) -> None:
    """Crops, sizes and resampling, against the library's image processor on the same picture."""
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    processor = Idefics2ImageProcessorPil(
        do_image_splitting=split,
        size={"shortest_edge": 28, "longest_edge": 224},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    stock = processor(image, return_tensors="np")
    mode: Literal["always", "never"] = "always" if split else "never"
    views = plan_views(width, height, split=mode, **NANO_EDGES)
    assert stock["pixel_values"].shape[1] == len(views) == (5 if split else 1)
    for n, view in enumerate(views):
        ours = cut_view(image, view).astype(np.float32) / 255 * 2 - 1
        mask = stock["pixel_attention_mask"][0, n].astype(bool)
        theirs = stock["pixel_values"][0, n][:, : view.height_px, : view.width_px]
        assert mask.sum() == view.height_px * view.width_px
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_auto_splits_only_what_one_view_would_shrink() -> None:
    assert len(plan_views(980, 700, split="auto", **EDGES)) == 1
    assert len(plan_views(981, 700, split="auto", **EDGES)) == 5
    assert len(plan_views(700, 981, split="auto", **EDGES)) == 5


def test_odd_sizes_are_split_without_a_lost_pixel() -> None:
    boxes = [view.box for view in plan_views(5, 7, split="always", **NANO_EDGES)]
    assert boxes == [(0, 0, 2, 3), (2, 0, 5, 3), (0, 3, 2, 7), (2, 3, 5, 7), (0, 0, 5, 7)]


def test_an_image_too_thin_to_split_is_refused() -> None:
    with pytest.raises(DataError, match=r"1 x 50 pixels.*images\.split: never"):
        plan_views(1, 50, split="always", **NANO_EDGES)
    assert len(plan_views(1, 50, split="never", **NANO_EDGES)) == 1


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = load_image("turned.jpg", tmp_path)
    assert upright.size == (20, 40)
    top, bottom = upright.getpixel((10, 5)), upright.getpixel((10, 35))
    assert isinstance(top, tuple)
    assert isinstance(bottom, tuple)
    assert top[2] > 200 > 50 > top[0]  # blue above
    assert bottom[0] > 200 > 50 > bottom[2]  # red below


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (0, 0), (255, 255, 255)),  # transparent shows the white paper
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 32768, (128, 128, 128)),  # plain conversion would clip it to white
        ("I", 32768, (128, 128, 128)),
    ],
)
def test_every_mode_becomes_the_rgb_a_person_sees(mode: str, value: Any, expected: Any) -> None:
    image = to_rgb(Image.new(mode, (4, 4), value))
    assert image.mode == "RGB"
    assert image.getpixel((1, 1)) == expected


def test_a_palette_with_a_transparent_colour_is_put_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60] + [0] * 762)
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "p.png", transparency=0)
    loaded = load_image("p.png", tmp_path)
    assert loaded.getpixel((0, 0)) == (40, 50, 60)
    assert loaded.getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bit_files_keep_their_greys(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "scan.png")
    greys = np.asarray(load_image("scan.png", tmp_path))[..., 0]
    np.testing.assert_array_equal(greys, np.round(ramp / 257).astype(np.uint8))


def png(size: tuple[int, int] = (30, 20)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_bytes_and_data_uris_are_read(tmp_path: Path) -> None:
    data = png()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    assert load_image(data, tmp_path).size == (30, 20)
    assert load_image(uri, tmp_path).tobytes() == load_image(data, tmp_path).tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is an empty file"),
        (b"<html>not found</html>", "is no image"),
        (png()[:700], "is cut short"),
        (png()[:40], "is cut short|cannot be decoded|is no image"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"image 'broken\.png' ({message})"):
        load_image("broken.png", tmp_path)


def test_a_missing_file_is_named_with_the_folder_it_was_looked_for_in(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"'no\.png' not found in {tmp_path}.*image_root"):
        load_image("no.png", tmp_path)


def test_a_url_is_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a URL"):
        load_image("https://example.com/a.png", tmp_path)


def test_a_damaged_orientation_is_a_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow lets the reader's own errors through where EXIF data is cut."""

    def fail(_image: Image.Image) -> None:
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr("finetune.data.images.ImageOps.exif_transpose", fail)
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(DataError, match=r"'a\.png' cannot be decoded"):
        load_image("a.png", tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bomb.png").write_bytes(png((100, 100)))
    for limit in (4000, 9000):  # beyond twice the limit Pillow raises; below, it would only warn
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match="too large"):
            load_image("bomb.png", tmp_path)
