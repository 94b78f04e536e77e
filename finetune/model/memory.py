"""The bytes that a training step takes on one device, by term.

Weights, adapters and the optimizer's state are counted from the parameters; the rest is what a step
on tensors without values (`finetune.model.tracing`) is seen to hold at its heaviest moment.
"""

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch.utils.checkpoint import checkpoint

from finetune.model.adapters import base_of, require_grad_on_language_inputs_only
from finetune.model.kernels import (
    Device,
    Kernels,
    autocast_in_modules,
    quantised_linear,
)
from finetune.model.lora import add_in_place
from finetune.model.loss import learn_from_labels
from finetune.model.tracing import LiveBytes, counted_by_module

TERMS = (
    "weights",
    "adapters",
    "gradients",
    "optimizer",
    "batch",
    "vision",
    "connector",
    "language",
    "logits",
    "workspace",
)
Quantize = Literal["none", "nf4", "int8"]

# bitsandbytes' block sizes: a scale for 64 weights, itself in 8 bits with a float32 for 256 scales;
_NF4_BLOCK, _NF4_SCALES_BLOCK = 64, 256
# cuBLAS gets this much from torch's allocator on Hopper cards, a quarter on earlier ones
_CUBLAS_WORKSPACE = 32 * 2**20
# bitsandbytes' 8-bit optimizers: a float32 scale for 256 values of state, of tensors of this size
_ADAM8_BLOCK, _ADAM8_SMALLEST = 256, 4096


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the heaviest moment of a step, by term, and when that is."""

    terms: Mapping[str, int]
    peak_at: str
    flops: int
    """Of one batch, forward and backward, what checkpointing computes twice included."""

    @property
    def peak_bytes(self) -> int:
        """Of all terms together."""
        return sum(self.terms.values())


def weight_bytes(weight: torch.Tensor, quantize: Quantize = "none") -> int:
    """Of one weight matrix as it is held; nf4 is double-quantised."""
    count = weight.numel()
    if quantize == "nf4":
        scales = math.ceil(count / _NF4_BLOCK)
        # the last constant: a table of 256 and one of 16 numbers, and the scales' mean
        return math.ceil(count / 2) + scales + 4 * math.ceil(scales / _NF4_SCALES_BLOCK) + 4 * 273
    if quantize == "int8":
        return count + 4 * weight.shape[0]  # a float32 scale a row
    return count * weight.element_size()


def optimizer_bytes(parameters: Iterable[torch.Tensor], optimizer: str) -> int:
    """State that an optimizer of transformers keeps for these parameters, by its name there.

    GaLore and APOLLO keep less than Adam, by how they project; they are counted as Adam.
    """
    if optimizer == "adafactor":
        return sum(map(_factored_bytes, parameters))
    num_states = next((count for part, count in _STATES.items() if part in optimizer), 2)
    return num_states * sum(_state_bytes(each, optimizer) for each in parameters)


# Numbers kept for each weight, by what the optimizer's name holds; of any other two, as by Adam
_STATES = {
    "schedule_free_sgd": 1,
    "sgd": 0,
    "lomo": 0,
    "ademamix": 3,
    "lion": 1,
    "rmsprop": 1,
    "adagrad": 1,
}


def _state_bytes(parameter: torch.Tensor, optimizer: str) -> int:
    count = parameter.numel()
    if "4bit" in optimizer:  # torchao: a float32 scale for 128 values
        return math.ceil(count / 2) + 4 * math.ceil(count / 128)
    if "8bit" in optimizer and count >= _ADAM8_SMALLEST:
        return count + 4 * math.ceil(count / _ADAM8_BLOCK)
    in_float32 = "8bit" in optimizer or "32bit" in optimizer or "bnb" in optimizer
    return count * (4 if in_float32 else parameter.element_size())


def _factored_bytes(parameter: torch.Tensor) -> int:
    """Adafactor: of a matrix, the means of its rows and of its columns."""
    if parameter.dim() < 2:
        return 4 * parameter.numel()
    *outer, rows, columns = parameter.shape
    return 4 * math.prod(outer) * (rows + columns)


def optimizer_workspace(parameters: Iterable[torch.Tensor], optimizer: str, device: Device) -> int:
    """What a step of the optimizer allocates for a moment.

    Torch's AdamW on a GPU takes the square root of all second moments at once (`foreach`); on a
    CPU, of one parameter after the other, twice. Fused and bitsandbytes' kernels work in place.
    """
    sizes = [each.numel() * each.element_size() for each in parameters]
    if not sizes or optimizer == "sgd":
        return 0
    if optimizer == "adamw_torch" and device == "cuda":
        return sum(sizes)
    if optimizer in ("adamw_torch", "adafactor"):
        return 2 * max(sizes)
    return 0


def quantise(model: Any, is_quantised: Callable[[str], bool], quantize: Quantize) -> None:
    """Hold the linear layers chosen by name as bitsandbytes would, on the meta device.

    Their weights keep their shape, so that what asks for it need not know; what they weigh is
    `weight_bytes`'.
    """
    if quantize == "none":
        return
    kind = quantised_linear(quantize)
    linears: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and is_quantised(name)
    }
    for module in linears.values():
        module.__class__ = kind
        module.weight.requires_grad_(False)
        module.planned_quantize = quantize
        # what PEFT asks of a layer of bitsandbytes
        module.compute_dtype = module.weight.dtype
        module.weight.compress_statistics, module.weight.quant_type = True, "nf4"
        module.state, module.index = _EightBitState(), None
    model.is_loaded_in_4bit = quantize == "nf4"
    model.is_loaded_in_8bit = quantize == "int8"


@dataclass
class _EightBitState:
    has_fp16_weights: bool = False
    threshold: float = 6.0


def set_up_training(adapted: Any, *, checkpointing: bool) -> None:
    """What our trainer and TRL's do to a model before the first step; may be called again."""
    adapted.train()
    base = base_of(adapted)
    if checkpointing:
        require_grad_on_language_inputs_only(base)
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    else:
        base.gradient_checkpointing_disable()
        for hook in getattr(base, "_require_grads_hooks", ()):
            hook.remove()
        base._require_grads_hooks = []
    add_in_place(base)
    learn_from_labels(base)  # Liger's kernel, where the trainer takes it, holds fewer logits


