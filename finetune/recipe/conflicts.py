"""Which settings of a recipe exclude each other, though each is right alone."""

from collections.abc import Iterator
from typing import Any

from finetune.recipe.fields import PARTS
from finetune.recipe.messages import Problem

# They project the gradients of whole weight matrices, so there is nothing for them in an adapter.
PROJECTING_OPTIMIZERS = ("galore", "apollo")
# Torch's own, which step a share of a weight as they would step all of it.
SHARING_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
# They step inside the backward pass, so that no gradient lives long.
STEPPING_IN_BACKWARD = ("lomo", "adalomo", "layerwise")


def conflicts(recipe: Any) -> Iterator[Problem]:
    """Settings of a `Recipe` that are right one by one but not together."""
    yield from _image_conflicts(recipe)
    yield from _data_conflicts(recipe)
    yield from _adapter_conflicts(recipe)
    yield from _cache_conflicts(recipe)
    yield from _training_conflicts(recipe)
    yield from _evaluation_conflicts(recipe)
    yield from _part_conflicts(recipe)
    yield from _optimizer_conflicts(recipe)
    if recipe.training.distributed not in (None, "ddp") and recipe.adapter.method != "frozen":
        yield from _engine_conflicts(recipe)


def _conflict(text: str, *reads: str) -> Problem:
    """A problem shown at the first of the keys it read."""
    return Problem(tuple(reads[0].split(".")), text, reads)


def _image_conflicts(recipe: Any) -> Iterator[Problem]:
    images, model = recipe.images, recipe.model
    if (
        images.shortest_edge_px
        and images.longest_edge_px
        and images.shortest_edge_px > images.longest_edge_px
    ):
        yield _conflict(
            f"{images.shortest_edge_px} is more than "
            f"images.longest_edge_px: {images.longest_edge_px}",
            "images.shortest_edge_px",
            "images.longest_edge_px",
        )
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield _conflict(
            "flash_attention_2 cannot work in float32; set model.dtype: bfloat16, "
            "or model.attention: sdpa",
            "model.attention",
            "model.dtype",
        )


def _data_conflicts(recipe: Any) -> Iterator[Problem]:
    data = recipe.data
    if data.eval and data.eval_fraction:
        yield _conflict("set either eval or eval_fraction, not both", "data.eval_fraction")
    for part, sources in (("train", data.train), ("eval", data.eval)):
        for number, source in enumerate(sources):
            place = f"data.{part}.{number}"
            if source.columns and source.format not in ("auto", "columns"):
                yield _conflict(
                    f"is for format: columns, and format is {source.format}; leave one out",
                    f"{place}.columns",
                )
            if source.format == "columns" and not source.columns:
                yield _conflict(
                    "needs columns, such as columns: {image: scan, question: q, answer: a}",
                    f"{place}.format",
                )
            if source.columns and not source.columns.question and not source.question:
                yield _conflict(
                    "names no question column; name one, or set question: to ask every row the "
                    "same",
                    f"{place}.columns",
                )
    streamed = [source for source in data.train if source.streaming]
    if not streamed:
        yield from _streamed_eval(recipe)
        return
    if len(streamed) < len(data.train):
        yield _conflict("stream all entries or none: they cannot be mixed", "data.train")
    if data.eval_fraction:
        yield _conflict(
            "needs all rows before training, and streamed ones come later; name data.eval, or "
            "leave streaming out",
            "data.eval_fraction",
        )
    if recipe.training.max_steps is None:
        yield _conflict(
            "streamed rows are not counted beforehand, so an epoch has no known length; set "
            "training.max_steps",
            "training.epochs",
        )
    yield from _streamed_eval(recipe)


def _streamed_eval(recipe: Any) -> Iterator[Problem]:
    for number, source in enumerate(recipe.data.eval):
        if source.streaming:
            yield _conflict(
                "held-out rows are read whole; leave streaming out",
                f"data.eval.{number}.streaming",
            )


