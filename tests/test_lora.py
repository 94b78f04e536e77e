"""LoRA added in place against PEFT's own layers."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.model.adapters import add_adapter
from finetune.model.load import load_model
from finetune.model.lora import add_in_place
from finetune.recipe import AdapterSection, ModelSection


class Two(nn.Module):
    """A layer with a bias, and one without whose input is learnt from."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 40)
        self.second = nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def pair(dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Any, Any]:
    """PEFT's model, and a copy that adds in place, both with an adapter that does something."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"]} | config
    stock = get_peft_model(Two().to(dtype), LoraConfig(**settings))  # type: ignore[arg-type]
    for name, weight in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
        if weight.requires_grad:
            weight.data = weight.data.float()
    ours = copy.deepcopy(stock)
    add_in_place(ours)
    return stock, ours


def outcome(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Output, and the gradients of the input and of all that learns."""
    torch.manual_seed(1)  # for dropout
    x = x.clone().requires_grad_()
    output = model(x)
    output.float().pow(2).sum().backward()
    gradients = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
    return output.detach(), gradients | {"x": x.grad}


def assert_same(stock: Any, ours: Any, x: torch.Tensor, rtol: float = 1e-5) -> None:
    (expected, expected_gradients), (output, gradients) = outcome(stock, x), outcome(ours, x)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=rtol, atol=rtol)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert error < rtol, name


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"lora_dropout": 0.3}, {"use_dora": True}, {"lora_bias": True}],
    ids=str,
)
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12)], ids=str)
def test_output_and_gradients_are_pefts(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    if config.get("lora_bias"):
        config = config | {"target_modules": ["first"]}
    if config.get("use_dora") and len(shape) == 1:
        shape = (1, 12)  # PEFT itself wants two axes
    assert_same(*pair(**config), torch.randn(*shape))


def test_under_autocast_numbers_agree_to_half_precision() -> None:
    stock, ours = pair(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(stock, ours, torch.randn(3, 7, 12), rtol=2e-2)


def test_a_float32_adapter_on_a_half_precision_base_is_pefts_without_autocast() -> None:
    assert_same(*pair(torch.bfloat16), torch.randn(3, 7, 12, dtype=torch.bfloat16), rtol=1e-6)


def test_two_adapters_or_none_are_pefts() -> None:
    stock, ours = pair()
    x = torch.randn(3, 12)
    with stock.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=0)
    for model in (stock, ours):
        torch.manual_seed(2)
        model.add_adapter(
            "other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
        )
        model.base_model.set_adapter(["default", "other"])
    assert_same(stock, ours, x)


def test_merging_is_pefts() -> None:
    stock, ours = pair()
    merged = [model.merge_and_unload() for model in (copy.deepcopy(stock), ours)]
    x = torch.randn(3, 12)
    torch.testing.assert_close(merged[1](x), merged[0](x), rtol=0, atol=0)
    torch.testing.assert_close(merged[1](x), stock(x))


def test_quantised_layers_have_the_losses_and_gradients_of_pefts() -> None:
    pytest.importorskip("bitsandbytes")
    model, family = load_model(ModelSection(name="nano", dtype="float32", quantize="nf4"))
    stock = add_adapter(model, family, AdapterSection(dropout=0.0), "nano")
    for name, weight in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05)
    ids = torch.randint(3, 400, (2, 20))
    figures = []
    for _ in range(2):
        stock.zero_grad()
        loss = stock(input_ids=ids, labels=ids).loss
        loss.backward()
        kept = [w.grad.flatten() for w in stock.parameters() if w.grad is not None]
        figures.append((loss.item(), torch.cat(kept)))
        add_in_place(stock)
    changed = [m for m in stock.modules() if type(m).__name__ == "_Linear4bit"]
    assert changed
    assert figures[1][0] == pytest.approx(figures[0][0], rel=1e-5)
    assert (figures[1][1] - figures[0][1]).norm() / figures[0][1].norm() < 1e-4


@contextmanager
def counted(num_elements: int) -> Iterator[list[str]]:
    """The operations whose results have so many numbers."""
    seen: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() == num_elements:
                seen.append(str(func))
            return result

    with Count():
        yield seen


def test_no_tensor_as_large_as_the_output_is_made_beside_it() -> None:
    stock, ours = pair()
    x = torch.randn(7, 12)
    layers = [model.base_model.model.first for model in (stock, ours)]
    ran = []
    for layer in layers:
        with counted(7 * 40) as seen:
            layer(x)
        ran.append([each for each in seen if "view" not in each])
    assert ran[0] == ["aten.addmm.default", "aten.mm.default", "aten.mul.Tensor", "aten.add.Tensor"]
    assert ran[1] == ["aten.addmm.default", "aten.addmm_.default"]
