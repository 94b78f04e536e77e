"""A batch that does not fit into the memory: told apart from other errors, named, and halved."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from finetune.data.collate import BatchRow
from finetune.errors import ModelError

# How memory runs out beside torch's own allocator for GPUs
_OTHER_WORDS = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class OutOfMemoryError(ModelError):
    """A batch did not fit, or a single row."""


class AskingOutOfMemoryError(ModelError):
    """Held-out rows did not fit that were to be answered at once; the message says what helps."""


@contextmanager
def told_apart() -> Iterator[list[str]]:
    """Runs the block; where memory ran out in it, the list given has torch's message in it.

    The error itself is let go of, since its traceback would hold on to the tensors that fill the
    memory.
    """
    found: list[str] = []
    try:
        yield found
    except torch.OutOfMemoryError as error:
        found.append(str(error).partition("\n")[0])
    except RuntimeError as error:
        if not any(text in str(error) for text in _OTHER_WORDS):
            raise
        found.append(str(error).rpartition("] ")[2].partition("\n")[0])


def out_of_memory(step: int, rows: Sequence[BatchRow], told: str) -> OutOfMemoryError:
    """The error for a batch at a step: which rows, how many tokens and views."""
    heaviest = sorted(rows, key=lambda row: (-row.num_views, -row.num_tokens))
    listed = [
        f"{row.where} ({row.num_tokens:,} tokens, {row.num_views:,} views)" for row in heaviest
    ]
    tokens, views = (sum(getattr(row, key) for row in rows) for key in ("num_tokens", "num_views"))
    return OutOfMemoryError(
        f"step {step}: out of memory at a batch of {len(rows)} rows, {tokens:,} tokens and "
        f"{views:,} views: {_first(listed)} ({told})"
    )


def out_of_memory_asking(rows: Sequence[tuple[str, int]], told: str) -> AskingOutOfMemoryError:
    """The error for held-out rows that were answered at once: their places and tokens."""
    listed = [f"{where} ({num_tokens:,} tokens)" for where, num_tokens in rows]
    shorter = "horter answers (evaluation.max_new_tokens) take less"
    if len(rows) > 1:
        what = f"{len(rows)} held-out rows were"
        helps = (
            f"Set evaluation.batch_size below {len(rows)}, or evaluation.batch_tokens, with which "
            f"a run may also go on (--resume); s{shorter}, too"
        )
    else:
        what, helps = "a held-out row was", f"S{shorter}, and so do smaller images"
    return AskingOutOfMemoryError(
        f"out of memory while {what} answered: {_first(listed)} ({told}). {helps}",
        resume_with=(f"evaluation.batch_size={len(rows) // 2}",) if len(rows) > 1 else None,
    )


def _first(listed: Sequence[str]) -> str:
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


class Halving:
    """Computes batches; one that the memory does not hold as its two halves, and these again, whose
    losses and gradients add up to the same.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]):
        """`collate` makes a batch of rows' features once more, and names its rows."""
        self.collate = collate
        self.num_splits = 0

    def compute(
        self,
        run: Callable[[dict[str, Any]], torch.Tensor],
        batch: dict[str, Any],
        rows: Sequence[BatchRow],
        parameters: Sequence[torch.nn.Parameter],
        step: int,
    ) -> torch.Tensor:
        """The loss that `run` gives, its gradients in `parameters`. Raises `OutOfMemoryError` for
        a row that does not fit by itself.
        """
        loss, told = apart_from_others(parameters, lambda: run(dict(batch)))
        if loss is not None:
            return loss
        if len(rows) < 2:
            raise out_of_memory(step, rows, told)
        self.num_splits += 1
        middle = len(rows) // 2
        losses = []
        for half in (rows[:middle], rows[middle:]):
            smaller = self.collate([row.feature for row in half])
            smaller.pop("rows")
            losses.append(self.compute(run, smaller, half, parameters, step))
        return losses[0] + losses[1]


def apart_from_others(
    parameters: Sequence[torch.nn.Parameter], compute: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor | None, str]:
    """What `compute` gives, its gradients added to those that are there: all of them, or none
    where memory ran out on the way, with torch's message then.

    It takes the memory of the gradients once more.
    """
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    loss = None
    with told_apart() as found:
        loss = compute()
    for parameter, gradient in zip(parameters, before, strict=True):
        if found or parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None:
            parameter.grad = gradient.add_(parameter.grad)
    if found:
        loss = None
        gc.collect()  # frames of checkpointed layers hold on to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return loss, "".join(found)
