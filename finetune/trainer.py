"""TRL's `SFTTrainer` on our batches: only what changes, each with its reason."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import seed_worker
from trl.trainer.sft_config import SFTConfig

from finetune.bad_steps import BadSteps
from finetune.data.collate import IGNORED_LABEL, BatchRow, Collator
from finetune.data.examination import Finding
from finetune.data.loaders import loading
from finetune.data.packed_views import PackedViews
from finetune.data.sampling import EpochBatches
from finetune.data.sequences import Layout
from finetune.data.streaming import ExampleStream, StreamCollator
from finetune.errors import ModelError
from finetune.model.adapters import (
    base_of,
    part_of_weight,
    require_grad_on_language_inputs_only,
)
from finetune.model.compiling import compiled_layers
from finetune.model.lora import add_in_place
from finetune.model.loss import choose_loss_kernel, learn_from_labels, num_learnt
from finetune.model.optimizer import (
    has_several_rates,
    parameter_groups,
    projected_modules,
)
from finetune.model.sharding import layers_to_shard
from finetune.model.vision_cache import WaitForFeatures
from finetune.out_of_memory import Halving, out_of_memory, told_apart
from finetune.processes import any_of_all
from finetune.recipe import Recipe
from finetune.row_numbers import held_out_rows, tell_epoch_to_resumed, trained_rows
from finetune.saving import SavingTrainer
from finetune.stream_progress import StreamProgress

FIGURES_A_PASS = ("entropy", "mean_token_accuracy")


class VisionSFTTrainer(SavingTrainer):
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
        bad_steps: BadSteps | None = None,
    ):
        """`num_train_rows` of the collator's rows are trained, the others held out. With a
        `stream` it is trained instead, and `on_findings` is told what was left out of it. The
        `recipe` tells which weights step at which rate; without one all step at that of `args`.
        `answer_figures` gives metrics of answers at every evaluation. `bad_steps` judges every
        step before the optimizer takes it.
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
        splits = recipe and recipe.training.on_oom == "split"
        self.halving = Halving(collator) if splits else None
        self.bad_steps = bad_steps
        self._logged_before_step: tuple[torch.Tensor, dict[str, int]] | None = None
        self._grad_norm: Any = None
        self.seconds_evaluated = 0.0
        self.batches = batches
        self.stream = stream
        self.progress = StreamProgress(stream, on_findings) if stream else None
        self.recipe = recipe
        self.rates: dict[str, float] = {}
        self.step_saw = False
        self.answer_figures = answer_figures
        self._held_out = torch.zeros(2)  # loss, summed, and learnt tokens
        base = base_of(model)
        self.sharded_layers = layers_to_shard(base, collator.encoder.family)
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
            callbacks=[
                *callbacks,
                *([self.progress] if self.progress else []),
                *([bad_steps] if bad_steps else []),
                WaitForFeatures(base),
                BeforeTheOptimizer(self),
            ],
        )
        kernel = recipe.training.loss_kernel if recipe else "auto"
        # liger reads the head's weight itself, of which FSDP leaves each process a share
        self.loss_kernel = choose_loss_kernel(base, "torch" if self.is_fsdp_enabled else kernel)
        learn_from_labels(base, self.loss_kernel)  # after TRL put its own fused head there
        add_in_place(base)
        for parameter in self.model.parameters():  # type: ignore[union-attr, operator]
            # TRL makes the adapters of a quantised base bfloat16, in which small steps are lost
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        part_of = part_of_weight(base, collator.encoder.family)
        # by module and name, as FSDP puts other parameters in their places
        self.seeing = [
            (module, own)
            for name, module in base.named_modules()
            for own, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and part_of(f"{name}.{own}") != "language"
        ]
        if stream:
            stream.rank, stream.num_ranks = self.args.process_index, self.args.world_size
        self.remove_callback(PrinterCallback)  # standard output is for results

    def create_accelerator_and_postprocess(self) -> None:
        """The stock one. FSDP gathers weights layer by layer, in the number format that is computed
        in, and adds up gradients in float32; accelerate would round these, and the loss, too.
        """
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
            plugin: Any = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = self.sharded_layers
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=dtypes.get(self.accelerator.mixed_precision),
                reduce_dtype=torch.float32,
            )

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
        if self.bad_steps and "loss" in logs:
            loss = self.bad_steps.corrected(logs.pop("loss"))
            logs |= {} if loss is None else {"loss": loss}
            if self.bad_steps.num_skipped:
                logs["skipped_steps"] = self.bad_steps.num_skipped
            if self.bad_steps.num_in_a_row:
                logs.pop("grad_norm", None)  # of the step that was left out
        if self.loss_kernel == "liger":
            for figures in self._metrics.values():
                for name in ("entropy", "mean_token_accuracy"):
                    figures.pop(name, None)
        super().log(logs, *args, **kwargs)

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
            **self._loading(),
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The stock one, whose loading processes leave signals alone from their first moment."""
        loader = DataLoader(
            self.eval_dataset if eval_dataset is None else eval_dataset,  # type: ignore[arg-type]
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            **self._loading(),
        )
        return self.accelerator.prepare(loader)

    def _loading(self, seed: Callable[[int], None] | None = None) -> dict[str, Any]:
        """How all loaders load."""
        args = self.args
        return {
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "prefetch_factor": args.dataloader_prefetch_factor,
            **loading(args.dataloader_num_workers, seed),
        }

    def _loader_of_batches(self) -> DataLoader:
        args, dataset = self.args, self.train_dataset
        seed = partial(
            seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
        )
        loader = DataLoader(
            dataset,  # type: ignore[arg-type]  # has all that is asked of one
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            **self._loading(seed),
        )
        loader = self.accelerator.prepare(loader)
        tell_epoch_to_resumed(loader, self.batches)
        return loader

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; under `training.compile` with compiled layers, for as long as it lasts."""
        if not (self.recipe and self.recipe.training.compile):
            return super().train(*args, **kwargs)
        model: Any = self.model
        base = base_of(model)
        with compiled_layers(base, self.data_collator.encoder.family):  # type: ignore[union-attr]
            return super().train(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The stock one; where a stream cannot go on in one process, it ends in all."""
        if not self.progress:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = self.progress.next_batches(epoch_iterator, num_batches, device)
        return batches, self._get_num_items_in_batch(batches, device)

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
        rows = inputs.pop("rows", ())
        layout = inputs.get("layout")
        is_learnt = (inputs["labels"] != IGNORED_LABEL).any(dim=1)  # an idle row is none
        num_rows = layout.num_rows if layout and is_learnt.any() else int(is_learnt.sum())
        if self._rng_checkpoint:
            # the stock one has done so before the stream's loader drew from it
            self._load_rng_state(str(self._rng_checkpoint))
            self._rng_checkpoint = None
        if told := inputs.pop("stream", None):
            assert self.progress
            self.progress.take_note(told, num_rows)
            rows = told["rows"]
        self.num_samples_seen += num_rows
        if self.bad_steps and not self.bad_steps.num_passes:
            self._logged_before_step = self._tr_loss.clone(), self._lengths_of_figures()
        loss = self._pass(rows, partial(super().training_step, model), inputs, *args, **kwargs)
        if self.bad_steps:
            self.bad_steps.take(loss, num_learnt(inputs), rows)
        return loss

    def _pass(
        self,
        rows: Sequence[BatchRow],
        stock: Callable[..., torch.Tensor],
        inputs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Forward and backward. Raises `OutOfMemoryError`, naming the batch, or computes its halves
        then, where the recipe says so.
        """

        def compute(batch: dict[str, Any]) -> torch.Tensor:
            num_tokens, lengths = self._total_train_tokens, self._lengths_of_figures()
            try:
                return stock(batch, *args, **kwargs)
            except RuntimeError:  # of a batch that may be computed again
                self._total_train_tokens = num_tokens
                self._cut_figures(lengths)
                raise

        trained = [p for p in self.model.parameters() if p.requires_grad]  # type: ignore[union-attr]
        step = self.state.global_step + 1
        if self.halving:
            return self.halving.compute(compute, inputs, rows, trained, step)
        with told_apart() as told:
            return compute(inputs)
        raise out_of_memory(step, rows, *told)  # where told_apart kept the error to itself

    def _lengths_of_figures(self) -> dict[str, int]:
        """Of TRL's lists of figures a pass, since the last log."""
        return {name: len(self._metrics["train"].get(name, ())) for name in FIGURES_A_PASS}

    def _cut_figures(self, lengths: Mapping[str, int]) -> None:
        """Forget those that came since; TRL divides by the length, so no list is left empty."""
        for name, length in lengths.items():
            kept = self._metrics["train"].pop(name, [])[:length]
            self._metrics["train"] |= {name: kept} if kept else {}

    @property
    def num_oom_splits(self) -> int:
        """Batches halved by this process."""
        return self.halving.num_splits if self.halving else 0

    def judge_step(self) -> None:
        """Before a step of the optimizer: of a bad one that is left out, neither gradients nor
        figures are kept.
        """
        if not self.bad_steps:
            return
        norm = self._grad_norm
        if norm is not None and hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()  # of shards
        # what a scaler finds in the gradients of float16 it leaves out itself, and scales lower
        found = None if norm is None or self.accelerator.scaler is not None else float(norm)
        if self.bad_steps.judge(self.state.global_step + 1, found, self.args.device):
            return
        for parameter in self.model.parameters():  # type: ignore[union-attr]
            parameter.grad = None
        assert self._logged_before_step is not None
        logged, lengths = self._logged_before_step
        self._tr_loss.copy_(logged)
        self._cut_figures(lengths)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The stock one, and it is kept: from before the gradients were scaled down to
        max_grad_norm, which makes zeros of those whose norm overflows.
        """
        self._grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self._grad_norm

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's; in several processes with a path of weight zero to all that is trained besides the
        language model: where a process's batch shows no picture, or no layer asks for them, these
        weights would have no gradient, and all processes wait for it.
        """
        learns = torch.is_grad_enabled() and self.seeing
        if self.is_deepspeed_enabled and learns and "pixel_values" not in inputs:
            raise ModelError(
                f"step {self.state.global_step + 1}: a batch without a picture, from which what "
                "sees has its gradients in another order than from one with pictures; DeepSpeed "
                "adds up those of all processes in the order that they come, and so of one weight "
                "to another's: set training.distributed: fsdp, or adapter.parts: [language]",
                resume_with=None,
            )
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if self.args.world_size == 1 or not learns:
            return found
        self.step_saw |= "pixel_values" in inputs
        # with FSDP these are whole from the beginning of a pass to its end, see layers_to_shard
        weights = (getattr(module, name) for module, name in self.seeing)
        nothing = sum(weight.reshape(-1)[0].float() for weight in weights) * 0.0
        return (found[0] + nothing, *found[1:]) if isinstance(found, tuple) else found + nothing

    def rest_what_saw_nothing(self) -> None:
        """Before a step of the optimizer: where no process has shown a picture, what sees has no
        gradient, as in one process, and not one of zero, with which momentum would move it.
        """
        if self.args.world_size > 1 and not any_of_all(self.step_saw, self.args.device):
            for module, name in self.seeing:
                getattr(module, name).grad = None
        self.step_saw = False

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The stock one; and the loss is summed, of which it gives the mean over a batch."""
        rows = inputs.pop("rows", ())
        result = None
        with told_apart() as told:
            result = super().prediction_step(model, inputs, *args, **kwargs)
        if result is None:
            raise out_of_memory(self.state.global_step, rows, *told)
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


class BeforeTheOptimizer(TrainerCallback):
    """What the trainer does before its steps, and with the gradients that it has."""

    def __init__(self, trainer: VisionSFTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After all others, which an evaluation needs as they are then."""
        self.trainer.evaluate_as_owed()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last pass of a step."""
        self.trainer.rest_what_saw_nothing()
        self.trainer.judge_step()
