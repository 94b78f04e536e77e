import base64
import contextlib
import gzip
import io
import os
import pickle
import socket
import struct
import sys
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin, features
from transformers.models.idefics2.image_processing_pil_idefics2 import (
    Idefics2ImageProcessorPil,
    get_resize_output_image_size,
)

from finetune.data.images import (
    ImageAccess,
    decode_image,
    load_image,
    page_of,
    read_image_file,
)
from finetune.data.pillow import to_rgb
from finetune.data.views import cut_views
from finetune.errors import DataError
from finetune.families.idefics2 import plan_image, resize_to_fit
from finetune.recipe import ImagesSection

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
    plan = plan_image(width, height, ImagesSection(split=mode, **NANO_EDGES))
    views = plan.views
    assert stock["pixel_values"].shape[1] == len(views) == (5 if split else 1)
    for n, (view, pixels) in enumerate(zip(views, cut_views(image, plan), strict=True)):
        ours = pixels.astype(np.float32) / 255 * 2 - 1
        mask = stock["pixel_attention_mask"][0, n].astype(bool)
        theirs = stock["pixel_values"][0, n][:, : view.height_px, : view.width_px]
        assert mask.sum() == view.height_px * view.width_px
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_auto_splits_only_what_one_view_would_shrink() -> None:
    assert len(plan_image(980, 700, ImagesSection(split="auto", **EDGES)).views) == 1
    assert len(plan_image(981, 700, ImagesSection(split="auto", **EDGES)).views) == 5
    assert len(plan_image(700, 981, ImagesSection(split="auto", **EDGES)).views) == 5


def test_odd_sizes_are_split_without_a_lost_pixel() -> None:
    boxes = [
        view.box for view in plan_image(5, 7, ImagesSection(split="always", **NANO_EDGES)).views
    ]
    assert boxes == [(0, 0, 2, 3), (2, 0, 5, 3), (0, 3, 2, 7), (2, 3, 5, 7), (0, 0, 5, 7)]


def test_an_image_too_thin_to_split_is_refused() -> None:
    with pytest.raises(DataError, match=r"1 x 50 pixels.*images\.split: never"):
        plan_image(1, 50, ImagesSection(split="always", **NANO_EDGES))
    assert len(plan_image(1, 50, ImagesSection(split="never", **NANO_EDGES)).views) == 1


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = load_image("turned.jpg", ImageAccess(tmp_path))
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
    loaded = load_image("p.png", ImageAccess(tmp_path))
    assert loaded.getpixel((0, 0)) == (40, 50, 60)
    assert loaded.getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bit_files_keep_their_greys(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "scan.png")
    greys = np.asarray(load_image("scan.png", ImageAccess(tmp_path)))[..., 0]
    np.testing.assert_array_equal(greys, np.round(ramp / 257).astype(np.uint8))


HERE = ImageAccess(Path())  # for sources that are no paths


