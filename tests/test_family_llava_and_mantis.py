"""What LLaVA and Mantis share: one square view an image, features in the order of the ids.

Shape letters: B rows, T tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.render import Renderer
from finetune.families.family import Family
from finetune.families.llava import LLAVA
from finetune.families.mantis import MANTIS
from tests.conftest import noise
from tests.models import llava, mantis
from tests.models.opened import Opened, asked, encode, open_tiny, pictures_of, seen

SAVE: dict[str, tuple[Family, Callable[[Path], None]]] = {
    "llava": (LLAVA, llava.save_tiny),
    "mantis-clip": (MANTIS, lambda folder: mantis.save_tiny(folder, "clip")),
    "mantis-siglip": (MANTIS, lambda folder: mantis.save_tiny(folder, "siglip")),
}


@pytest.fixture(scope="module", params=SAVE)
def opened(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    family, save = SAVE[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    save(folder)
    return open_tiny(family, folder)


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("llava")
    llava.save_tiny(folder)
    return open_tiny(LLAVA, folder)


def oracle(opened: Opened) -> Any:
    """The library's own image processor from the checkpoint's files; CLIP's sides padded."""
    if opened.config.vision_config.model_type == "siglip_vision_model":
        return SiglipImageProcessorPil.from_pretrained(opened.folder)
    return LlavaImageProcessorPil.from_pretrained(opened.folder, do_pad=True)


PICTURE = Image("a.png")
SIZES = [(1, 1), (1, 50), (50, 1), (3000, 40), (40, 3000), (42, 42), (41, 42), (643, 480), (7, 9)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_views_are_the_stock_processors_pixels(opened: Opened, width: int, height: int) -> None:
    picture = noise(width, height)
    stock = oracle(opened)(picture, return_tensors="pt")["pixel_values"]
    ours = opened.family.stack([seen(opened, [picture])], opened.processor, torch.empty(0))
    torch.testing.assert_close(ours["pixel_values"], stock, atol=1e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400))
def test_views_of_any_size_are_the_stock_processors_pixels(
    tiny_llava: Opened, width: int, height: int
) -> None:
    test_views_are_the_stock_processors_pixels(tiny_llava, width, height)


