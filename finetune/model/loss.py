"""The loss of labels: head and cross-entropy on learnt tokens alone, never more than a chunk of
logits at once.

It takes the place of TRL's fused head, under the same call and with the same output, so that
TRL's own trainer goes on with it. TRL's scores every token where there is no Triton, and multiplies
by the head's weight, past whatever wraps the head; here the head is called as a module. Nothing is
done to the logits: none of the supported models scales or caps them.

Shape letters: B rows, T tokens, N learnt tokens, n of them in a chunk, D width of the language
model, V entries of the vocabulary.
"""

import functools
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from packaging.version import Version
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from trl.trainer.utils import FusedCausalLMOutput

from finetune.data.collate import IGNORED_LABEL
from finetune.errors import ModelError
from finetune.model.adapters import base_of
from finetune.model.quantize import is_quantized

MAX_LOGITS = 2**25
"""Logits of a chunk, at most: 128 MiB in float32.

Of Idefics2's vocabulary 1,048 tokens, of Llama 3's 261: enough for the product with the head to be
bound by arithmetic rather than by reading the weight.
"""

LossKernel = Literal["torch", "liger"]


def choose_loss_kernel(
    model: Any, setting: Literal["auto", "torch", "liger"] = "auto"
) -> LossKernel:
    """What `training.loss_kernel` comes to for an adapted model on this machine.

    Raises `ModelError` where liger is asked for and the head is more than a product with a weight:
    Liger's kernel reads the weight itself, past an adapter or rows of added tokens.
    """
    if setting == "torch":
        return "torch"
    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Linear) and not is_quantized(head):
        is_known = torch.cuda.is_available() and _has_known_liger()
        return "liger" if setting == "liger" or is_known else "torch"
    if setting == "liger":
        raise ModelError(
            "training.loss_kernel: liger multiplies by the weight of lm_head itself, which is "
            f"{type(head).__name__} here, with weights that are trained beside it; set torch"
        )
    return "torch"


def _has_known_liger() -> bool:
    """Whether Liger is installed in a version whose kernel's arguments are known; see
    `_liger_log_prob`.
    """
    try:
        return Version("0.5.10") <= Version(version("liger_kernel")) < Version("0.9")
    except PackageNotFoundError:
        return False


def learn_from_labels(model: Any, kernel: LossKernel = "torch") -> None:
    """Let a model's forward take `fused_lm_head=True` and `label_weights`, in the place of TRL's
    patch of the forward, if that is there; see `score_labels`.

    The class is changed, not the object's method, so that a copy of the model uses its own weights.
    Without `fused_lm_head` the forward is the library's.
    """
    vars(model).pop("forward", None)
    if not hasattr(model, "loss_kernel"):
        model.__class__ = _learning_class(type(model))
    model.loss_kernel = kernel


@functools.cache
def _learning_class(plain: Any) -> type:
    @functools.wraps(plain.forward)  # `generate` checks its arguments against the signature
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, label_weights: Any = None, **kwargs: Any
    ) -> Any:
        if fused_lm_head:
            kernel = self.loss_kernel
            return score_labels(self, *args, label_weights=label_weights, kernel=kernel, **kwargs)
        return plain.forward(self, *args, **kwargs)

    # under its own name, which is saved with the configuration
    return type(plain.__name__, (plain,), {"forward": forward, "__module__": plain.__module__})


def score_labels(
    model: Any,
    *args: Any,
    labels: torch.Tensor,
    label_weights: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    kernel: LossKernel = "torch",
    **kwargs: Any,
) -> FusedCausalLMOutput:
    """How the model predicts every label [B, T] from the tokens before it.

    Figures of the output are [B, T - 1] and zero where nothing is learnt. A token counts as often
    as its entry in `label_weights` [B, T] says, in each of them: `label_mask` holds that number.
    The loss is divided by the sum of these, or by `num_items_in_batch`. Liger's kernel gives the
    sum of all log-probabilities alone, as `log_probs` without dimensions, and of `entropy` and
    `is_top1` zeros.
    """
    hidden_BTD = model.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
    mask = labels[:, 1:] != IGNORED_LABEL
    counts = mask if label_weights is None else mask * label_weights[:, 1:]
    hidden_ND = hidden_BTD[functional.pad(mask, (0, 1))]  # the last token predicts nothing
    targets_N = labels[:, 1:][mask]
    head = model.get_output_embeddings()
    if kernel == "liger" and len(targets_N):
        log_probs = _liger_log_prob(head, hidden_ND, targets_N, counts[mask])
        entropy = is_top1 = torch.zeros_like(log_probs, requires_grad=False)
    else:
        num_rows = rows_of_chunk(model.config.get_text_config().vocab_size)
        log_probs, entropy, is_top1 = (
            # scattered, the sum stays connected to the model where nothing is learnt
            each.new_zeros(mask.shape).masked_scatter(mask, each) * counts
            for each in _score(head, hidden_ND, targets_N, num_rows)
        )
    num_items = counts.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / num_items,
        log_probs=log_probs,
        entropy=entropy,
        is_top1=is_top1,
        label_mask=counts,
    )