def picture(size: tuple[int, int] = (30, 20), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(size: tuple[int, int] = (30, 20)) -> bytes:
    return saved(picture(size), "PNG")


def test_bytes_data_uris_and_base64_are_read() -> None:
    data = png()
    text = base64.b64encode(data).decode()
    wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    expected = load_image(data, HERE).tobytes()
    for source in (
        f"data:image/png;base64,{text}",
        f"data:image/png;charset=utf-8;name=a.png;base64,{text}",
        f"DATA:;BASE64,{wrapped}",
        text,
        wrapped,
    ):
        assert load_image(source, HERE).tobytes() == expected


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO"])
def test_base64_alone_is_known_by_what_it_holds(form: str) -> None:
    """JPEG's begins with /9j/, like an absolute path."""
    data = saved(picture(), form)
    assert load_image(base64.b64encode(data).decode(), HERE).size == load_image(data, HERE).size


def test_a_long_path_without_an_ending_is_a_path_all_the_same(tmp_path: Path) -> None:
    name = "scans/" + "0123456789abcdef" * 4
    (tmp_path / "scans").mkdir()
    (tmp_path / name).write_bytes(png())
    assert load_image(name, ImageAccess(tmp_path)).size == (30, 20)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data:image/png,abc", r"must read data:image/\.\.\.;base64"),
        ("data:image/svg+xml;utf8,<svg/>", r"must read data:image/\.\.\.;base64"),
        ("data:image/png;base64", "must read"),
        ("data:image/png;base64,iVBORw0K%2BGgo", "is percent-encoded .it holds '%'."),
        ("data:image/png;base64,iVBOR", "is not valid base64"),
        ("data:image/png;base64,iVBÖ", "is not valid base64"),
        ("data:image/png;base64,", "is an empty file"),
        ("data:image/png;base64," + base64.b64encode(b"hello there").decode(), "is text"),
        ("/9j/4AAQSkZJRgABAQAAAQABAAD/" * 3 + "=x", "base64 in the row. is not valid base64"),
    ],
)
def test_a_broken_data_uri_says_what_is_wrong(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_image(source, HERE)


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is an empty file"),
        (b"\0" * 5000, "holds only zero bytes"),
        (b"<html>not found</html>", "is a web page"),
        (b"\xef\xbb\xbf\n<!-- x -->\n<!DOCTYPE html><p>", "is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is XML"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG drawing.*convert it to PNG"),
        (b'<?xml version="1.0"?>\n<!-- Inkscape -->\n<svg width="1"/>', "is an SVG drawing"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b'{"error": "not found"}', "is JSON"),
        (b"[1, 2", "is text.*begins '\\[1, 2'"),
        (b"404: Not Found", "is text, not an image .it begins '404: Not Found'."),
        ("Größe ".encode() * 2000, "is text"),
        (b"#!/bin/sh\nrm -rf ~\n", "is a script"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is PostScript, a program that is never run"),
        (pickle.dumps({"a": np.zeros(3)}), "is a pickle.*never opened"),
        (pickle.dumps([os.getcwd], protocol=0), "is a pickle|is text"),
        (pickle.dumps(np.zeros(3), protocol=2), "is a pickle"),
        (zipped("model/data.pkl"), "is a PyTorch file.*never opened"),
        (zipped("a.png"), "is a zip archive; unpack it"),
        (gzip.compress(b"<svg/>", mtime=0), "is compressed with gzip"),
        (saved(picture(), "JPEG2000"), "is JPEG 2000"),
        (b"\x93NUMPY\x01\0", "is a NumPy array"),
        (b"\x7fELF\x02\x01", "is a program"),
        (b"SIMPLE  =                    T", "is a FITS file"),
        (b"8BPS\0\x01" + b"\0" * 20, "is a Photoshop file"),
        (b"\0" * 128 + b"DICM", "is a DICOM file"),
        (b"\0\0\0\x20ftypisom\0\0\x02\0", "is a video"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIF"),
        (b"PAR1\x15\x04", "is a table"),
        (bytes(range(200, 256)) * 4, "is no image that can be read"),
        (png()[:700], "is cut short"),
        (png()[:40], "is cut short"),
        (png()[:4], "is no image that can be read"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"image 'broken\.png' .*({message})"):
        load_image("broken.png", ImageAccess(tmp_path))


# Whole or an error: every format, cut everywhere


def animation(form: str) -> bytes:
    frames = [picture((9, 7), "P"), Image.new("P", (9, 7), 3)]
    return saved(frames[0], form, save_all=True, append_images=frames[1:], duration=100)


def tiff_with_its_colours_last() -> bytes:
    """4 x 2 palette pixels; to the decoder a colour map that is cut off is none at all."""
    colours = struct.pack("<768H", *[257 * (k % 251) for k in range(768)])
    tags = [(256, 4), (257, 2), (258, 8), (259, 1), (262, 3), (273, 122), (278, 2), (279, 8)]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    entries.append(struct.pack("<HHII", 320, 3, 768, 130))
    directory = struct.pack("<H", 9) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(range(1, 9)) + colours


def rle_bitmap() -> bytes:
    """8-bit run lengths: two rows of (3 of colour 1), an absolute run, the end."""
    rows = b"\x03\x01\0\0" + b"\0\x03\x02\x01\x02\0" + b"\0\x01"
    palette = bytes([0, 0, 0, 0, 255, 0, 0, 0, 0, 255, 0, 0]) + bytes(253 * 4)
    start = 14 + 40 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, 3, 2, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start) + info + palette + rows


SMALL = picture((9, 7))
GREY = SMALL.convert("L")
CUTS = {
    "jpeg": saved(SMALL, "JPEG"),
    "progressive jpeg": saved(SMALL, "JPEG", progressive=True),
    "grey jpeg with restarts": saved(picture((40, 24), "L"), "JPEG", restart_marker_blocks=1),
    "jpeg with exif": saved(SMALL, "JPEG", exif=Image.Exif().tobytes() + b"\xff\xd9" * 3),
    "cmyk jpeg": saved(SMALL.convert("CMYK"), "JPEG"),
    "png": saved(SMALL, "PNG"),
    "palette png": saved(SMALL.convert("P"), "PNG", transparency=3),
    "16-bit png": saved(GREY.convert("I;16"), "PNG"),
    "animated png": animation("PNG"),
    "gif": saved(SMALL.convert("P"), "GIF", transparency=3),
    "animated gif": animation("GIF"),
    "webp": saved(SMALL, "WEBP"),
    "lossless webp": saved(SMALL, "WEBP", lossless=True, exif=Image.Exif().tobytes()),
    "animated webp": animation("WEBP"),
    "bmp": saved(SMALL, "BMP"),
    "palette bmp": saved(SMALL.convert("P"), "BMP"),
    "rle bmp": rle_bitmap(),
    "tiff": saved(SMALL, "TIFF"),
    "palette tiff": saved(SMALL.convert("P"), "TIFF"),
    "deflated tiff": saved(SMALL, "TIFF", compression="tiff_deflate"),
    "lzw tiff": saved(SMALL, "TIFF", compression="tiff_lzw"),
    "packbits tiff": saved(SMALL, "TIFF", compression="packbits"),
    "jpeg tiff": saved(SMALL, "TIFF", compression="jpeg"),
    "fax tiff": saved(SMALL.convert("1"), "TIFF", compression="group4"),
    "palette tiff, colours last": tiff_with_its_colours_last(),
    "big tiff": saved(SMALL, "TIFF", big_tiff=True),
    "tiff of two pages": saved(SMALL, "TIFF", save_all=True, append_images=[GREY]),
    "ppm": saved(SMALL, "PPM"),
    "ppm of 10 bits": b"P6 4 2 1023\n" + bytes([1, 200, 3, 4, 0, 9]) * 8,
    "pbm": saved(SMALL.convert("1"), "PPM"),
    "plain ppm": b"P3 2 2 255\n" + b"255 128 64  " * 4 + b"\n",
    "plain pgm": b"P2 2 2 255\n# a comment\n255 128\n64 32\n",
    "plain pbm": b"P1 3 2\n101\n010",
    "ico": saved(picture((8, 8)), "ICO", sizes=[(8, 8), (4, 4)]),
    "ico of bitmaps": saved(picture((8, 8)), "ICO", sizes=[(8, 8)], bitmap_format="bmp"),
    "mpo": saved(SMALL, "MPO", save_all=True, append_images=[SMALL]),
}
if features.check("avif"):
    CUTS["avif"] = saved(SMALL, "AVIF")
    CUTS["lossless avif"] = saved(SMALL, "AVIF", quality=100)


@pytest.fixture(params=[False, True], ids=["strict", "lenient"])
def _any_pillow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another library may have set for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", request.param)


@pytest.mark.usefixtures("_any_pillow")
@pytest.mark.parametrize("name", CUTS)
def test_a_cut_image_is_refused_or_loses_nothing(name: str) -> None:
    data = CUTS[name]
    whole = load_image(data, HERE)
    expected = whole.size, whole.tobytes()
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length in range(len(data)):
            try:
                image = load_image(data[:length], HERE)
            except DataError:
                refused += 1
            else:
                assert (image.size, image.tobytes()) == expected, f"cut at {length}"
    assert refused > len(data) // 3


@pytest.mark.usefixtures("_any_pillow")
@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(CUTS)), data=st.data())
def test_a_file_with_other_bytes_is_an_image_or_a_data_error(name: str, data: Any) -> None:
    content = bytearray(CUTS[name])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(DataError):
            assert load_image(bytes(content), ImageAccess(Path(), max_megapixels=1)).mode == "RGB"


@pytest.mark.usefixtures("_any_pillow")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CUTS["jpeg"][:-2], "is cut short .its end marker is missing."),
        (CUTS["jpeg"][:-20] + bytes(20), "is cut short"),
        (CUTS["png"][:-12], "is cut short"),
        (CUTS["png"][:-1] + b"\0", r"is damaged .wrong checksum in IEND"),
        (CUTS["png"].replace(b"IDAT", b"IDAt"), "mend or replace it"),
        (CUTS["webp"][:-1], "is cut short"),
        (CUTS["tiff"][:-1], "is cut short .its pixels go on"),
        (CUTS["gif"][:-8], "is cut short"),
        (CUTS["bmp"][:-4], "is cut short"),
    ],
)
def test_the_end_of_a_file_is_never_filled_up(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_image(content, HERE)


def test_a_bit_turned_over_in_a_png_is_seen() -> None:
    data = bytearray(png())
    data[len(data) // 2] ^= 1
    with pytest.raises(DataError, match="wrong checksum in IDAT"):
        load_image(bytes(data), HERE)


def test_bytes_after_the_end_are_let_be() -> None:
    for name in ("jpeg", "png", "webp", "gif", "bmp"):
        image = load_image(CUTS[name] + b"\0" * 100, HERE)
        assert image.tobytes() == load_image(CUTS[name], HERE).tobytes()


def test_an_animation_gives_its_first_frame() -> None:
    first = np.asarray(load_image(animation("GIF"), HERE))
    still = np.asarray(load_image(saved(picture((9, 7), "P"), "GIF"), HERE))
    np.testing.assert_array_equal(first, still)
    assert not (first == first[0, 0]).all()  # the second frame is of one colour


def test_what_other_libraries_set_in_pillow_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # would be an error for each of these
    cut = CUTS["progressive jpeg"][:-30]

    def try_both(_: int) -> str:
        assert load_image(png(), HERE).size == (30, 20)
        with pytest.raises(DataError) as caught:
            load_image(cut, HERE)
        return str(caught.value)

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(try_both, range(200)))) == 1
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    assert Image.MAX_IMAGE_PIXELS == 50


