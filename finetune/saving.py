"""TRL's `SFTTrainer`, whose checkpoints are whole or not there."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints
from trl.trainer.sft_trainer import SFTTrainer

from finetune.bad_steps import BadSteps
from finetune.callbacks import LeftEvaluationError, StopOnSignal
from finetune.checkpoints import ASIDE, settle
from finetune.errors import RunDirError
from finetune.model.methods import load_checkpoint
from finetune.model.sharding import whole_weights
from finetune.processes import as_the_first_finds
from finetune.resuming import refuse_damaged_weights
from finetune.stream_progress import StreamProgress

TORCH_SAVES = ("PytorchStreamWriter", "inline_container.cc")
"""In the words of torch.save where a file cannot be written on."""


class StepsAreOverError(Exception):
    """A resumed run had an evaluation left to make, and no step."""


class SavingTrainer(SFTTrainer):
    """Writes what a run has come to, and takes it up again."""

    progress: StreamProgress | None = None
    bad_steps: BadSteps | None = None
    _rng_checkpoint: Path | None = None
    _owes_evaluation_of: Path | None = None
    _random_after_evaluation: tuple[Any, ...] | None = None

    def go_on_from(self, checkpoint: Path, *, owes_evaluation: bool = False) -> None:
        """Know again what is no part of the stock trainer's state at a checkpoint."""
        if owes_evaluation:
            self._owes_evaluation_of = checkpoint
        if self.bad_steps:
            self.bad_steps.go_on(checkpoint)
        if self.progress:
            self.progress.go_on(checkpoint, max(self.args.dataloader_num_workers, 1))
            self._rng_checkpoint = checkpoint

    def evaluate_as_owed(self) -> None:
        """Before the first step of a resumed run: the evaluation that a signal has ended, with the
        random numbers that it began with.

        Raises `StepsAreOverError` where no step comes after it.
        """
        checkpoint, self._owes_evaluation_of = self._owes_evaluation_of, None
        if not checkpoint:
            return
        self._load_rng_state(str(checkpoint))
        try:
            metrics = self._evaluate(None, None)
        except LeftEvaluationError as error:  # the checkpoint stands
            raise StepsAreOverError from error
        self._determine_best_metric(metrics, None)
        self._know_the_best(checkpoint.parent)
        self._random_after_evaluation = _random_states()
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            raise StepsAreOverError

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The stock one, or what an evaluation since the checkpoint has left."""
        if self._random_after_evaluation:
            _set_random_states(self._random_after_evaluation)
        else:
            super()._load_rng_state(checkpoint)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The stock one; where one checkpoint is kept it would delete the last for the best, and a
        stopped run goes on from the last.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def end_without_steps(self) -> None:
        """What the stock method does after the last one."""
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """The stock one; when a signal ends the evaluation, a checkpoint is written as if it had
        come before.
        """
        evaluates = self.control.should_evaluate
        before = _random_states() if evaluates else ()
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except LeftEvaluationError:
            _set_random_states(before)
            self.control.should_evaluate = False
            self.control.should_log = self.control.should_save = True
            self.control.should_training_stop = True
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The stock one, written aside and renamed when it is whole, with what a stream needs to go
        on; older ones are deleted after that.

        Raises `RunDirError` where it cannot be written; those before it stand.
        """
        self.settle()
        run, name = Path(str(self.args.output_dir)), f"checkpoint-{self.state.global_step}"
        aside, is_first = run / ASIDE, self.is_world_process_zero()
        if is_first:
            shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
        self.accelerator.wait_for_everyone()
        limit = self.args.save_total_limit
        try:
            self.args.output_dir, self.args.save_total_limit = str(aside), None
            (aside / name).mkdir(parents=True, exist_ok=True)
            if self.progress:
                self.progress.write(aside / name)
            if self.bad_steps and is_first:
                self.bad_steps.write(aside / name)
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()
            self._know_the_best(run)
            if is_first:
                self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
                settle(aside / name, run / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and not any(w in str(error) for w in TORCH_SAVES):
                raise
            if is_first:  # another may fail while the first still writes there
                shutil.rmtree(aside, ignore_errors=True)
            raise RunDirError(
                f"{run / name}: cannot be written ({error}); the checkpoints before it stand: make "
                "room or mend the folder, and go on with --resume"
            ) from error
        finally:
            self.args.output_dir, self.args.save_total_limit = str(run), limit
        # the checkpoint from before a bad step may be the last good one
        if is_first and not (self.bad_steps and self.bad_steps.num_in_a_row):
            rotate_checkpoints(str(run), limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The stock one; in shares it would gather the frozen weights, too, and of DeepSpeed the
        rounded ones.
        """
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            super().save_model(output_dir, _internal_call)
            return
        assert isinstance(self.model, torch.nn.Module)
        self._save(output_dir, state_dict=whole_weights(self.model))

    def _know_the_best(self, run: Path) -> None:
        """Where the best checkpoint will be, which the stock method has looked for aside; nowhere
        if it was removed.
        """
        step = self.state.best_global_step
        best = run / f"checkpoint-{step}"
        is_there = step and (step == self.state.global_step or as_the_first_finds(best.is_dir))
        self.state.best_model_checkpoint = str(best) if is_there else None

    def settle(self) -> None:
        """Bring the weights to where they are meant: schedule-free optimizers train beside it."""
        if self.optimizer and callable(bring := getattr(self.optimizer, "eval", None)):
            bring()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Ours: the stock one takes a whole model's file as it is, in the Hub's layout, and passes
        over the names that do not fit.
        """
        load_checkpoint(model or self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Ours, as for a resumed run; none where a signal ends the run, which has little time, and
        is to go on. Raises `RunDirError` where the checkpoint is damaged.
        """
        callbacks = self.callback_handler.callbacks
        if any(isinstance(each, StopOnSignal) and each.exit_code is not None for each in callbacks):
            return
        assert self.state.best_model_checkpoint
        best = Path(self.state.best_model_checkpoint)
        refuse_damaged_weights(best)
        load_checkpoint(self.model, best)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL would write an empty card beside every checkpoint; `push` makes one that
        says something.
        """


def _random_states() -> tuple[Any, ...]:
    """Of all that a checkpoint holds as well."""
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpu


def _set_random_states(states: tuple[Any, ...]) -> None:
    python, numpy, on_cpu, on_gpu = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(on_cpu)
    if on_gpu:
        torch.cuda.set_rng_state_all(on_gpu)
