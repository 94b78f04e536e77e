"""What is Mantis's alone; what it shares with LLaVA stands in test_family_llava."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoProcessor, LlavaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.render import Renderer
from finetune.families.mantis import LLAMA3_TEMPLATE, MANTIS
from finetune.recipe import ImagesSection
from tests.conftest import noise
from tests.models import mantis
from tests.models.opened import open_tiny

PICTURE = Image("a.png")
SYSTEM = (
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "You are a pirate chatbot who always responds in pirate speak!<|eot_id|>"
)
ROW = Conversation(
    (
        Message("user", (PICTURE, PICTURE, Text(" Which one shows 128,258 cats?"))),
        Message("assistant", (Text("The first, as I'd said."),)),
        Message("user", (Text("And "), PICTURE)),
        Message("assistant", (Text("Naïve, 東京!"),)),
    )
)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def processor(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    mantis.save_tiny(folder, request.param)
    return open_tiny(MANTIS, folder).processor


@pytest.fixture(scope="module")
def full_vocabulary() -> LlavaProcessor:
    """Mantis-8B-siglip-llama3's processor with its real vocabulary."""
    pytest.importorskip("llama_models", reason="ships Llama-3's vocabulary")
    pytest.importorskip("tiktoken", reason="reads it")
    return LlavaProcessor(
        SiglipImageProcessorPil(size={"height": 384, "width": 384}),
        mantis.real_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=0,
        chat_template=LLAMA3_TEMPLATE.text,
    )


def plans(processor: Any, conversation: Conversation) -> list[Any]:
    return [
        MANTIS.plan_image(100, 70, ImagesSection(), processor.image_processor)
        for _ in conversation.images()
    ]


def test_images_are_numbered_through_the_row(processor: Any) -> None:
    rendered = Renderer(processor, MANTIS).render(ROW, plans(processor, ROW))
    num = MANTIS.num_image_tokens(processor, plans(processor, ROW)[0])
    user, assistant = (
        f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant")
    )
    one, two, three = (f"(image {i}: <Image>{'<image>' * num}</Image>)" for i in (1, 2, 3))
    assert processor.tokenizer.decode(rendered.input_ids) == (
        f"<|begin_of_text|>{SYSTEM}"
        f"{user}{one}{two} Which one shows 128,258 cats?<|eot_id|>"
        f"{assistant}The first, as I'd said.<|eot_id|>"
        f"{user}And {three}<|eot_id|>"
        f"{assistant}Naïve, 東京!<|eot_id|>"
    )


def test_a_system_turn_takes_the_place_of_the_pirates(processor: Any) -> None:
    row = Conversation((Message("system", (Text("Be brief."),)), *ROW.messages))
    rendered = Renderer(processor, MANTIS).render(row, plans(processor, row))
    text = processor.tokenizer.decode(rendered.input_ids)
    assert "pirate" not in text
    assert text.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user"
    )


@pytest.mark.parametrize("system", [True, False])
def test_answers_and_their_ends_are_learnt(processor: Any, system: bool) -> None:
    start = (Message("system", (Text("Be brief."),)),) if system else ()
    row = Conversation((*start, *ROW.messages))
    rendered = Renderer(processor, MANTIS).render(row, plans(processor, row))
    learnt = [t for t, m in zip(rendered.input_ids, rendered.loss_mask, strict=True) if m]
    assert processor.tokenizer.decode(learnt) == (
        "The first, as I'd said.<|eot_id|>Naïve, 東京!<|eot_id|>"
    )


def test_ids_are_tiktokens_on_the_real_vocabulary(full_vocabulary: Any) -> None:
    """The oracle is Meta's own tokenizer, given the text piece by piece."""
    from llama_models.llama3.tokenizer import Tokenizer

    meta = Tokenizer.get_instance()
    rendered = Renderer(full_vocabulary, MANTIS).render(ROW, plans(full_vocabulary, ROW))
    text = full_vocabulary.tokenizer.decode(rendered.input_ids)
    expected = []
    pieces = text.split("<image>" * 728)
    assert len(pieces) == 4
    for piece in pieces:
        expected += meta.encode(piece, bos=False, eos=False, allowed_special="all")
        expected += [128256] * 728
    assert rendered.input_ids == expected[:-728]
    assert rendered.input_ids[0] == 128000
    assert rendered.input_ids[-1] == 128009


def test_the_real_vocabulary_is_that_of_the_checkpoint(full_vocabulary: Any) -> None:
    tokenizer = full_vocabulary.tokenizer
    names = ["<|eot_id|>", "<image>", "<pad>"]
    assert tokenizer.convert_tokens_to_ids(names) == [128009, 128256, 128257]
    assert len(tokenizer) == 128258


def test_ids_are_the_stock_processors_on_the_real_vocabulary(full_vocabulary: Any) -> None:
    pictures = [noise(40, 30, seed=i) for i in range(3)]
    rendered = Renderer(full_vocabulary, MANTIS).render(ROW, plans(full_vocabulary, ROW))
    stock = mantis.stock_inputs(full_vocabulary, ROW, pictures, generation_prompt=False)
    assert rendered.input_ids == stock["input_ids"][0].tolist()


def test_the_library_cannot_build_the_processor_that_the_checkpoint_names(tmp_path: Path) -> None:
    """Why it is built by hand."""
    mantis.save_tiny(tmp_path, "siglip")
    assert not hasattr(AutoProcessor.from_pretrained(tmp_path), "image_processor")
    built = open_tiny(MANTIS, tmp_path).processor
    assert built.num_additional_image_tokens == 0
    assert isinstance(built.image_processor, SiglipImageProcessorPil)


def test_a_checkpoint_that_names_no_pad_token_gets_the_one_after_the_image(tmp_path: Path) -> None:
    mantis.save_tiny(tmp_path, "siglip")
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    opened = open_tiny(MANTIS, tmp_path)
    assert opened.processor.tokenizer.pad_token_id == opened.config.image_token_index + 1


def test_another_vision_tower_is_refused_with_the_reason(tmp_path: Path) -> None:
    mantis.save_tiny(tmp_path, "clip")
    config = AutoConfig.from_pretrained(tmp_path)
    config.vision_config.model_type = "pixtral"
    assert "pixtral" in (MANTIS.untrainable(config) or "")
