"""TRL's `SFTTrainer` on our batches: only what changes, each with its reason."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune.data.collate import Collator
from finetune.model.adapters import require_grad_on_language_inputs_only
from finetune.recipe import Recipe
from finetune.rundir import RunDir


class VisionSFTTrainer(SFTTrainer):
    """Trains an instantiated, adapted model on the rows of a `Collator`, known to it by their
    numbers.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        collator: Collator,
        *,
        num_train_rows: int,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        num_rows = len(collator.rows)
        # The dataset holds row numbers, so that rows stay as they were read and TRL's own
        # preparation (which looks for images in the first row alone, and cuts at max_length) has
        # nothing to prepare.
        numbers = Dataset.from_dict({"row": list(range(num_rows))})
        held_out = (
            numbers.select(range(num_train_rows, num_rows)) if num_rows > num_train_rows else None
        )
        self.num_samples_seen = 0
        # Before TRL sees the model: it asks for gradients on every embedding as soon as it does
        require_grad_on_language_inputs_only(model.get_base_model())
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=numbers.select(range(num_train_rows)),
            eval_dataset=held_out,
            processing_class=collator.encoder.processor,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)  # standard output is for results

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """TRL's, and the samples are counted."""
        self.num_samples_seen += len(inputs["input_ids"]) * self.args.world_size
        return super().training_step(model, inputs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL would write an empty card beside every checkpoint; `push` makes one that
        says something.
        """


def training_arguments(recipe: Recipe, run: RunDir, *, num_eval_rows: int) -> SFTConfig:
    """The recipe's settings under the names of transformers and TRL."""
    training, on_gpu = recipe.training, torch.cuda.is_available()
    # A bfloat16 base on a GPU computes its float32 adapters under autocast; on a CPU autocast gains
    # nothing
    half = recipe.model.dtype if on_gpu else None
    return SFTConfig(
        output_dir=str(run.checkpoints),
        use_cpu=not on_gpu,
        bf16=half == "bfloat16",
        fp16=half == "float16",
        num_train_epochs=training.epochs or 1,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=recipe.evaluation.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,  # type: ignore[arg-type]  # mappings are refused before
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup_ratio,  # below 1 it is a share of the steps
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optimizer,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=training.seed,
        data_seed=training.seed,
        logging_steps=training.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # or a diverged run is logged with a loss of zero
        save_steps=training.save_steps,
        save_total_limit=training.keep_checkpoints,
        eval_strategy="steps" if num_eval_rows else "no",
        eval_steps=recipe.evaluation.every_steps,
        prediction_loss_only=True,  # or TRL keeps the logits of all held-out rows
        dataloader_num_workers=training.num_workers,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,  # nothing is ever cut; rows over data.max_tokens were dealt with before
        report_to=list(recipe.output.trackers) or "none",
        disable_tqdm=True,  # the progress display is ours
    )
