"""Packed vision against the library's own path: the same features, losses and gradients."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.collate import collate
from finetune.data.examples import Encoder, Example
from finetune.data.images import ImageAccess
from finetune.data.packed_views import PackedViews, pack_views
from finetune.data.sources import Row
from finetune.families import FAMILIES
from finetune.model.adapters import add_adapter, require_grad_on_language_inputs_only
from finetune.model.generate import generate_answers
from finetune.model.load import load_model, load_processor
from finetune.model.vision import MAX_PATCHES, encode_views, views_of_calls
from finetune.recipe import AdapterSection, ImagesSection, ModelSection
from tests.conftest import NANO, NANO_IMAGES, noise
from tests.families import CHECKPOINTS
from tests.models import idefics
from tests.test_collate import row_losses

MERGED = [name for name, each in CHECKPOINTS.items() if each.family.view_encoder]
CROSSED = [name for name, each in CHECKPOINTS.items() if each.family.cross_encoder]


def opened(folder: Path, name: str, *, packed: bool, **images: Any) -> tuple[Encoder, Any]:
    section = ModelSection(name=str(folder), dtype="float32", packed_vision=packed)
    processor, settings = load_processor(section, ImagesSection(**images))
    return (
        Encoder(processor, CHECKPOINTS[name].family, settings, packed_vision=packed),
        load_model(section)[0].eval(),
    )


def random_rows(folder: Path, seed: int) -> list[Row]:
    """One to four rows of none to three pictures of any size, some of them the same file."""
    draw = np.random.default_rng(seed)
    for i in range(4):
        width, height = draw.integers(8, 240, 2).tolist()
        noise(width, height, seed=seed * 10 + i).save(folder / f"{i}.png")
    rows = []
    for number in range(int(draw.integers(1, 5))):
        pictures = draw.integers(0, 4, int(draw.integers(0, 4))).tolist()
        pictures = pictures or ([0] if number == 0 else [])  # not all rows without one
        rows.append(row_about(folder, pictures))
    return rows


def row_about(folder: Path, pictures: Sequence[int]) -> Row:
    asked = (*(Image(f"{i}.png") for i in pictures), Text("What is it?"))
    messages = (Message("user", asked), Message("assistant", (Text("A cat."),)))
    return Row("rows:1", Conversation(messages), ImageAccess(folder))


def adapted(model: Any, name: str, parts: tuple[Any, ...]) -> Any:
    torch.manual_seed(0)
    model = add_adapter(
        model, CHECKPOINTS[name].family, AdapterSection(dropout=0.0, parts=parts), name
    )
    for key, parameter in model.named_parameters():
        if "lora_B" in key:  # zeros would hide the gradients of lora_A
            torch.nn.init.normal_(parameter, std=0.05)
    base = model.get_base_model()
    require_grad_on_language_inputs_only(base)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    return model.train()


@pytest.mark.parametrize("split", ["always", "never", "auto"])
@pytest.mark.parametrize("name", MERGED)
def test_packed_features_are_the_stock_ones(
    folder_of: Callable[[str], Path], name: str, split: str, tmp_path: Path
) -> None:
    encoder, model = opened(folder_of(name), name, packed=True, split=split)
    for seed in range(4):
        examples = [encoder.encode(row) for row in random_rows(tmp_path, seed)]
        ids = torch.zeros((len(examples), 1))
        stacked = encoder.family.stack(examples, encoder.processor, ids)
        packed = encoder.family.pack(examples, encoder.processor, ids)
        assert set(packed) == {"pixel_values"}
        with torch.no_grad():
            stock = model.model.get_image_features(**stacked).pooler_output
            ours = model.model.get_image_features(**packed).pooler_output
        torch.testing.assert_close(torch.cat(ours), torch.cat(stock), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_losses_are_those_of_the_stock_path(
    folder_of: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    encoder, ours = opened(folder_of(name), name, packed=True)
    _, stock = opened(folder_of(name), name, packed=False)
    for seed in range(3):
        examples = [encoder.encode(row) for row in random_rows(tmp_path, seed)]
        losses = [
            row_losses(
                model,
                collate(examples, encoder.processor, encoder.family, packed_vision=packed),
            )
            for model, packed in ((ours, True), (stock, False))
        ]
        torch.testing.assert_close(*losses, atol=2e-5, rtol=1e-5)


def test_an_idefics_without_a_perceiver_has_the_losses_of_the_stock_path(tmp_path: Path) -> None:
    name = "idefics-9b-instruct"
    folder = tmp_path / name
    idefics.save_tiny(folder, perceiver=False)
    encoder, ours = opened(folder, name, packed=True)
    _, stock = opened(folder, name, packed=False)
    examples = [encoder.encode(row) for row in random_rows(tmp_path, 0)]
    losses = [
        row_losses(
            model, collate(examples, encoder.processor, encoder.family, packed_vision=packed)
        )
        for model, packed in ((ours, True), (stock, False))
    ]
    torch.testing.assert_close(*losses, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "parts", [("language", "connector"), ("language",), ("language", "connector", "vision")]
)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_adapter_gradients_are_those_of_the_stock_path(
    folder_of: Callable[[str], Path], name: str, parts: tuple[Any, ...], tmp_path: Path
) -> None:
    encoder, ours = opened(folder_of(name), name, packed=True)
    _, stock = opened(folder_of(name), name, packed=False)
    examples = [encoder.encode(row) for row in random_rows(tmp_path, 1)]
    gradients = []
    for model, packed in ((ours, True), (stock, False)):
        model = adapted(model, name, parts)
        batch = collate(examples, encoder.processor, encoder.family, packed_vision=packed)
        model(**batch).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("lora_A" in key for key in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_every_checkpoint_is_of_one_kind() -> None:
    assert sorted(MERGED + CROSSED) == sorted(CHECKPOINTS)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_each_picture_travels_and_is_computed_once_and_what_is_missing_never(
    folder_of: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    encoder, model = opened(folder_of(name), name, packed=True)
    noise(20, 70, seed=1).save(tmp_path / "0.png")
    noise(60, 30, seed=2).save(tmp_path / "1.png")
    rows = [row_about(tmp_path, pictures) for pictures in ([0, 1], [], [1, 0, 0])]
    examples = [encoder.encode(row) for row in rows]
    batch = collate(examples, encoder.processor, encoder.family, packed_vision=True)
    views: PackedViews = batch["pixel_values"]
    assert {group.dtype for group in views.groups} == {torch.uint8}
    once = examples[0].views  # both pictures
    assert sum(group.numel() for group in views.groups) == sum(view.size for view in once)
    embedded = []
    modules = dict(model.model.named_modules())
    (patches,) = (each for key, each in modules.items() if key.endswith("patch_embedding"))
    patches.register_forward_pre_hook(lambda module, args: embedded.append(len(args[0])))
    row_losses(model, batch)
    # Llama's tower takes images in four places for tiles
    expected = 4 * 2 if encoder.family.name == "mllama" else len(once)
    assert sum(embedded) == expected


@pytest.mark.parametrize("pictures", [[[], []], [[], [0, 1, 0], [1]], [[], [1]]])
@pytest.mark.parametrize("name", CROSSED)
def test_rows_that_lack_pictures_of_others_learn_as_in_the_stock_path(
    folder_of: Callable[[str], Path], name: str, pictures: list[list[int]], tmp_path: Path
) -> None:
    """There the missing ones are computed, and hidden by the masks."""
    encoder, ours = opened(folder_of(name), name, packed=True)
    _, stock = opened(folder_of(name), name, packed=False)
    noise(30, 130, seed=1).save(tmp_path / "0.png")
    noise(60, 40, seed=2).save(tmp_path / "1.png")
    examples = [encoder.encode(row_about(tmp_path, each)) for each in pictures]
    losses, gradients = [], []
    for model, packed in ((ours, True), (stock, False)):
        batch = collate(examples, encoder.processor, encoder.family, packed_vision=packed)
        losses.append(row_losses(model, dict(batch)))
        model = adapted(model, name, ("language", "connector", "vision"))
        model(**batch).loss.backward()
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses, atol=2e-5, rtol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("parts", "with_grad", "num_runs"),
    [
        (("language", "connector"), False, 2),
        (("language",), False, 1),
        (("language", "connector", "vision"), True, 2),
    ],
)
@pytest.mark.parametrize(
    ("name", "connector"),
    [("llama-3.2-11b-vision", "multi_modal_projector"), ("idefics-9b", "perceiver_resampler")],
)
def test_where_views_are_read_by_cross_attention_only_what_learns_has_gradients(
    folder_of: Callable[[str], Path],
    name: str,
    connector: str,
    parts: tuple[Any, ...],
    with_grad: bool,
    num_runs: int,
    tmp_path: Path,
) -> None:
    """And the connector is computed again where it learns, rather than kept."""
    encoder, model = opened(folder_of(name), name, packed=True)
    noise(30, 30).save(tmp_path / "0.png")
    batch = collate(
        [encoder.encode(row_about(tmp_path, [0]))],
        encoder.processor,
        encoder.family,
        packed_vision=True,
    )
    model = adapted(model, name, parts)
    inner = model.get_base_model().model
    in_tower, runs = [], []
    inner.vision_model.register_forward_hook(lambda *_: in_tower.append(torch.is_grad_enabled()))
    # before it runs: the second time stops where nothing more is needed
    inner.get_submodule(connector).register_forward_pre_hook(lambda *_: runs.append(1))
    model(**batch).loss.backward()
    assert in_tower == [with_grad]
    assert len(runs) == num_runs


def nano_rows(folder: Path, *sizes: tuple[int, int]) -> list[Row]:
    for i, size in enumerate(sizes):
        noise(*size, seed=i).save(folder / f"{i}.png")
    asked = [(Image(f"{i}.png"), Text("What is it?")) for i in range(len(sizes))]
    return [
        Row(
            "rows:1",
            Conversation((Message("user", each), Message("assistant", (Text("A"),)))),
            ImageAccess(folder),
        )
        for each in asked
    ]


def nano_batch(encoder: Encoder, rows: list[Row]) -> dict[str, Any]:
    examples = [encoder.encode(row) for row in rows]
    return collate(examples, encoder.processor, encoder.family, packed_vision=True)


def test_a_picture_that_comes_twice_is_computed_once(
    encoder: Encoder, nano_model: Any, tmp_path: Path
) -> None:
    rows = nano_rows(tmp_path, (112, 56), (56, 112))
    views: PackedViews = nano_batch(encoder, [*rows, rows[0]])["pixel_values"]
    assert [len(group) for group in views.groups] == [1, 1]
    assert views.order_N.tolist() == [0, 1, 0]
    seen = []
    nano_model.model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].shape), with_kwargs=True
    )
    features = encode_views(nano_model.model, views)
    assert sum(shape[0] for shape in seen) == 2
    torch.testing.assert_close(features[0], features[2], rtol=0, atol=0)


def test_pixels_travel_as_bytes(encoder: Encoder, tmp_path: Path) -> None:
    views = nano_batch(encoder, nano_rows(tmp_path, (112, 56), (56, 56)))["pixel_values"]
    assert {group.dtype for group in views.groups} == {torch.uint8}
    assert views.num_bytes == 3 * (112 * 56 + 56 * 56) + 8 * len(views)


def test_groups_are_cut_at_the_most_patches_of_a_call() -> None:
    views = [np.full((3, 490, 490), i, np.uint8) for i in range(8)]  # 1,225 patches each
    row = Example("row", [], [], views)
    image_processor = type(
        "P", (), {"rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    )
    processor = type("Q", (), {"image_processor": image_processor})
    packed = pack_views([row], processor, torch.zeros(0))["pixel_values"]
    calls = [len(call) for call in views_of_calls(packed, patch_size=14)]
    assert calls == [MAX_PATCHES // 1225] * 2 + [8 - 2 * (MAX_PATCHES // 1225)]


def learnt(parts: tuple[Any, ...], batch: dict[str, Any]) -> tuple[Any, list[bool], int]:
    """Whether each call of the tower had gradients on, and how often the connector's first layer
    was computed in a whole step.
    """
    model = adapted(load_model(NANO)[0], "idefics2-8b", parts)
    inner = model.get_base_model().model
    with_grad, projected = [], []
    inner.vision_model.register_forward_hook(
        lambda module, args, output: with_grad.append(torch.is_grad_enabled())
    )
    inner.connector.modality_projection.register_forward_hook(
        lambda module, args, output: projected.append(1)
    )
    model(**batch).loss.backward()
    return model, with_grad, len(projected)


def test_a_frozen_tower_runs_without_gradients_and_a_learning_connector_is_computed_again(
    encoder: Encoder, tmp_path: Path
) -> None:
    batch = nano_batch(encoder, nano_rows(tmp_path, (112, 56)))
    _, with_grad, num_projected = learnt(("language", "connector"), batch)
    assert with_grad == [False]
    assert num_projected == 2
    _, with_grad, num_projected = learnt(("language",), batch)
    assert with_grad == [False]
    assert num_projected == 1
    _, with_grad, _ = learnt(("vision",), batch)
    assert with_grad[0]


def test_a_copy_of_the_model_runs_its_own_weights(encoder: Encoder, tmp_path: Path) -> None:
    batch = nano_batch(encoder, nano_rows(tmp_path, (112, 56)))
    model = load_model(NANO)[0]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.model.vision_model.parameters():
            parameter.zero_()
    features = [encode_views(each.model, batch["pixel_values"]) for each in (model, twin)]
    assert not torch.allclose(features[0], features[1])


def test_a_saved_model_is_a_plain_one(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    load_model(NANO)[0].save_pretrained(tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert "finetune" not in (tmp_path / "config.json").read_text()
    assert type(plain.model).get_image_features.__module__.startswith("transformers")


def test_without_packed_vision_the_library_runs_as_it_is(tmp_path: Path) -> None:
    section = NANO.model_copy(update={"packed_vision": False})
    model, _ = load_model(section)
    assert type(model.model).__mro__[0].__module__.startswith("transformers")
    assert "view_encoder" not in vars(model.model)
    processor, _ = load_processor(section, NANO_IMAGES)
    encoder = Encoder(processor, FAMILIES["idefics2"], NANO_IMAGES)
    rows = nano_rows(tmp_path, (56, 56))
    batch = collate([encoder.encode(row) for row in rows], processor, encoder.family)
    assert {"pixel_values", "pixel_attention_mask"} <= batch.keys()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_answers_are_those_of_the_stock_path(
    folder_of: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    """`generate` reads the arguments of the features' function off its signature."""
    encoder, ours = opened(folder_of(name), name, packed=True)
    _, stock = opened(folder_of(name), name, packed=False)
    prompts = [encoder.encode_prompt(row) for row in random_rows(tmp_path, 1)]
    answers = [
        generate_answers(
            model,
            encoder.processor,
            encoder.family,
            prompts,
            max_new_tokens=6,
            batch_size=2,
            packed_vision=packed,
        )
        for model, packed in ((ours, True), (ours, False), (stock, False))
    ]
    assert answers[0] == answers[1] == answers[2]
