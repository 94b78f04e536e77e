"""One training step without weights: which tensors are alive when, and what they weigh.

The step itself is run, on tensors of torch's meta device, which have a shape but no values: the
model's own forward, the trainer's own loss, autograd's own backward. What autograd keeps for the
backward pass is thus not a formula of ours but what it does keep. Values are computed beside that
for what comes of the batch alone (ids, masks, pixels), since a model may ask them how many views
are real.

Where a kernel of the real device keeps other things than meta's, `finetune.model.kernels` says so.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import flop_registry

from finetune.errors import ModelError

# Larger results are not computed beside their shapes: no model asks for the values of its attention
# masks, and a padded view's mask has 24 million entries.
_MOST_VALUES = 2**27

aten = torch.ops.aten
_INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
}
# Where a tensor of values or a shape comes of the values of another
_ASKING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.masked_scatter_backward.default,
}


@dataclass
class Traced:
    """What one pass over a batch did. `terms` are the bytes alive at the peak, by `LiveBytes.term`
    of the moment at which they came to be.
    """

    peak_bytes: int = 0
    terms: Mapping[str, int] = field(default_factory=dict)
    peak_phase: str = ""
    flops: int = 0


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every meta tensor that comes to be while it is entered, until it is let
    go of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.term = "workspace"
        self.phase = ""
        self.live: Counter[str] = Counter()
        self.traced = Traced()
        self._known: dict[int, tuple[str, int]] = {}
        self._values: dict[int, torch.UntypedStorage] = {}

    def hold(self, tensor: torch.Tensor, term: str, *, num_bytes: int | None = None) -> None:
        """Count a tensor that was there before, or move it to another term."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            old, size = self._known[key]
            self.live[old] -= size
            self.live[term] += size
            self._known[key] = (term, size)
            return
        self._count(storage, term, storage.nbytes() if num_bytes is None else num_bytes)

    def give_values(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Let a meta tensor be asked for its values."""
        assert tensor.shape == values.shape
        same = torch.empty_strided(tensor.shape, tensor.stride(), dtype=values.dtype, device="cpu")
        same.copy_(values)
        storage = tensor.untyped_storage()
        self._values[storage._cdata] = same.untyped_storage()
        # another storage may come to stand at the same address
        weakref.finalize(storage, _let_go_of_values, weakref.ref(self), storage._cdata)

    @contextmanager
    def of_term(self, term: str) -> Iterator[None]:
        """What comes to be meanwhile is counted under this term."""
        before, self.term = self.term, term
        try:
            yield
        finally:
            self.term = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _INDEXING:
            args = (args[0], self._numbered(args[1]), *args[2:])
        out = self._run(func, args, kwargs)
        if formula := flop_registry.get(func._overloadpacket):
            self.traced.flops += formula(*args, **kwargs, out_val=out)
        for tensor in _tensors_in((out,)):
            if tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._count(storage, self.term, storage.nbytes())
        return out

    def _count(self, storage: torch.UntypedStorage, term: str, num_bytes: int) -> None:
        key = storage._cdata
        self._known[key] = (term, num_bytes)
        # held weakly, or every storage would hold the counter and the model with it
        weakref.finalize(storage, _let_go, weakref.ref(self), key)
        self.live[term] += num_bytes
        total = self.live.total()
        if total > self.traced.peak_bytes:
            self.traced.peak_bytes = total
            self.traced.terms = dict(self.live)
            self.traced.peak_phase = self.phase

    def _forget(self, key: int) -> None:
        term, size = self._known.pop(key)
        self.live[term] -= size

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operation on shapes, and on values where all that goes into it has some."""
        tensors = list(_tensors_in((*args, *kwargs.values())))  # some are written to, as `out`
        values = [self.values_of(tensor) for tensor in tensors]
        to_cpu = torch.device(kwargs.get("device") or "meta").type == "cpu"
        if func is aten._to_copy.default and to_cpu and tensors[0].is_meta:
            return func(self._asked(values[0], func), **kwargs)
        if tensors and tensors[0].is_meta and func in _ASKING:
            return self._answer(func, args, tensors[0], values)
        if any(value is None for value in values):
            return _shaped(func, args, kwargs, tensors)
        out = func(*args, **kwargs)
        if not (tensors or "device" in kwargs):
            return out
        outs = [each for each in tree_flatten(out)[0] if isinstance(each, torch.Tensor)]
        is_new = [
            each.is_meta and each.untyped_storage()._cdata not in self._known for each in outs
        ]
        is_in_place = func._schema.is_mutable
        if not (any(is_new) or is_in_place):
            return out
        if any(each.numel() > (_MOST_VALUES if tensors else _most_made(each)) for each in outs):
            return out
        flat, spec = tree_flatten((args, kwargs))
        known = iter(values)
        real = [next(known) if isinstance(each, torch.Tensor) else each for each in flat]
        real_args, real_kwargs = tree_unflatten(real, spec)
        if "device" in kwargs:
            real_kwargs["device"] = "cpu"
        real_out = func(*real_args, **real_kwargs)
        reals = [each for each in tree_flatten(real_out)[0] if isinstance(each, torch.Tensor)]
        for meta, new, each in zip(outs, is_new, reals, strict=True):
            if new:
                self.give_values(meta, each)
        return out

    def _answer(self, func: Any, args: Any, first: torch.Tensor, values: list[Any]) -> Any:
        """Operations whose result, or its shape, depends on values."""
        if func is aten._local_scalar_dense.default:
            return self._asked(values[0], func).item()
        if func is aten.nonzero.default:
            return self._with_values(self._asked(values[0], func).nonzero())
        if func is aten.masked_select.default:
            return first.new_empty(int(self._asked(values[1], func).sum()))
        if func is aten.masked_scatter_backward.default:
            return first.new_empty(args[2])
        raise AssertionError(func)

    def values_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The values of a tensor, or None where they depend on weights."""
        if not tensor.is_meta:
            return tensor
        storage = self._values.get(tensor.untyped_storage()._cdata)
        if storage is None:
            return None
        empty = torch.empty(0, dtype=tensor.dtype, device="cpu")
        return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]

    def _with_values(self, values: torch.Tensor) -> torch.Tensor:
        tensor = torch.empty(values.shape, dtype=values.dtype, device="meta")
        self.give_values(tensor, values)
        return tensor

    def _numbered(self, indices: Any) -> list[Any]:
        """Boolean masks as the numbers of what they choose, which have a shape."""
        numbered: list[Any] = []
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8) and index.is_meta:
                chosen = self._asked(self.values_of(index), "index").nonzero(as_tuple=True)
                numbered += [self._with_values(numbers) for numbers in chosen]
            else:
                numbered.append(index)
        return numbered

    @staticmethod
    def _asked(values: torch.Tensor | None, what: Any) -> torch.Tensor:
        if values is None:
            raise ModelError(
                f"the model's forward asks for values that depend on its weights ({what}), so its "
                "memory cannot be planned without them; train a few steps and look at summary.json"
            )
        return values


_Shape = tuple[torch.Size, tuple[int, ...], torch.dtype]
_shapes: dict[tuple[Any, ...], list[_Shape] | None] = {}


def _shaped(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
    """`func` on meta tensors, whose answer to the same shapes is remembered: a model's layers ask
    the same thirty times, and torch works most shapes out in Python.
    """
    key = (func, *map(_as_key, args), *((name, _as_key(x)) for name, x in kwargs.items()))
    known = _shapes.get(key)
    if known:
        outs = [torch.empty_strided(*each[:2], dtype=each[2], device="meta") for each in known]
        return outs[0] if len(outs) == 1 else tuple(outs)
    out = func(*args, **kwargs)
    if key not in _shapes:
        outs = list(out) if isinstance(out, tuple) else [out]
        own = {each.untyped_storage()._cdata for each in tensors}
        is_fresh = all(
            isinstance(each, torch.Tensor)
            and each.is_meta
            and each.storage_offset() == 0
            and each.untyped_storage()._cdata not in own
            for each in outs
        )
        _shapes[key] = [(x.shape, x.stride(), x.dtype) for x in outs] if is_fresh else None
    return out


def _as_key(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # of a number on the CPU among meta tensors only the kind matters
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, (list, tuple)):
        return tuple(map(_as_key, value))
    return type(value), value


def _tensors_in(args: Any) -> Iterator[torch.Tensor]:
    """An operation's tensors, in their order: its arguments are flat, or hold lists of them."""
    for each in args:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, (list, tuple)):
            yield from _tensors_in(each)


