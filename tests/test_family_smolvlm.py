import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, AutoProcessor, Idefics3Processor, SmolVLMProcessor
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.views import ImagePlan
from finetune.families.idefics3 import IDEFICS3
from finetune.families.smolvlm import SMOLVLM, build_processor
from tests.conftest import noise
from tests.models import idefics3, smolvlm

CONVERSATION = Conversation(
    (
        Message("system", (Text("Be brief."),)),
        Message("user", (Image("a"), Text("And the other?"), Image("b"))),
        Message("assistant", (Text("12.50\n\nand 3"),)),
        Message("user", (Text("Sure?"),)),
        Message("assistant", (Text("Yes"),)),
    )
)


class OwnProcessor(SmolVLMProcessor):
    """The library's, taking anything for the video processor that needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("smolvlm")
    smolvlm.save_tiny(folder)
    return folder


def load_processor(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    return build_processor(lambda kind: (kind or AutoProcessor).from_pretrained(folder), config)


def test_without_torchvision_pictures_are_idefics3s_to_process(folder: Path) -> None:
    processor = load_processor(folder)
    assert isinstance(processor, Idefics3Processor)
    assert type(processor.image_processor).__name__ == "SmolVLMImageProcessorPil"
    assert processor.image_seq_len == 4
    assert processor.chat_template == smolvlm.TEMPLATE


def test_with_its_packages_the_checkpoints_own_processor_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in ("torchvision", "num2words"):
        monkeypatch.setattr(f"transformers.utils.import_utils.is_{package}_available", lambda: True)
    assert build_processor(lambda kind: kind, None) is None
    monkeypatch.setattr("transformers.utils.import_utils.is_num2words_available", lambda: False)
    assert build_processor(lambda kind: kind, None) is Idefics3Processor


def test_idefics3s_processor_gives_the_inputs_of_smolvlms_own(folder: Path) -> None:
    ours = load_processor(folder)
    own = OwnProcessor(
        ours.image_processor,
        ours.tokenizer,
        SimpleNamespace(num_frames=1, fps=1),
        image_seq_len=ours.image_seq_len,
        chat_template=ours.chat_template,
    )
    pictures = [noise(90, 60), noise(300, 500)]
    for generation_prompt in (False, True):
        expected = idefics3.stock_inputs(
            own, CONVERSATION, pictures, generation_prompt=generation_prompt
        )
        inputs = idefics3.stock_inputs(
            ours, CONVERSATION, pictures, generation_prompt=generation_prompt
        )
        assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
        assert inputs["pixel_values"].equal(expected["pixel_values"])


@pytest.mark.parametrize(("rows", "cols"), [(0, 0), (1, 2), (2, 1), (4, 4), (6, 6)])
def test_the_text_of_an_image_is_the_librarys(folder: Path, rows: int, cols: int) -> None:
    processor = load_processor(folder)
    plan = ImagePlan((), rows=rows, cols=cols)
    expected = get_image_prompt_string(
        rows,
        cols,
        processor.image_seq_len,
        fake_token_around_image="<fake_token_around_image>",
        image_token="<image>",
        global_image_token="<global-img>",
    )
    assert SMOLVLM.image_text(processor, plan, 1) == expected
    assert IDEFICS3.image_text(processor, plan, 2) == expected


def test_every_name_of_a_tile_is_one_token(folder: Path) -> None:
    processor = load_processor(folder)
    plan = ImagePlan((), rows=6, cols=6)
    tokens = processor.tokenizer.tokenize(SMOLVLM.image_text(processor, plan, 1))
    assert [token for token in tokens if token.startswith("<row")] == list(smolvlm.PLACES)


def test_the_saved_processor_loads_in_plain_transformers(folder: Path, tmp_path: Path) -> None:
    processor = load_processor(folder)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "Idefics3Processor"
    again = AutoProcessor.from_pretrained(tmp_path)
    pictures = [noise(90, 60), noise(300, 500)]
    first, second = (
        idefics3.stock_inputs(each, CONVERSATION, pictures, generation_prompt=True)
        for each in (processor, again)
    )
    assert first["input_ids"].equal(second["input_ids"])
    assert first["pixel_values"].equal(second["pixel_values"])