# Sizes


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("limit", [None, 10, 89_478_485])
def test_a_decompression_bomb_is_refused_from_its_header(
    limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own warning would be one
        with pytest.raises(DataError, match=r"too large \(50,000 x 40,000 pixels.*max_megapixels"):
            load_image(png_header(50_000, 40_000), HERE)
        with pytest.raises(DataError, match="is cut short"):  # within the limit: decoded, and short
            load_image(png_header(500, 400), HERE)


def test_the_limit_is_the_recipes() -> None:
    data = saved(Image.new("L", (1000, 101)), "PNG")
    with pytest.raises(DataError, match=r"1,000 x 101 pixels, more than 0\.1 megapixels"):
        load_image(data, ImageAccess(Path(), max_megapixels=0.1))
    assert load_image(data, ImageAccess(Path(), max_megapixels=0.101)).size == (1000, 101)


def test_an_icon_that_understates_its_picture_is_refused() -> None:
    inner = png_header(50_000, 40_000)
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    with pytest.raises(DataError, match=r"too large \(50,000 x 40,000"):
        load_image(icon, HERE)


def test_a_tiff_with_a_tile_beyond_all_bounds_is_refused() -> None:
    tags = [(256, 4), (257, 2), (258, 8), (259, 1), (262, 1), (322, 1 << 16), (323, 1 << 16)]
    tags += [(324, 8), (325, 4)]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    with pytest.raises(DataError, match=r"too large \(65,536 x 65,536"):
        load_image(b"II*\0" + struct.pack("<I", 8) + directory, HERE)
    endless = struct.pack("<HHHII", 1, 273, 4, (1 << 32) - 1, 0) + bytes(4)
    with pytest.raises(DataError, match="is cut short"):
        load_image(b"II*\0" + struct.pack("<I", 8) + endless, HERE)


def test_a_picture_within_an_icon_is_checked_like_any_other() -> None:
    icon = bytearray(saved(picture((8, 8)), "ICO", sizes=[(8, 8)]))
    icon[-1] ^= 1
    with pytest.raises(DataError, match="wrong checksum in IEND"):
        load_image(bytes(icon), HERE)


def test_a_text_that_unpacks_without_end_is_an_error() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 5_000_000, zip=True)
    with pytest.raises(DataError, match="cannot be decoded"):
        load_image(saved(SMALL, "PNG", pnginfo=info), HERE)


