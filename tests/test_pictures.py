from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage
from PIL import ImageFilter

from data_formats.chat import parse_chat
from finetune.data import pictures as module
from finetune.data.augment import Augmentation
from finetune.data.examples import Encoder, Example
from finetune.data.images import ImageAccess
from finetune.data.pictures import Shortcuts
from finetune.data.sources import Row
from finetune.errors import DataError
from finetune.families import FAMILIES
from finetune.recipe import DataSection, ImagesSection
from tests.conftest import chat_row, noise


@pytest.fixture
def make_encoder(nano_processor: Any) -> Callable[..., Encoder]:
    def make(**shortcuts: bool) -> Encoder:
        images = ImagesSection(split="always", longest_edge_px=112, shortest_edge_px=28)
        family = FAMILIES["idefics2"]
        return Encoder(nano_processor, family, images, shortcuts=Shortcuts(**shortcuts))

    return make


@pytest.fixture
def row(tmp_path: Path) -> Callable[..., Row]:
    """`row(question, *images)`; A and B are smooth JPEG pictures of 600 x 480, C is another in a
    folder of its own under the name of A.
    """
    (tmp_path / "other").mkdir()
    for seed, name in enumerate(("A.jpg", "B.jpg", "other/A.jpg")):
        photo = noise(600, 480, seed).filter(ImageFilter.GaussianBlur(6))
        photo.save(tmp_path / name, quality=95)

    def make(question: str, *images: str, folder: str = ".") -> Row:
        conversation = parse_chat(chat_row(question, "An answer", *images))
        return Row(f"rows.jsonl:{question}", conversation, ImageAccess(tmp_path / folder))

    return make


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Name and size of the width in pixels of every picture that was decoded."""
    seen, decode = [], module.decode_image

    def noted(name: str, *args: Any, **kwargs: Any) -> PilImage.Image:
        image = decode(name, *args, **kwargs)
        seen.append((name, image.width))
        return image

    monkeypatch.setattr(module, "decode_image", noted)
    return seen


def encode_all(encoder: Encoder, rows: list[Row], draws: list[Any] | None = None) -> list[Example]:
    pictures = encoder.new_pictures()
    draws = draws or [None] * len(rows)
    return [encoder.encode(r, d, pictures) for r, d in zip(rows, draws, strict=True)]


def same_views(one: Example, other: Example) -> bool:
    return one.plans == other.plans and all(
        np.array_equal(a, b) for a, b in zip(one.views, other.views, strict=True)
    )


@pytest.mark.parametrize("reduced_decode", [False, True])
def test_rows_about_one_picture_decode_it_once_and_hold_the_same_views(
    make_encoder: Any, row: Any, decoded: Any, reduced_decode: bool
) -> None:
    encoder = make_encoder(reduced_decode=reduced_decode)
    rows = [row("1?", "A.jpg"), row("2?", "B.jpg"), row("3?", "A.jpg"), row("4?", "A.jpg", "A.jpg")]
    examples = encode_all(encoder, rows)
    assert [name for name, _ in decoded] == ["'A.jpg'", "'B.jpg'"]
    first, _, third, twice = ([id(view) for view in example.views] for example in examples)
    assert first == third
    assert first * 2 == twice
    for example, alone in zip(examples, map(encoder.encode, rows), strict=True):
        assert example.input_ids == alone.input_ids
        assert same_views(example, alone)


def test_bytes_are_known_by_what_they_hold(make_encoder: Any, tmp_path: Path, row: Any) -> None:
    data = {name: (tmp_path / name).read_bytes() for name in ("A.jpg", "B.jpg")}
    rows = []
    for content in (data["A.jpg"], bytes(bytearray(data["A.jpg"])), data["B.jpg"]):
        asked = row("?", "x")
        (image,) = asked.conversation.images()
        message, *others = asked.conversation.messages
        parts = tuple(
            replace(part, source=content) if part == image else part for part in message.content
        )
        messages = (replace(message, content=parts), *others)
        rows.append(replace(asked, conversation=replace(asked.conversation, messages=messages)))
    first, again, other = encode_all(make_encoder(), rows)
    assert [id(view) for view in first.views] == [id(view) for view in again.views]
    assert not same_views(first, other)


def test_one_name_in_two_folders_is_two_pictures(make_encoder: Any, row: Any) -> None:
    encoder = make_encoder()
    rows = [row("1?", "A.jpg"), row("2?", "A.jpg", folder="other")]
    examples = encode_all(encoder, rows)
    assert not same_views(*examples)
    assert all(map(same_views, examples, map(encoder.encode, rows)))


@pytest.mark.parametrize("reduced_decode", [False, True])
def test_a_row_drawn_larger_gets_its_own_views_of_the_same_picture(
    make_encoder: Any, tmp_path: Path, row: Any, decoded: Any, reduced_decode: bool
) -> None:
    noise(60, 48).save(tmp_path / "small.jpg")
    encoder = make_encoder(reduced_decode=reduced_decode)
    rows = [row("1?", "small.jpg"), row("2?", "small.jpg")]
    larger = Augmentation(1.8, False, 3)
    plain, enlarged = encode_all(encoder, rows, [None, larger.draws(0, 7)])
    assert len(decoded) == 1
    assert plain.plans != enlarged.plans
    assert same_views(enlarged, encoder.encode(rows[1], larger.draws(0, 7)))


def test_a_prompt_shows_what_the_row_before_it_showed(
    make_encoder: Any, row: Any, decoded: Any
) -> None:
    encoder = make_encoder()
    pictures = encoder.new_pictures()
    whole = encoder.encode(row("1?", "A.jpg"), pictures=pictures)
    prompt = encoder.encode_prompt(row("2?", "A.jpg"), pictures)
    assert len(decoded) == 1
    assert list(map(id, whole.views)) == list(map(id, prompt.views))


def test_only_the_pictures_of_the_last_row_stay_decoded(make_encoder: Any, row: Any) -> None:
    encoder = make_encoder()
    pictures = encoder.new_pictures()
    for asked in (row("1?", "A.jpg", "B.jpg"), row("2?", "B.jpg")):
        encoder.encode(asked, pictures=pictures)
    held = {key[0]: known._decoded is not None for key, known in pictures._known.items()}
    assert held == {"A.jpg": False, "B.jpg": True}


def test_a_reduced_picture_has_the_plans_and_nearly_the_pixels_of_the_whole_one(
    make_encoder: Any, row: Any, decoded: Any
) -> None:
    whole = make_encoder().encode(row("?", "A.jpg"))
    reduced = make_encoder(reduced_decode=True).encode(row("?", "A.jpg"))
    assert decoded == [("'A.jpg'", 600), ("'A.jpg'", 300)]  # a quarter of it shows 112 pixels
    assert (reduced.input_ids, reduced.plans) == (whole.input_ids, whole.plans)
    for ours, theirs in zip(reduced.views, whole.views, strict=True):
        assert ours.shape == theirs.shape
        inside = np.abs(ours.astype(int) - theirs)[:, 2:-2, 2:-2]
        assert inside.mean() < 1  # one level; a wrong place or size gives tens on such a picture


@pytest.mark.parametrize("reduced_decode", [False, True])
def test_a_picture_that_cannot_be_decoded_is_refused_by_every_row_that_shows_it(
    make_encoder: Any, tmp_path: Path, row: Any, reduced_decode: bool
) -> None:
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "A.jpg").read_bytes()[:-400])
    encoder = make_encoder(reduced_decode=reduced_decode)
    pictures = encoder.new_pictures()
    for _ in range(2):
        with pytest.raises(DataError, match=r"'cut\.jpg' is cut short"):
            encoder.encode(row("?", "cut.jpg"), pictures=pictures)
    assert encoder.encode(row("?", "B.jpg"), pictures=pictures).views


def test_the_recipe_says_which_shortcuts_are_taken(nano_processor: Any) -> None:
    data = {"train": [{"path": "x.jsonl"}], "fast_resize": True}
    made = Encoder.of_recipe(
        nano_processor, FAMILIES["idefics2"], ImagesSection(), DataSection.model_validate(data)
    )
    assert made.shortcuts == Shortcuts(reduced_decode=False, fast_resize=True)
