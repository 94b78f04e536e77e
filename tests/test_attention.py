"""Sequences of several rows against the rows one by one: the same losses and gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.collate import IGNORED_LABEL, collate
from finetune.data.examples import Encoder, Example
from finetune.data.images import ImageAccess
from finetune.data.sequences import Layout, Layouting
from finetune.data.sources import Row
from finetune.errors import ModelError
from finetune.model.adapters import base_of
from finetune.model.attention import follow_layouts, sliding_window, token_sees
from finetune.model.load import load_model, load_processor
from finetune.recipe import ImagesSection, ModelSection
from tests.conftest import NANO, NANO_IMAGES, noise
from tests.families import CHECKPOINTS
from tests.test_vision import MERGED, adapted

SHARED = Layouting(share_images=True)
PACKED = Layouting(packing=True, max_tokens=96)
BOTH = Layouting(packing=True, share_images=True, max_tokens=96)


def opened(folder: Path, name: str, **model: Any) -> tuple[Encoder, Any]:
    section = ModelSection.model_validate({"name": str(folder), "dtype": "float32"} | model)
    images = ImagesSection() if "llava" in name or "mantis" in name else ImagesSection(split="auto")
    processor, settings = load_processor(section, images)
    packed = section.packed_vision
    encoder = Encoder(processor, CHECKPOINTS[name].family, settings, packed_vision=packed)
    return encoder, load_model(section)[0].eval()


def turn(question: str, answer: str, *pictures: int) -> tuple[Message, Message]:
    asked = (*(Image(f"{i}.png") for i in pictures), Text(question))
    return Message("user", asked), Message("assistant", (Text(answer),))


def rows_of(folder: Path, *conversations: tuple[Any, ...]) -> list[Row]:
    for i, size in enumerate([(112, 56), (56, 112), (28, 28)]):
        noise(*size, seed=i).save(folder / f"{i}.png")
    return [
        Row(f"rows:{number}", Conversation(sum(turns, ())), ImageAccess(folder))
        for number, turns in enumerate(conversations, 1)
    ]


def rows_of_all_kinds(folder: Path) -> list[Row]:
    """Several turns and pictures, one question with two answers, a row twice, rows that begin
    another, rows without a picture, and two pages.
    """
    first = turn("What is it?", "A cat.", 0)
    return rows_of(
        folder,
        (first,),
        (turn("What is it?", "A dog, or two.", 0),),
        (turn("How many of them are there?", "4", 0),),
        (first, turn("And this?", "Seven", 1)),
        (first, turn("And this?", "Seven", 2)),
        (first, turn("Sure?", "Yes.")),
        (first,),
        (turn("No picture.", "Right."),),
        (turn("What is it?", "A cat.", 1),),
        (turn("Both?", "They differ", 1, 0),),
    )


def summed_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Over all learnt tokens by their weights, each predicted at the place before it."""
    base = base_of(model)
    inputs = {key: batch[key] for key in batch.keys() - {"labels", "label_weights"}}
    hidden_STD = base.model(**inputs).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    learnt = labels != IGNORED_LABEL
    logits = base.lm_head(hidden_STD[learnt]).float()
    losses = cross_entropy(logits, labels[learnt], reduction="none")
    if "label_weights" in batch:
        losses = losses * batch["label_weights"][:, 1:][learnt]
    return losses.sum()


def learning_one(examples: list[Example], chosen: int) -> list[Example]:
    """The same rows, of which a single one is learnt."""
    return [
        Example(
            each.where,
            each.input_ids,
            each.loss_mask if i == chosen else [False] * len(each.loss_mask),
            each.views,
            each.plans,
        )
        for i, each in enumerate(examples)
    ]


def batch_of(encoder: Encoder, examples: list[Example], layouting: Layouting | None = None) -> Any:
    return collate(
        examples,
        encoder.processor,
        encoder.family,
        packed_vision=encoder.packed_vision,
        layouting=layouting,
    )


