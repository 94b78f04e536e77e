"""What happens beside the training steps: the metrics file, the progress display, the stop on a
signal.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from finetune.environment import peak_memory_gib
from finetune.metrics import title_of
from finetune.processes import (
    any_of_all,
    is_first,
    is_of_a_lost_process,
    process,
    sum_of_all,
    wait_for_all,
)
from finetune.recipe import METRICS, EvaluationSection
from finetune.resuming import out_of_patience
from finetune.rundir import RunDir, read_jsonl, write_jsonl
from finetune.stopping import INTERRUPTED, RESUME_ME, STOPS


class MetricsFile(TrainerCallback):
    """Appends a line to metrics.jsonl at every log, with the samples since the run began and the
    seconds that they took, evaluations left out.

    On resume, lines after the checkpoint's step are taken out, and the counts go on from the last
    one kept.
    """

    def __init__(self, run: RunDir):
        self.run = run
        self.trainer: Any = None  # set once the trainer exists; it counts the samples
        self._started = 0.0
        self._last = {"seconds": 0.0, "samples": 0}
        self._samples_before = 0  # the process began, in the run
        self._oom_splits_before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, and drop what an interrupted run wrote past the checkpoint that this one
        starts from.
        """
        kept = [line for line in read_jsonl(self.run.metrics) if line["step"] <= state.global_step]
        wait_for_all()  # all read before one writes
        if is_first():
            write_jsonl(self.run.metrics, kept)
        self._last = next((line for line in reversed(kept) if "samples" in line), self._last)
        self._samples_before = self._last["samples"]
        self._oom_splits_before = self._last.get("oom_splits", 0)
        self.trainer._total_train_tokens = self._last.get("num_tokens", 0)  # TRL's, from anew
        self._started = time.perf_counter() - self._last["seconds"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log every step that a checkpoint or the end follows: what came since the last line would
        otherwise be missing from the next one of a resumed run, or altogether.
        """
        saves = state.global_step % max(1, round(state.save_steps)) == 0
        if saves or control.should_training_stop or state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """A line for a logging step (`loss`, or only `skipped_steps` where all were) or an
        evaluation (`eval_loss`); the closing summary is not one.
        """
        if not logs or not {"loss", "skipped_steps", "eval_loss"} & logs.keys():
            return
        line = {"step": state.global_step, **logs}
        if "eval_loss" not in logs:
            seconds = time.perf_counter() - self._started - self.trainer.seconds_evaluated
            seen = sum_of_all(self.trainer.num_samples_seen, args.device)
            samples = self._samples_before + seen
            elapsed = seconds - self._last["seconds"]
            line |= {
                "seconds": round(seconds, 3),
                "samples": samples,
                "samples_per_second": round((samples - self._last["samples"]) / elapsed, 3),
                "peak_memory_gib": round(peak_memory_gib(), 3),
            }
            if splits := self._oom_splits_before + self.trainer.num_oom_splits:
                line["oom_splits"] = splits
            self._last = line
        if not is_first():
            return
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class ProgressDisplay(TrainerCallback):
    """A bar with the loss on a terminal; elsewhere a line a logging step, so that a log file stays
    readable.
    """

    def __init__(self, console: Console):
        self.console = console
        self.loss = float("nan")
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        self.bar.start()
        self.task = self.bar.add_task(
            "", total=state.max_steps, completed=state.global_step, loss=self.loss
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=state.global_step, loss=self.loss)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Take the loss into the bar, or print it."""
        logs = logs or {}
        self.loss = logs.get("loss", self.loss)
        if self.console.is_terminal:
            return
        shown = {
            "loss": "loss {:.4f}",
            "learning_rate": "learning rate {:.2e}",
            "eval_loss": "held-out loss {:.4f}",
        }
        words = [text.format(float(logs[key])) for key, text in shown.items() if key in logs]
        words += [
            f"{title_of(name)} {logs[f'eval_{name}']:.3f}"
            for name in METRICS
            if f"eval_{name}" in logs
        ]
        if words:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {'  '.join(words)}")

    def close(self) -> None:
        """Leave the bar standing, and give the cursor back."""
        self.bar.stop()


class Patience(TrainerCallback):
    """Evaluates at the last step, too, and ends a run that gets no better, as the recipe says."""

    def __init__(self, settings: EvaluationSection, console: Console):
        self.settings = settings
        self.console = console

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for an evaluation of the last weights, or they could not be the best; and have the
        steps logged before one with which the run may end.
        """
        chooses = self.settings.load_best or self.settings.patience
        if chooses and state.global_step >= state.max_steps:
            control.should_evaluate = True
        if self.settings.patience and control.should_evaluate:
            control.should_log = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the evaluations since the best, which a checkpoint's log holds as well."""
        if out_of_patience(state.log_history, self.settings):
            self.console.print(
                f"stopping at step {state.global_step}: no better {self.settings.best_metric} in "
                f"{self.settings.patience} evaluations"
            )
            control.should_training_stop = True


class LeftEvaluationError(Exception):
    """An evaluation between steps is left, in all processes at the same place."""


class StopOnSignal(TrainerCallback):
    """SIGINT, SIGTERM and SIGUSR1 end a run after the step at hand, or within an evaluation, with a
    checkpoint; before and after the steps at once. So does a second SIGINT.

    The signals are taken over for as long as it is entered.
    """

    def __init__(self, console: Console):
        self.console = console
        self.exit_code: int | None = None
        """What the signal that came asks for."""
        self.signal_name = ""
        self._in_steps = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        for number in STOPS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if self.exit_code is not None and is_of_a_lost_process(error):
            # One has ended, and the signal was the launcher's, which ends them all: why, that one
            # has said
            os._exit(self.exit_code)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From now on there is something to save."""
        self._in_steps = True
        self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        if not self._in_steps:
            self.console.print(f"stopped by {self.signal_name}; go on with --resume")
            raise SystemExit(RESUME_ME)
        self.exit_code = INTERRUPTED if number == signal.SIGINT else RESUME_ME
        again = " (again: stop at once)" if number == signal.SIGINT else ""
        if again:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        after = "once all processes have taken this step" if process()[1] > 1 else "after this step"
        self.console.print(f"stopping {after} and saving a checkpoint{again}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the trainer for a checkpoint and the end, in every process where one was told; an
        evaluation, which would come first, is left to the resumed run.
        """
        if self._is_told(args):
            control.should_log = True
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After every batch of an evaluation; raise `LeftEvaluationError` where one was told."""
        if self._is_told(args):
            raise LeftEvaluationError

    def _is_told(self, args: Any) -> bool:
        """All processes have to ask."""
        if not any_of_all(self.exit_code is not None, args.device):
            return False
        if self.exit_code is None:
            self.exit_code, self.signal_name = RESUME_ME, "a signal to another process"
        return True

    @contextmanager
    def answering(self, model: torch.nn.Module) -> Iterator[None]:
        """While a model answers in an evaluation: raise `LeftEvaluationError` before its next token
        once a signal has come. Not in several processes, which end with their answers at different
        times, and then wait for each other.
        """

        def leave(*_: Any) -> None:
            if self.exit_code is not None and process()[1] == 1:
                raise LeftEvaluationError

        hook = model.register_forward_pre_hook(leave)
        try:
            yield
        finally:
            hook.remove()

    def steps_are_over(self) -> None:
        """Ctrl-C, and the other signals, end the run at once again."""
        self._in_steps = False
        if signal.SIGINT in self._previous:
            signal.signal(
                signal.SIGINT, self._previous.pop(signal.SIGINT) or signal.default_int_handler
            )