def _adapter_conflicts(recipe: Any) -> Iterator[Problem]:
    adapter, quantize = recipe.adapter, recipe.model.quantize
    if quantize != "none" and adapter.method == "full":
        yield _conflict(
            f"full trains the weights themselves, which model.quantize: {quantize} freezes; "
            "set adapter.method: lora, or model.quantize: none",
            "adapter.method",
            "model.quantize",
        )
    if quantize != "none" and adapter.method == "pissa":
        yield _conflict(
            f"pissa splits the exact weights, which model.quantize: {quantize} rounds; "
            "set adapter.method: lora, or model.quantize: none",
            "adapter.method",
            "model.quantize",
        )
    if quantize == "int8" and adapter.method == "dora":
        # bitsandbytes 0.50, autograd/_functions.py, MatMul8bitFp.forward: state.SCB is None
        yield _conflict(
            "dora breaks off at the first step with model.quantize: int8, as bitsandbytes has no "
            "scales for its weights then; set model.quantize: nf4, or adapter.method: lora",
            "adapter.method",
            "model.quantize",
        )
    if adapter.method == "frozen" and not recipe.data.eval and not recipe.data.eval_fraction:
        yield _conflict(
            "frozen trains nothing, and without data.eval there is nothing to judge either; "
            "name held-out rows there, or set adapter.method: lora",
            "adapter.method",
            "data.eval",
            "data.eval_fraction",
        )
    if adapter.method == "full" and adapter.extra_tokens and "language" not in adapter.parts:
        yield _conflict(
            "are rows of the language part, which is not trained; add language to adapter.parts",
            "adapter.extra_tokens",
            "adapter.method",
            "adapter.parts",
        )
    elif (
        adapter.extra_tokens
        and adapter.method != "frozen"
        and isinstance(recipe.training.learning_rate, dict)
        and "language" not in adapter.parts
    ):
        yield _conflict(
            "are rows of the language part, which training.learning_rate has no rate for; give "
            "one rate for all, or add language to adapter.parts",
            "adapter.extra_tokens",
            "training.learning_rate",
            "adapter.parts",
        )
    if (
        "vision" in adapter.parts
        and adapter.method != "frozen"
        and recipe.training.vision_cache != "off"
    ):
        yield _conflict(
            "features of a vision part that is trained change at every step; "
            "set it to off, or leave vision out of adapter.parts",
            "training.vision_cache",
            "adapter.parts",
            "adapter.method",
        )


def _cache_conflicts(recipe: Any) -> Iterator[Problem]:
    if recipe.training.vision_cache == "off":
        return
    if not recipe.model.packed_vision:
        yield _conflict(
            "is for views at their own size; set it to off, or model.packed_vision: true",
            "training.vision_cache",
            "model.packed_vision",
        )
    if recipe.data.random_upscale > 1:
        yield _conflict(
            "features of pictures that data.random_upscale enlarges are never asked for again; "
            "set one of both to off (random_upscale: 1)",
            "training.vision_cache",
            "data.random_upscale",
        )


def _evaluation_conflicts(recipe: Any) -> Iterator[Problem]:
    evaluation, every = recipe.evaluation, recipe.evaluation.every_steps
    chooses = [name for name in ("load_best", "patience") if getattr(evaluation, name)]
    if not chooses:
        return
    key = f"evaluation.{chooses[0]}"
    if not recipe.data.eval and not recipe.data.eval_fraction:
        yield _conflict("needs held-out rows; name data.eval, or set data.eval_fraction", key)
    if evaluation.load_best and recipe.training.save_steps != every:
        yield _conflict(
            f"needs a checkpoint at every evaluation; set training.save_steps: {every}, as "
            "evaluation.every_steps",
            "evaluation.load_best",
            "training.save_steps",
            "evaluation.every_steps",
        )
    best = evaluation.best_metric
    if best == "loss":
        return
    if best not in evaluation.metrics:
        yield _conflict(
            f"{best} is not measured; add it to evaluation.metrics",
            "evaluation.best_metric",
            "evaluation.metrics",
        )
    if not evaluation.rows_in_training:
        yield _conflict(
            f"{best} is of answers, and evaluation.rows_in_training: 0 asks for none; raise it",
            "evaluation.best_metric",
            "evaluation.rows_in_training",
        )