# Paths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """tmp/root/{a.png, images/b.png}, tmp/outside.png"""
    (tmp_path / "root" / "images").mkdir(parents=True)
    for name in ("outside.png", "root/a.png", "root/images/b.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path / "root"


def test_no_path_leaves_the_root_unless_allowed(folder: Path) -> None:
    (folder / "link.png").symlink_to("../outside.png")
    (folder / "linked").symlink_to("..")
    outside = str(folder.parent / "outside.png")
    for source in ("../outside.png", "images/../../outside.png", outside, "link.png",
                   "linked/outside.png", "../missing.png"):  # fmt: skip
        with pytest.raises(
            DataError, match=r"lies outside image_root \(.*root\).*allow_outside_root"
        ):
            load_image(source, ImageAccess(folder))
        if "missing" not in source:
            allowed = ImageAccess(folder, allow_outside_root=True)
            assert load_image(source, allowed).size == (30, 20)


def test_paths_within_the_root_are_read_however_they_are_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "inner.png").symlink_to("images/b.png")
    other = folder.parent / "other"
    other.symlink_to(folder)  # the root itself may be a link
    for source in ("a.png", "./images/../a.png", str(folder / "a.png"), "inner.png"):
        assert load_image(source, ImageAccess(folder)).size == (30, 20)
    assert load_image("a.png", ImageAccess(other)).size == (30, 20)
    assert load_image(str(other / "a.png"), ImageAccess(folder)).size == (30, 20)
    monkeypatch.chdir(folder)
    assert load_image("images/b.png", ImageAccess(Path())).size == (30, 20)


