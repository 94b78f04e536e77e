"""The trainer itself, against the stock forward."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.data import IterableDataset
from trl.trainer.sft_trainer import SFTTrainer

from finetune.arguments import training_arguments
from finetune.data.collate import Collator, collate
from finetune.data.loaders import LoadingContext, loading
from finetune.model.adapters import add_adapter
from finetune.model.load import load_model
from finetune.recipe import load_recipe
from finetune.rundir import RunDir
from finetune.trainer import VisionSFTTrainer
from finetune.training import epoch_batches, prepare
from tests.conftest import NANO, chat_row, write_rows


@pytest.fixture
def trainer(dataset: Callable[..., Path], tmp_path: Path) -> Callable[..., VisionSFTTrainer]:
    """A trainer on the small dataset, with the recipe's `training` settings given."""

    def make(**training: Any) -> VisionSFTTrainer:
        recipe = load_recipe(dataset(adapter={"dropout": 0.0}, training=training))
        prepared = prepare(recipe, Console(quiet=True))
        assert prepared.train
        assert prepared.held_out
        model, family = load_model(recipe.model)
        return VisionSFTTrainer(
            add_adapter(model, family, recipe.adapter, "nano"),
            training_arguments(recipe, RunDir(tmp_path / "run"), num_eval_rows=4),
            Collator(prepared.encoder, prepared.train.rows + prepared.held_out.rows),
            epoch_batches(prepared),
            num_train_rows=len(prepared.train.rows),
        )

    return make


def test_rows_are_drawn_by_the_weights_of_their_sources(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    write_rows(tmp_path / "more.jsonl", [chat_row(f"q{i}", "a") for i in range(6)])
    recipe = load_recipe(
        dataset(
            data={
                "train": [
                    {"path": str(tmp_path / "train.jsonl"), "weight": 0.5},
                    {"path": str(tmp_path / "more.jsonl"), "weight": 3},
                ]
            }
        )
    )
    prepared = prepare(recipe, Console(quiet=True))
    assert prepared.train
    model, family = load_model(recipe.model)
    trainer = VisionSFTTrainer(
        add_adapter(model, family, recipe.adapter, "nano"),
        training_arguments(recipe, RunDir(tmp_path / "run"), num_eval_rows=0),
        Collator(prepared.encoder, prepared.train.rows),
        epoch_batches(prepared),
        num_train_rows=len(prepared.train.rows),
    )
    trainer.data_collator = lambda features: [feature["row"] for feature in features]  # type: ignore[assignment]
    drawn = Counter(row for batch in trainer.get_train_dataloader() for row in batch)
    assert sum(drawn[row] for row in range(12)) == 6
    assert [drawn[row] for row in range(12, 18)] == [3] * 6


class Stream(IterableDataset[Any]):
    encoder = None

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_all_loaders_leave_signals_alone_and_held_out_rows_come_as_from_the_stock_one(
    trainer: Callable[..., VisionSFTTrainer],
) -> None:
    made = trainer(num_workers=2)
    made.data_collator = lambda features: [feature["row"] for feature in features]  # type: ignore[assignment]
    ours, stock = made.get_eval_dataloader(), SFTTrainer.get_eval_dataloader(made)
    assert list(ours) == list(stock)
    loaders: list[Any] = [ours, made.get_train_dataloader()]
    streamed: Any = Stream()
    made.stream = streamed
    loaders.append(made.get_train_dataloader())
    for loader in loaders:
        assert isinstance(loader.multiprocessing_context, LoadingContext)
        assert loader.worker_init_fn.func is loading(2)["worker_init_fn"].func
    assert not isinstance(stock.multiprocessing_context, LoadingContext)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(12, 1), (4, 3), (5, 3)])
def test_the_logged_loss_is_the_mean_over_all_learnt_tokens(
    trainer: Callable[..., VisionSFTTrainer], batch_size: int, accumulation: int
) -> None:
    """Whatever the split into batches: rows with long answers must not count less."""
    ours = trainer(batch_size=batch_size, gradient_accumulation=accumulation, max_steps=1)
    encoder, rows = ours.data_collator.encoder, ours.data_collator.rows[:12]  # type: ignore[union-attr]
    model, _ = load_model(NANO)
    batch = collate([encoder.encode(row) for row in rows], encoder.processor, encoder.family)
    with torch.no_grad():
        expected = model(**batch).loss  # a fresh adapter changes nothing
    ours.train()
    logged = next(line["loss"] for line in ours.state.log_history if "loss" in line)
    assert logged == pytest.approx(expected.item(), abs=1e-4)


def test_training_with_checkpointing_hooks_the_language_inputs_alone(
    trainer: Callable[..., VisionSFTTrainer],
) -> None:
    """TRL, PEFT and transformers each ask for it on every embedding; all three are held off."""
    ours = trainer(gradient_checkpointing=True, max_steps=1)
    ours.train()
    base = ours.model.get_base_model()  # type: ignore[union-attr, operator]
    vision = base.model.vision_model
    assert not [m for m in vision.modules() if "require" in str(m._forward_hooks.values())]
    assert len(base.get_input_embeddings()._forward_hooks) == 1


