"""What a model waits for its batches, where loading or computing is known to be the slower."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.data.collate import Collator
from finetune.recipe import load_recipe
from finetune.trainer import VisionSFTTrainer
from scripts.bench_waiting import Speeds, measure


def test_processes_needed_deliver_what_the_model_takes() -> None:
    assert Speeds(num_workers=2, loading=10, training=24, both=10).workers_needed == 5
    assert Speeds(num_workers=0, loading=30, training=24, both=13).workers_needed == 1
    assert Speeds(num_workers=2, loading=10, training=20, both=5).waiting == 0.75


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(("slowed", "waits"), [("loading", True), ("step", False)])
def test_the_slower_of_both_sets_the_pace(
    dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, slowed: str, waits: bool
) -> None:
    owner: Any = Collator if slowed == "loading" else VisionSFTTrainer
    name = "__call__" if slowed == "loading" else "training_step"
    stock = getattr(owner, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.5)
        return stock(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)
    recipe = load_recipe(dataset(), ["training.num_workers=1"])
    speeds = measure(recipe, num_batches=4)
    assert (speeds.waiting > 0.5) == waits
    slow_rate = speeds.loading if waits else speeds.training
    assert slow_rate < 2 * (recipe.training.batch_size or 0)
    assert speeds.both < 1.2 * slow_rate