def _training_conflicts(recipe: Any) -> Iterator[Problem]:
    training = recipe.training
    if training.epochs is not None and training.max_steps is not None:
        yield _conflict(
            "set either max_steps or epochs, not both", "training.max_steps", "training.epochs"
        )
    if training.epochs is None and training.max_steps is None:
        yield _conflict("set epochs or max_steps", "training.epochs", "training.max_steps")
    if training.on_oom == "split" and any(source.streaming for source in recipe.data.train):
        yield _conflict(
            "split reads the rows of a batch again, which a stream cannot; set stop",
            "training.on_oom",
            "data.train",
        )
    if training.packing and training.neftune_alpha:
        yield _conflict(
            "the noise of neftune_alpha is scaled by the length of a sequence, which packing "
            "changes; leave one of both out",
            "training.packing",
            "training.neftune_alpha",
        )
    adapter = recipe.adapter
    trains_head = any(name.split(".")[-1] == "lm_head" for name in adapter.modules_to_save)
    if (
        training.loss_kernel == "liger"
        and adapter.method not in ("full", "frozen")
        and (adapter.extra_tokens or trains_head)
    ):
        # choose_loss_kernel refuses what wraps the head in any other way
        yield _conflict(
            "liger multiplies by the weight of lm_head alone, past what PEFT trains beside it for "
            f"adapter.{'extra_tokens' if adapter.extra_tokens else 'modules_to_save'}; set auto "
            "or torch",
            "training.loss_kernel",
            "adapter.extra_tokens",
            "adapter.modules_to_save",
            "adapter.method",
        )
    budgets = ("training.batch_tokens", "training.batch_patches")
    has_budget = training.batch_tokens is not None or training.batch_patches is not None
    if training.batch_size is not None and has_budget:
        yield _conflict(
            "set either batch_size, or batch_tokens and batch_patches, not both",
            "training.batch_size",
            *budgets,
        )
    if training.batch_size is None and not has_budget:
        yield _conflict(
            "set batch_size, or batch_tokens or batch_patches", "training.batch_size", *budgets
        )
    if any(source.streaming for source in recipe.data.train):
        yield from _streamed_batches(training)


def _streamed_batches(training: Any) -> Iterator[Problem]:
    """Budgets, which need to know what every row costs before training."""
    for name in ("batch_tokens", "batch_patches"):
        if getattr(training, name):
            yield _conflict(
                "needs the cost of all rows before training, and streamed ones come later; "
                "set training.batch_size, or leave streaming out",
                f"training.{name}",
                "data.train",
            )


def _engine_conflicts(recipe: Any) -> Iterator[Problem]:
    """What does not go with weights, or an optimizer's state, that processes hold in shares."""
    training, key = recipe.training, "training.distributed"
    name = training.distributed
    if training.optimizer not in SHARING_OPTIMIZERS:
        yield _conflict(
            f"{training.optimizer} steps whole weights, of which {key}: {name} gives it shares; "
            f"set one of {', '.join(SHARING_OPTIMIZERS)}",
            "training.optimizer",
            key,
        )
    if training.compile:
        # accelerate compiles between its checkpointing and its sharding (accelerator.py 1.15,
        # _prepare_fsdp2), and layers compiled beforehand were never tried
        yield _conflict(f"was never tried with {key}: {name}; set false", "training.compile", key)
    if training.on_oom == "split":
        yield _conflict(
            f"split takes more passes than other processes, which wait for it with {key}: {name}; "
            "set stop",
            "training.on_oom",
            key,
        )
    if name.startswith("zero") and training.bad_loss == "skip":
        # accelerate 1.15, utils/deepspeed.py, DeepSpeedEngineWrapper.backward
        yield _conflict(
            "DeepSpeed steps at the end of a backward pass, before a step can be left out; set "
            f"stop, or {key}: fsdp",
            "training.bad_loss",
            key,
        )
    if name == "fsdp":
        yield from _conflicts_of_shares(recipe)