def test_a_missing_file_is_named_with_the_folder_it_was_looked_for_in(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"'no\.png' not found in {tmp_path}; .*image_root"):
        load_image("no.png", ImageAccess(tmp_path))


@pytest.mark.parametrize(
    ("source", "below", "hint"),
    [
        ("images/b.png", "images", r"it is in .*root: set image_root to that"),
        ("b.png", "", r"it is in .*root/images: set image_root to that"),
        ("data/images/b.png", "", r"'images/b\.png' is there"),
        ("data/images/b.png", "images", r"'b\.png' is there"),
        (r"images\b.png", "", "write / for"),
        ("A.PNG", "", r"did you mean 'a\.png'\?"),
        ("a.jpg", "", r"did you mean 'a\.png'\?"),
        ("images/receipt-12-totl.png", "", r"did you mean 'receipt-12-total\.png'"),
        ("images/0041.png", "", "mend the path"),  # 0040.png is another picture
        ("images/42.png", "", r"did you mean '0042\.png'"),
        ("~/a.png", "", "~ is not expanded"),
        ("a.png", "nowhere", "that folder is not there; set image_root"),
    ],
)
def test_a_missing_file_is_looked_for_nearby(
    folder: Path, source: str, below: str, hint: str
) -> None:
    for name in ("receipt-12-total.png", "0040.png", "0042.png"):
        (folder / "images" / name).write_bytes(png())
    with pytest.raises(DataError, match=f"not found in .*; {hint}"):
        load_image(source, ImageAccess(folder / below))


def test_only_regular_files_are_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.png"))
    for source, found in [
        ("images", "a folder"),
        ("pipe.png", "a device, pipe"),
        ("socket.png", "a device, pipe"),
        ("", "a folder"),
    ]:
        with pytest.raises(DataError, match=f"is {found}.*mend the path"):
            load_image(source, ImageAccess(folder))
    with pytest.raises(DataError, match="is a device"):
        load_image("/dev/zero", ImageAccess(folder, allow_outside_root=True))


