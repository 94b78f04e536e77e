"""What is LLaVA-1.5's alone, and the full-size models of LLaVA and Mantis."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image as PilImage
from transformers import AutoConfig, AutoProcessor

from data_formats.chat import Conversation, Image, Message, Text
from finetune.errors import DataError
from finetune.families.llava import LARGEST_SQUARE_PX, LLAVA
from finetune.families.mantis import MANTIS
from tests.models import llava, mantis
from tests.models.opened import IMAGES, Opened, open_tiny, pictures_of, seen

PICTURE = Image("a.png")


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("llava")
    llava.save_tiny(folder)
    return open_tiny(LLAVA, folder)


def test_a_wide_page_keeps_its_sides(tiny_llava: Opened) -> None:
    """The stored processing cuts them off; LLaVA-1.5 was trained with padding."""
    page = PilImage.new("RGB", (200, 50), "white")
    page.paste((255, 0, 0), (0, 0, 20, 50))
    page.paste((255, 0, 0), (180, 0, 200, 50))

    def reddest_at(pixels: torch.Tensor, column: int) -> float:
        red, green = pixels[0, 0, :, column], pixels[0, 1, :, column]
        return float((red - green).max())

    stored = AutoProcessor.from_pretrained(tiny_llava.folder).image_processor
    cut = stored(page, return_tensors="pt")["pixel_values"]
    ours = LLAVA.stack([seen(tiny_llava, [page])], tiny_llava.processor, torch.empty(0))
    for column in (1, -2):
        assert reddest_at(cut, column) < 0.5 < 3 < reddest_at(ours["pixel_values"], column)


def test_an_image_whose_square_would_fill_the_memory_is_refused(tiny_llava: Opened) -> None:
    image_processor = tiny_llava.processor.image_processor
    with pytest.raises(DataError, match=r"16,385 x 100 pixels.*scale it down"):
        LLAVA.plan_image(LARGEST_SQUARE_PX + 1, 100, IMAGES, image_processor)
    square = LARGEST_SQUARE_PX + 1
    assert LLAVA.plan_image(square, square, IMAGES, image_processor).canvas is None


def test_prompts_are_those_of_the_checkpoints_own_template(tiny_llava: Opened) -> None:
    own = AutoProcessor.from_pretrained(tiny_llava.folder)
    assert own.chat_template == llava.TEMPLATE
    for content in (
        (PICTURE, Text("What is this?")),
        (Text("What is this?"), PICTURE),
        (PICTURE, Text(" Compare with "), PICTURE, Text(" please")),
        (Text("No picture here."),),
    ):
        system = Message("system", (Text("Be brief."),))
        prompt = Conversation((system, Message("user", content)))
        pictures = pictures_of(prompt)
        texts = [
            processor.tokenizer.decode(
                llava.stock_inputs(processor, prompt, pictures, generation_prompt=True)[
                    "input_ids"
                ][0]
            )
            for processor in (own, tiny_llava.processor)
        ]
        assert texts[0] == texts[1]


def test_answers_end_as_vicunas_did(tiny_llava: Opened) -> None:
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
        {"role": "user", "content": [{"type": "text", "text": "R"}]},
    ]
    text = tiny_llava.processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == "Be brief. USER: <image>\nQ ASSISTANT: A</s>USER: R ASSISTANT:"


@pytest.mark.parametrize(
    ("vision", "edge", "num_class_tokens", "num_tokens"),
    [("clip", 336, 1, 576), ("siglip", 384, 0, 728)],
)
def test_an_image_takes_576_tokens_of_clip_and_728_of_siglip(
    vision: str, edge: int, num_class_tokens: int, num_tokens: int
) -> None:
    is_clip = vision == "clip"
    processor = SimpleNamespace(
        patch_size=14,
        num_additional_image_tokens=num_class_tokens,
        vision_feature_select_strategy="default",
        image_processor=SimpleNamespace(
            size={"shortest_edge": edge} if is_clip else {"height": edge, "width": edge},
            do_pad=is_clip,
            image_mean=[0.5, 0.5, 0.5],
        ),
    )
    plan = LLAVA.plan_image(1000, 700, IMAGES, processor.image_processor)
    assert LLAVA.num_image_tokens(processor, plan) == num_tokens
    assert [(view.width_px, view.height_px) for view in plan.views] == [(edge, edge)]


FULL_SIZE = {
    "llava": (LLAVA, llava.full_size, llava.PARAMETERS, llava.LORA),
    "mantis-clip": (
        MANTIS,
        lambda: mantis.full_size("clip"),
        mantis.PARAMETERS["clip"],
        mantis.LORA["clip"],
    ),
    "mantis-siglip": (
        MANTIS,
        lambda: mantis.full_size("siglip"),
        mantis.PARAMETERS["siglip"],
        mantis.LORA["siglip"],
    ),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_parameters_and_lora_at_full_size(name: str) -> None:
    family, full_size, parameters, lora = FULL_SIZE[name]
    model = full_size()
    assert family.recognises(model.config)
    assert family.untrainable(model.config) is None
    parts = family.parts_of(model.config)
    found = {"total": sum(p.numel() for p in model.parameters())}
    for part, facts in parts.items():
        inside = [
            p for key, p in model.named_parameters() if key.startswith(tuple_of(facts.prefixes))
        ]
        found[part] = sum(p.numel() for p in inside)
    found["language"] += model.lm_head.weight.numel()
    assert found == parameters
    linears = {
        key: module for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    of_part = {
        key: [
            part
            for part, facts in parts.items()
            if key.startswith(tuple_of(facts.prefixes)) and key.rsplit(".", 1)[1] in facts.linears
        ]
        for key in linears
        if key != "lm_head"
    }
    assert all(len(names) == 1 for names in of_part.values())
    for chosen, count in lora.items():
        adapted = [linears[key] for key, names in of_part.items() if names[0] in chosen]
        assert count == sum(8 * (each.in_features + each.out_features) for each in adapted)


def tuple_of(prefixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{prefix}." for prefix in prefixes)


def test_other_models_of_the_same_type_are_refused_with_the_reason(tiny_llava: Opened) -> None:
    pixtral = AutoConfig.for_model(
        "llava", vision_config={"model_type": "pixtral"}, text_config={"model_type": "mistral"}
    )
    assert LLAVA.recognises(pixtral)
    assert "pixtral and mistral" in (LLAVA.untrainable(pixtral) or "")
    llama3 = AutoConfig.from_pretrained(tiny_llava.folder)
    llama3.text_config.eos_token_id = 128001
    assert "128001" in (LLAVA.untrainable(llama3) or "")


def test_old_adapter_keys_are_the_names_of_the_old_checkpoint(tiny_llava: Opened) -> None:
    keys = llava.old_adapter_keys(
        {
            "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight": 0,
            "base_model.model.model.multi_modal_projector.linear_1.lora_A.weight": 1,
            "base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1.lora_A.weight": 2,
        }
    )
    assert list(keys) == [
        "base_model.model.language_model.model.layers.0.mlp.up_proj.lora_A.weight",
        "base_model.model.multi_modal_projector.linear_1.lora_A.weight",
        "base_model.model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    ]
