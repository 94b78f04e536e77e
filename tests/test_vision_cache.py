"""Features kept on disk: what is read is what was computed, whatever happens to the files."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PilImage
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from finetune.data import pictures
from finetune.data.collate import collate
from finetune.data.examples import Encoder
from finetune.data.images import ImageAccess
from finetune.data.packed_views import (
    KeyedView,
    PackedViews,
    normalised,
    pack_views,
    view_key,
)
from finetune.data.pictures import Picture, Shortcuts
from finetune.data.sequences import Layouting
from finetune.data.sources import Row
from finetune.data.views import Canvas, ImagePlan, View
from finetune.data.vision_cache import CacheWriter, VisionCache, content_key
from finetune.errors import ModelError, RecipeError
from finetune.model.adapters import base_of
from finetune.model.load import load_model
from finetune.model.vision import encode_views
from finetune.model.vision_cache import Keeper, keeping_features, settings_key
from finetune.planning import Planner
from finetune.recipe import load_recipe
from finetune.rundir import RunDir, read_jsonl
from tests.conftest import NANO, noise, write_dataset
from tests.families import CHECKPOINTS
from tests.test_train import train
from tests.test_vision import MERGED, adapted, nano_rows, opened, random_rows

GIB = 2**30


@contextmanager
def keeping(model: Any, encoder: Encoder, folder: Path) -> Iterator[tuple[Encoder, Keeper]]:
    """As training does with the cache in `folder`, which is written when the block ends."""
    write_dataset(folder, num_train=1, num_eval=0)
    recipe = load_recipe(folder / "recipe.yaml", ["training.vision_cache=1GiB"])
    quiet = Console(quiet=True)
    with keeping_features(model, encoder, recipe, folder / "cache", quiet) as found:
        inner = base_of(model).model
        yield found, inner.feature_keeper


def packed(encoder: Encoder, rows: list[Row]) -> dict[str, Any]:
    pictures = encoder.new_pictures()
    examples = [encoder.encode(row, pictures=pictures) for row in rows]
    return collate(examples, encoder.processor, encoder.family, packed_vision=True)


def dtypes(views: PackedViews) -> set[torch.dtype]:
    return {group.dtype for group in views.groups}


@pytest.mark.parametrize("parts", [("language", "connector"), ("language",)])
@pytest.mark.parametrize("name", MERGED)
def test_what_is_read_is_what_the_frozen_part_gives_rounded_to_bfloat16(
    folder_of: Callable[[str], Path], name: str, parts: tuple[Any, ...], tmp_path: Path
) -> None:
    encoder, plain = opened(folder_of(name), name, packed=True)
    model = adapted(plain, name, parts)
    inner = model.get_base_model().model
    rows = random_rows(tmp_path, 1)
    views: PackedViews = packed(encoder, rows)["pixel_values"]
    frozen = encoder.family.view_encoder
    assert frozen
    expected = []
    with torch.no_grad():
        for group in views.groups:
            features = frozen.tower(inner, normalised(group, views))
            if "connector" not in parts:
                features = frozen.connect(inner, features)
            expected.append(features.to(torch.bfloat16))
    with keeping(model, encoder, tmp_path) as (found, _):
        encode_views(inner, packed(found, rows)["pixel_values"])
    with keeping(model, encoder, tmp_path) as (found, _):
        read: PackedViews = packed(found, rows)["pixel_values"]
        last = encode_views(inner, read)
    assert dtypes(read) == {torch.bfloat16}
    torch.testing.assert_close(list(read.groups), expected, rtol=0, atol=0)
    torch.testing.assert_close(last, encode_views(inner, views), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("parts", [("language", "connector"), ("language",)])
@pytest.mark.parametrize("name", MERGED)
def test_losses_and_gradients_are_the_same_whether_features_are_computed_or_read(
    folder_of: Callable[[str], Path], name: str, parts: tuple[Any, ...], tmp_path: Path
) -> None:
    encoder, plain = opened(folder_of(name), name, packed=True)
    model = adapted(plain, name, parts)
    rows = random_rows(tmp_path, 2)

    def step(encoder: Encoder) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = model(**packed(encoder, rows)).loss
        loss.backward()
        learnt = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), learnt

    without = step(encoder)
    steps, counted = [], []
    for _ in range(2):
        with keeping(model, encoder, tmp_path) as (found, keeper):
            steps.append(step(found))
            counted.append((keeper.num_read, keeper.num_computed))
    num_views = counted[0][1]
    assert counted == [(0, num_views), (num_views, 0)]
    torch.testing.assert_close(steps[1], steps[0], rtol=0, atol=0)
    torch.testing.assert_close(steps[0][0], without[0], rtol=0.01, atol=0.01)
    assert step(encoder)[0] == without[0]  # nothing is left on the model


def test_a_picture_of_which_one_view_is_missing_is_read_and_computed(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    encoder, plain = opened(folder_of("idefics2-8b"), "idefics2-8b", packed=True, split="always")
    model = adapted(plain, "idefics2-8b", ("language", "connector"))
    rows = nano_rows(tmp_path, (112, 56), (56, 112))
    both = []
    with keeping(model, encoder, tmp_path) as (found, _):
        both.append(encode_views(plain.model, packed(found, rows * 2)["pixel_values"]))
    sorted((tmp_path / "cache").rglob("*.safetensors"))[0].unlink()
    with keeping(model, encoder, tmp_path) as (found, keeper):
        views: PackedViews = packed(found, rows * 2)["pixel_values"]
        both.append(encode_views(plain.model, views))
    assert dtypes(views) == {torch.bfloat16, torch.uint8}
    assert (keeper.num_read, keeper.num_computed) == (9, 1)
    torch.testing.assert_close(both[1], both[0], rtol=1e-6, atol=1e-6)
    with keeping(model, encoder, tmp_path) as (found, _):
        assert dtypes(packed(found, rows)["pixel_values"]) == {torch.bfloat16}


def test_views_of_one_key_are_equal_and_travel_once() -> None:
    shape, features = (3, 28, 28), torch.ones((4, 8), dtype=torch.bfloat16)
    views = [KeyedView("a", shape, features=features), KeyedView("a", shape, features=features)]
    assert views[0] == views[1] != KeyedView("b", shape, features=features)
    assert view_key(views[0]) == view_key(views[1])
    image_processor = type(
        "P", (), {"rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    )
    processor = type("Q", (), {"image_processor": image_processor})
    rows: list[Any] = [SimpleNamespace(views=views)]
    packed = pack_views(rows, processor, torch.zeros(0))["pixel_values"]
    assert [len(group) for group in packed.groups] == [1]
    assert packed.order_N.tolist() == [0, 0]


def run_of(recipe: Path, folder: Path, *overrides: str) -> list[Any]:
    """Losses of a run, those of the held-out rows among them."""
    train(str(recipe), [f"output.dir={folder}", *overrides])
    logged = read_jsonl(RunDir(folder).metrics)
    return [line.get("loss", line.get("eval_loss")) for line in logged]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_read_what_the_first_one_computed_and_a_second_run_all(
    dataset: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    num_workers: int,
) -> None:
    """Twelve pictures three times over: the tower sees each once, a second run none; and none is
    decoded then to be trained.
    """
    write = CacheWriter.write
    monkeypatch.setattr(  # slower than steps are, so that the end of an epoch has to be waited for
        CacheWriter, "write", lambda *args: time.sleep(0.2) or write(*args)
    )
    training = {"epochs": 3, "max_steps": None, "num_workers": num_workers}
    recipe = dataset(num_eval=0, adapter={"dropout": 0.0}, training=training)
    without = run_of(recipe, tmp_path / "without")
    cold = run_of(recipe, tmp_path / "cold", "training.vision_cache=1GiB")
    assert "24 views read, 12 computed and kept" in capfd.readouterr().err
    monkeypatch.setattr(pictures, "decode_image", None)  # nor in a forked process
    warm = run_of(recipe, tmp_path / "warm", "training.vision_cache=1GiB")
    assert "36 views read, 0 computed and kept" in capfd.readouterr().err
    assert warm == cold
    assert len(cold) == 9
    assert cold == pytest.approx(without, rel=0.01)


def test_rows_that_share_a_picture_are_laid_out_as_without_a_cache(
    encoder: Encoder, tmp_path: Path
) -> None:
    model = adapted(load_model(NANO)[0], "idefics2-8b", ("language", "connector"))
    pages = nano_rows(tmp_path, (112, 56), (56, 112))
    rows = [row for row in pages for _ in range(3)]
    layouting = Layouting(share_images=True, packing=True)

    def batch(encoder: Encoder) -> dict[str, Any]:
        # apart, as loading processes do: the rows of a page then hold views of equal keys
        examples = [encoder.encode(row) for row in rows]
        return collate(
            examples, encoder.processor, encoder.family, packed_vision=True, layouting=layouting
        )

    without = batch(encoder)
    losses = []
    for _ in range(2):
        with keeping(model, encoder, tmp_path) as (found, _):
            shared = batch(found)
            losses.append(model(**shared).loss)
            assert torch.equal(shared["input_ids"], without["input_ids"])
            assert torch.equal(shared["position_ids"], without["position_ids"])
            assert sum(map(len, shared["pixel_values"].groups)) == 2
    assert losses[0] == losses[1]
    assert losses[0].item() == pytest.approx(model(**without).loss.item(), rel=0.01)


def test_streamed_rows_are_read_too(
    dataset: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = dataset(num_eval=0, training={"max_steps": 3})
    settings = [
        f"data.train=[{{path: {tmp_path / 'train.jsonl'}, streaming: true}}]",
        "training.vision_cache=1GiB",
    ]
    cold = run_of(recipe, tmp_path / "cold", *settings)
    assert " 12 computed and kept" in capfd.readouterr().err
    assert run_of(recipe, tmp_path / "warm", *settings) == cold
    assert " 0 computed and kept" in capfd.readouterr().err


def test_held_out_rows_are_read_too_and_judged_by_their_pixels(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = dataset(adapter={"dropout": 0.0})
    runs = [RunDir(tmp_path / name) for name in ("without", "cold", "warm")]
    losses = [
        run_of(recipe, run.path, f"training.vision_cache={limit}")
        for run, limit in zip(runs, ("off", "1GiB", "1GiB"), strict=True)
    ]
    assert losses[1] == losses[2]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    base = [[line["base"] for line in read_jsonl(run.predictions)] for run in runs]
    assert base[0] == base[1] == base[2]


def features(number: int = 0, places: int = 16) -> torch.Tensor:
    torch.manual_seed(number)
    return torch.randn((places, 32)).to(torch.bfloat16)


def key(number: int) -> str:
    return f"{content_key(bytes([number]), None, 144)}-30x20-{'0' * 32}"


FILE_BYTES = 1200  # of 16 x 32 numbers of two bytes, with the header of safetensors


@pytest.fixture
def cache(tmp_path: Path) -> VisionCache:
    return VisionCache(tmp_path / "vision", "settings")


@pytest.fixture
def writer(cache: VisionCache) -> Iterator[CacheWriter]:
    writer = CacheWriter(cache, GIB)
    yield writer
    writer.close()


def names(cache: VisionCache) -> set[str]:
    return {path.stem for path in cache.root.rglob("*.safetensors")}


def test_a_view_is_found_again_with_the_size_of_its_picture(
    cache: VisionCache, writer: CacheWriter
) -> None:
    content = key(1).partition("-")[0]
    assert cache.size_of(content) is None
    assert cache.find(key(1)) is None
    assert writer.write(key(1), features(1))
    found = cache.find(key(1))
    assert found is not None
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, features(1))
    assert cache.size_of(content) == (30, 20)
    assert replace(cache, settings="others").find(key(1)) is None


def test_a_view_kept_right_after_its_folder_was_looked_at_is_known(
    cache: VisionCache, writer: CacheWriter
) -> None:
    """So soon that the folder still has the time that it had then."""
    first, second = (f"ab{digit * 30}" for digit in "01")
    writer.write(f"{first}-30x20-{'0' * 32}", features())
    assert cache.size_of(first) == (30, 20)
    folder = cache.path_of(first).parent
    times = folder.stat().st_atime_ns, folder.stat().st_mtime_ns
    writer.write(f"{second}-30x20-{'0' * 32}", features())
    os.utime(folder, ns=times)
    assert cache.size_of(second) == (30, 20)


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "other"])
def test_a_damaged_file_is_removed_and_computed_again(
    cache: VisionCache, writer: CacheWriter, damage: str
) -> None:
    writer.write(key(1), features(1))
    path = cache.path_of(key(1))
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[:-100],
            "changed": whole[:-1] + bytes([whole[-1] ^ 1]),
            "empty": b"",
            "other": b"not a file of ours, though it is as long as one" * 30,
        }[damage]
    )
    assert cache.find(key(1)) is None
    assert not path.exists()
    writer.write(key(1), features(1))
    assert cache.find(key(1)) is not None


def test_files_are_found_by_content_and_pages_by_number_and_resolution() -> None:
    png, pdf = b"\x89PNG\r\n\x1a\n" + b"0" * 20, b"%PDF-1.7 \n" + b"0" * 20
    assert content_key(png, None, 144) == content_key(png, None, 72)
    assert content_key(png, None, 144) != content_key(png + b"1", None, 144)
    drawn = [(1, 144), (2, 144), (1, 72), (None, 144)]
    assert len({content_key(pdf, page, dpi) for page, dpi in drawn}) == 4


WHOLE = View((0, 0, 100, 80), 56, 42)
GROUND = Canvas(120, 120, left_px=0, upper_px=0, colour=(0, 0, 0))


@pytest.mark.parametrize(
    "plan",
    [
        ImagePlan((View((0, 0, 100, 79), 56, 42),)),
        ImagePlan((View((0, 0, 100, 80), 56, 56),)),
        ImagePlan((WHOLE,), resizes=((200, 160),)),
        ImagePlan((WHOLE,), canvas=GROUND),
        ImagePlan((WHOLE,), canvas=replace(GROUND, colour=(0, 0, 1))),
    ],
)
def test_a_view_that_is_cut_otherwise_is_another_one(cache: VisionCache, plan: ImagePlan) -> None:
    content = content_key(b"a picture", None, 144)
    known = [ImagePlan((WHOLE,)), ImagePlan((WHOLE, WHOLE), rows=1, cols=2)]
    assert len({cache.views(content, (100, 80), each)[0].key for each in known}) == 1
    assert (
        cache.views(content, (100, 80), plan)[0].key
        != cache.views(content, (100, 80), known[0])[0].key
    )


@pytest.mark.parametrize("reduced_decode", [True, False])
def test_a_view_of_a_picture_that_is_decoded_smaller_is_another_one(
    cache: VisionCache, tmp_path: Path, reduced_decode: bool
) -> None:
    """Beside quarters that show all its pixels the same whole view is cut from all of them."""
    noise(800, 600).save(tmp_path / "photo.jpg")
    shortcuts = Shortcuts(reduced_decode=reduced_decode)
    access = ImageAccess(tmp_path)
    picture = Picture("photo.jpg", access, PilImage.Resampling.BILINEAR, shortcuts, cache)
    whole = View((0, 0, 800, 600), 392, 294)
    quarter = View((0, 0, 400, 300), 400, 300)
    alone, beside = ImagePlan((whole,)), ImagePlan((whole, quarter))
    keys = [picture.views(plan)[0].key for plan in (alone, beside)]
    pixels = [picture.views(plan)[0].pixels for plan in (alone, beside)]
    assert (keys[0] == keys[1]) == np.array_equal(pixels[0], pixels[1]) == (not reduced_decode)


def an_encoder(folder_of: Callable[[str], Path], **images: Any) -> tuple[Encoder, Any]:
    encoder, model = opened(folder_of("idefics2-8b"), "idefics2-8b", packed=True, **images)
    return encoder, adapted(model, "idefics2-8b", ("language", "connector")).get_base_model().model


def changed_settings() -> dict[str, Callable[[Any, Any], Any]]:
    """Changes to an encoder and a model without its head; what is given back is the stage."""

    def set_on(
        owner: Callable[[Any, Any], Any], name: str, value: Any
    ) -> Callable[[Any, Any], Any]:
        return lambda encoder, inner: setattr(owner(encoder, inner), name, value)

    processor = lambda encoder, inner: encoder.processor.image_processor  # noqa: E731

    def one_weight(encoder: Any, inner: Any) -> None:
        inner.vision_model.post_layernorm.bias.data[0] += 1e-3

    def shortcut(name: str) -> Callable[[Any, Any], Any]:
        return lambda encoder, inner: object.__setattr__(
            encoder, "shortcuts", Shortcuts(**{name: True})
        )

    return {
        "resample": set_on(processor, "resample", 3),
        "rescale_factor": set_on(processor, "rescale_factor", 1 / 127.5),
        "mean": set_on(processor, "image_mean", [0.5, 0.5, 0.4]),
        "std": set_on(processor, "image_std", [0.5, 0.5, 0.4]),
        "a weight of the tower": one_weight,
        "dtype": lambda encoder, inner: inner.to(torch.float16),
        "epsilon": set_on(lambda encoder, inner: inner.config.vision_config, "layer_norm_eps", 1.0),
        "reduced_decode": shortcut("reduced_decode"),
        "fast_resize": shortcut("fast_resize"),
        "stage": lambda encoder, inner: "connector",
    }


@pytest.mark.parametrize("name", changed_settings())
def test_a_setting_that_shapes_features_leads_to_another_folder(
    folder_of: Callable[[str], Path], name: str
) -> None:
    encoder, inner = an_encoder(folder_of)
    before = settings_key(inner, encoder, "tower")
    stage = changed_settings()[name](encoder, inner)
    after = settings_key(inner, encoder, stage if stage == "connector" else "tower")
    assert after != before


@pytest.mark.parametrize("what", ["transformers", "PIL"])
def test_another_version_leads_to_another_folder(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    encoder, inner = an_encoder(folder_of)
    before = settings_key(inner, encoder, "tower")
    monkeypatch.setattr(f"{what}.__version__", "99.0")
    assert settings_key(inner, encoder, "tower") != before


def test_what_shapes_no_feature_leads_to_the_same_folder(folder_of: Callable[[str], Path]) -> None:
    """The learnt connector and language model, the sizes that plans are made by, limits; and the
    connector where it is frozen, too, matters.
    """
    encoder, inner = an_encoder(folder_of)
    tower, connector = (settings_key(inner, encoder, stage) for stage in ("tower", "connector"))
    with torch.no_grad():
        for parameter in [*inner.connector.parameters(), *inner.text_model.parameters()]:
            parameter += 1
    unsplit, _ = an_encoder(folder_of, split="never", longest_edge_px=112, shortest_edge_px=28)
    unsplit = replace(unsplit, max_tokens=7)
    assert settings_key(inner, unsplit, "tower") == tower
    assert settings_key(inner, encoder, "connector") != connector


def age(cache: VisionCache, *numbers: int) -> None:
    """As if they had been used in this order, long ago: what is written at once may have one time,
    by the clock that files have theirs from.
    """
    for seconds, number in enumerate(numbers, start=1):
        os.utime(cache.path_of(key(number)), (seconds, seconds))


def test_the_limit_holds_and_what_was_unused_for_longest_goes_first(cache: VisionCache) -> None:
    limit = 10 * FILE_BYTES
    first = CacheWriter(cache, limit)
    for number in range(8):
        first.put(key(number), features(number))
        first.wait()
    first.close()
    assert first.num_kept == 8
    age(cache, *range(8))
    assert cache.find(key(0)) is not None  # used again, so that 1 is the oldest
    second = CacheWriter(cache, limit)
    for number in range(8, 13):
        second.put(key(number), features(number))
        second.wait()
        assert second.num_bytes() <= limit
    second.close()
    assert names(cache) >= {key(number) for number in (0, *range(8, 13))}
    assert key(1) not in names(cache)
    assert second.num_kept == 5


def test_what_this_run_uses_is_not_given_up_for_what_comes_later(cache: VisionCache) -> None:
    """Or an epoch over more views than fit would find none of them in the next one."""
    writer = CacheWriter(cache, 4 * FILE_BYTES)
    for number in range(9):
        writer.put(key(number), features(number))
        if number < 2:
            writer.wait()  # several threads write, in no order of theirs
    writer.close()
    assert writer.is_full
    kept = names(cache)
    assert {key(0), key(1)} <= kept
    assert writer.num_kept == len(kept) < 5
    assert writer.num_bytes() <= 4 * FILE_BYTES


def test_a_smaller_limit_than_before_makes_room_at_once(cache: VisionCache) -> None:
    writer = CacheWriter(cache, GIB)
    for number in range(8):
        writer.put(key(number), features(number))
    writer.close()
    age(cache, *range(8))
    smaller = CacheWriter(cache, 3 * FILE_BYTES)
    smaller.close()
    assert 0 < smaller.num_bytes() <= 3 * FILE_BYTES


def test_files_of_other_settings_and_a_lost_sum_are_counted(cache: VisionCache) -> None:
    others = replace(cache, settings="other")
    other = CacheWriter(others, GIB)
    for number in range(4):
        other.put(key(number), features(number))
    other.close()
    age(others, *range(4))
    (cache.root / ".total").write_text("")
    writer = CacheWriter(cache, 5 * FILE_BYTES)
    for number in range(4):
        writer.put(key(number), features(number))
        writer.wait()
        assert writer.num_bytes() <= 5 * FILE_BYTES
    writer.close()
    assert writer.num_kept == 4


def test_an_eviction_while_bytes_are_counted_does_not_count_twice(
    cache: VisionCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = CacheWriter(cache, GIB)
    for number in range(3):
        counting.write(key(number), features(number))
    counted = counting.num_bytes()
    age(cache, *range(3))
    evicting = CacheWriter(cache, counted + FILE_BYTES // 4)  # one has to go for another
    walked = counting._files  # pyright: ignore[reportPrivateUsage]
    thread = threading.Thread(target=evicting.write, args=(key(9), features(9)))

    def slowly() -> Iterator[tuple[int, Path, int]]:
        oldest = min(walked())
        yield oldest
        thread.start()
        thread.join(0.5)
        yield from (file for file in walked() if file[1] != oldest[1])

    monkeypatch.setattr(counting, "_files", slowly)
    assert counting.num_bytes() == counted
    thread.join()
    assert names(cache) == {key(number) for number in (1, 2, 9)}
    evicting.close()
    counting.close()


KILLED = """
import os, sys
from pathlib import Path
import torch
from finetune.data import vision_cache
from finetune.data.vision_cache import CacheWriter, VisionCache
cache = VisionCache(Path(sys.argv[1]), "settings")
writer = CacheWriter(cache, 2**30)
data = torch.ones((64, 1152), dtype=torch.bfloat16)
written = Path.write_bytes
def half(self, data):
    written(self, data[: len(data) // 2])
    os._exit(9)
Path.write_bytes = half
writer.write(sys.argv[2], data)
"""


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_to_read(
    cache: VisionCache,
) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, cache.root, key(1)], check=False)
    assert done.returncode == 9
    left = list(cache.path_of(key(1)).parent.iterdir())
    assert len(left) == 1  # the half of it
    assert cache.find(key(1)) is None
    assert cache.size_of(key(1)[:32]) is None
    two_days_ago = time.time() - 48 * 3600
    os.utime(left[0], (two_days_ago, two_days_ago))
    writer = CacheWriter(cache, GIB)
    assert writer.write(key(1), features(1))
    assert writer.num_bytes() == cache.path_of(key(1)).stat().st_size
    writer.close()
    assert not left[0].exists()


BESIDE = """
import sys
from pathlib import Path
import torch
from finetune.data.vision_cache import CacheWriter, VisionCache
cache = VisionCache(Path(sys.argv[1]), "settings")
writer = CacheWriter(cache, int(sys.argv[2]))
for key in sys.argv[3:]:
    torch.manual_seed(int(key[:8], 16))
    writer.put(key, torch.randn((16, 32)).to(torch.bfloat16))
writer.close()
print(writer.num_kept)
"""


def test_processes_that_write_the_same_and_other_views_at_once_keep_the_limit(
    cache: VisionCache,
) -> None:
    limit = 60 * FILE_BYTES
    of_each = [range(0, 40), range(20, 60), range(20, 100)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BESIDE, cache.root, str(limit), *map(key, numbers)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for numbers in of_each
    ]
    writer = CacheWriter(cache, limit)
    while any(process.poll() is None for process in processes):
        assert writer.num_bytes() <= limit
    kept = [int(process.communicate()[0]) for process in processes]
    writer.close()
    assert all(process.returncode == 0 for process in processes)
    assert sum(kept) >= len(names(cache)) >= 40
    assert not list(cache.root.rglob("*.tmp"))
    total = int((cache.root / ".total").read_text())
    assert total == writer.num_bytes() <= limit
    for name in names(cache):
        torch.manual_seed(int(name[:8], 16))
        found = cache.find(name)
        assert found is not None
        assert torch.equal(found, torch.randn((16, 32)).to(torch.bfloat16))


def test_a_full_disk_is_told_of_once_and_the_features_are_used_all_the_same(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, plain = opened(folder_of("idefics2-8b"), "idefics2-8b", packed=True, split="never")
    model = adapted(plain, "idefics2-8b", ("language", "connector"))
    rows = nano_rows(tmp_path, (112, 56), (56, 112), (56, 56))
    write_dataset(tmp_path, num_train=1, num_eval=0)
    recipe = load_recipe(tmp_path / "recipe.yaml", ["training.vision_cache=1GiB"])
    console = Console(file=StringIO(), width=500)

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with keeping_features(model, encoder, recipe, tmp_path / "cache", console) as found:
        views = packed(found, rows)["pixel_values"]
        first = encode_views(plain.model, views)
        torch.testing.assert_close(encode_views(plain.model, views), first, rtol=0, atol=0)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert told.count("No space left on device") == 1
    assert "6 computed, 0 of them kept" in told
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("model.packed_vision=false", "at their own size"),
        ("data.random_upscale=1.5", "never asked for again"),
        ("adapter.parts=[vision]", "change at every step"),
    ],
)
def test_a_recipe_whose_features_cannot_be_kept_is_refused(
    dataset: Callable[..., Path], setting: str, told: str
) -> None:
    recipe = dataset()
    with pytest.raises(RecipeError, match=told):
        load_recipe(recipe, ["training.vision_cache=1GiB", setting])
    load_recipe(recipe, [setting])
    load_recipe(recipe, ["training.vision_cache=1GiB"])


def test_a_family_without_views_in_the_text_is_refused(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    CHECKPOINTS["llama-3.2-11b-vision"].save_tiny(tmp_path / "tiny")
    with pytest.raises(RecipeError, match="mllama"):
        train(
            str(dataset(images={})),
            [f"model.name={tmp_path / 'tiny'}", "training.vision_cache=1GiB"],
        )
    assert not (tmp_path / "run").exists()


def test_a_tower_of_which_a_module_is_trained_whole_is_refused(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="modules_to_save"):
        train(
            str(dataset()),
            ["training.vision_cache=1GiB", "adapter.modules_to_save=[post_layernorm]"],
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("parts", ["[language, connector]", "[language]"])
def test_plan_tells_what_a_run_then_takes_and_is_spared(
    dataset: Callable[..., Path], tmp_path: Path, parts: str
) -> None:
    """Pictures of one size, one of them shown by two rows, against the files of a run and torch's
    own count of what the frozen part computes for twelve views.
    """
    recipe_file = dataset(num_eval=0, training={"epochs": 1, "max_steps": None})
    for number in range(12):
        noise(84, 56, seed=min(number, 10)).save(tmp_path / f"train{number}.png")
    settings = [f"adapter.parts={parts}", "training.vision_cache=1GiB"]
    settings.append("training.share_images=off")
    planned = Planner.of_recipe(
        load_recipe(recipe_file, settings), Console(quiet=True), device="cpu"
    ).plan()
    cache = planned.vision_cache
    assert cache
    train(str(recipe_file), settings)
    files = list((tmp_path / ".finetune-cache" / "vision").rglob("*.safetensors"))
    assert len(files) == 11
    kept = [load_file(path)["features"] for path in files]
    assert cache.needed_bytes == sum(each.nbytes for each in kept)
    told = cache.to_json()
    assert told["fits"] is True
    assert told["limit_bytes"] == GIB
    assert told["features_of"] == ("connector" if parts == "[language]" else "tower")

    model, family = load_model(load_recipe(recipe_file).model)
    frozen = family.view_encoder
    assert frozen
    # the sums of products of attention, which torch counts in eager code alone
    model.requires_grad_(False).set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        seen = frozen.tower(model.model, torch.zeros((12, 3, 56, 84)))
        if parts == "[language]":
            frozen.connect(model.model, seen)
    assert cache.flops_saved == counter.get_total_flops()


def test_plan_says_how_much_of_the_features_a_limit_holds(dataset: Callable[..., Path]) -> None:
    def planned(*settings: str) -> Any:
        recipe = load_recipe(dataset(num_eval=0), [*settings])
        return Planner.of_recipe(recipe, Console(quiet=True)).plan().vision_cache

    off = planned()
    assert "training.vision_cache is off" in off.in_words("1 TFLOP")
    assert off.to_json()["fits"] is None
    small = planned("training.vision_cache=20kB")
    assert small.to_json()["fits"] is False
    assert f"hold {20_000 / off.needed_bytes:.0%}" in small.in_words("1 TFLOP")
    assert planned("adapter.parts=[language, connector, vision]") is None
