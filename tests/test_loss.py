"""The loss of learnt tokens alone, against the cross-entropy of all logits of the stock forward."""

import copy
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.collate import IGNORED_LABEL, collate
from finetune.data.examples import Encoder
from finetune.data.images import ImageAccess
from finetune.data.sources import Row
from finetune.errors import ModelError, RecipeError
from finetune.model import loss
from finetune.model.adapters import add_adapter, base_of
from finetune.model.load import load_model, load_processor
from finetune.model.loss import choose_loss_kernel, learn_from_labels
from finetune.model.vocabulary import add_extra_tokens, extend_vocabulary
from finetune.recipe import AdapterSection, ImagesSection, ModelSection, Recipe
from finetune.requirements import refuse_what_cannot_run
from tests.conftest import NANO, NANO_IMAGES, noise
from tests.families import CHECKPOINTS

FAMILIES_SHOWN = (
    "idefics2-8b",
    "idefics3-8b",
    "llava-1.5-7b",
    "mantis-8b-siglip",
    "llama-3.2-11b-vision",
    "idefics-9b-instruct",
    "idefics-9b",
)
ANSWERS = ("A cat.", "Nothing at all is written on this sign.", "No.")

Batch = dict[str, Any]


def batch_of(encoder: Encoder, folder: Path) -> Batch:
    """Rows with one picture, without and with two, and answers of different lengths."""
    for i in range(2):
        noise(60 + 40 * i, 90, seed=i).save(folder / f"{i}.png")
    rows = []
    for pictures, answer in zip(([0], [], [0, 1]), ANSWERS, strict=True):
        asked = (*(Image(f"{i}.png") for i in pictures), Text("What is it?"))
        messages = (Message("user", asked), Message("assistant", (Text(answer),)))
        rows.append(Row("rows:1", Conversation(messages), ImageAccess(folder)))
    examples = [encoder.encode(row) for row in rows]
    return collate(examples, encoder.processor, encoder.family, packed_vision=encoder.packed_vision)


def opened(folder: Path, name: str, dtype: Any = "float32") -> tuple[Encoder, Any]:
    section = ModelSection(name=str(folder), dtype=dtype)
    processor, images = load_processor(section, ImagesSection())
    encoder = Encoder(processor, CHECKPOINTS[name].family, images, packed_vision=True)
    return encoder, load_model(section)[0]


