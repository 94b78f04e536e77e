from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from finetune.errors import RunDirError
from finetune.families import FAMILIES
from finetune.model.adapters import add_adapter
from finetune.model.load import load_model
from finetune.model.pissa import convert_to_lora, decompose, go_on_from_start, save_start
from finetune.recipe import AdapterSection, ModelSection

FAMILY = FAMILIES["idefics2"]


def model_with(method: Any, dtype: Any = "float32", **settings: Any) -> Any:
    model, _ = load_model(ModelSection(name="nano", dtype=dtype))
    section = AdapterSection(method=method, dropout=0.0, **settings)
    adapted = add_adapter(model, FAMILY, section, "nano")
    if method == "pissa":
        decompose(adapted)
    return adapted


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 40)[None]).logits


def train_a_little(model: Any) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)


def test_the_start_holds_the_strongest_directions_of_each_weight() -> None:
    model = model_with("pissa", rank={"language": 4, "connector": 8}, alpha=2.0)
    plain = dict(load_model(ModelSection(name="nano", dtype="float32"))[0].named_modules())
    ratios = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight = plain[name.removeprefix("base_model.model.")].weight
        rest: Any = layer.get_base_layer().weight
        lora_A, lora_B = (each["default"].weight for each in (layer.lora_A, layer.lora_B))
        start = layer.scaling["default"] * lora_B @ lora_A
        torch.testing.assert_close(rest + start, weight, atol=1e-5, rtol=1e-4)
        strengths = torch.linalg.svdvals(weight)
        best = strengths[layer.r["default"] :].square().sum()  # no matrix of this rank leaves less
        ratios.append((rest.square().sum() / best).item())
    assert len(ratios) > 20
    assert max(ratios) < 1.01
    assert min(ratios) > 0.999


def test_a_rank_above_a_weights_smaller_side_is_filled_up_with_zeros() -> None:
    """Every weight is then wholly in the adapter, and the base is nothing."""
    model = model_with("pissa", rank=600, alpha=600)
    plain = dict(load_model(ModelSection(name="nano", dtype="float32"))[0].named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight: Any = plain[name.removeprefix("base_model.model.")].weight
            start: Any = [each["default"].weight for each in (layer.lora_A, layer.lora_B)]
            lora_A, lora_B = start
            num_outputs, num_inputs = weight.shape
            assert (lora_A.shape, lora_B.shape) == ((600, num_inputs), (num_outputs, 600))
            assert not lora_A[min(weight.shape) :].any()
            assert not lora_B[:, min(weight.shape) :].any()
            torch.testing.assert_close(lora_B @ lora_A, weight, atol=1e-5, rtol=1e-4)


def test_the_start_is_the_base_and_the_base_without_the_adapter_is_not() -> None:
    plain = logits(load_model(ModelSection(name="nano", dtype="float32"))[0])
    model = model_with("pissa")
    torch.testing.assert_close(logits(model), plain, atol=1e-3, rtol=1e-3)
    with model.disable_adapter():
        assert (logits(model) - plain).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_going_on_from_the_start_gives_the_same_weights_bit_for_bit(
    tmp_path: Path, dtype: Any
) -> None:
    torch.manual_seed(0)
    first = model_with("pissa", dtype)
    save_start(first, tmp_path / "start.safetensors")
    torch.manual_seed(7)  # another decomposition, were it done again
    again = model_with("lora", dtype)
    go_on_from_start(again, tmp_path / "start.safetensors")
    ours, theirs = again.state_dict(), first.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_lost_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="is missing, so that the run cannot go on"):
        go_on_from_start(model_with("lora"), tmp_path / "start.safetensors")


@pytest.mark.parametrize("settings", [{}, {"rank": {"language": 2, "connector": 4}}])
def test_the_converted_adapter_is_pefts_own_conversion_and_holds_for_the_plain_base(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = model_with("pissa", **settings)
    save_start(model, tmp_path / "start.safetensors")
    model.save_pretrained(tmp_path / "initial", save_embedding_layers=False)
    train_a_little(model)
    model.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    trained = logits(model)
    convert_to_lora(tmp_path / "ours", tmp_path / "start.safetensors")
    model.save_pretrained(
        tmp_path / "pefts",
        save_embedding_layers=False,
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    ours, pefts = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "pefts")
    )
    assert ours.keys() == pefts.keys()
    for name in ours:
        product = (".lora_A.", ".lora_B.")
        if product[0] in name:
            other = name.replace(*product)
            torch.testing.assert_close(ours[other] @ ours[name], pefts[other] @ pefts[name])
    base, _ = load_model(ModelSection(name="nano", dtype="float32"))
    plain = logits(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "ours")
    torch.testing.assert_close(logits(loaded), trained, atol=1e-3, rtol=1e-3)
    assert (trained - plain).abs().max() > 0.1
