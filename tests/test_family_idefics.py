"""The first Idefics: one square view an image, the one image that each token sees, and a head in
two pieces.

Shape letters: B rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from PIL import Image as PilImage
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids_pt,
)
from trl.trainer.utils import add_fused_lm_head

from data_formats.chat import Conversation, Image, Text
from finetune.data.collate import collate
from finetune.data.examples import Example
from finetune.families.family import Family
from finetune.families.idefics import IDEFICS, IDEFICS_BASE, PARTS, image_seen
from tests import family_rows
from tests.family_rows import Inputs, asked, learnt_ids, logits_of, noise
from tests.models import idefics

SIZES = [(1, 1), (1, 50), (3000, 40), (40, 3000), (28, 28), (29, 28), (640, 480)]


@dataclass
class Kind:
    """A family, its tiny checkpoint and the processor built from it."""

    family: Family
    folder: Path
    processor: Any


def open_kind(folder: Path, family: Family, num_added: int) -> Kind:
    idefics.save_tiny(folder, num_added=num_added)
    processor = family.build_processor(lambda kind: AutoProcessor.from_pretrained(folder), None)
    assert processor.chat_template is None
    assert family.lent_template
    processor.chat_template = family.lent_template.text
    return Kind(family, folder, processor)


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return open_kind(tmp_path_factory.mktemp("instruct"), IDEFICS, 3)


@pytest.fixture(scope="module", params=["instruct", "base"])
def kind(request: Any, instruct: Kind, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    if request.param == "instruct":
        return instruct
    return open_kind(tmp_path_factory.mktemp("base"), IDEFICS_BASE, 2)


@pytest.fixture(scope="module")
def model(instruct: Kind) -> Any:
    return load(instruct).eval()


def load(kind: Kind) -> Any:
    model = AutoModelForImageTextToText.from_pretrained(kind.folder)
    kind.family.adjust_model(model)
    return model


def encode(
    kind: Kind,
    conversation: Conversation,
    pictures: Sequence[PilImage.Image] = (),
    *,
    prompt: bool = False,
) -> Example:
    return family_rows.encode(kind.processor, kind.family, conversation, pictures, prompt=prompt)


def shown(kind: Kind, pictures: Sequence[PilImage.Image], ids: Sequence[int]) -> Example:
    return family_rows.shown(kind.processor, kind.family, pictures, ids)


def batch_of(kind: Kind, rows: Sequence[Example], *, left: bool = False) -> Inputs:
    return family_rows.inputs_of(kind.processor, kind.family, rows, "left" if left else "right")


def labelled(kind: Kind, rows: Sequence[Example]) -> Inputs:
    return collate(rows, kind.processor, kind.family)


PICTURE = Image("a.png")
FOLLOWED_UP = Conversation(
    (
        *asked(PICTURE, PICTURE, Text(" Same? "), answer="No.").messages,
        *asked(Text("And this? "), PICTURE, Text("  that?"), answer="Yes.").messages,
        *asked(Text("Why?"), answer="Because.").messages,
    )
)
CONVERSATIONS = {
    "image first": (asked(PICTURE, Text("What is it?")), 1),
    "image last": (asked(Text("What is it?"), PICTURE), 1),
    "images apart by blanks": (asked(PICTURE, Text(" "), PICTURE, Text("Both?")), 2),
    "several": (FOLLOWED_UP, 3),
    "no image": (asked(Text("What is written?")), 0),
}
PICTURES = [noise(40, 20), noise(100, 30, 1), noise(20, 130, 2)]


def row_named(kind: Kind, name: str) -> Example:
    conversation, num_images = CONVERSATIONS[name]
    return encode(kind, conversation, PICTURES[:num_images])


@pytest.mark.parametrize("size", SIZES)
def test_views_are_the_stock_processors_pixels(instruct: Kind, size: tuple[int, int]) -> None:
    picture = noise(*size)
    stock = instruct.processor.image_processor([picture], return_tensors="pt")
    ours = IDEFICS.stack([shown(instruct, [picture], [])], instruct.processor, torch.zeros((1, 1)))
    torch.testing.assert_close(ours["pixel_values"][0], stock, atol=1e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300))
def test_views_are_the_stock_processors_pixels_at_any_size(
    instruct: Kind, width: int, height: int
) -> None:
    test_views_are_the_stock_processors_pixels(instruct, (width, height))


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [False, True])
def test_inputs_are_the_stock_processors(kind: Kind, name: str, prompt: bool) -> None:
    conversation, num_images = CONVERSATIONS[name]
    if prompt:
        conversation = Conversation(conversation.messages[:-1])
    pictures = PICTURES[:num_images]
    stock = idefics.stock_inputs(kind.processor, conversation, pictures, generation_prompt=prompt)
    ours = batch_of(kind, [encode(kind, conversation, pictures, prompt=prompt)])
    assert ours.keys() == stock.keys()
    # past </s>, which only the base writes, the library takes the row for another text
    ends = (stock["input_ids"][0] == kind.processor.tokenizer.eos_token_id).nonzero()
    same = slice(int(ends[0]) + 1 if len(ends) else None)
    for key, value in stock.items():
        mine = ours[key]
        if key == "image_attention_mask":
            mine, value = mine[:, same], value[:, same]
        torch.testing.assert_close(
            mine, value, atol=1e-6, rtol=0, check_dtype=value.dtype != torch.bool, msg=key
        )


def test_one_exchange_reads_as_on_the_model_card(instruct: Kind) -> None:
    row = encode(instruct, FOLLOWED_UP, PICTURES)
    fake = "<fake_token_around_image>"
    decode = instruct.processor.tokenizer.decode
    assert decode(row.input_ids) == (
        f"<s>User:{fake}<image>{fake}<image>{fake}Same? <end_of_utterance>"
        "\nAssistant: No.<end_of_utterance>"
        f"\nUser: And this?{fake}<image>{fake}that?<end_of_utterance>"
        "\nAssistant: Yes.<end_of_utterance>"
        "\nUser: Why?<end_of_utterance>\nAssistant: Because.<end_of_utterance>"
    )
    end = "<end_of_utterance>"
    assert decode(learnt_ids(row)) == f"No.{end} Yes.{end} Because.{end}"


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.lists(st.sampled_from([7, 8]), min_size=9, max_size=9), min_size=1))
def test_the_image_that_a_token_sees_is_the_librarys(instruct: Kind, rows: list[list[int]]) -> None:
    tokenizer, image_token_id = instruct.processor.tokenizer, instruct.processor.image_token_id
    ids_BT = torch.tensor(rows)
    ids_BT[ids_BT == 8] = image_token_id
    stock, _ = image_attention_mask_for_packed_input_ids_pt(ids_BT, tokenizer)
    assert image_seen(ids_BT, image_token_id).equal(stock)


def test_a_second_answer_of_the_base_is_not_learnt_blind(instruct: Kind) -> None:
    """Its answers end in </s>, after which the library's processor hides the picture."""
    image_token_id = instruct.processor.image_token_id
    ids_BT = torch.tensor([[1, 7, image_token_id, 7, 2, 7, 7, 2]])
    assert image_seen(ids_BT, image_token_id).tolist() == [[-1, -1, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("names", [list(CONVERSATIONS), ["no image", "no image"]])
def test_a_batch_gives_each_row_what_it_gets_alone(
    instruct: Kind, model: Any, left: bool, names: list[str]
) -> None:
    rows = [row_named(instruct, name) for name in names]
    batch = batch_of(instruct, rows, left=left)
    together = logits_of(model, batch)
    for b, row in enumerate(rows):
        alone = logits_of(model, batch_of(instruct, [row]))
        held = batch["attention_mask"][b].bool()
        torch.testing.assert_close(together[b, held], alone[0], atol=2e-5, rtol=0)


def test_tokens_see_their_image(instruct: Kind, model: Any) -> None:
    row = row_named(instruct, "image last")
    other = shown(instruct, [noise(50, 50, 9)], row.input_ids)
    place = row.input_ids.index(instruct.processor.image_token_id)
    difference = logits_of(model, batch_of(instruct, [row])) - logits_of(
        model, batch_of(instruct, [other])
    )
    assert (difference[0, :place] == 0).all()
    assert (difference[0, place:].abs().amax(dim=-1) > 0).all()


def test_generation_in_a_batch_is_that_of_each_row_alone(instruct: Kind, model: Any) -> None:
    rows = []
    for conversation, num_images in CONVERSATIONS.values():
        prompt = Conversation(conversation.messages[:-1])
        rows.append(encode(instruct, prompt, PICTURES[:num_images], prompt=True))
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 1}
    together = model.generate(**batch_of(instruct, rows, left=True), **greedy)[:, -6:]
    for b, row in enumerate(rows):
        alone = model.generate(**batch_of(instruct, [row]), **greedy)[0, -6:]
        assert together[b].tolist() == alone.tolist()


def cross_entropy(model: Any, inputs: Inputs, num_items: int | None) -> torch.Tensor:
    """The oracle: over all logits, outside of the model."""
    given = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**given).logits[:, :-1].flatten(0, 1)
    labels = inputs["labels"][:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return total / (num_items or (labels != -100).sum())


def test_the_stock_model_crashes_with_labels(instruct: Kind) -> None:
    stock = AutoModelForImageTextToText.from_pretrained(instruct.folder)
    with pytest.raises(RuntimeError):
        stock(**labelled(instruct, [row_named(instruct, "image first")]))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("num_items", [None, 5])
def test_the_loss_is_over_all_tokens(kind: Kind, wrapped: bool, num_items: int | None) -> None:
    model = load(kind).eval()
    adapted = get_peft_model(model, lora(["language"])) if wrapped else model
    inputs = labelled(kind, [row_named(kind, "several"), row_named(kind, "no image")])
    expected = cross_entropy(adapted, inputs, num_items)
    torch.testing.assert_close(adapted(**inputs, num_items_in_batch=num_items).loss, expected)
    # and by TRL's trainer, which multiplies by the weight of the head itself
    add_fused_lm_head(model)
    fused = adapted(**inputs, fused_lm_head=True, num_items_in_batch=num_items).loss
    torch.testing.assert_close(fused, expected)


def test_the_head_is_stored_and_used_as_before(instruct: Kind, model: Any, tmp_path: Path) -> None:
    stock = AutoModelForImageTextToText.from_pretrained(instruct.folder).eval()
    assert model.lm_head.weight.shape[0] == len(instruct.processor.tokenizer)
    assert model.state_dict().keys() == stock.state_dict().keys()
    inputs = batch_of(instruct, [row_named(instruct, "several")])
    assert logits_of(model, inputs).equal(logits_of(stock, inputs))
    model.save_pretrained(tmp_path)
    load: Any = AutoModelForImageTextToText.from_pretrained
    again, info = load(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert logits_of(again.eval(), inputs).equal(logits_of(stock, inputs))


def lora(parts: Sequence[str]) -> LoraConfig:
    names = [f"({prefix}).*" for part in parts for prefix in PARTS[part].prefixes]
    linears = {linear for part in parts for linear in PARTS[part].linears}
    return LoraConfig(r=2, target_modules=f"({'|'.join(names)})\\.({'|'.join(linears)})")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_configurations_freezing_does_not_reach_adapters(
    instruct: Kind, checkpointing: bool
) -> None:
    model = load(instruct)
    assert model.config.freeze_text_layers
    assert model.config.freeze_vision_layers
    adapted = get_peft_model(model, lora(list(PARTS))).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros would keep gradients from lora_A
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    inputs = labelled(instruct, [row_named(instruct, "several"), row_named(instruct, "no image")])
    adapted(**inputs, use_cache=False).loss.backward()
    frozen = [name for name, p in adapted.named_parameters() if not p.requires_grad]
    assert not any("lora" in name for name in frozen)
    unreached = [
        name
        for name, p in adapted.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not unreached


def test_gradients_with_checkpointing_are_those_without(instruct: Kind) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load(instruct).train().requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = labelled(instruct, [row_named(instruct, "several")])
        model(**inputs, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_old_checkpoints_load_whole(kind: Kind) -> None:
    load: Any = AutoModelForImageTextToText.from_pretrained
    _, info = load(kind.folder, output_loading_info=True)
    assert not any(info.values()), info


def test_each_checkpoint_is_recognised_by_its_added_tokens(instruct: Kind) -> None:
    config = AutoModelForImageTextToText.from_pretrained(instruct.folder).config
    assert IDEFICS.recognises(config)
    assert not IDEFICS_BASE.recognises(config)
    config.additional_vocab_size = 2
    assert IDEFICS_BASE.recognises(config)
    assert not IDEFICS.recognises(config)


def test_every_linear_layer_belongs_to_one_part() -> None:
    for name, of in family_rows.parts_of_linears(idefics.full_size(), PARTS).items():
        assert len(of) == (0 if name.startswith("lm_head") else 1), name


def test_the_full_size_model_has_the_expected_number_of_parameters() -> None:
    model = idefics.full_size()
    assert family_rows.parameters_by_part(model, PARTS) == idefics.PARAMETERS
    for adapted, expected in idefics.LORA.items():
        assert family_rows.lora_parameters(model, PARTS, adapted) == expected