def _most_made(tensor: torch.Tensor) -> int:
    """How many values of a tensor that is made of nothing may matter: positions, lengths, masks,
    rather than room for numbers.
    """
    return 2**16 if tensor.is_floating_point() else 2**24


def _let_go(counter: "weakref.ref[LiveBytes]", key: int) -> None:
    if (alive := counter()) is not None:
        alive._forget(key)


def _let_go_of_values(counter: "weakref.ref[LiveBytes]", key: int) -> None:
    if (alive := counter()) is not None:
        alive._values.pop(key, None)


@contextmanager
def counted_by_module(
    live: LiveBytes,
    model: torch.nn.Module,
    term_of: Callable[[str], str | None],
    again: Callable[[], AbstractContextManager[Any]],
) -> Iterator[None]:
    """Meanwhile, count tensors under the term of the module that is running, by the module's name;
    of several within each other, of the deepest that has a term.

    Checkpointed layers run a second time, in the backward pass, and then within `again`.
    """
    before: list[str] = []
    with ExitStack() as stack:

        def follow(module: Any, term: str) -> None:
            def enter(*_: Any) -> None:
                before.append(live.term)
                live.term = term

            def leave(*_: Any) -> None:
                live.term = before.pop()

            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            # always: the second run of a layer stops by an exception where nothing more is needed
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            if getattr(module, "gradient_checkpointing", False):
                checkpoint = module._gradient_checkpointing_func
                module._gradient_checkpointing_func = partial(checkpointed, checkpoint, term)
                stack.callback(setattr, module, "_gradient_checkpointing_func", checkpoint)

        def checkpointed(
            checkpoint: Callable[..., Any], term: str, forward: Callable[..., Any], *args: Any
        ) -> Any:
            # a layer's own hooks stand outside of what runs again
            def run(*inputs: Any) -> Any:
                if live.phase == "forward":
                    return forward(*inputs)
                with live.of_term(term), again():
                    return forward(*inputs)

            return checkpoint(run, *args)

        for name, module in model.named_modules():
            if term := term_of(name):
                follow(module, term)
        yield
