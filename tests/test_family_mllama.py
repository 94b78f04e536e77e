"""Llama 3.2 Vision: tiles on a black canvas, the tokens that see them, and rows without an image.

Shape letters: B rows, T tokens.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.collate import collate
from finetune.data.examples import Example
from finetune.families.mllama import (
    BASE_TEMPLATE,
    MLLAMA,
    arrangements,
    mend_template,
    spans_that_see,
)
from finetune.model.vision import take_packed_views
from tests import family_rows
from tests.family_rows import Inputs, asked, learnt_ids, logits_of, noise
from tests.models import mllama

SIZES = [(1, 1), (1, 50), (3000, 40), (40, 3000), (28, 28), (29, 28), (55, 57), (300, 200), (7, 9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mllama")
    mllama.save_tiny(folder)
    return folder


def load(folder: Path) -> Any:
    return MLLAMA.build_processor(lambda kind: AutoProcessor.from_pretrained(folder), None)


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return load(folder)


@pytest.fixture(scope="module")
def stock_model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    MLLAMA.adjust_model(model)
    return model


def encode(
    processor: Any,
    conversation: Conversation,
    pictures: Sequence[PilImage.Image] = (),
    *,
    prompt: bool = False,
) -> Example:
    return family_rows.encode(processor, MLLAMA, conversation, pictures, prompt=prompt)


def shown(processor: Any, pictures: Sequence[PilImage.Image], ids: Sequence[int]) -> Example:
    return family_rows.shown(processor, MLLAMA, pictures, ids)


def batch_of(processor: Any, rows: Sequence[Example], *, left: bool = False) -> Inputs:
    return family_rows.inputs_of(processor, MLLAMA, rows, "left" if left else "right")


PICTURE = Image("a.png")
FOLLOWED_UP = Conversation(
    (
        *asked(PICTURE, PICTURE, Text("Same?"), answer="No.").messages,
        *asked(Text("And this?"), PICTURE, answer="Yes.").messages,
    )
)
CONVERSATIONS = {
    "image first": (asked(PICTURE, Text("What is it?")), 1),
    "image last": (asked(Text("What is it?"), PICTURE), 1),
    "several": (FOLLOWED_UP, 3),
    "no image": (asked(Text("What is written?")), 0),
}
PICTURES = [noise(40, 20), noise(100, 30, 1), noise(20, 130, 2)]


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_the_stock_processors_pixels(processor: Any, size: tuple[int, int]) -> None:
    picture = noise(*size)
    stock = processor.image_processor(picture, return_tensors="pt")
    ours = MLLAMA.stack([shown(processor, [picture], [processor.image_token_id])], processor, ONE)
    torch.testing.assert_close(ours["pixel_values"], stock["pixel_values"], atol=1e-6, rtol=0)
    assert ours["aspect_ratio_ids"].equal(stock["aspect_ratio_ids"])
    assert ours["aspect_ratio_mask"].equal(stock["aspect_ratio_mask"])


ONE = torch.tensor([[308]])


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400))
def test_tiles_are_the_stock_processors_pixels_at_any_size(
    processor: Any, width: int, height: int
) -> None:
    test_tiles_are_the_stock_processors_pixels(processor, (width, height))


@pytest.mark.parametrize("size", [(1, 50), (560, 560), (561, 559), (1700, 900), (3000, 40)])
def test_tiles_are_the_stock_processors_at_full_size(size: tuple[int, int]) -> None:
    processor = mllama.real_processor()
    picture = noise(*size)
    stock = processor.image_processor(picture, return_tensors="pt")
    row = shown(processor, [picture], [processor.image_token_id])
    ours = MLLAMA.stack([row], processor, torch.tensor([row.input_ids]))
    torch.testing.assert_close(ours["pixel_values"], stock["pixel_values"], atol=1e-6, rtol=0)
    assert ours["aspect_ratio_ids"].equal(stock["aspect_ratio_ids"])


@pytest.mark.parametrize("num_tiles", [1, 2, 3])
def test_tiles_of_an_image_attend_to_the_places_that_it_leaves_empty(
    stock_model: Any, num_tiles: int
) -> None:
    """So the tower must compute these, too."""
    size = stock_model.config.vision_config.image_size
    pixels = torch.zeros((1, 1, 4, 3, size, size))
    pixels[:, :, :num_tiles] = torch.randn(pixels[:, :, :num_tiles].shape)
    other = pixels.clone()
    other[:, :, num_tiles:] = torch.randn(other[:, :, num_tiles:].shape)
    seen = [
        stock_model.model.vision_model(
            pixel_values=each,
            aspect_ratio_ids=torch.tensor([[num_tiles]]),  # one row of tiles
            aspect_ratio_mask=(torch.arange(4) < num_tiles).long()[None, None],
        ).last_hidden_state[:, :, :num_tiles]
        for each in (pixels, other)
    ]
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_packed_tiles_are_those_of_the_images_alone(processor: Any) -> None:
    """Of 2, 1 and 3 tiles, where the library has 4 places an image."""
    ids = [processor.image_token_id, 7]
    pictures = [noise(56, 28), noise(28, 28, 1), noise(28, 84, 2)]
    grids = [(1, 2), (1, 1), (3, 1)]
    rows = [
        shown(processor, pictures[:2], [5, *ids, *ids]),
        shown(processor, [], [5, 7, 7, 7, 7]),
        shown(processor, [pictures[2], pictures[0]], [5, *ids, *ids]),
    ]
    packed = MLLAMA.pack(rows, processor, torch.tensor([row.input_ids for row in rows]))
    assert packed.keys() == {"pixel_values", "cross_attention_mask"}
    views = packed["pixel_values"]
    assert [tuple(group.shape[:3]) for group in views.groups] == [(1, *grid) for grid in grids]
    # five tiles of two images are the most of a row
    assert views.order_N.view(3, 5).tolist()[0][:3] == [0, 1, 2]
    assert views.order_N.view(3, 5).tolist()[2] == [3, 4, 5, 0, 1]
    seen_BTM = packed["cross_attention_mask"][:, :, 0]
    assert seen_BTM[0].tolist() == [[0] * 5, *[[1, 1, 0, 0, 0]] * 2, *[[0, 0, 1, 0, 0]] * 2]
    assert not seen_BTM[1].any()
    assert seen_BTM[2].tolist() == [[0] * 5, *[[1, 1, 1, 0, 0]] * 2, *[[0, 0, 0, 1, 1]] * 2]
    assert MLLAMA.pack(rows[1:2], processor, torch.tensor([rows[1].input_ids])) == {}


def test_only_tiles_of_images_are_projected_and_crossed(
    folder: Path, processor: Any, model: Any
) -> None:
    packed_model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    MLLAMA.adjust_model(packed_model)
    take_packed_views(packed_model, MLLAMA)
    rows = [
        encode(processor, FOLLOWED_UP, [noise(56, 28), noise(28, 28, 1), noise(56, 28)]),
        encode(processor, CONVERSATIONS["image first"][0], [noise(28, 84, 2)]),
    ]
    inner: Any = packed_model.model
    projected, crossed = [], []
    inner.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: projected.append(args[0][..., 0].numel())
    )
    inner.language_model.layers[1].cross_attn.k_proj.register_forward_pre_hook(
        lambda _, args: crossed.append(args[0][..., 0].numel())
    )
    batch = collate(rows, processor, MLLAMA, packed_vision=True)
    del batch["labels"]
    ours = logits_of(packed_model, batch)
    num_patches = inner.vision_model.num_patches
    assert sum(projected) == (2 + 1 + 3) * num_patches  # the first picture comes twice
    assert crossed == [2 * (2 + 1 + 2) * num_patches]  # two rows of up to five tiles
    expected = logits_of(model, batch_of(processor, rows))
    held = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[held], expected[held], atol=2e-5, rtol=0)


def test_grids_have_the_numbers_of_the_models_configuration() -> None:
    config = mllama.full_size().config.vision_config
    assert [list(grid) for grid in arrangements(4)] == config.supported_aspect_ratios


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("vocabulary", ["tiny", "real"])
@pytest.mark.parametrize("prompt", [False, True])
def test_inputs_are_the_stock_processors(
    processor: Any, name: str, vocabulary: str, prompt: bool
) -> None:
    if vocabulary == "real":
        processor = mllama.real_processor()
        assert processor.image_token_id == 128256
    conversation, num_images = CONVERSATIONS[name]
    if prompt:
        conversation = Conversation(conversation.messages[:-1])
    pictures = PICTURES[:num_images]
    stock = mllama.stock_inputs(processor, conversation, pictures, generation_prompt=prompt)
    ours = batch_of(processor, [encode(processor, conversation, pictures, prompt=prompt)])
    assert ours["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    assert ours.keys() == stock.keys()
    for key, value in stock.items():
        torch.testing.assert_close(ours[key], value, atol=1e-6, rtol=0, msg=key)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.lists(st.sampled_from([7, 8]), min_size=1, max_size=12), min_size=1))
def test_the_tokens_that_see_an_image_are_the_librarys(rows: list[list[int]]) -> None:
    length = max(map(len, rows))
    padded = [[0] * (length - len(row)) + row for row in rows]
    num_tiles = [[1] * row.count(8) for row in rows]
    stock = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(row, 8) for row in padded], num_tiles, 1, length
    )
    ours = np.zeros_like(stock)
    for b, row in enumerate(padded):
        for i, span in enumerate(spans_that_see(row, 8)):
            ours[b, span, i] = 1
    assert np.array_equal(ours, stock)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("names", [list(CONVERSATIONS), ["no image", "no image"]])
def test_a_batch_gives_each_row_what_it_gets_alone(
    processor: Any, model: Any, left: bool, names: list[str]
) -> None:
    rows = []
    for name in names:
        conversation, num_images = CONVERSATIONS[name]
        rows.append(encode(processor, conversation, PICTURES[:num_images]))
    batch = batch_of(processor, rows, left=left)
    together = logits_of(model, batch)
    for b, row in enumerate(rows):
        alone = logits_of(model, batch_of(processor, [row]))
        held = batch["attention_mask"][b].bool()
        torch.testing.assert_close(together[b, held], alone[0], atol=2e-5, rtol=0)


def test_rows_of_text_are_the_stock_models(processor: Any, model: Any, stock_model: Any) -> None:
    row = encode(processor, CONVERSATIONS["no image"][0])
    inputs = batch_of(processor, [row])
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert logits_of(model, inputs).equal(logits_of(stock_model, inputs))
    beside = batch_of(
        processor, [row, encode(processor, CONVERSATIONS["image first"][0], PICTURES[:1])]
    )
    torch.testing.assert_close(
        logits_of(model, beside)[0, : len(row.input_ids)],
        logits_of(stock_model, inputs)[0],
        atol=2e-5,
        rtol=0,
    )


def test_rows_that_begin_with_their_image_are_the_stock_models(
    processor: Any, model: Any, stock_model: Any
) -> None:
    inputs = batch_of(processor, [shown(processor, PICTURES[:1], [processor.image_token_id, 5, 6])])
    torch.testing.assert_close(logits_of(model, inputs), logits_of(stock_model, inputs))


def test_tokens_before_an_image_do_not_see_it(processor: Any, model: Any, stock_model: Any) -> None:
    ids = [5, 6, processor.image_token_id, 7]
    one = batch_of(processor, [shown(processor, [noise(28, 28, 1)], ids)])
    other = batch_of(processor, [shown(processor, [noise(28, 28, 2)], ids)])
    difference = (logits_of(model, one) - logits_of(model, other))[0].abs().amax(dim=-1)
    assert (difference[:2] == 0).all()
    assert (difference[2:] > 0).all()
    # the day on which the library masks them, too, the hook can go
    leaked = (logits_of(stock_model, one) - logits_of(stock_model, other))[0].abs().amax(dim=-1)
    assert (leaked[:2] > 0).all()


def test_old_checkpoints_load_whole(folder: Path) -> None:
    load: Any = AutoModelForImageTextToText.from_pretrained
    _, info = load(folder, output_loading_info=True)
    assert not any(info.values()), info


def test_generation_in_a_batch_is_that_of_each_row_alone(processor: Any, model: Any) -> None:
    rows = []
    for conversation, num_images in CONVERSATIONS.values():
        prompt = Conversation(conversation.messages[:-1])
        rows.append(encode(processor, prompt, PICTURES[:num_images], prompt=True))
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 1}
    together = model.generate(**batch_of(processor, rows, left=True), **greedy)[:, -6:]
    for b, row in enumerate(rows):
        alone = model.generate(**batch_of(processor, [row]), **greedy)[0, -6:]
        assert together[b].tolist() == alone.tolist()


def test_training_with_checkpointing_reaches_every_part(folder: Path, processor: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForImageTextToText.from_pretrained(folder).train()
        MLLAMA.adjust_model(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        rows = [
            encode(processor, CONVERSATIONS[name][0], PICTURES[: CONVERSATIONS[name][1]])
            for name in ("several", "no image")
        ]
        inputs = batch_of(processor, rows)
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 300, -100)
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    for part in MLLAMA.parts_of(model.config).values():
        assert any(family_rows.inside(name, part) for name in gradients[0])


def test_every_linear_layer_belongs_to_one_part() -> None:
    model = mllama.full_size()
    parts_of = family_rows.parts_of_linears(model, MLLAMA.parts_of(model.config))
    for name, of in parts_of.items():
        assert of == ([] if name == "lm_head" else [expected_part(name)]), name


def expected_part(name: str) -> str:
    if name.startswith("model.language_model"):
        number = int(name.split(".")[3])
        return "connector" if number in (3, 8, 13, 18, 23, 28, 33, 38) else "language"
    return "connector" if "projector" in name else "vision"


def test_the_full_size_model_has_the_hubs_number_of_parameters() -> None:
    model = mllama.full_size()
    parts = MLLAMA.parts_of(model.config)
    assert family_rows.parameters_by_part(model, parts) == mllama.PARAMETERS
    for adapted, expected in mllama.LORA.items():
        assert family_rows.lora_parameters(model, parts, adapted) == expected


@pytest.mark.parametrize("template", [mllama.TEMPLATE, mllama.FIRST_TEMPLATE])
def test_a_system_turn_is_read_and_dated_as_in_training(tmp_path: Path, template: str) -> None:
    mllama.save_tiny(tmp_path, template=template)
    processor = load(tmp_path)
    system = Message("system", (Text("Be short."),))
    conversation = Conversation((system, *asked(Text("What?")).messages))
    row = encode(processor, conversation)
    text = processor.tokenizer.decode(row.input_ids)
    assert "\nToday Date: 26 Jul 2024\n\nBe short.<|eot_id|>" in text
    # and without the variable, as whoever loads the saved processor would
    messages = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    assert "26 Jul 2024" in processor.apply_chat_template(messages)
    assert mend_template(processor.chat_template) == processor.chat_template


def test_the_stock_template_writes_todays_date(folder: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    processor = AutoProcessor.from_pretrained(folder)
    days = [datetime.now()]
    text = processor.apply_chat_template(messages)
    days.append(datetime.now())  # midnight may pass meanwhile
    assert any(day.strftime("%d %b %Y") in text for day in days)


def test_the_base_learns_to_stop_at_a_token_that_it_knows(tmp_path: Path) -> None:
    mllama.save_tiny(tmp_path, template=None)
    processor = load(tmp_path)
    assert processor.chat_template is None
    processor.chat_template = BASE_TEMPLATE.text
    row = encode(processor, FOLLOWED_UP, PICTURES)
    decode = processor.tokenizer.decode
    assert decode(row.input_ids) == (
        "<|begin_of_text|>User: <|image|><|image|>Same?\nAssistant: No.<|end_of_text|>\n"
        "User: And this?<|image|>\nAssistant: Yes.<|end_of_text|>\n"
    )
    assert decode(learnt_ids(row)) == " No.<|end_of_text|> Yes.<|end_of_text|>"


def test_the_date_and_the_system_turn_of_another_template_are_left_alone() -> None:
    assert mend_template(BASE_TEMPLATE.text) == BASE_TEMPLATE.text
