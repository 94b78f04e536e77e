"""TRL's `SFTTrainer` on our batches: only what changes, each with its reason."""

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints, seed_worker
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune.checkpoints import ASIDE, settle
from finetune.data.collate import IGNORED_LABEL, Collator
from finetune.data.examination import Finding
from finetune.data.packed_views import PackedViews
from finetune.data.sampling import EpochBatches
from finetune.data.sequences import Layout
from finetune.data.streaming import ExampleStream, Position, StreamCollator
from finetune.errors import RunDirError
from finetune.metrics import lower_is_better
from finetune.model.adapters import (
    base_of,
    part_of_weight,
    require_grad_on_language_inputs_only,
)
from finetune.model.compiling import compiled_layers
from finetune.model.lora import add_in_place
from finetune.model.loss import choose_loss_kernel, learn_from_labels, num_learnt
from finetune.model.methods import load_checkpoint, mixes_dtypes
from finetune.model.optimizer import (
    base_rate,
    has_several_rates,
    parameter_groups,
    projected_modules,
)
from finetune.model.vision_cache import WaitForFeatures
from finetune.processes import any_of_all
from finetune.recipe import Recipe, TrainingSection
from finetune.rundir import RunDir, read_json, write_json


class VisionSFTTrainer(SFTTrainer):
    """Trains an instantiated, adapted model on the rows of a `Collator`, known to it by their
    numbers.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        collator: Collator,
        batches: EpochBatches,
        *,
        num_train_rows: int,
        stream: ExampleStream | None = None,
        on_findings: Callable[[list[Finding]], None] = lambda findings: None,
        recipe: Recipe | None = None,
        answer_figures: Callable[[], Mapping[str, float]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        """`num_train_rows` of the collator's rows are trained, the others held out. With a
        `stream` it is trained instead, and `on_findings` is told what was left out of it. The
        `recipe` tells which weights step at which rate; without one all step at that of `args`.
        `answer_figures` gives metrics of answers at every evaluation.
        """
        num_rows = len(collator.rows)
        # The dataset holds row numbers, so that rows stay as they were read and TRL's own
        # preparation (which looks for images in the first row alone, and cuts at max_length) has
        # nothing to prepare.
        held_out = (
            held_out_rows(range(num_train_rows, num_rows), args)
            if num_rows > num_train_rows
            else None
        )
        self.num_samples_seen = 0
        self.seconds_evaluated = 0.0
        self.batches = batches
        self.stream = stream
        self.on_findings = on_findings
        self.num_streamed = {"taken": 0, "trained": 0, "left out": 0}
        self.recipe = recipe
        self.rates: dict[str, float] = {}
        self.step_saw = False
        self._rng_checkpoint: Path | None = None
        self.answer_figures = answer_figures
        self._held_out = torch.zeros(2)  # loss, summed, and learnt tokens
        base = base_of(model)
        if recipe:
            args.optim_target_modules = projected_modules(base, collator.encoder.family, recipe)
        # Before TRL sees the model: it asks for gradients on every embedding as soon as it does
        require_grad_on_language_inputs_only(base)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            # of a stream nothing is known beforehand, so TRL is shown a stand-in
            train_dataset=Dataset.from_dict({"row": [0]})
            if stream
            else trained_rows(num_train_rows),
            eval_dataset=held_out,
            processing_class=collator.encoder.processor,
            callbacks=[*callbacks, WaitForFeatures(base), BeforeTheOptimizer(self)],
        )
        self.loss_kernel = choose_loss_kernel(
            base, recipe.training.loss_kernel if recipe else "auto"
        )
        learn_from_labels(base, self.loss_kernel)  # after TRL put its own fused head there
        add_in_place(base)
        for parameter in self.model.parameters():  # type: ignore[union-attr, operator]
            # TRL makes the adapters of a quantised base bfloat16, in which small steps are lost
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        part_of = part_of_weight(base, collator.encoder.family)
        self.seeing = [
            parameter
            for name, parameter in base.named_parameters()
            if parameter.requires_grad and part_of(name) != "language"
        ]
        if stream:
            stream.rank, stream.num_ranks = self.args.process_index, self.args.world_size
        self.remove_callback(PrinterCallback)  # standard output is for results

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The stock one; where the recipe has several rates, its weights are sorted again."""
        optimizer = super().create_optimizer(model)
        if self.recipe and has_several_rates(self.recipe):
            model = model or self.model
            decayed = self.get_decay_parameter_names(model)
            family = self.data_collator.encoder.family  # type: ignore[union-attr]
            optimizer.param_groups.clear()
            for group in parameter_groups(model, family, self.recipe, decayed):
                optimizer.add_param_group(group)
        return optimizer

    def _get_learning_rate(self) -> float:
        """The first group's, and those of all groups are noted for the log."""
        optimizer: Any = self.optimizer
        groups = optimizer.param_groups if optimizer else []
        self.rates = {group["name"]: float(group["lr"]) for group in groups if "name" in group}
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's, with a rate for every group of weights beside `learning_rate`, where there are
        several, and without the figures that the loss kernel does not give.

        A stream has no epochs: `epoch` is the share of the steps, in a resumed run, too, where the
        stock one counts from anew.
        """
        if self.stream:
            self.state.epoch = self.state.global_step / self.state.max_steps
        if "learning_rate" in logs:
            logs |= {f"learning_rate/{name}": rate for name, rate in self.rates.items()}
        if self.loss_kernel == "liger":
            for figures in self._metrics.values():
                for name in ("entropy", "mean_token_accuracy"):
                    figures.pop(name, None)
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Ours: the stock one takes a whole model's file as it is, in the Hub's layout, and passes
        over the names that do not fit.
        """
        load_checkpoint(model or self.model, Path(resume_from_checkpoint))

    def get_train_dataloader(self) -> DataLoader:
        """Our batches, shared out over processes by accelerate; of a stream, a loader that it
        leaves alone: each process has its own rows already.
        """
        if not self.stream:
            return self._loader_of_batches()
        return DataLoader(
            self.stream,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=StreamCollator(self.stream.encoder),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _loader_of_batches(self) -> DataLoader:
        args, dataset = self.args, self.train_dataset
        loader = DataLoader(
            dataset,  # type: ignore[arg-type]  # has all that is asked of one
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
            ),
        )
        loader = self.accelerator.prepare(loader)
        tell_epoch_to_resumed(loader, self.batches)
        return loader

    def go_on_with_stream(self, checkpoint: Path) -> None:
        """Let every loading process start where it was at the checkpoint; nothing without a stream.

        Raises `RunDirError` where the checkpoint was written by another number of processes, among
        which the rows were shared out otherwise.
        """
        if not self.stream:
            return
        per_rank, rank = max(self.args.dataloader_num_workers, 1), self.args.process_index
        positions, self.num_streamed = read_stream_state(checkpoint, rank)
        num_ranks = len(list(checkpoint.glob("stream-*.json")))
        known = set(range(rank * per_rank, (rank + 1) * per_rank))
        if num_ranks != self.args.world_size or not positions.keys() <= known:
            raise RunDirError(
                f"{checkpoint}: was written with another number of loading or training processes; "
                "resume with the same training.num_workers and as many devices"
            )
        self.stream.positions = positions
        self._rng_checkpoint = checkpoint

    def _take_note(self, told: dict[str, Any], num_trained: int) -> None:
        assert self.stream
        self.stream.positions[told["consumer"]] = Position.from_json(told["position"])
        left_out = sum(finding.kind != "changed" for finding in told["findings"])
        for name, count in (
            ("taken", told["num_taken"]),
            ("trained", num_trained),
            ("left out", left_out),
        ):
            self.num_streamed[name] += count
        self.on_findings(told["findings"])

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
            if self.stream:
                write_stream_state(
                    aside / name, self.stream, self.args.process_index, self.num_streamed
                )
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()
            self._know_the_best(run)
            if is_first:
                self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
                settle(aside / name, run / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise  # not of torch.save's, which words a full disk so
            shutil.rmtree(aside, ignore_errors=True)
            raise RunDirError(
                f"{run / name}: cannot be written ({error}); the checkpoints before it stand: make "
                "room or mend the folder, and go on with --resume"
            ) from error
        finally:
            self.args.output_dir, self.args.save_total_limit = str(run), limit
        if is_first:
            rotate_checkpoints(str(run), limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _know_the_best(self, run: Path) -> None:
        """Where the best checkpoint will be, which the stock method has looked for aside."""
        step = self.state.best_global_step
        best = run / f"checkpoint-{step}"
        if step and (step == self.state.global_step or best.is_dir()):
            self.state.best_model_checkpoint = str(best)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; under `training.compile` with compiled layers, for as long as it lasts."""
        if not (self.recipe and self.recipe.training.compile):
            return super().train(*args, **kwargs)
        model: Any = self.model
        base = base_of(model)
        with compiled_layers(base, self.data_collator.encoder.family):  # type: ignore[union-attr]
            return super().train(*args, **kwargs)

    def settle(self) -> None:
        """Bring the weights to where they are meant: schedule-free optimizers train beside it."""
        if self.optimizer and callable(bring := getattr(self.optimizer, "eval", None)):
            bring()

    def _get_num_items_in_batch(
        self, batch_samples: list[Any], device: torch.device
    ) -> torch.Tensor | None:
        """Learnt tokens of a step's batches on all ranks, by weight; the stock one counts labels.

        A float on every rank, whether or not its batches have weights, since ranks add them up.
        """
        if not batch_samples:
            return None
        count = torch.stack([num_learnt(batch) for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()  # type: ignore[union-attr]
        return count

    def _prepare_input(self, data: Any) -> Any:
        """The stock one, which leaves all but tensors where it is, and our own parts of a batch."""
        if isinstance(data, (Layout, PackedViews)):
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """TRL's, and the samples of this process are counted."""
        layout = inputs.get("layout")
        is_learnt = (inputs["labels"] != IGNORED_LABEL).any(dim=1)  # an idle row is none
        num_rows = layout.num_rows if layout and is_learnt.any() else int(is_learnt.sum())
        if self._rng_checkpoint:
            # the stock one has done so before the stream's loader drew from it
            self._load_rng_state(str(self._rng_checkpoint))
            self._rng_checkpoint = None
        if told := inputs.pop("stream", None):
            self._take_note(told, num_rows)
        self.num_samples_seen += num_rows
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's; in several processes with a path of weight zero to all that is trained besides the
        language model: where a process's batch shows no picture, or no layer asks for them, these
        weights would have no gradient, and all processes wait for it.
        """
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if self.args.world_size == 1 or not self.seeing or not torch.is_grad_enabled():
            return found
        self.step_saw |= "pixel_values" in inputs
        nothing = sum(weight.reshape(-1)[0].float() for weight in self.seeing) * 0.0
        return (found[0] + nothing, *found[1:]) if isinstance(found, tuple) else found + nothing

    def rest_what_saw_nothing(self) -> None:
        """Before a step of the optimizer: where no process has shown a picture, what sees has no
        gradient, as in one process, and not one of zero, with which momentum would move it.
        """
        if self.args.world_size > 1 and not any_of_all(self.step_saw, self.args.device):
            for weight in self.seeing:
                weight.grad = None
        self.step_saw = False

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The stock one; and the loss is summed, of which it gives the mean over a batch."""
        result = super().prediction_step(model, inputs, *args, **kwargs)
        count = num_learnt(inputs).float().cpu()
        assert result[0] is not None
        self._held_out += torch.stack([result[0].float().cpu() * count, count])
        return result

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The stock one, with the loss a token instead of the mean over batches, whatever their
        length, its perplexity, and the metrics of answers.
        """
        self._held_out = torch.zeros(2)
        started = time.perf_counter()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        summed: Any = self.accelerator.reduce(self._held_out.to(self.args.device))
        loss = float(summed[0] / summed[1].clamp(min=1))
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.answer_figures:
            with self.accelerator.autocast():  # as in training
                found |= self.answer_figures()
        assert output.metrics is not None
        self.seconds_evaluated += time.perf_counter() - started
        output.metrics.update({f"{metric_key_prefix}_{name}": each for name, each in found.items()})
        return output

    def _load_best_model(self) -> None:
        """Ours, as for a resumed run."""
        assert self.state.best_model_checkpoint
        load_checkpoint(self.model, Path(self.state.best_model_checkpoint))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL would write an empty card beside every checkpoint; `push` makes one that
        says something.
        """


class BeforeTheOptimizer(TrainerCallback):
    """What the trainer does with the gradients that it has."""

    def __init__(self, trainer: VisionSFTTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last pass of a step."""
        self.trainer.rest_what_saw_nothing()


def trained_rows(count: int) -> Dataset:
    """Row numbers, and after them the idle one, see `EpochBatches.idle_row`."""
    numbers = np.arange(count + 1)
    return Dataset.from_dict({"row": numbers % count, "again": numbers == count})


def held_out_rows(numbers: range, args: SFTConfig) -> Dataset:
    """Row numbers, filled up with the last one `again` until every process has as many batches:
    accelerate would fill up with the first ones, and the loss count them twice.
    """
    all_at_once = args.per_device_eval_batch_size * args.world_size
    num_again = -len(numbers) % all_at_once if args.world_size > 1 else 0
    return Dataset.from_dict(
        {
            "row": [*numbers, *[numbers[-1]] * num_again],
            "again": [False] * len(numbers) + [True] * num_again,
        }
    )


def tell_epoch_to_resumed(loader: DataLoader, batches: EpochBatches) -> None:
    """Let a loader that was shared out over processes know its epoch also once its first batches
    are skipped: accelerate wraps it once more then, and looks for the one that is to be told under
    the name `sampler` alone (data_loader.py, DataLoaderShard.set_epoch).
    """
    if isinstance(loader.batch_sampler, BatchSamplerShard):
        loader.batch_sampler.sampler = batches.sampler


def write_stream_state(
    checkpoint: Path, stream: ExampleStream, rank: int, num_streamed: dict[str, int]
) -> None:
    """How far each loading process of this training process has come."""
    positions = {str(number): p.to_json() for number, p in stream.positions.items()}
    write_json(checkpoint / f"stream-{rank}.json", {"positions": positions, "rows": num_streamed})


def read_stream_state(checkpoint: Path, rank: int) -> tuple[dict[int, Position], dict[str, int]]:
    """What `write_stream_state` wrote: positions by loading process, and rows counted."""
    state = read_json(checkpoint / f"stream-{rank}.json")
    positions = {int(n): Position.from_json(value) for n, value in state["positions"].items()}
    return positions, state["rows"]


def prefetch_factor(training: TrainingSection) -> int | None:
    """Batches that each loading process keeps ready; None without such processes.

    Together they hold all batches of a step, since the trainer takes these before it computes the
    first: of torch's own two a process, the others would be waited for in every step, however fast
    they are loaded.
    """
    if not training.num_workers:
        return None
    return max(2, math.ceil(training.gradient_accumulation / training.num_workers))


def training_arguments(recipe: Recipe, run: RunDir, *, num_eval_rows: int) -> SFTConfig:
    """The recipe's settings under the names of transformers and TRL."""
    training, on_gpu = recipe.training, torch.cuda.is_available()
    # A bfloat16 base on a GPU computes its float32 adapters under autocast; on a CPU autocast gains
    # nothing, unless whole modules are trained: only autocast lets float32 meet the base's dtype
    half = recipe.model.dtype if on_gpu or mixes_dtypes(recipe) else None
    arguments = SFTConfig(
        output_dir=str(run.checkpoints),
        use_cpu=not on_gpu,
        bf16=half == "bfloat16",
        fp16=half == "float16",
        num_train_epochs=training.epochs or 1,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size or 1,  # with budgets it is not asked for
        per_device_eval_batch_size=recipe.evaluation.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=base_rate(recipe),
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup_ratio,  # below 1 it is a share of the steps
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optimizer,
        neftune_noise_alpha=training.neftune_alpha or None,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=training.seed,
        data_seed=training.seed,
        logging_steps=training.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # or a diverged run is logged with a loss of zero
        save_steps=training.save_steps,
        save_total_limit=training.keep_checkpoints,
        ignore_data_skip=any(source.streaming for source in recipe.data.train),  # it skips itself
        eval_strategy="steps" if num_eval_rows else "no",
        eval_steps=recipe.evaluation.every_steps,
        load_best_model_at_end=recipe.evaluation.load_best,
        metric_for_best_model=recipe.evaluation.best_metric,
        greater_is_better=not lower_is_better(recipe.evaluation.best_metric),
        prediction_loss_only=True,  # or TRL keeps the logits of all held-out rows
        dataloader_num_workers=training.num_workers,
        dataloader_prefetch_factor=prefetch_factor(training),
        # never persistent: a loading process knows the epoch, which draws what augmentation
        # changes, from its start alone. Batches are pinned where there is a GPU, by default.
        remove_unused_columns=False,
        # what has no gradient in some batch is given one of zero, see compute_loss
        ddp_find_unused_parameters=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,  # nothing is ever cut; rows over data.max_tokens were dealt with before
        report_to=list(recipe.output.trackers) or "none",
        disable_tqdm=True,  # the progress display is ours
    )
    # One process computes on one card: the library would else share each batch out over all that it
    # sees (DataParallel), which splits tensors and gives every card all views
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