def _conflicts_of_shares(recipe: Any) -> Iterator[Problem]:
    """What does not go with weights in shares."""
    training, key = recipe.training, "training.distributed"
    if recipe.evaluation.rows_in_training and (recipe.data.eval or recipe.data.eval_fraction):
        yield _conflict(
            f"answers need whole weights, which {key}: fsdp has after training alone; set "
            "evaluation.rows_in_training: 0",
            "evaluation.rows_in_training",
            key,
            "data.eval",
            "data.eval_fraction",
        )
    if training.loss_kernel == "liger":
        yield _conflict(
            f"liger reads all of lm_head's weight, of which {key}: fsdp holds a share; set auto or "
            "torch",
            "training.loss_kernel",
            key,
        )
    if recipe.model.quantize == "int8":
        # accelerate 1.15, utils/fsdp_utils.py, fsdp2_prepare_model, knows Params4bit alone
        yield _conflict(
            f"int8 weights lose their scales where {key}: fsdp shares them out; set nf4",
            "model.quantize",
            key,
        )


def _part_conflicts(recipe: Any) -> Iterator[Problem]:
    """Mappings by part that do not name exactly the parts that are trained."""
    adapter, rate = recipe.adapter, recipe.training.learning_rate
    mappings = [("training.learning_rate", "rate", rate)] if adapter.method != "frozen" else []
    if adapter.method not in ("full", "frozen"):
        mappings += [
            ("adapter.rank", "rank", adapter.rank),
            ("adapter.alpha", "alpha", adapter.alpha),
        ]
    for key, what, values in mappings:
        if not isinstance(values, dict):
            continue
        for part in PARTS:
            if part in values and part not in adapter.parts:
                text = (
                    f"names {part}, which is not trained; "
                    f"leave it out, or add {part} to adapter.parts"
                )
            elif part in adapter.parts and part not in values:
                text = (
                    f"has no {what} for {part}, which is trained; add one, or give one {what} "
                    "for all parts"
                )
            else:
                continue
            yield _conflict(text, key, "adapter.parts")


def _optimizer_conflicts(recipe: Any) -> Iterator[Problem]:
    training, method = recipe.training, recipe.adapter.method
    name = training.optimizer
    if method == "frozen":
        return
    projecting = name.startswith(PROJECTING_OPTIMIZERS)
    in_backward = name.endswith(STEPPING_IN_BACKWARD)
    if projecting and method != "full":
        yield _conflict(
            f"{name} makes the training of whole weights cheaper, which adapter.method: {method} "
            "does not do; set adapter.method: full, or training.optimizer: adamw_torch",
            "training.optimizer",
            "adapter.method",
        )
    guards = [
        key
        for key, is_set in (
            ("bad_loss", training.bad_loss == "skip"),
            ("spike_factor", training.spike_factor is not None),
            ("on_oom", training.on_oom == "split"),
        )
        if is_set
    ]
    if in_backward and guards:
        yield _conflict(
            f"{name} steps within the backward pass, before training.{guards[0]} could prevent it; "
            "leave that out, or set training.optimizer: adamw_torch",
            "training.optimizer",
            *(f"training.{key}" for key in guards),
        )
    if in_backward and training.gradient_accumulation > 1:
        yield _conflict(
            f"{name} steps in every backward pass, so it cannot gather gradients; "
            "set training.gradient_accumulation: 1",
            "training.optimizer",
            "training.gradient_accumulation",
        )
    several = isinstance(training.learning_rate, dict) or training.lora_plus_ratio != 1
    if several and (projecting or in_backward):
        yield _conflict(
            f"{name} has one rate for all weights; give one training.learning_rate, "
            "and leave lora_plus_ratio out",
            "training.optimizer",
            "training.learning_rate",
            "training.lora_plus_ratio",
        )
