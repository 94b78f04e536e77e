import dataclasses
import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data.images import ImageAccess, decode_image, jpeg_size
from finetune.data.views import (
    Canvas,
    ImagePlan,
    View,
    cut_views,
    largest_reduction,
    reduced_plan,
)
from finetune.families.idefics2 import plan_image
from finetune.recipe import ImagesSection

HERE = ImageAccess(Path())
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
EDGES = {"shortest_edge_px": 378, "longest_edge_px": 980}


def noise(width: int, height: int, kind: str = "colour") -> Image.Image:
    """Pixels at random: of one band, of three alike, or of three."""
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    if kind == "colour":
        return Image.fromarray(pixels)
    grey = Image.fromarray(pixels[..., 0])
    return grey if kind == "grey" else grey.convert("RGB")


def slope(width: int, height: int) -> Image.Image:
    """Red grows to the right and green downwards, so that a pixel's colours tell its place."""
    red = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    pixels = np.stack([red, green, np.full_like(red, 128)], axis=-1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def saved(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 95, "subsampling": 0} | options)
    return file.getvalue()


def split_plan(width: int, height: int, mode: Literal["always", "never"] = "always") -> ImagePlan:
    return plan_image(width, height, ImagesSection(split=mode, **EDGES))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(2, 500),
    height=st.integers(2, 500),
    kind=st.sampled_from(["grey", "grey RGB", "colour"]),
    resample=st.sampled_from([BILINEAR, BICUBIC]),
)
def test_views_are_what_pillow_makes_of_the_crop_in_rgb(
    width: int, height: int, kind: str, resample: Image.Resampling
) -> None:
    image, plan = noise(width, height, kind), split_plan(width, height)
    for view, pixels in zip(plan.views, cut_views(image, plan, resample), strict=True):
        crop = image.convert("RGB").crop(view.box)
        expected = crop.resize((view.width_px, view.height_px), resample)
        np.testing.assert_array_equal(pixels, np.asarray(expected).transpose(2, 0, 1))
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable


