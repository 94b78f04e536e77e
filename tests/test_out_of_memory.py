"""Batches that the memory does not hold: named, or halved with the same result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from finetune import asking, evaluate
from finetune.data.collate import BatchRow
from finetune.errors import ModelError, RecipeError
from finetune.out_of_memory import apart_from_others, out_of_memory, told_apart
from finetune.planning import Planner, needed_bytes
from finetune.recipe import load_recipe
from finetune.requirements import refuse_what_cannot_run
from finetune.rundir import RunDir, read_jsonl
from finetune.train import train
from finetune.training import what_helps


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`small_memory(n)`: the backward pass of more than n learnt rows runs out of memory, after it
    has computed gradients.
    """
    from finetune.trainer import VisionSFTTrainer

    stock = VisionSFTTrainer.compute_loss

    def limit(num_rows: int) -> None:
        def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() or len(inputs["input_ids"]) <= num_rows:
                return stock(self, model, inputs, *args, **kwargs)
            # of the language model's second layer: those behind it have gradients by then
            layer = next(m for n, m in model.named_modules() if n.endswith("text_model.layers.1"))
            hook = layer.register_forward_hook(lambda module, args, out: _Full.apply(out))
            try:
                return stock(self, model, inputs, *args, **kwargs)
            finally:
                hook.remove()

        monkeypatch.setattr(VisionSFTTrainer, "compute_loss", compute_loss)

    return limit