@torch.inference_mode()
def sum_losses(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Of each row of a collated batch the loss, in nats and summed, and the number of tokens that
    it is summed over [B, 2].
    """
    model = base_of(model)
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    model.eval()
    output = score_labels(model, **inputs)
    assert output.log_probs is not None
    assert output.label_mask is not None
    return torch.stack([-output.log_probs.sum(dim=1), output.label_mask.sum(dim=1)], dim=1)


def rows_of_chunk(num_entries: int) -> int:
    """Tokens of a chunk, for a vocabulary of so many entries."""
    return max(MAX_LOGITS // num_entries, 1)


def num_learnt(batch: Any) -> torch.Tensor:
    """How many tokens a collated batch learns from, each counted as often as its weight says."""
    mask = batch["labels"][:, 1:] != IGNORED_LABEL
    weights = batch.get("label_weights")
    return mask.float().sum() if weights is None else (mask * weights[:, 1:]).sum()


def _score(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden_ND: torch.Tensor,
    targets_N: torch.Tensor,
    num_rows: int,
) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropies, and whether the target is the likeliest, [N] each."""
    score = functools.partial(_score_chunk, head)
    if len(targets_N) > num_rows:
        # computed again in the backward pass; of a single chunk the logits may as well be kept
        score = functools.partial(checkpoint, score, use_reentrant=False)
    chunks = zip(hidden_ND.split(num_rows), targets_N.split(num_rows), strict=True)
    figures = [score(hidden_nD, targets_n) for hidden_nD, targets_n in chunks]
    return tuple(torch.cat(each) for each in zip(*figures, strict=True))


def _score_chunk(
    head: Callable[[torch.Tensor], torch.Tensor], hidden_nD: torch.Tensor, targets_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen_n, log_probs_nV = _LogProbs.apply(head(hidden_nD), targets_n)  # type: ignore[misc]
    # Last, since a second run stops where the gradients have what they need
    with torch.no_grad():
        entropy_n = -log_probs_nV.exp().mul_(log_probs_nV).sum(dim=-1)
        is_top1_n = (log_probs_nV.argmax(dim=-1) == targets_n).float()
    return chosen_n, entropy_n, is_top1_n


class _LogProbs(torch.autograd.Function):
    """Log-probabilities of the targets, and of all entries without gradient, in float32.

    The gradient is written over the latter: torch's own would hold three times as much.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_nV: torch.Tensor, targets_n: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs_nV = logits_nV.float().log_softmax(dim=-1)
        ctx.dtype = logits_nV.dtype
        ctx.save_for_backward(log_probs_nV, targets_n)
        ctx.mark_non_differentiable(log_probs_nV)
        ctx.set_materialize_grads(False)
        return log_probs_nV.gather(-1, targets_n[:, None])[:, 0], log_probs_nV

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        log_probs_nV, targets_n = ctx.saved_tensors
        gradient_n = grads[0].float()[:, None]
        # d log p_target / d logit_v is 1 for the target, less p_v for every v
        gradient_nV = log_probs_nV.exp_().mul_(-gradient_n)
        gradient_nV.scatter_add_(-1, targets_n[:, None], gradient_n)
        return gradient_nV.to(ctx.dtype), None


def _liger_log_prob(
    head: Any, hidden_ND: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of the targets' log-probabilities, by Liger's kernel.

    Source: liger-kernel 0.5.10 to 0.8.5, ops/fused_linear_cross_entropy.py, which take these
    arguments in this order. The kernel knows no weights of tokens (before 0.8 its gradients with
    `reduction="none"` were those of a sum), so it is called once for each different weight.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import (  # type: ignore[import-not-found]
        LigerFusedLinearCrossEntropyFunction,
    )

    total = torch.zeros((), device=hidden_ND.device)
    for weight in weights_N.unique().tolist():
        same = weights_N == weight
        summed, *_ = LigerFusedLinearCrossEntropyFunction.apply(
            hidden_ND[same],
            head.weight,
            targets_N[same],
            head.bias,
            None,  # weights of the vocabulary's entries
            IGNORED_LABEL,
            0.0,  # of the squared normaliser
            0.0,  # label smoothing
            "sum",
        )
        total = total - weight * summed
    return total
