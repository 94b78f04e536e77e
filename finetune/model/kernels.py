"""What the kernels of a device keep and allocate where torch's meta device does otherwise.

Shape letters: B rows, H heads, T queries, S keys, D width of a head.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Device = Literal["cuda", "cpu"]

# Of torch's list "CUDA Ops that can autocast to float16" and "to float32" (torch.amp's
# documentation), what these models call.
_LOWERED = {
    functional.linear,
    functional.bilinear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.bmm,
    torch.Tensor.__matmul__,
    torch.Tensor.__rmatmul__,
    functional.scaled_dot_product_attention,
    functional.multi_head_attention_forward,  # nothing within it is seen here one by one
}
_RAISED = {
    functional.layer_norm,
    functional.group_norm,
    functional.softmax,
    functional.log_softmax,
    functional.softplus,
    functional.normalize,
    functional.cross_entropy,
    torch.softmax,
    torch.log_softmax,
    torch.exp,
    torch.log,
    torch.pow,
    torch.rsqrt,
    torch.reciprocal,
    torch.cumsum,
    torch.prod,
    torch.sum,
    torch.norm,
    torch.Tensor.softmax,
    torch.Tensor.exp,
    torch.Tensor.log,
    torch.Tensor.pow,
    torch.Tensor.__pow__,
    torch.Tensor.rsqrt,
    torch.Tensor.cumsum,
    torch.Tensor.sum,
    torch.Tensor.norm,
}


class FusedAttention(torch.autograd.Function):
    """Attention as the fused kernels do it: no matrix of scores; kept for the backward pass are
    queries, keys, values, the output, the mask, and one float32 a query and head.

    Source: torch, aten/src/ATen/native/transformers: `_scaled_dot_product_flash_attention`,
    `_scaled_dot_product_efficient_attention`, `_scaled_dot_product_flash_attention_for_cpu`.
    """

    @staticmethod
    def forward(ctx: Any, query, key, value, mask, on_flops) -> torch.Tensor:
        B, H, T, D = query.shape
        S, width = value.shape[-2:]
        # laid out as [B, T, H, D], so that the transposition after it copies nothing
        out = query.new_empty(B, T, H, width).transpose(1, 2)
        log_sum_exp_BHT = query.new_empty(B, H, T, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, log_sum_exp_BHT)
        ctx.on_flops = on_flops
        on_flops(2 * B * H * T * S * (D + width))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, _mask, _out, log_sum_exp_BHT = ctx.saved_tensors
        B, H, T, D = query.shape
        S, width = value.shape[-2:]
        num_kv_heads = key.shape[1]
        row_sums = torch.empty_like(log_sum_exp_BHT)
        gradients = [torch.empty_like(each) for each in (query, key, value)]
        if query.dtype != torch.float32:  # half-precision kernels add the queries' up in float32
            accumulated = torch.empty_like(query, dtype=torch.float32)
            del accumulated
        if num_kv_heads != H:  # shared keys' gradients come a query head, and are then added up
            expanded = [each.new_empty(B, H, S, each.shape[-1]) for each in (key, value)]
            del expanded
        del row_sums
        ctx.on_flops(5 * B * H * T * S * (D + width))
        return *gradients, None, None


@dataclass
class Kernels(TorchFunctionMode):
    """Runs meta tensors through what `device` would do.

    `half` is the dtype of autocast, None without it; it holds inside modules alone, as the trainer
    wraps the model's forward. `on_flops` is told of arithmetic that the dispatcher does not see.
    """

    device: Device
    half: torch.dtype | None
    on_flops: Callable[[int], None]
    _cast: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.half and torch.is_autocast_enabled():
            if func in _LOWERED:
                args = [self._lower(each) for each in args]
                kwargs = {name: self._lower(each) for name, each in kwargs.items()}
            elif func in _RAISED and kwargs.get("dtype") is None:
                args = [_raise(each) for each in args]
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is functional.dropout and self.device == "cuda":
            return _fused_dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # torch turns it into numbers to be added, anew for every layer
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        return FusedAttention.apply(query, key, value, attn_mask, self.on_flops)  # type: ignore[return-value]

    def _lower(self, each: Any) -> Any:
        if isinstance(each, (list, tuple)):
            return type(each)(map(self._lower, each))
        if not isinstance(each, torch.Tensor) or each.dtype != torch.float32:
            return each
        if not (each.is_leaf and each.requires_grad):
            return each.to(self.half)
        # autocast keeps the copy of a trained weight until the forward has ended
        if id(each) not in self._cast:
            self._cast[id(each)] = each.to(self.half)
        return self._cast[id(each)]

    def forward_ended(self) -> None:
        """Let go of what autocast keeps until then."""
        self._cast.clear()


def _raise(each: Any) -> Any:
    halves = (torch.float16, torch.bfloat16)
    return each.float() if isinstance(each, torch.Tensor) and each.dtype in halves else each


def _fused_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """On a GPU the mask has a byte an element, elsewhere it is a tensor of numbers."""
    if not training or p == 0:
        return input
    return torch.native_dropout(input, p, True)[0]


@contextmanager
def autocast_in_modules(model: torch.nn.Module, half: torch.dtype | None) -> Iterator[None]:
    """Have torch say that autocast is on while a module of the model runs, forward or again in the
    backward pass of a checkpointed layer; the casts themselves are `Kernels`'.
    """
    depth = 0

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    def is_enabled(device_type: str = "cuda") -> bool:
        return half is not None and depth > 0 and device_type in ("cuda", "meta")

    def dtype_of(device_type: str) -> torch.dtype:
        return half or torch.float32

    with ExitStack() as stack:
        for module in model.modules() if half else ():
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        # Torch has no autocast for meta, and none for CUDA on a machine without it
        stack.enter_context(patch("torch.is_autocast_enabled", is_enabled))
        stack.enter_context(patch("torch.get_autocast_dtype", dtype_of))
        yield


class _Dequantised(torch.autograd.Function):
    """A product with weights that are unpacked to the inputs' dtype first, forward and backward,
    and not kept. Source: bitsandbytes, autograd/_functions.py, MatMul4Bit and MatMul8bitLt.
    """

    @staticmethod
    def forward(ctx: Any, x, weight, bias, keeps_input) -> torch.Tensor:
        unpacked = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
        ctx.save_for_backward(weight, x if keeps_input else None)
        return functional.linear(x, unpacked, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        weight, _ = ctx.saved_tensors
        unpacked = torch.empty(weight.shape, dtype=grads[0].dtype, device=grads[0].device)
        return grads[0] @ unpacked, None, None, None


@functools.cache
def quantised_linear(kind: Literal["nf4", "int8"]) -> type[torch.nn.Linear]:
    """The class of a linear layer that is held in 4 or 8 bits and computes as bitsandbytes' does.

    Where that package is there it is one of its layers, which PEFT adapts by another path.
    """
    try:
        from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

        parent = Linear4bit if kind == "nf4" else Linear8bitLt
    except ImportError:
        parent = torch.nn.Linear

    class Quantised(parent):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            product = _Dequantised.apply(x, self.weight, self.bias, kind == "int8")
            return product  # type: ignore[return-value]

    Quantised.__name__ = parent.__name__
    return Quantised