class _Full(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words")


def settings(**training: Any) -> dict[str, Any]:
    return {
        "max_steps": 3,
        "batch_size": 4,
        "gradient_accumulation": 2,
        "save_steps": 100,
        **training,
    }


def test_halves_train_as_the_whole_batch(
    dataset: Callable[..., Path], tmp_path: Path, small_memory: Callable[..., None]
) -> None:
    """Against a run with memory enough: losses, norms of the gradient, weights."""
    keys = settings(on_oom="split", share_images="off")
    recipe = str(dataset(num_train=16, num_eval=0, training=keys, adapter={"dropout": 0.0}))
    runs = [RunDir(tmp_path / name) for name in ("enough", "little")]
    for run in runs:
        assert train(load_recipe(recipe, [f"output.dir={run.path}"])) == 0
        small_memory(1)
    logged = [[json.loads(line) for line in run.metrics.read_text().splitlines()] for run in runs]
    for whole, halved in zip(*logged, strict=True):
        for key in ("loss", "grad_norm"):
            assert halved[key] == pytest.approx(whole[key], rel=1e-4), key
        assert halved["num_tokens"] == whole["num_tokens"]
        assert halved["entropy"] == pytest.approx(whole["entropy"], rel=0.2)  # means of passes
        assert halved["samples"] == whole["samples"]
        assert "oom_splits" not in whole
    # of 4 rows: into 2 and 2, and each of these into 1 and 1; two passes a step, three steps
    assert [line["oom_splits"] for line in logged[1]] == [6, 12, 18]
    assert json.loads(runs[1].summary.read_text())["num_oom_splits"] == 18
    name = "adapter_model.safetensors"
    whole, halved = (load_file(run.adapter / name) for run in runs)
    for key, weight in whole.items():
        torch.testing.assert_close(halved[key], weight, rtol=1e-3, atol=2e-5)


def test_a_batch_that_does_not_fit_is_named_with_its_views_and_tokens(
    dataset: Callable[..., Path], small_memory: Callable[..., None]
) -> None:
    recipe = str(dataset(num_eval=0, training=settings()))
    small_memory(1)
    with pytest.raises(ModelError) as error:
        train(load_recipe(recipe))
    message = str(error.value)
    assert "step 1: out of memory at a batch of 4 rows, " in message
    assert "4 views: " in message
    assert "train.jsonl:" in message
    assert "CUDA out of memory. Tried to allocate 2.00 GiB." in message
    assert "training.on_oom: split" in message


@pytest.fixture
def no_room_to_answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`no_room_to_answer(n)`: more than n held-out rows answered at once run out of memory."""
    stock = asking.generate_answers

    def limit(num_rows: int) -> None:
        def generate_answers(*args: Any, batch_size: int, **kwargs: Any) -> list[str]:
            if batch_size > num_rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return stock(*args, batch_size=batch_size, **kwargs)

        monkeypatch.setattr(asking, "generate_answers", generate_answers)

    return limit


IN_TRAINING = {"every_steps": 2, "batch_size": 3, "max_new_tokens": 4}


@pytest.mark.parametrize("during", ["an evaluation", "the judging"])
def test_held_out_rows_that_do_not_fit_are_named_and_the_run_goes_on_with_fewer_at_once(
    dataset: Callable[..., Path],
    no_room_to_answer: Callable[[int], None],
    tmp_path: Path,
    during: str,
) -> None:
    asked = {"rows_in_training": 0} if during == "the judging" else {}
    recipe = str(dataset(training=settings(save_steps=2), evaluation=IN_TRAINING | asked))
    kept = [f"output.dir={tmp_path / 'kept'}"]
    assert train(load_recipe(recipe, kept)) == 0
    no_room_to_answer(1)
    with pytest.raises(ModelError) as error:
        train(load_recipe(recipe))
    message = str(error.value)
    assert message.startswith("evaluation of step 2: " * (during == "an evaluation") + "out of mem")
    assert "out of memory while 3 held-out rows were answered: " in message
    assert "eval.jsonl:1 (" in message
    assert "Set evaluation.batch_size below 3, or evaluation.batch_tokens" in message
    assert "training." not in message
    fewer = "evaluation.batch_size=1"
    assert train(load_recipe(recipe, [fewer]), resume=True) == 0
    run, same = RunDir(tmp_path / "run"), RunDir(tmp_path / "kept")
    assert load_recipe(run.recipe).evaluation.batch_size == 1
    answers = [[row["adapter"] for row in read_jsonl(each.predictions)] for each in (run, same)]
    assert answers[0] == answers[1]


def test_a_single_held_out_row_that_does_not_fit_is_told_what_else_helps(
    dataset: Callable[..., Path], no_room_to_answer: Callable[[int], None], tmp_path: Path
) -> None:
    recipe = str(dataset(training=settings(), evaluation=IN_TRAINING))
    assert train(load_recipe(recipe)) == 0
    no_room_to_answer(0)
    asked = evaluate.Asked(settings=["evaluation.batch_size=1"])
    with pytest.raises(ModelError, match="while a held-out row was answered: ") as error:
        evaluate.evaluate(tmp_path / "run", asked)
    assert "batch_size" not in str(error.value)
    assert "evaluation.max_new_tokens" in str(error.value)


@pytest.mark.parametrize(
    ("batch_size", "told"), [(3, "lower evaluation.batch_size"), (1, "make its images smaller")]
)
def test_a_held_out_loss_that_does_not_fit_is_told_with_what_helps(
    dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, batch_size: int, told: str
) -> None:
    from finetune.trainer import VisionSFTTrainer

    stock = VisionSFTTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(VisionSFTTrainer, "compute_loss", compute_loss)
    evaluation = IN_TRAINING | {"batch_size": batch_size}
    recipe = str(dataset(training=settings(), evaluation=evaluation))
    batch = f"step 2: out of memory at a batch of {batch_size} row"
    with pytest.raises(ModelError, match=batch) as error:
        train(load_recipe(recipe))
    assert f"This is held out: {told}" in str(error.value)
    half = (f"evaluation.batch_size={batch_size // 2}",)
    assert error.value.resume_with == (half if batch_size > 1 else None)
    assert "training." not in str(error.value)


def test_a_single_row_that_does_not_fit_ends_the_run(
    dataset: Callable[..., Path], small_memory: Callable[..., None]
) -> None:
    recipe = str(dataset(num_eval=0, training=settings(on_oom="split")))
    small_memory(0)
    with pytest.raises(ModelError, match="out of memory at a batch of 1 rows"):
        train(load_recipe(recipe))


def test_gradients_of_a_pass_that_failed_half_way_are_taken_back() -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    weight.grad = torch.tensor([10.0])

    def fails() -> torch.Tensor:
        (weight * 3).sum().backward()
        raise torch.OutOfMemoryError("full")

    loss, told = apart_from_others([weight], fails)
    assert loss is None
    assert told == "full"
    assert weight.grad.tolist() == [10.0]

    def works() -> torch.Tensor:
        loss = (weight * 3).sum()
        loss.backward()
        return loss

    loss, _ = apart_from_others([weight], works)
    assert weight.grad is not None
    assert weight.grad.tolist() == [13.0]


def test_memory_that_runs_out_on_a_cpu_is_told_apart_and_other_errors_are_not() -> None:
    with told_apart() as told:
        torch.empty(2**55)
    assert "can't allocate memory" in told[0]
    with pytest.raises(RuntimeError, match="shape"), told_apart():
        torch.ones(2).reshape(3)


def test_the_heaviest_rows_are_named_first() -> None:
    batch = [BatchRow("a:1", 70, 1), BatchRow("a:2", 400, 5), BatchRow("a:3", 90, 1)]
    message = str(out_of_memory(4, batch, "full"))
    assert "3 rows, 560 tokens and 7 views: a:2 (400 tokens, 5 views), a:3" in message


def test_split_is_refused_in_several_processes(
    dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(str(dataset()), ["training.on_oom=split"])
    refuse_what_cannot_run(recipe, "mine.yaml")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="on_oom: split is for one process"):
        refuse_what_cannot_run(recipe, "mine.yaml")


def test_split_is_refused_for_a_stream(dataset: Callable[..., Path], tmp_path: Path) -> None:
    recipe = str(dataset(num_eval=0))
    with pytest.raises(RecipeError, match="split reads the rows of a batch again"):
        load_recipe(recipe, ["training.on_oom=split", "data.train.0.streaming=true"])


def test_on_a_card_it_is_told_what_plan_would_change(
    dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(dataset(training={"batch_size": 8, "gradient_checkpointing": False}))
    heaviest = Planner.of_recipe(recipe, Console(quiet=True)).plan().worst.memory
    size = needed_bytes(heaviest, "cuda") - 1_000_000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, size))
    with monkeypatch.context() as card:
        card.setattr(torch.cuda, "is_available", lambda: True)
        words, resume_with = what_helps(recipe, Console(quiet=True))
    assert resume_with == ("training.on_oom=split",)
    assert words.startswith("By finetune plan, start again with one of these: ")
    assert "training.batch_size" in words
