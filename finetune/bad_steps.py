"""Steps whose loss is no number, or a spike: found before the optimizer takes them."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from finetune.data.collate import BatchRow
from finetune.errors import FinetuneError, ModelError
from finetune.processes import is_first, lists_of_all, mean_of_all
from finetune.recipe import TrainingSection
from finetune.recipe.conflicts import STEPPING_IN_BACKWARD
from finetune.rundir import RunDir, append_jsonl, read_json, read_jsonl, write_json, write_jsonl

NUM_REMEMBERED = 50
ENOUGH = 10
"""Steps before which nothing is called a spike."""
MAX_IN_A_ROW = 10
MAX_PAGES = 20
_STATE = "bad_steps.json"


@dataclass(frozen=True)
class BadStep:
    """One step, and the rows that made it so: those of the batches without a number, or of the
    batch with the highest loss; where the loss has a number but its gradient has none, all.
    """

    step: int
    loss: float
    why: str
    rows: tuple[BatchRow, ...]

    def to_json(self) -> dict[str, Any]:
        """As a line of the list."""
        rows = [{k: v for k, v in asdict(row).items() if k != "feature"} for row in self.rows]
        loss = self.loss if math.isfinite(self.loss) else str(self.loss)
        return {"step": self.step, "loss": loss, "why": self.why, "rows": rows}


@dataclass(frozen=True)
class _Pass:
    loss: torch.Tensor  # its part of the step's loss, which is the sum of all passes'
    num_learnt: torch.Tensor
    rows: tuple[BatchRow, ...]


class BadSteps(TrainerCallback):
    """Watches the passes of every step, and judges the step when its gradients are there.

    What it remembers is in the checkpoints, so that a resumed run judges as an unbroken one.
    """

    def __init__(
        self,
        settings: TrainingSection,
        run: RunDir,
        write_page: Callable[[Sequence[BatchRow], Path], None] | None = None,
        tell: Callable[[str], None] = lambda message: None,
        dtype: str = "bfloat16",
    ):
        """`write_page` shows rows in a file; None where they cannot be shown. `tell` is given a
        message for each step that is left out. `dtype` is the model's.
        """
        self.tell = tell
        self.dtype = dtype
        self.settings = settings
        self.folder = run.bad_steps
        self.list = run.bad_steps / "steps.jsonl"
        self.write_page = write_page
        self.losses: deque[float] = deque(maxlen=NUM_REMEMBERED)
        self.num_skipped = 0
        self.num_in_a_row = 0
        self.num_since_log = 0
        self.num_skipped_since_log = 0
        self._passes: list[_Pass] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop what an interrupted run listed past the checkpoint that this one starts from."""
        if is_first() and self.list.is_file():
            kept = [line for line in read_jsonl(self.list) if line["step"] <= state.global_step]
            write_jsonl(self.list, kept)

    def take(self, loss: torch.Tensor, num_learnt: torch.Tensor, rows: Sequence[BatchRow]) -> None:
        """Note a pass: its share of the step's loss, and how many tokens it learnt from."""
        self._passes.append(_Pass(loss.detach(), num_learnt, tuple(rows)))

    @property
    def num_passes(self) -> int:
        """Of the step at hand, so far."""
        return len(self._passes)

    def judge(self, step: int, grad_norm: float | None, device: torch.device) -> bool:
        """Whether the optimizer may take the step that was computed; all processes answer alike.

        `grad_norm` is None where it is not to be looked at: a scaler of float16 does. Raises
        `ModelError` where a bad step stops the run.
        """
        passes, self._passes = self._passes, []
        self.num_since_log += 1
        loss = mean_of_all(float(sum(each.loss.float() for each in passes)), device)
        why = self._why(loss)
        if not why and grad_norm is not None and not math.isfinite(mean_of_all(grad_norm, device)):
            why = "its gradient holds no number"
        if not why:
            self.losses.append(loss)
            self.num_in_a_row = 0
            return True
        found = BadStep(step, loss, why, _blamed(passes, loss))
        self.num_skipped += 1
        self.num_skipped_since_log += 1
        self.num_in_a_row += 1
        told = self._tell(found)
        if self.settings.bad_loss == "stop":
            go_on = "go on with --resume and training.bad_loss=skip, or " if self._can_skip else ""
            raise ModelError(
                f"{told}; {go_on}{self._anew('these rows mended')}",
                resume_with=("training.bad_loss=skip",) if self._can_skip else None,
            )
        if self.num_in_a_row >= MAX_IN_A_ROW:
            raise ModelError(
                f"{told}; it is the {MAX_IN_A_ROW}th in a row: training has diverged; "
                + self._anew(),
                resume_with=None,
            )
        self.tell(f"left out {told}")
        return False

    def _anew(self, *ways: str) -> str:
        """What else helps, none of which a resumed run may change."""
        found = [*ways, "a lower training.learning_rate", "a higher training.warmup_ratio"]
        found += ["model.dtype: float32"] if self.dtype != "float32" else []
        return f"start again with {', '.join(found[:-1])} or {found[-1]}"

    @property
    def _can_skip(self) -> bool:
        """Whether the recipe may say so."""
        within = self.settings.optimizer.endswith(STEPPING_IN_BACKWARD)
        return not within and not (self.settings.distributed or "").startswith("zero")

    def _why(self, loss: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        factor, known = self.settings.spike_factor, len(self.losses)
        if factor is None or known < ENOUGH:
            return ""
        median = statistics.median(self.losses)
        if loss <= factor * median or median == 0:  # of steps that learnt from nothing
            return ""
        return (
            f"the loss is {loss:.4g}, {loss / median:.1f} times the median of the {known} steps "
            f"before (training.spike_factor: {factor:g})"
        )

    def _tell(self, found: BadStep) -> str:
        """List it, show its rows; the message."""
        page, is_shown = self.folder / f"step-{found.step}.html", False
        if is_first():
            append_jsonl(self.list, [found.to_json()])
            if self.write_page and found.rows and self.num_skipped <= MAX_PAGES:
                # a page that cannot be made must not take the place of what is to be told
                with suppress(FinetuneError, OSError):
                    self.write_page(found.rows, page)
                    is_shown = True
        places = [row.where for row in found.rows]
        more = f" and {len(places) - 4} more" if len(places) > 5 else ""
        shown = ", ".join(places[: 4 if more else 5]) + more
        seen = f"; see {page}" if is_shown else ""
        return f"step {found.step}: {found.why}, with {shown or 'no rows'} in the batch{seen}"

    def corrected(self, loss: float) -> float | None:
        """The mean since the last log, of which the stock one counts the steps left out as zero;
        None where all were.
        """
        taken = self.num_since_log - self.num_skipped_since_log
        share = self.num_since_log / taken if taken > 0 else None
        self.num_since_log = self.num_skipped_since_log = 0
        return None if share is None else loss if share == 1 else loss * share

    def write(self, checkpoint: Path) -> None:
        """What is remembered."""
        state = {"losses": list(self.losses), "num_skipped": self.num_skipped}
        write_json(checkpoint / _STATE, state | {"num_in_a_row": self.num_in_a_row})

    def go_on(self, checkpoint: Path) -> None:
        """Remember what was written there; nothing by a version that did not write it."""
        if not (checkpoint / _STATE).is_file():
            return
        state = read_json(checkpoint / _STATE)
        self.losses.extend(state["losses"])
        self.num_skipped, self.num_in_a_row = state["num_skipped"], state["num_in_a_row"]


def _blamed(passes: Sequence[_Pass], loss: float) -> tuple[BatchRow, ...]:
    """The rows of those passes, over all processes."""
    told = [  # its part, and the loss of its tokens, as far as passes of a step can be compared
        (float(each.loss), float(each.loss) / max(float(each.num_learnt), 1), each.rows)
        for each in passes
    ]
    everywhere = lists_of_all(told)
    if not math.isfinite(loss):
        chosen = [rows for share, _, rows in everywhere if not math.isfinite(share)]
    elif everywhere:
        chosen = [max(everywhere, key=lambda each: each[1])[2]]
    else:
        chosen = []
    return tuple(row for rows in chosen for row in rows)