@pytest.mark.parametrize("kind", ["grey", "grey RGB"])
def test_a_picture_without_colours_is_resized_in_one_band(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes, resize = [], Image.Image.resize

    def noted(image: Image.Image, size: Any, resample: Any) -> Image.Image:
        if size != (64, 64):  # the sample that is looked at for colours
            modes.append(image.mode)
        return resize(image, size, resample)

    monkeypatch.setattr(Image.Image, "resize", noted)
    cut_views(noise(300, 200, kind), split_plan(300, 200))
    assert modes == ["L"] * 5


def test_one_coloured_pixel_keeps_all_bands() -> None:
    image = noise(300, 200, "grey RGB")
    image.putpixel((299, 199), (255, 0, 0))
    plan = ImagePlan((View((0, 0, 300, 200), 300, 200),))
    np.testing.assert_array_equal(cut_views(image, plan)[0], np.asarray(image).transpose(2, 0, 1))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(2, 900),
    height=st.integers(2, 900),
    resample=st.sampled_from([BILINEAR, BICUBIC]),
)
def test_torch_resizes_to_what_pillow_does_but_for_rounding(
    width: int, height: int, resample: Image.Resampling
) -> None:
    """Torch rounds its weights, so that either pass may round a pixel the other way; the second one
    adds what the first one left, at weights whose sizes add up to 1 (bilinear), below 2 (bicubic).
    """
    image, plan = noise(width, height), split_plan(width, height)
    exact = cut_views(image, plan, resample)
    fast = cut_views(image, plan, resample, fast_resize=True)
    for ours, theirs in zip(fast, exact, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == np.uint8
        assert ours.flags.c_contiguous
        differences = np.abs(ours.astype(int) - theirs)
        assert differences.max() <= (2 if resample == BILINEAR else 3)


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(2, 9000),
    height=st.integers(2, 9000),
    mode=st.sampled_from(["always", "never"]),
)
def test_a_reduced_picture_still_holds_every_view(
    width: int, height: int, mode: Literal["always", "never"]
) -> None:
    plan = split_plan(width, height, mode)
    reduction = largest_reduction(plan, (width, height))
    reduced = reduced_plan(plan, (width, height), reduction)
    end = (-(-width // reduction), -(-height // reduction))
    assert reduced.views[-1].box == (0, 0, *end)
    for before, after in zip(plan.views, reduced.views, strict=True):
        assert (after.width_px, after.height_px) == (before.width_px, before.height_px)
        if reduction > 1:
            left, upper, right, lower = after.box
            assert right - left >= after.width_px - 1  # an edge between pixels is rounded
            assert lower - upper >= after.height_px - 1
    if mode == "always":  # the quarters meet and leave nothing out
        first, second, third, fourth = (view.box for view in reduced.views[:4])
        assert first[:2] == (0, 0)
        assert fourth[2:] == end
        assert first[2:] == fourth[:2] == (second[0], third[1])
    enough = [
        (view.box[2] - view.box[0]) // view.width_px >= 2 * reduction
        and (view.box[3] - view.box[1]) // view.height_px >= 2 * reduction
        for view in plan.views
    ]
    assert reduction == 8 or not all(enough)  # no larger one would do


def test_what_is_brought_to_one_size_first_is_held_to_that_size() -> None:
    view = View((0, 0, 100, 100), 50, 50)
    plan = ImagePlan((view,), resizes=((100, 100),))
    assert largest_reduction(plan, (450, 800)) == 4
    assert reduced_plan(plan, (450, 800), 4) == plan


@pytest.mark.parametrize("orientation", [1, 6, 8])
@pytest.mark.parametrize("size", [(2400, 1800), (2402, 1798), (1703, 2207)])
@pytest.mark.parametrize("kind", ["split", "whole", "canvas"])
def test_a_reduced_picture_shows_everything_in_its_place(
    kind: str, size: tuple[int, int], orientation: int
) -> None:
    image = slope(*size)
    exif = image.getexif()
    exif[0x0112] = orientation
    data = saved(image, exif=exif)
    upright = size if orientation == 1 else (size[1], size[0])
    assert jpeg_size("x", data, HERE) == upright
    exact = decode_image("x", data, HERE)
    assert exact.size == upright
    plans = {
        "split": plan_image(
            *upright, ImagesSection(split="always", longest_edge_px=392, shortest_edge_px=112)
        ),
        "whole": plan_image(
            *upright, ImagesSection(split="never", longest_edge_px=392, shortest_edge_px=112)
        ),
    }
    side = max(upright)
    left, upper = (side - upright[0]) // 2, (side - upright[1]) // 2
    canvas = Canvas(side, side, left, upper, (128, 128, 128))
    plans["canvas"] = ImagePlan((View((0, 0, side, side), 336, 336),), canvas=canvas)
    plan = plans[kind]
    reduction = largest_reduction(plan, upright)
    assert reduction in (2, 4)
    reduced = decode_image("x", data, HERE, reduction=reduction)
    assert reduced.size == tuple(-(-edge // reduction) for edge in upright)
    views = cut_views(reduced, reduced_plan(plan, upright, reduction))
    half_a_pixel = 0.5 * 255 / 392  # in levels, of a slope over the longest of the views
    for ours, theirs in zip(views, cut_views(exact, plan), strict=True):
        differences = ours.astype(int) - theirs
        assert np.abs(differences.mean(axis=(1, 2))).max() < half_a_pixel
        if kind != "canvas":  # which has edges within
            assert np.abs(differences).max() <= 3  # two JPEG decodings, each rounded


def test_other_formats_have_no_header_to_plan_from_and_are_never_reduced() -> None:
    file = io.BytesIO()
    noise(64, 48).save(file, "PNG")
    assert jpeg_size("x", file.getvalue(), HERE) is None
    assert decode_image("x", file.getvalue(), HERE, reduction=4).size == (64, 48)


def test_grey_files_stay_grey_only_where_that_is_asked_for() -> None:
    data = saved(noise(40, 30, "grey"))
    assert decode_image("x", data, HERE).mode == "RGB"
    grey = decode_image("x", data, HERE, keep_grey=True)
    assert grey.mode == "L"
    assert grey.convert("RGB").tobytes() == decode_image("x", data, HERE).tobytes()


def test_a_plan_can_be_looked_up() -> None:
    plan = split_plan(300, 200)
    assert {plan: 1}[dataclasses.replace(plan)] == 1