CONVERSATIONS = [
    asked(PICTURE, Text("What is this?")),
    asked(Text("What is this?"), PICTURE),
    asked(PICTURE, Text(" Compare with "), PICTURE, Text(" please")),
    asked(Text("No picture here.")),
    Conversation((Message("system", (Text("Be brief."),)), *asked(PICTURE, Text("Q")).messages)),
    Conversation(
        (*asked(PICTURE, Text("One?")).messages, *asked(Text("Two?"), PICTURE).messages),
    ),
    asked(PICTURE, Text("ends in a space "), answer=" \n"),
    asked(PICTURE, Text(""), answer=""),
]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_ids_and_pixels_are_the_stock_processors(
    opened: Opened, conversation: Conversation
) -> None:
    pictures = pictures_of(conversation)
    row = encode(opened, conversation, pictures)
    stock = llava.stock_inputs(opened.processor, conversation, pictures, generation_prompt=False)
    assert row.input_ids == stock["input_ids"][0].tolist()
    ours = opened.family.stack([row], opened.processor, stock["input_ids"])
    assert ours.keys() == stock.keys() & {"pixel_values"}
    if pictures:
        torch.testing.assert_close(ours["pixel_values"], stock["pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_prompt_at_inference_is_the_prefix_in_training(
    opened: Opened, conversation: Conversation
) -> None:
    pictures = pictures_of(conversation)
    prompt = Conversation(conversation.messages[:-1])
    row = encode(opened, conversation, pictures)
    ids = Renderer(opened.processor, opened.family).render_prompt(prompt, row.plans)
    stock = llava.stock_inputs(opened.processor, prompt, pictures, generation_prompt=True)
    assert ids == stock["input_ids"][0].tolist()
    assert row.input_ids[: len(ids)] == ids


def test_only_the_answer_and_its_end_are_learnt(opened: Opened) -> None:
    conversation = CONVERSATIONS[5]
    plans = seen(opened, pictures_of(conversation)).plans
    rendered = Renderer(opened.processor, opened.family).render(conversation, plans)
    learnt = [t for t, m in zip(rendered.input_ids, rendered.loss_mask, strict=True) if m]
    template = opened.family.own_template
    assert template
    text = opened.processor.tokenizer.decode(learnt)
    assert [part.strip() for part in text.split(template.turn_end_token)] == ["A cat."] * 2 + [""]


def test_image_tokens_are_as_many_as_features(opened: Opened) -> None:
    row = encode(opened, asked(PICTURE, Text("a"), PICTURE), [noise(30, 90), noise(90, 30)])
    count = row.input_ids.count(opened.processor.image_token_id)
    assert count == sum(
        opened.family.num_image_tokens(opened.processor, plan) for plan in row.plans
    )
    model: Any = AutoModelForImageTextToText.from_pretrained(opened.folder)
    pixels = opened.family.stack([row], opened.processor, torch.empty(0))
    features = model.get_image_features(**pixels).pooler_output
    assert count == sum(len(image) for image in features)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_gives_the_logits_of_its_rows_alone(opened: Opened, padding_side: str) -> None:
    pictures = [noise(30, 90), noise(90, 30, seed=1), noise(50, 50, seed=2)]
    rows = [
        encode(opened, asked(PICTURE, Text("One?")), pictures[:1]),
        encode(opened, asked(Text("None at all, and a longer question?")), []),
        encode(opened, asked(PICTURE, Text("and"), PICTURE), pictures[1:]),
    ]
    model = AutoModelForImageTextToText.from_pretrained(opened.folder).eval()
    length = max(len(row.input_ids) for row in rows)
    ids_BT = torch.full((len(rows), length), opened.processor.tokenizer.pad_token_id)
    mask_BT = torch.zeros_like(ids_BT)
    for i, row in enumerate(rows):
        num = len(row.input_ids)
        place = slice(length - num, None) if padding_side == "left" else slice(num)
        ids_BT[i, place] = torch.tensor(row.input_ids)
        mask_BT[i, place] = 1
    with torch.inference_mode():
        images = opened.family.stack(rows, opened.processor, ids_BT)
        batch = model(input_ids=ids_BT, attention_mask=mask_BT, **images).logits
        for i, row in enumerate(rows):
            ids = torch.tensor([row.input_ids])
            images = opened.family.stack([row], opened.processor, ids)
            alone = model(input_ids=ids, **images).logits[0]
            torch.testing.assert_close(batch[i][mask_BT[i] == 1], alone, atol=1e-4, rtol=1e-4)


def model_of_layer(opened: Opened, layer: int | list[int], strategy: str) -> Any:
    config = AutoConfig.from_pretrained(opened.folder)
    config.vision_feature_layer, config.vision_feature_select_strategy = layer, strategy
    config.vision_config.num_hidden_layers = 4
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


LAYERS = [-1, -2, -5, 1, 4, [-2, -1], [3, 0, 3]]


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", LAYERS)
def test_features_are_the_librarys_of_any_layers(
    opened: Opened, layer: int | list[int], strategy: str
) -> None:
    model = model_of_layer(opened, layer, strategy)
    encoder = opened.family.view_encoder
    assert encoder
    pixels = torch.randn(2, 3, opened.config.vision_config.image_size, 42)
    with torch.inference_mode():
        stock = torch.stack(list(model.get_image_features(pixels).pooler_output))
        ours = encoder.connect(model.model, encoder.tower(model.model, pixels))
    torch.testing.assert_close(ours, stock, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("layer", "deepest"), [(-2, 3), (-1, 4), (0, 0), ([1, -3], 2)])
def test_no_layer_runs_behind_the_one_that_is_read(
    opened: Opened, layer: int | list[int], deepest: int
) -> None:
    model = model_of_layer(opened, layer, "full")
    encoder, vision = opened.family.view_encoder, model.model.vision_tower
    assert encoder
    ran = []
    for name, module in vision.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    encoder.tower(model.model, torch.randn(1, 3, opened.config.vision_config.image_size, 42))
    layers = [
        int(name.rsplit(".", 1)[1])
        for name in ran
        if name.startswith("encoder.layers.") and name.count(".") == 2
    ]
    assert layers == list(range(deepest))
    assert not [name for name in ran if name.startswith(("head", "post_layernorm"))]


def test_another_picture_gives_other_logits(opened: Opened) -> None:
    """Or else the test above would pass on a model that looks at none."""
    conversation = asked(PICTURE, Text("One?"))
    model = AutoModelForImageTextToText.from_pretrained(opened.folder).eval()
    logits = []
    for seed in range(2):
        row = encode(opened, conversation, [noise(60, 60, seed)])
        ids = torch.tensor([row.input_ids])
        with torch.inference_mode():
            logits.append(
                model(input_ids=ids, **opened.family.stack([row], opened.processor, ids)).logits[
                    0, -1
                ]
            )
    assert (logits[0] - logits[1]).abs().max() > 0.01


def test_a_saved_processor_does_the_same_under_plain_transformers(
    opened: Opened, tmp_path: Path
) -> None:
    opened.processor.save_pretrained(tmp_path)
    plain = AutoProcessor.from_pretrained(tmp_path)
    conversation = CONVERSATIONS[2]
    pictures = pictures_of(conversation)
    row = encode(opened, conversation, pictures)
    stock = llava.stock_inputs(plain, conversation, pictures, generation_prompt=False)
    assert row.input_ids == stock["input_ids"][0].tolist()
    ours = opened.family.stack([row], opened.processor, stock["input_ids"])
    torch.testing.assert_close(ours["pixel_values"], stock["pixel_values"], atol=1e-6, rtol=0)
    again = open_tiny(opened.family, opened.folder)
    rebuilt = opened.family.build_processor(
        lambda each: (each or AutoProcessor).from_pretrained(tmp_path), again.config
    )
    assert rebuilt.image_processor.to_dict() == opened.processor.image_processor.to_dict()


def test_key_names_before_transformers_5_load_with_nothing_missing(opened: Opened) -> None:
    # a pair because of output_loading_info, which the declared type does not know
    load: Any = AutoModelForImageTextToText.from_pretrained
    model, info = load(opened.folder, output_loading_info=True)
    assert not any(info.values())
    assert "model.vision_tower.encoder.layers.0.mlp.fc1.weight" in model.state_dict()


def test_an_adapter_of_before_transformers_4_52_loads_whole(opened: Opened, tmp_path: Path) -> None:
    def load() -> Any:
        model = AutoModelForImageTextToText.from_pretrained(opened.folder)
        opened.family.adjust_model(model)
        return model

    settings = LoraConfig(r=2, init_lora_weights=False, target_modules=r".*(up_proj|linear_1|fc1)")
    adapted = get_peft_model(load(), settings)
    adapted.save_pretrained(str(tmp_path))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for keys in (weights, llava.old_adapter_keys(weights)):
        save_file(keys, tmp_path / "adapter_model.safetensors")
        again = get_peft_model_state_dict(PeftModel.from_pretrained(load(), str(tmp_path)))
        assert again.keys() == weights.keys()
        assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_each_family_recognises_its_own(opened: Opened) -> None:
    assert [f for f in (LLAVA, MANTIS) if f.recognises(opened.config)] == [opened.family]
    assert opened.family.untrainable(opened.config) is None