def adapted(model: Any, family: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    section = AdapterSection(dropout=0.0, parts=("language", "connector"), **settings)
    model = add_adapter(model, family, section, "it")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros would hide the gradients of lora_A
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def full_loss(model: Any, batch: Batch, weights_BT: torch.Tensor | None = None) -> torch.Tensor:
    """The oracle: the mean over learnt tokens of the cross-entropy of all logits, in float32."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    labels = batch["labels"][:, 1:]
    losses = functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels, reduction="none"
    )
    counts = (labels != IGNORED_LABEL).float()
    if weights_BT is not None:
        counts = counts * weights_BT[:, 1:]
    return (losses * counts).sum() / counts.sum()


def learnt_loss(model: Any, batch: Batch) -> torch.Tensor:
    """As `SFTTrainer.compute_loss` makes it of the output."""
    outputs = model(**batch, use_cache=False, fused_lm_head=True)
    return -outputs.log_probs.sum() / outputs.label_mask.sum()


def gradients(model: Any, loss_of_model: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of_model.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(model: Any, batch: Batch) -> None:
    expected = full_loss(model, batch)
    expected_gradients = gradients(model, expected)
    base = base_of(model)
    learn_from_labels(base)
    ours = learnt_loss(model, batch)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients(model, ours), expected_gradients, atol=1e-6, rtol=1e-5)


@pytest.fixture(params=[None, 5], ids=["one chunk", "chunks of five tokens"])
def chunked(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All learnt tokens in one chunk, or several chunks of which the last is smaller."""
    if request.param:
        monkeypatch.setattr(loss, "rows_of_chunk", lambda num_entries: request.param)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("name", FAMILIES_SHOWN)
def test_loss_and_gradients_are_those_of_the_full_loss(
    folder_of: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    encoder, model = opened(folder_of(name), name)
    compare(adapted(model, encoder.family), batch_of(encoder, tmp_path))


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("name", ["idefics2-8b", "idefics-9b-instruct"])
def test_a_head_that_is_trained_gets_the_gradients_of_the_full_loss(
    folder_of: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    encoder, model = opened(folder_of(name), name)
    model = adapted(model, encoder.family, modules_to_save=("lm_head",))
    batch = batch_of(encoder, tmp_path)
    compare(model, batch)
    trained = [p.grad for n, p in model.named_parameters() if "lm_head" in n and p.grad is not None]
    assert trained
    assert all(gradient.abs().sum() > 0 for gradient in trained)


@pytest.mark.usefixtures("chunked")
def test_rows_of_added_tokens_get_the_gradients_of_the_full_loss(
    nano_model: Any, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate(
        {
            "model": {"name": "nano", "dtype": "float32"},
            "adapter": {"extra_tokens": ["<price>"]},
            "data": {"train": [{"hub": "user/name"}], "eval": [{"hub": "user/name"}]},
        }
    )
    processor = load_processor(NANO, NANO_IMAGES)[0]
    add_extra_tokens(processor, recipe)
    ids = extend_vocabulary(nano_model, processor, recipe)
    family = CHECKPOINTS["idefics2-8b"].family
    torch.manual_seed(0)
    model = add_adapter(nano_model, family, recipe.adapter, "nano", new_token_ids=ids).eval()
    batch = batch_of(Encoder(processor, family, NANO_IMAGES, packed_vision=True), tmp_path)
    batch["labels"][0, -1] = batch["input_ids"][0, -1] = ids[0]
    batch["attention_mask"][0, -1] = 1
    compare(model, batch)
    assert any("trainable_tokens" in n and p.grad is not None for n, p in model.named_parameters())


@pytest.mark.usefixtures("chunked")
def test_logits_of_a_bfloat16_model_are_raised_to_float32(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    encoder, model = opened(folder_of("idefics2-8b"), "idefics2-8b", "bfloat16")
    model = adapted(model, encoder.family)
    batch = batch_of(encoder, tmp_path)
    with torch.no_grad():
        expected = full_loss(model, batch)
        learn_from_labels(model.get_base_model())
        outputs = model(**batch, fused_lm_head=True)
    assert outputs.log_probs.dtype == torch.float32
    torch.testing.assert_close(outputs.loss, expected, atol=1e-5, rtol=0)


@pytest.fixture
def nano(nano_model: Any, encoder: Encoder, tmp_path: Path) -> tuple[Any, Batch]:
    """An adapted nano that learns from labels, and a batch for it."""
    model = adapted(nano_model, encoder.family)
    learn_from_labels(nano_model)
    return model, batch_of(encoder, tmp_path)


@pytest.mark.usefixtures("chunked")
def test_entropy_and_accuracy_are_of_learnt_tokens(nano: tuple[Any, Batch]) -> None:
    model, batch = nano
    with torch.no_grad():
        outputs = model(**batch, fused_lm_head=True)
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    learnt = labels != IGNORED_LABEL
    assert outputs.label_mask.equal(learnt)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(outputs.entropy, entropy * learnt, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.is_top1.bool(), (logits.argmax(-1) == labels) & learnt)


def test_a_token_counts_as_often_as_its_weight_says(nano: tuple[Any, Batch]) -> None:
    model, batch = nano
    weights = torch.ones(batch["labels"].shape)
    weights[0] = 3
    expected = full_loss(model, batch, weights)
    expected_gradients = gradients(model, expected)
    ours = learnt_loss(model, batch | {"label_weights": weights})
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients(model, ours), expected_gradients, atol=1e-6, rtol=1e-5)


def test_a_weighted_token_gives_the_figures_of_its_repeated_rows(nano: tuple[Any, Batch]) -> None:
    model, batch = nano
    text = {name: batch[name][1:2] for name in ("input_ids", "attention_mask", "labels")}
    other = {name: batch[name][1:2].clone() for name in text}
    other["labels"][:, -4:] = IGNORED_LABEL
    both = {name: torch.cat([text[name], other[name]]) for name in text}
    weights = torch.tensor([[3.0], [1.0]]).expand(both["labels"].shape)
    repeated = {name: torch.cat([text[name]] * 3 + [other[name]]) for name in text}
    with torch.no_grad():
        ours = model(**both, label_weights=weights, fused_lm_head=True)
        expected = model(**repeated, fused_lm_head=True)
    for figure in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(
            getattr(ours, figure).sum().float(),
            getattr(expected, figure).sum().float(),
            atol=1e-4,
            rtol=1e-5,
        )


def test_a_batch_without_learnt_tokens_has_a_loss_of_zero(nano: tuple[Any, Batch]) -> None:
    model, batch = nano
    outputs = model(
        **batch | {"labels": torch.full_like(batch["labels"], IGNORED_LABEL)}, fused_lm_head=True
    )
    assert outputs.loss.item() == 0
    outputs.log_probs.sum().backward()
    learnt = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert learnt
    assert not any(gradient.abs().sum() for gradient in learnt)


def test_logits_never_hold_more_than_a_chunk_neither_forward_nor_backward(
    nano: tuple[Any, Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = nano
    monkeypatch.setattr(loss, "rows_of_chunk", lambda num_entries: 5)
    base = model.get_base_model()
    num_entries = base.lm_head.out_features
    num_learnt = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
    shapes, kept = [], []
    base.lm_head.register_forward_hook(lambda *args: shapes.append(args[2].shape))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        ours = learnt_loss(model, batch)
    ours.backward()
    assert num_learnt > 10
    assert {tuple(shape[1:]) for shape in shapes} == {(num_entries,)}
    assert max(shape[0] for shape in shapes) == 5
    assert sum(shape[0] for shape in shapes) == 2 * num_learnt  # once again in the backward pass
    # weights and inputs are kept, logits of no chunk are
    of_vocabulary = [shape for shape in kept if num_entries in shape]
    assert not [shape for shape in of_vocabulary if shape != base.lm_head.weight.shape]


def test_a_single_chunk_is_not_computed_again(nano: tuple[Any, Batch]) -> None:
    model, batch = nano
    calls = []
    model.get_base_model().lm_head.register_forward_hook(lambda *args: calls.append(1))
    learnt_loss(model, batch).backward()
    assert len(calls) == 1


def test_a_chunk_holds_at_most_so_many_logits() -> None:
    assert loss.rows_of_chunk(32_003) * 32_003 <= loss.MAX_LOGITS
    assert loss.rows_of_chunk(32_003) == 1048
    assert loss.rows_of_chunk(2 * loss.MAX_LOGITS) == 1


def test_a_copy_of_the_model_runs_its_own_weights(nano: tuple[Any, Batch]) -> None:
    model, batch = nano
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        num_entries = model.get_base_model().lm_head.out_features
        flat = torch.tensor(float(num_entries)).log()
        torch.testing.assert_close(twin(**batch, fused_lm_head=True).loss, flat)
        torch.testing.assert_close(twin(**batch).loss, flat)
        assert not torch.allclose(model(**batch).loss, flat)


def test_without_the_loss_the_forward_is_the_librarys(nano: tuple[Any, Batch]) -> None:
    model, batch = nano
    base = model.get_base_model()
    plain = load_model(NANO)[0]
    assert inspect.signature(base.forward) == inspect.signature(plain.forward)
    assert type(base).__name__ == type(plain).__name__
    torch.testing.assert_close(model(**batch).loss, full_loss(model, batch))
    prompt = {k: v for k, v in batch.items() if k != "labels"}
    out = base.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert out.shape[1] == batch["input_ids"].shape[1] + 2
    with pytest.raises(ValueError, match="label_wights"):
        base.generate(**prompt, label_wights=1)


# -- Liger ----------------------------------------------------------------------------------------


class TorchOfLiger(torch.autograd.Function):
    """Liger's function in torch: the arguments and results of liger-kernel 0.8.5,
    ops/fused_linear_cross_entropy.py. As there, gradients come of the forward pass.
    """

    calls: ClassVar[list[int]] = []

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        _input: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        bias: torch.Tensor | None = None,
        ce_weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
    ) -> tuple[torch.Tensor, None, None, None]:
        assert len(_input)  # the kernel divides by the number of its rows
        assert _input.is_contiguous()
        assert target.is_contiguous()
        TorchOfLiger.calls.append(len(_input))
        with torch.enable_grad():
            hidden = _input.detach().requires_grad_()
            summed = functional.cross_entropy(
                functional.linear(hidden, weight.detach(), bias),
                target,
                weight=ce_weight,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
            )
            ctx.save_for_backward(*torch.autograd.grad(summed, hidden))
        return summed.detach(), None, None, None

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (grads[0] * ctx.saved_tensors[0], *[None] * 12)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A stand-in for the package, which needs Triton; gives the rows of each call."""
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("liger_kernel.ops.fused_linear_cross_entropy")
    module.LigerFusedLinearCrossEntropyFunction = TorchOfLiger  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    TorchOfLiger.calls = []
    return TorchOfLiger.calls  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["idefics2-8b", "idefics-9b-instruct"])
def test_ligers_loss_and_gradients_are_those_of_the_full_loss(
    folder_of: Callable[[str], Path], liger: list[int], name: str, tmp_path: Path
) -> None:
    encoder, model = opened(folder_of(name), name)
    model = adapted(model, encoder.family)
    batch = batch_of(encoder, tmp_path)
    weights = torch.ones(batch["labels"].shape)
    for given in ({}, {"label_weights": weights}):
        weights[1] = 2
        expected = full_loss(model, batch, given.get("label_weights"))
        expected_gradients = gradients(model, expected)
        learn_from_labels(model.get_base_model(), "liger")
        ours = learnt_loss(model, batch | given)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gradients(model, ours), expected_gradients, atol=1e-6, rtol=1e-5)
    num_learnt = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
    # one call, then one for each of the two weights
    assert len(liger) == 3
    assert liger[0] == sum(liger[1:]) == num_learnt


def test_liger_is_not_asked_about_no_tokens(nano: tuple[Any, Batch], liger: list[int]) -> None:
    model, batch = nano
    learn_from_labels(model.get_base_model(), "liger")
    labels = torch.full_like(batch["labels"], IGNORED_LABEL)
    learnt = model(**batch | {"labels": labels}, fused_lm_head=True).log_probs.sum()
    learnt.backward()
    assert learnt.item() == 0
    assert not liger


def test_ligers_own_kernel_gives_the_full_loss() -> None:
    """Where it is installed: on a GPU, or slowly on a CPU, with TRITON_INTERPRET=1 in the
    environment.
    """
    pytest.importorskip("liger_kernel")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton needs a GPU or its interpreter")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 101, bias=False, device=device).requires_grad_(False)
    hidden = torch.randn(7, 32, device=device, requires_grad=True)
    targets = torch.randint(0, 101, (7,), device=device)
    weights = torch.tensor([1.0, 2, 1, 3, 1, 2, 1], device=device)
    losses = functional.cross_entropy(head(hidden), targets, reduction="none")
    expected = -(losses * weights).sum()
    ours = loss._liger_log_prob(head, hidden, targets, weights)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-6)
    both = [torch.autograd.grad(each / 5, hidden)[0] for each in (ours, expected)]
    torch.testing.assert_close(*both, atol=1e-6, rtol=1e-5)


def test_liger_is_chosen_on_a_gpu_where_it_is_installed(
    nano_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"liger_kernel": "0.8.5"}
    monkeypatch.setattr(loss, "version", lambda name: installed[name])
    assert choose_loss_kernel(nano_model, "auto") == "torch"  # there is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_loss_kernel(nano_model, "auto") == "liger"
    assert choose_loss_kernel(nano_model, "torch") == "torch"
    installed["liger_kernel"] = "0.9.0"  # whose kernel nobody here has read
    assert choose_loss_kernel(nano_model, "auto") == "torch"
    assert choose_loss_kernel(nano_model, "liger") == "liger"


def test_liger_is_refused_for_a_head_that_is_more_than_a_product(
    nano_model: Any, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "version", lambda name: "0.8.5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    adapted(nano_model, encoder.family, modules_to_save=("lm_head",))
    assert choose_loss_kernel(nano_model, "auto") == "torch"
    with pytest.raises(ModelError, match=r"training\.loss_kernel: liger .*lm_head.* torch"):
        choose_loss_kernel(nano_model, "liger")


def test_liger_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.model_validate(
        {
            "model": {"name": "nano", "dtype": "float32"},
            "data": {"train": [{"hub": "user/name"}], "eval": [{"hub": "user/name"}]},
            "training": {"loss_kernel": "liger"},
        }
    )
    monkeypatch.setattr("finetune.packages.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"loss_kernel: liger.*pip install liger-kernel"):
        refuse_what_cannot_run(recipe, "it")
    monkeypatch.setattr("finetune.packages.find_spec", lambda name: name)
    with pytest.raises(RecipeError, match=r"training\.loss_kernel: liger runs on a GPU only"):
        refuse_what_cannot_run(recipe, "it")