def test_a_huge_file_is_refused_before_it_is_read(folder: Path) -> None:
    with (folder / "huge.png").open("wb") as file:
        file.truncate(513 * 2**20)  # takes no room on the disk
    with pytest.raises(DataError, match=r"is too large a file \(513 MiB, at most 512\)"):
        load_image("huge.png", ImageAccess(folder))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\0.png", "cannot be read .embedded null"),
        ("x" * 5000 + ".png", r"xxx'\.\.\. cannot be read \(File name too long"),
        ("a.png/b.png", "cannot be read .Not a directory"),
        ("\ud800.png", "cannot be read"),
        ("https://example.com/a.png", "is a URL, and nothing is downloaded.*allow_urls: true"),
        ("file:///etc/passwd", "is a file:// URL; give the path alone"),
        ("s3://bucket/a.png", "is a s3:// URL, which is not read; save it as a file"),
    ],
)
def test_a_source_that_is_no_path_says_so(folder: Path, source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_image(source, ImageAccess(folder))


def test_a_link_that_leads_to_itself_is_an_error(folder: Path) -> None:
    (folder / "loop.png").symlink_to("loop.png")
    with pytest.raises(DataError, match=r"'loop\.png' (cannot be read|not found)"):
        load_image("loop.png", ImageAccess(folder))


def test_the_files_own_bytes_are_given(folder: Path) -> None:
    assert read_image_file("a.png", ImageAccess(folder)) == ("'a.png'", png())
    assert read_image_file(png(), ImageAccess(folder)) == ("(bytes in the row)", png())


def test_a_damaged_orientation_is_a_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow lets the reader's own errors through where EXIF data is cut."""

    def fail(_image: Image.Image, *, in_place: bool) -> None:
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr("finetune.data.images.ImageOps.exif_transpose", fail)
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(DataError, match=r"'a\.png' cannot be decoded"):
        load_image("a.png", ImageAccess(tmp_path))


def test_an_image_in_memory_needs_its_file_no_more(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(saved(picture(), "JPEG"))
    image = load_image("a.jpg", ImageAccess(tmp_path))
    (tmp_path / "a.jpg").unlink()
    assert image.crop((1, 1, 5, 5)).resize((8, 8)).size == (8, 8)


# PDF pages


def pdf(*colours: str, edge_points: int = 72) -> bytes:
    pages = [Image.new("RGB", (edge_points, edge_points // 2), colour) for colour in colours]
    return saved(pages[0], "PDF", save_all=True, append_images=pages[1:], resolution=72)


def locked_pdf() -> bytes:
    """A page, and an encryption that the empty password does not open."""
    return (
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


def colour_of(image: Image.Image) -> tuple[int, ...]:
    pixel = image.getpixel((image.width // 2, image.height // 2))
    assert isinstance(pixel, tuple)
    return tuple(round(value / 255) for value in pixel)


def test_a_pdf_page_is_an_image(tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    (tmp_path / "one.PDF").write_bytes(pdf("red"))
    (tmp_path / "three.pdf").write_bytes(pdf("red", "lime", "blue"))
    here = ImageAccess(tmp_path)
    assert load_image("one.PDF", here).size == (144, 72)
    assert load_image("one.PDF", ImageAccess(tmp_path, pdf_dpi=72)).size == (72, 36)
    assert load_image(pdf("red"), HERE).mode == "RGB"
    data_uri = "data:application/pdf;base64," + base64.b64encode(pdf("blue")).decode()
    assert colour_of(load_image(data_uri, HERE)) == (0, 0, 1)
    colours = [colour_of(load_image(f"three.pdf#page={n}", here)) for n in (1, 2, 3)]
    assert colours == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert read_image_file("three.pdf#page=2", here)[1] == pdf("red", "lime", "blue")


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("a.pdf", pdf("red", "blue"), r"is a PDF of 2 pages; name one as FILE\.pdf#page=1"),
        ("a.pdf#page=3", pdf("red", "blue"), "is a PDF of 2 pages and has no page 3"),
        ("a.pdf#page=0", pdf("red"), "names no page by '#page=0'"),
        ("a.pdf#2", pdf("red"), r"names no page by '#2'; write FILE\.pdf#page=1"),
        ("a.pdf", pdf("red")[:-10], "is a PDF that is cut short"),
        ("a.pdf", b"%PDF-1.7\nnothing\n%%EOF", "is a PDF that cannot be read"),
        ("a.pdf", locked_pdf(), "is a PDF with a password"),
        ("a.pdf", pdf("red", edge_points=14000), "28,000 x 14,000 pixels at 144 dpi.*data.pdf_dpi"),
        ("a.pdf#page=1", png(), "is PNG, not a PDF, and has no pages"),
    ],
)
def test_a_pdf_that_gives_no_page_says_why(
    tmp_path: Path, source: str, content: bytes, message: str
) -> None:
    pytest.importorskip("pypdfium2")
    (tmp_path / "a.pdf").write_bytes(content)
    with pytest.raises(DataError, match=rf"image 'a\.pdf.*{message}"):
        load_image(source, ImageAccess(tmp_path))


def test_without_pypdfium2_a_pdf_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(DataError, match=r"pip install 'vlm-recipes\[pdf\]'"):
        load_image(pdf("red"), HERE)


def test_pdf_pages_are_rendered_alike_in_threads() -> None:
    pytest.importorskip("pypdfium2")
    data = pdf("red", "lime", "blue", edge_points=300)
    expected = [decode_image("x", data, HERE, page=n).tobytes() for n in (1, 2, 3)]
    with ThreadPoolExecutor(4) as threads:
        pages = [1 + k % 3 for k in range(30)]
        found = threads.map(lambda n: decode_image("x", data, HERE, page=n).tobytes(), pages)
        assert all(got == expected[n - 1] for n, got in zip(pages, found, strict=True))


def test_only_pdf_names_carry_a_page() -> None:
    assert page_of("a.pdf#page=12") == 12
    assert page_of("a.pdf") is page_of("a#1.png") is page_of(b"%PDF") is None
