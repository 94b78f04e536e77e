import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.data.examples import Encoder
from finetune.errors import ModelError
from finetune.families import FAMILIES
from finetune.model.load import load_model, load_processor, model_location
from finetune.recipe import ImagesSection, ModelSection
from tests.conftest import NANO, NANO_IMAGES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be damaged."""
    copy = tmp_path / "model"
    shutil.copytree(model_location("nano"), copy)
    return copy


def local(folder: Path) -> ModelSection:
    return ModelSection(name=str(folder), dtype="float32")


def test_the_perceiver_gets_the_text_models_epsilon(folder: Path) -> None:
    """On the Hub the perceiver's is not named, and the library's default is not what it was trained
    with.
    """
    config = json.loads((folder / "config.json").read_text())
    del config["perceiver_config"]["rms_norm_eps"]
    config["text_config"]["rms_norm_eps"] = 1e-5
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_model(local(folder))
    norms = [
        m
        for n, m in model.named_modules()
        if "perceiver_resampler" in n and hasattr(m, "variance_epsilon")
    ]
    assert norms
    assert {norm.variance_epsilon for norm in norms} == {1e-5}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_come_in_the_recipes_dtype(dtype: Any) -> None:
    model, _ = load_model(ModelSection(name="nano", dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors weights"):
        load_model(local(folder))


def test_pickled_weights_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors weights"):
        load_model(local(folder))


def test_a_missing_weight_is_refused_and_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("latents")))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing.*latents"):
        load_model(local(folder))


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="its weights cannot be loaded"):
        load_model(local(folder))


def test_damaged_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="its weights"):
        load_model(local(folder))


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_model(local(tmp_path))


def test_a_model_of_another_family_is_refused_with_the_supported_ones(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match=r"'gpt2' is not supported; expected one of idefics2"):
        load_model(local(folder))


def test_views_larger_than_the_position_table_are_refused() -> None:
    with pytest.raises(ModelError, match=r"longest_edge_px: 980 is more than the 224 pixels"):
        load_processor(NANO, ImagesSection(longest_edge_px=980))


@pytest.mark.parametrize(("split", "does"), [("always", True), ("never", False), ("auto", False)])
def test_the_processor_is_set_to_the_recipes_images(split: Any, does: bool) -> None:
    processor, _ = load_processor(NANO, NANO_IMAGES.model_copy(update={"split": split}))
    assert processor.image_processor.do_image_splitting is does
    assert dict(processor.image_processor.size)["longest_edge"] == 224
    assert dict(processor.image_processor.size)["shortest_edge"] == 28


def test_image_settings_left_open_are_the_checkpoints_own(folder: Path) -> None:
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"] |= {
        "do_image_splitting": True,
        "size": {"longest_edge": 112, "shortest_edge": 56},
    }
    file.write_text(json.dumps(settings))
    processor, images = load_processor(local(folder), ImagesSection())
    assert images == ImagesSection(split="always", longest_edge_px=112, shortest_edge_px=56)
    processor, images = load_processor(local(folder), ImagesSection(split="never"))
    assert images == ImagesSection(split="never", longest_edge_px=112, shortest_edge_px=56)
    assert processor.image_processor.do_image_splitting is False
    with pytest.raises(
        ModelError, match=r"shortest_edge_px: 56 is more than .*longest_edge_px: 28"
    ):
        load_processor(local(folder), ImagesSection(longest_edge_px=28))
    with pytest.raises(ModelError, match=r"208 is not a multiple of the patch size 14"):
        load_processor(local(folder), ImagesSection(longest_edge_px=208))


def test_weights_stored_by_bitsandbytes_are_refused_with_what_to_do(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"stored in 4 or 8 bits.*model\.quantize: nf4 or int8"):
        load_model(local(folder))


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_weights_stored_quantised_are_refused_with_the_reason(folder: Path, method: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"stored as {method.upper()}.*model\.quantize: nf4"):
        load_model(local(folder))


def test_a_base_without_a_template_is_lent_one_that_ends_in_a_token_it_knows(folder: Path) -> None:
    """The base was never trained on <end_of_utterance>, and its head is frozen."""
    (folder / "chat_template.jinja").unlink()
    processor, _ = load_processor(local(folder), NANO_IMAGES)
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    answer = [{"type": "text", "text": "A cat."}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    assert processor.apply_chat_template(messages) == "User:<image>What?\nAssistant: A cat.</s>\n"
    encoder = Encoder(processor, FAMILIES["idefics2"], NANO_IMAGES)
    assert encoder.renderer.template.turn_end_token == "</s>"
