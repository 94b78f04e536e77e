"""What the loading processes keep ready, and the figures that `scripts.bench_loading` prints."""

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.arguments import training_arguments
from finetune.recipe import load_recipe
from finetune.rundir import RunDir
from scripts import bench_loading


@pytest.mark.parametrize(
    ("num_workers", "gradient_accumulation", "kept"),
    [(0, 8, None), (1, 1, 2), (2, 8, 4), (3, 8, 3), (4, 1, 2), (2, 64, 32)],
)
def test_the_loading_processes_hold_a_whole_step_ready(
    dataset: Callable[..., Path],
    tmp_path: Path,
    num_workers: int,
    gradient_accumulation: int,
    kept: int | None,
) -> None:
    recipe = load_recipe(
        dataset(
            training={"num_workers": num_workers, "gradient_accumulation": gradient_accumulation}
        )
    )
    arguments = training_arguments(recipe, RunDir(tmp_path / "run"), num_eval_rows=0)
    assert arguments.dataloader_prefetch_factor == kept
    assert kept is None or kept * num_workers >= gradient_accumulation


def test_the_loading_benchmark_measures_every_kind_and_every_setting() -> None:
    pictures = bench_loading.draw_pictures(scale=0.1)
    figures = bench_loading.time_rows(pictures, repeats=1)
    assert [(f["picture"], f["split"], f["settings"]) for f in figures] == [
        (name, split, settings)
        for name in pictures
        for split in ("always", "never")
        for settings in ("library", *bench_loading.SETTINGS)
    ]
    for figure in figures:
        assert figure["milliseconds"] > 0
        if figure["settings"] == "exact":
            assert (figure["mean_difference"], figure["largest_difference"]) == (0, 0)


def test_the_cores_that_a_card_needs_are_its_rows_times_their_seconds() -> None:
    assert bench_loading.cores_needed(milliseconds_a_row=40, rows_per_second=50) == 2
    assert bench_loading.cores_needed(milliseconds_a_row=40, rows_per_second=51) == 3