@pytest.mark.parametrize(
    ("attention", "packed_vision"), [("sdpa", True), ("sdpa", False), ("eager", True)]
)
@pytest.mark.parametrize("name", MERGED)
def test_every_row_has_the_loss_it_has_alone(
    folder_of: Callable[[str], Path], name: str, attention: str, packed_vision: bool, tmp_path: Path
) -> None:
    encoder, model = opened(folder_of(name), name, attention=attention, packed_vision=packed_vision)
    examples = [encoder.encode(row) for row in rows_of_all_kinds(tmp_path)]
    with torch.no_grad():
        alone = [summed_loss(model, batch_of(encoder, [example])) for example in examples]
        for layouting in (SHARED, PACKED, BOTH):
            laid_out = []
            for number in range(len(examples)):
                batch = batch_of(encoder, learning_one(examples, number), layouting)
                assert batch["layout"].num_rows == len(examples)
                laid_out.append(summed_loss(model, batch))
            torch.testing.assert_close(laid_out, alone, atol=2e-5, rtol=1e-5)
            together = summed_loss(model, batch_of(encoder, examples, layouting))
            torch.testing.assert_close(together, sum(alone), atol=1e-4, rtol=1e-5)


def gradients_of(model: Any, *batches: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of the adapters, added up over batches."""
    model.zero_grad()
    for batch in batches:
        summed_loss(model, batch).backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed_vision", [True, False])
@pytest.mark.parametrize("name", MERGED)
def test_adapters_learn_what_the_rows_teach_one_by_one(
    folder_of: Callable[[str], Path], name: str, packed_vision: bool, tmp_path: Path
) -> None:
    """In all parts, with checkpointing."""
    encoder, model = opened(folder_of(name), name, packed_vision=packed_vision)
    model = adapted(model, name, ("language", "connector", "vision"))
    examples = [encoder.encode(row) for row in rows_of_all_kinds(tmp_path)]
    apart = gradients_of(model, *(batch_of(encoder, [example]) for example in examples))
    assert any("vision" in key and "lora_A" in key for key in apart)
    for layouting in (SHARED, BOTH):
        laid_out = gradients_of(model, batch_of(encoder, examples, layouting))
        assert laid_out.keys() == apart.keys()
        scale = max(gradient.abs().max() for gradient in apart.values())
        torch.testing.assert_close(laid_out, apart, atol=1e-5 * float(scale), rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_window_shorter_than_the_rows_slides_over_each_of_them(
    folder_of: Callable[[str], Path], attention: str, tmp_path: Path
) -> None:
    """The rows alone have the library's own window."""
    name = "idefics2-8b"
    encoder, model = opened(folder_of(name), name, attention=attention)
    examples = [encoder.encode(row) for row in rows_of_all_kinds(tmp_path)]
    with torch.no_grad():
        whole = sum(summed_loss(model, batch_of(encoder, [each])) for each in examples)
        model.config.text_config.sliding_window = 5
        alone = sum(summed_loss(model, batch_of(encoder, [each])) for each in examples)
        laid_out = summed_loss(model, batch_of(encoder, examples, BOTH))
    assert abs(whole - alone) > 1
    torch.testing.assert_close(laid_out, alone, atol=1e-4, rtol=1e-5)


def test_which_window_the_library_uses() -> None:
    mistral = {"model_type": "mistral", "sliding_window": 5}
    config = type("Config", (), mistral)
    assert sliding_window(config) == 5
    assert sliding_window(type("Config", (), mistral | {"sliding_window": None})) is None
    assert sliding_window(type("Config", (), mistral | {"model_type": "llama"})) is None
    full = ["full_attention"] * 2
    assert sliding_window(type("Config", (), mistral | {"layer_types": full})) is None
    mixed = ["full_attention", "sliding_attention"]
    with pytest.raises(ModelError, match="share_images: off"):
        sliding_window(type("Config", (), mistral | {"layer_types": mixed}))


def test_tokens_see_their_own_branch_and_what_is_above_it() -> None:
    """A stem of two tokens, two branches of one and two, and padding."""
    nodes = torch.tensor([[1, 1, 2, 3, 3, 0, 0]])
    sees = torch.tensor([[[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]]).bool()
    positions = torch.tensor([[0, 1, 2, 2, 3, 0, 0]])
    layout = Layout(nodes, sees, num_rows=2)
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    assert token_sees(layout, positions)[0].int().tolist() == expected
    expected[4][:2] = [0, 0]
    expected[3][0] = expected[2][0] = 0
    assert token_sees(layout, positions, window=2)[0].int().tolist() == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfloat16_rows_are_as_far_from_alone_as_its_rounding(
    folder_of: Callable[[str], Path], attention: str, tmp_path: Path
) -> None:
    name = "idefics2-8b"
    encoder, model = opened(folder_of(name), name, attention=attention, dtype="bfloat16")
    examples = [encoder.encode(row) for row in rows_of_all_kinds(tmp_path)]
    with torch.no_grad():
        alone = sum(summed_loss(model, batch_of(encoder, [each])) for each in examples)
        laid_out = summed_loss(model, batch_of(encoder, examples, BOTH))
    torch.testing.assert_close(laid_out, alone, atol=0, rtol=2**-7)


def test_a_quantised_base_has_the_losses_of_rows_alone(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    section = ModelSection(name="nano", dtype="float32", quantize="nf4")
    encoder = Encoder(
        load_processor(section, NANO_IMAGES)[0],
        CHECKPOINTS["idefics2-8b"].family,
        NANO_IMAGES,
        packed_vision=True,
    )
    model = adapted(load_model(section)[0], "idefics2-8b", ("language", "connector"))
    examples = [encoder.encode(row) for row in rows_of_all_kinds(tmp_path)]
    apart = gradients_of(model, *(batch_of(encoder, [example]) for example in examples))
    laid_out = gradients_of(model, batch_of(encoder, examples, BOTH))
    scale = max(gradient.abs().max() for gradient in apart.values())
    torch.testing.assert_close(laid_out, apart, atol=1e-5 * float(scale), rtol=1e-4)


def test_flash_attention_keeps_packed_rows_apart_by_their_positions(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own path to the kernel, with stand-ins for the kernel's two functions."""
    name = "idefics2-8b"
    encoder, model = opened(folder_of(name), name, dtype="float32")
    examples = [encoder.encode(row) for row in rows_of_all_kinds(tmp_path)]
    with torch.no_grad():
        alone = [summed_loss(model, batch_of(encoder, [each])) for each in examples]
        lengths = stand_in_for_flash_attention(monkeypatch)
        model.config.text_config._attn_implementation = "flash_attention_2"
        one = Layouting(packing=True, max_tokens=96, one_sequence=True)
        batch = batch_of(encoder, examples, one)
        assert len(batch["input_ids"]) == 1
        laid_out = summed_loss(model, batch)
    assert lengths[0] == [len(each.input_ids) for each in examples]
    torch.testing.assert_close(laid_out, sum(alone), atol=1e-4, rtol=1e-5)


def stand_in_for_flash_attention(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths of what each call keeps apart."""
    from transformers import modeling_flash_attention_utils as flash

    lengths = []

    def varlen(q: Any, k: Any, v: Any, *, cu_seqlens_q: Any, softmax_scale: float, **_: Any) -> Any:
        sizes = cu_seqlens_q.diff().tolist()
        lengths.append(sizes)
        parts = zip(*(each.split(sizes) for each in (q, k, v)), strict=True)
        return torch.cat([causal(*qkv, scale=softmax_scale) for qkv in parts])

    def causal(q: Any, k: Any, v: Any, scale: float) -> Any:
        # [tokens, heads, width] and back
        q, k, v = (each.transpose(0, 1) for each in (q, k, v))
        k, v = (each.repeat_interleave(len(q) // len(k), dim=0) for each in (k, v))
        seen = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale
        )
        return seen.transpose(0, 1)

    def not_asked(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("rows of one sequence were not told apart")

    kernels = ((not_asked, varlen, None, None, None), (lambda **kwargs: kwargs, None))
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_args: kernels)
    return lengths


def test_a_batch_without_a_layout_is_left_as_it_is(encoder: Encoder, tmp_path: Path) -> None:
    """Rows with nothing in common make the same batch, whatever may be shared."""
    rows = rows_of_all_kinds(tmp_path)[7:9]
    examples = [encoder.encode(row) for row in rows]
    alone = collate(examples, encoder.processor, encoder.family)
    batch = collate(examples, encoder.processor, encoder.family, layouting=SHARED)
    assert batch.keys() == alone.keys()
    assert all(torch.equal(batch[key], alone[key]) for key in alone)


def test_a_hook_is_not_added_twice() -> None:
    model, _ = load_model(NANO)
    num_hooks = len(model.model._forward_pre_hooks)
    follow_layouts(model)
    assert len(model.model._forward_pre_hooks) == num_hooks


def test_three_questions_on_a_page_hold_it_once(encoder: Encoder, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, *((turn(f"Question {i}?", f"{i}{i}", 0),) for i in range(3)))
    examples = [encoder.encode(row) for row in rows]
    batch = collate(
        examples, encoder.processor, encoder.family, packed_vision=True, layouting=SHARED
    )
    image_tokens = (batch["input_ids"] == encoder.processor.image_token_id).sum()
    assert image_tokens == examples[0].input_ids.count(encoder.processor.image_token_id)
    assert len(batch["pixel_values"]) == 1
    assert batch["attention_mask"].sum() < sum(len(each.input_ids) for each in examples)