def hold_weights(live: LiveBytes, model: torch.nn.Module) -> None:
    """Count the parameters and buffers of a model, as they are held."""
    for module in model.modules():
        quantize: Quantize = getattr(module, "planned_quantize", "none")  # type: ignore[assignment]
        for name, weight in module.named_parameters(recurse=False):
            term = "adapters" if weight.requires_grad else "weights"
            quantised = quantize if name == "weight" else "none"
            live.hold(weight, term, num_bytes=weight_bytes(weight, quantised))
        for _, buffer in module.named_buffers(recurse=False):
            live.hold(buffer, "weights")


def step_memory(
    model: Any,
    batch: Mapping[str, Any],
    *,
    term_of: Callable[[str], str | None],
    optimizer: str,
    device: Device,
    half: torch.dtype | None,
    accumulates: bool = False,
    bytes_of_other_batches: int = 0,
) -> StepMemory:
    """What one step of `model`, on the meta device, takes with this batch of real tensors.

    The model is set up as for training: adapted, in training mode, checkpointing where it shall,
    our loss added. `term_of` gives the term of a module by its name, `half` is autocast's dtype.
    Where a step `accumulates` several batches, gradients are there when it begins, and the trainer
    holds the other batches, too. Raises `ModelError` where the model's forward cannot be followed.
    """
    live = LiveBytes()
    trained = [each for each in model.parameters() if each.requires_grad]
    hold_weights(live, model)
    state = optimizer_bytes(trained, optimizer)
    paged = optimizer.startswith("paged")  # its state makes room while the model computes
    live.live["optimizer"] = 0 if paged else state
    live.live["workspace"] = _CUBLAS_WORKSPACE if device == "cuda" else 0
    live.live["batch"] = bytes_of_other_batches
    inputs = {}
    for name, values in batch.items():
        inputs[name] = values.to("meta")
        for tensor, real in zip(tensors_of(inputs[name]), tensors_of(values), strict=True):
            live.hold(tensor, "batch")
            live.give_values(tensor, real)
    for parameter in trained:
        parameter.grad = None
        if accumulates:
            parameter.grad = torch.empty_like(parameter)
            live.hold(parameter.grad, "gradients")

    def added_flops(flops: int) -> None:
        live.traced.flops += flops

    def is_gradient(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        live.hold(parameter.grad, "gradients")

    with ExitStack() as stack:
        if gc.isenabled():  # it would go through all modules again and again, for nothing
            gc.disable()
            stack.callback(gc.enable)
        kernels = Kernels(device, half, added_flops)
        for parameter in trained:
            stack.callback(parameter.register_post_accumulate_grad_hook(is_gradient).remove)
        stack.enter_context(counted_by_module(live, model, term_of, lambda: kernels))
        stack.enter_context(_loss_counted_again(live, kernels))
        stack.enter_context(autocast_in_modules(model, half))
        stack.enter_context(live)
        live.phase = "forward"
        with kernels:
            loss = step_loss(model, inputs)
        kernels.forward_ended()
        live.phase = "backward"
        if loss.requires_grad:
            loss.backward()
    terms, peak_at = dict(live.traced.terms), live.traced.peak_phase
    after = dict(live.live) | {"optimizer": state}
    after["workspace"] = after.get("workspace", 0) + optimizer_workspace(trained, optimizer, device)
    if sum(after.values()) > sum(terms.values()):
        terms, peak_at = after, "optimizer step"
    for parameter in trained:
        parameter.grad = None
    return StepMemory({term: terms.get(term, 0) for term in TERMS}, peak_at, live.traced.flops)


@contextmanager
def _loss_counted_again(live: LiveBytes, kernels: Kernels) -> Iterator[None]:
    """Meanwhile, chunks of the loss that are computed again in the backward pass run through the
    kernels as they did before, and count as logits.
    """

    @contextmanager
    def again() -> Iterator[None]:
        with live.of_term("logits"), kernels:
            yield

    counted = partial(checkpoint, context_fn=lambda: (nullcontext(), again()))
    with patch("finetune.model.loss.checkpoint", counted):
        yield


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors of one entry of a batch, which may be an object of several."""
    if isinstance(value, torch.Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, each.name) for each in fields(value)]
    return (
        [t for each in value for t in tensors_of(each)] if isinstance(value, (list, tuple)) else []
    )


def step_loss(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The loss of a batch, as `SFTTrainer.compute_loss` has it.

    Source: trl 1.16, trl/trainer/sft_trainer.py.
    """
    outputs = model(**inputs, use_cache=False, fused_lm_head=True)
    num_tokens = outputs.label_mask.sum()
    return -outputs.log_probs.sum() / num_tokens.clamp(min=1)