class NotingCollator(Collator):
    """Writes down the epoch in which it was asked for a training row, in whichever process."""

    file: Path

    def __call__(self, features: Any) -> Any:
        with self.file.open("a") as file:
            for feature in features:
                if feature["row"] < 12:
                    file.write(f"{self.sampler.epoch} {feature['row']}\n")  # type: ignore[union-attr]
        return super().__call__(features)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loading_process_knows_the_epoch_of_its_rows_also_in_a_resumed_run(
    trainer: Callable[..., VisionSFTTrainer], tmp_path: Path, num_workers: int
) -> None:
    """An epoch is three steps of four rows; the checkpoint stands in the middle of the second."""

    def rows_by_epoch(name: str, checkpoint: str | None) -> dict[int, list[int]]:
        ours = trainer(max_steps=8, save_steps=4, num_workers=num_workers)
        noting = NotingCollator(
            ours.data_collator.encoder,  # type: ignore[union-attr]
            ours.data_collator.rows,  # type: ignore[union-attr]
            sampler=ours.batches.sampler,
        )
        noting.file = tmp_path / name
        ours.data_collator = noting
        ours.train(resume_from_checkpoint=checkpoint)
        asked: dict[int, list[int]] = {}
        for line in noting.file.read_text().splitlines():
            epoch, row = map(int, line.split())
            asked.setdefault(epoch, []).append(row)
        return asked

    whole = rows_by_epoch("whole", None)
    resumed = rows_by_epoch("resumed", str(tmp_path / "run" / "checkpoints" / "checkpoint-4"))
    assert [sorted(whole[epoch]) for epoch in (0, 1)] == [list(range(12))] * 2
    # workers may have been asked ahead for the rows of the third epoch's last step
    assert set(whole) == {0, 1, 2}
    assert set(resumed) == {1, 2}
    first = trainer().batches.of_epoch(1)[0]
    assert sorted(resumed[1]) == sorted(set(range(12)) - set(first))


def test_frozen_weights_stay_as_they_were(trainer: Callable[..., VisionSFTTrainer]) -> None:
    ours = trainer(learning_rate=0.05, max_steps=2, warmup_ratio=0)
    before = {n: p.detach().clone() for n, p in ours.model.named_parameters()}  # type: ignore[union-attr]
    ours.train()
    changed = {n for n, p in ours.model.named_parameters() if not torch.equal(p, before[n])}  # type: ignore[union-attr]
    assert changed
    assert all("lora_" in name for name in changed)


def test_two_trainings_with_one_seed_end_with_the_same_weights(
    trainer: Callable[..., VisionSFTTrainer],
) -> None:
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        ours = trainer(max_steps=3)
        ours.train()
        ends.append({n: p for n, p in ours.model.named_parameters() if p.requires_grad})  # type: ignore[union-attr]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_token_that_stands_for_several_rows_weighs_like_them(
    trainer: Callable[..., VisionSFTTrainer],
) -> None:
    """Over a step of two batches, of which one has weights: the loss that is logged is the mean
    over all rows.
    """
    ours = trainer(batch_size=6, gradient_accumulation=2, max_steps=1)
    collator: Any = ours.data_collator
    encoder, batches = collator.encoder, []

    def weighted(features: Any) -> dict[str, Any]:
        batch = collator(features)
        if not batches:
            weights = torch.ones(batch["labels"].shape)
            weights[0] = 3
            batch["label_weights"] = weights
        batches.append(features)
        return batch

    ours.data_collator = weighted  # type: ignore[assignment]
    model, _ = load_model(NANO)
    ours.train()
    numbers = [feature["row"] for batch in batches[:2] for feature in batch]
    numbers += [numbers[0]] * 2
    rows = [collator.rows[number] for number in numbers]
    batch = collate([encoder.encode(row) for row in rows], encoder.processor, encoder.family)
    with torch.no_grad():
        expected = model(**batch).loss
    logged = next(line["loss"] for line in ours.state.log_history if "loss" in line)
    assert logged == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize(("kernel", "given"), [("torch", True), ("liger", False)])
def test_figures_that_the_loss_kernel_does_not_give_are_not_logged(
    trainer: Callable[..., VisionSFTTrainer], kernel: Any, given: bool
) -> None:
    ours = trainer(max_steps=1)
    ours.loss_kernel = kernel
    ours.train()
    logged = next(line for line in ours.state.log_history if "loss" in line)
    assert logged["num_tokens"] > 0
    assert [name in logged for name in ("entropy", "mean_token_accuracy")] == [given, given]


def test_the_model_is_scored_on_learnt_tokens_alone(
    trainer: Callable[..., VisionSFTTrainer],
) -> None:
    ours = trainer(batch_size=4, max_steps=1)
    base = ours.model.get_base_model()  # type: ignore[union-attr, operator]
    scored: list[int] = []
    learnt: list[int] = []
    base.lm_head.register_forward_hook(lambda module, args, out: scored.append(len(out)))
    collator: Any = ours.data_collator

    def noting(features: Any) -> Any:
        batch = collator(features)
        learnt.append(int((batch["labels"][:, 1:] != -100).sum()))
        return batch

    ours.data_collator = noting  # type: ignore[assignment]
    ours.train()
    assert scored
    assert scored == learnt[: len(scored)]
