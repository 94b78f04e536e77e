"""A recipe's training settings under the names of transformers and TRL."""

import math

import torch
from trl.trainer.sft_config import SFTConfig

from finetune.metrics import lower_is_better
from finetune.model.methods import mixes_dtypes
from finetune.model.optimizer import base_rate
from finetune.processes import engine
from finetune.recipe import Recipe, TrainingSection
from finetune.rundir import RunDir


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
        # or every card adds up the gradients of all weights, whole, until a step's last pass
        accelerator_config={
            "gradient_accumulation_kwargs": {"sync_each_batch": engine() == "fsdp"}
        },
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,  # nothing is ever cut; rows over data.max_tokens were dealt with before
        report_to=list(recipe.output.trackers) or "none",
        disable_tqdm=True,  # the progress display is ours
    )
    # One process computes on one card: the library would else share each batch out over all that it
    # sees (DataParallel), which splits tensors and gives every card all views
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
