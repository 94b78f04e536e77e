"""Steps whose loss is no number or a spike: told with their rows, stopped at or left out."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.bad_steps import BadSteps
from finetune.data.collate import BatchRow
from finetune.errors import DataError, ModelError, RecipeError
from finetune.recipe import TrainingSection, load_recipe
from finetune.rundir import RunDir
from finetune.train import train
from tests.commands import FINETUNE, run

HERE = torch.device("cpu")


def watched(folder: Path, **settings: Any) -> BadSteps:
    return BadSteps(TrainingSection(**settings), RunDir(folder))


def rows(*places: str) -> tuple[BatchRow, ...]:
    return tuple(BatchRow(place, 10, 1) for place in places)


def a_step(bad_steps: BadSteps, step: int, *losses: float) -> bool:
    """Of passes of one row each, named by their number, with equal numbers of tokens."""
    for number, loss in enumerate(losses):
        bad_steps.take(torch.tensor(loss), torch.tensor(5.0), rows(f"a.jsonl:{number}"))
    return bad_steps.judge(step, 1.0, HERE)


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "bad_steps" / "steps.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_step_without_a_number_stops_the_run_and_names_the_rows_that_made_it(
    tmp_path: Path,
) -> None:
    bad_steps = watched(tmp_path)
    with pytest.raises(ModelError, match=r"step 7: the loss is nan, with a\.jsonl:1 in the batch"):
        a_step(bad_steps, 7, 0.5, math.nan, 0.5)
    (line,) = lines(tmp_path)
    assert line["loss"] == "nan"
    assert [row["where"] for row in line["rows"]] == ["a.jsonl:1"]


def test_a_spike_is_told_by_the_median_and_blamed_on_the_highest_pass(tmp_path: Path) -> None:
    bad_steps = watched(tmp_path, bad_loss="skip", spike_factor=3.0)
    for step in range(10):
        assert a_step(bad_steps, step, 0.5, 0.5)
    assert a_step(bad_steps, 10, 1.4, 1.6)  # three times the median, and not more
    assert not a_step(bad_steps, 11, 1.0, 2.1)
    (line,) = lines(tmp_path)
    assert "3.1 times the median of the 11 steps before" in line["why"]
    assert [row["where"] for row in line["rows"]] == ["a.jsonl:1"]
    assert list(bad_steps.losses)[-1] == pytest.approx(3.0)  # the spike is not remembered


@pytest.mark.parametrize(
    ("settings", "can_skip"),
    [({}, True), ({"distributed": "fsdp"}, True), ({"distributed": "zero2"}, False)]
    + [({"optimizer": name}, False) for name in ("lomo", "galore_adamw_layerwise")],
)
def test_what_is_advised_is_what_the_recipe_and_resume_allow(
    settings: dict[str, Any], can_skip: bool, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as error:
        a_step(watched(tmp_path, **settings), 1, math.nan)
    going_on = "; go on with --resume and training.bad_loss=skip, or start again with these rows"
    assert (going_on in str(error.value)) == can_skip
    assert "start again with these rows mended, a lower training.learning_rate" in str(error.value)
    assert error.value.resume_with == (("training.bad_loss=skip",) if can_skip else None)


def test_what_the_recipe_has_already_is_not_advised(tmp_path: Path) -> None:
    advised = {}
    for dtype in ("bfloat16", "float32"):
        bad_steps = BadSteps(TrainingSection(), RunDir(tmp_path), dtype=dtype)
        with pytest.raises(ModelError) as error:
            a_step(bad_steps, 1, math.nan)
        advised[dtype] = str(error.value).partition("start again with ")[2]
    rows = "these rows mended, a lower training.learning_rate"
    assert advised == {
        "bfloat16": f"{rows}, a higher training.warmup_ratio or model.dtype: float32",
        "float32": f"{rows} or a higher training.warmup_ratio",
    }


def test_a_step_left_out_is_told_without_advice(tmp_path: Path) -> None:
    told: list[str] = []
    bad_steps = BadSteps(TrainingSection(bad_loss="skip"), RunDir(tmp_path), tell=told.append)
    assert not a_step(bad_steps, 1, math.nan)
    assert told == ["left out step 1: the loss is nan, with a.jsonl:0 in the batch"]


def test_nothing_is_a_spike_before_ten_steps_nor_without_a_factor(tmp_path: Path) -> None:
    early = watched(tmp_path, spike_factor=2.0)
    assert a_step(early, 1, 0.1)
    assert a_step(early, 2, 100.0)
    unwatched = watched(tmp_path)
    assert all(a_step(unwatched, step, 0.1) for step in range(20))
    assert a_step(unwatched, 20, 1e6)


def test_a_gradient_without_a_number_is_found_though_the_loss_has_one(tmp_path: Path) -> None:
    bad_steps = watched(tmp_path, bad_loss="skip")
    bad_steps.take(torch.tensor(0.5), torch.tensor(5.0), rows("a.jsonl:1", "a.jsonl:2"))
    assert not bad_steps.judge(1, math.inf, HERE)
    (line,) = lines(tmp_path)
    assert line["why"] == "its gradient holds no number"
    assert [row["where"] for row in line["rows"]] == ["a.jsonl:1", "a.jsonl:2"]


def test_steps_that_learnt_from_nothing_make_no_spike_of_the_next(tmp_path: Path) -> None:
    bad_steps = watched(tmp_path, spike_factor=2.0)
    assert all(a_step(bad_steps, step, 0.0) for step in range(12))
    assert a_step(bad_steps, 12, 3.0)


def test_a_page_that_cannot_be_made_does_not_take_the_place_of_the_message(tmp_path: Path) -> None:
    def fails(rows: Any, page: Path) -> None:
        raise DataError("the picture is gone")

    bad_steps = BadSteps(TrainingSection(), RunDir(tmp_path), fails)
    with pytest.raises(ModelError, match="the loss is nan") as error:
        a_step(bad_steps, 1, math.nan)
    assert "see " not in str(error.value)


def test_a_checkpoint_of_a_version_that_remembered_nothing_is_gone_on_from(tmp_path: Path) -> None:
    bad_steps = watched(tmp_path)
    bad_steps.go_on(tmp_path)
    assert bad_steps.num_skipped == 0


def test_ten_in_a_row_stop_a_run_that_leaves_them_out(tmp_path: Path) -> None:
    bad_steps = watched(tmp_path, bad_loss="skip")
    for step in range(9):
        assert not a_step(bad_steps, step, math.inf)
    assert a_step(bad_steps, 9, 1.0)
    for step in range(10, 19):
        assert not a_step(bad_steps, step, math.inf)
    told = "10th in a row: training has diverged; start again with a lower training.learning_rate"
    with pytest.raises(ModelError, match=told):  # rows are not to blame, so none is to be mended
        a_step(bad_steps, 19, math.inf)


def test_what_is_remembered_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    before, after = (watched(tmp_path, bad_loss="skip", spike_factor=3.0) for _ in range(2))
    for step in range(10):
        a_step(before, step, 1.0)
    a_step(before, 10, math.nan)
    before.write(tmp_path)
    after.go_on(tmp_path)
    assert (after.num_skipped, after.num_in_a_row) == (1, 1)
    assert not a_step(after, 11, 3.5)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`poisoned(n)` makes the loss of the n-th pass of a run, from 1, no number, and its entropy
    too, as a model's that has lost its head.
    """
    from finetune.trainer import VisionSFTTrainer

    stock = VisionSFTTrainer.compute_loss

    def poison(number: int) -> None:
        count = [0]

        def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            found = stock(self, model, inputs, *args, **kwargs)
            if not torch.is_grad_enabled():
                return found
            count[0] += 1
            if count[0] != number:
                return found
            self._metrics["train"]["entropy"][-1] = math.nan
            return found * math.nan

        monkeypatch.setattr(VisionSFTTrainer, "compute_loss", compute_loss)

    return poison


def settings(**training: Any) -> dict[str, Any]:
    return {
        "scheduler": "constant",
        "warmup_ratio": 0,
        "max_steps": 3,
        "save_steps": 100,
        **training,
    }


def test_a_step_left_out_changes_no_weight_and_is_counted(
    dataset: Callable[..., Path], tmp_path: Path, poisoned: Callable[[int], None]
) -> None:
    """Against a run that ended before it."""
    recipe = str(dataset(num_eval=0, training=settings(), adapter={"dropout": 0.0}))
    train(load_recipe(recipe, ["training.max_steps=2", f"output.dir={tmp_path / 'short'}"]))
    poisoned(3)
    skipping = load_recipe(recipe, ["training.bad_loss=skip", f"output.dir={tmp_path / 'run'}"])
    assert train(skipping) == 0
    short, run = RunDir(tmp_path / "short"), RunDir(tmp_path / "run")
    name = "adapter_model.safetensors"
    trained, kept = load_file(run.adapter / name), load_file(short.adapter / name)
    assert all(torch.equal(trained[key], kept[key]) for key in kept)
    assert json.loads(run.summary.read_text())["num_skipped_steps"] == 1
    logged = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert all(math.isfinite(value) for line in logged for value in line.values())
    assert json.loads(run.summary.read_text())["steps"] == 3
    assert logged[-1]["skipped_steps"] == 1
    (line,) = lines(run.path)
    assert line["step"] == 3
    assert len(line["rows"]) == 4


def test_the_mean_loss_counts_the_steps_that_were_taken(
    dataset: Callable[..., Path], tmp_path: Path, poisoned: Callable[[int], None]
) -> None:
    """Without a rate every step of an epoch-long batch has one loss, whatever is left out."""
    fixed = settings(learning_rate=1e-30, batch_size=12, logging_steps=3, bad_loss="skip")
    recipe = str(dataset(num_eval=0, training=fixed, adapter={"dropout": 0.0}))
    means = []
    for name in ("whole", "skipped"):
        train(load_recipe(recipe, [f"output.dir={tmp_path / name}"]))
        logged = RunDir(tmp_path / name).metrics.read_text().splitlines()
        means.append([json.loads(line) for line in logged][-1])
        poisoned(3)
    assert means[1]["skipped_steps"] == 1
    assert means[1]["loss"] == pytest.approx(means[0]["loss"], rel=1e-3)
    assert means[1]["entropy"] == pytest.approx(means[0]["entropy"], rel=1e-3)


def test_the_rows_of_a_bad_step_can_be_looked_at(
    dataset: Callable[..., Path], tmp_path: Path, poisoned: Callable[[int], None]
) -> None:
    recipe = str(dataset(num_eval=0, training=settings()))
    poisoned(2)
    with pytest.raises(ModelError) as error:
        train(load_recipe(recipe))
    page = tmp_path / "run" / "bad_steps" / "step-2.html"
    (line,) = lines(tmp_path / "run")
    assert str(page) in str(error.value)
    for row in line["rows"]:
        assert row["where"] in page.read_text()
        assert row["where"] in str(error.value)


def test_weights_that_run_away_are_found_at_the_first_step_that_shows_it(
    dataset: Callable[..., Path],
) -> None:
    recipe = dataset(training={"learning_rate": 1e30, "warmup_ratio": 0, "max_steps": 20})
    with pytest.raises(ModelError, match=r"step [23]: the loss is (nan|inf)"):
        train(load_recipe(str(recipe)))


def test_a_run_resumed_after_a_step_left_out_ends_with_the_same_bytes(
    dataset: Callable[..., Path], tmp_path: Path, poisoned: Callable[[int], None]
) -> None:
    keys = settings(max_steps=4, save_steps=3, bad_loss="skip", spike_factor=4.0)
    recipe = str(dataset(num_eval=0, training=keys, adapter={"dropout": 0.0}))
    poisoned(2)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(load_recipe(recipe, [f"output.dir={whole}"]))
    poisoned(2)
    train(load_recipe(recipe, [f"output.dir={broken}"]))
    # as if it had been killed after the checkpoint of step 3
    (broken / "summary.json").unlink()
    shutil.rmtree(broken / "checkpoints" / "checkpoint-4")
    poisoned(100)
    train(load_recipe(recipe, [f"output.dir={broken}"]), resume=True)
    assert len(lines(broken)) == 1
    file = Path("adapter") / "adapter_model.safetensors"
    assert (whole / file).read_bytes() == (broken / file).read_bytes()
    assert json.loads((broken / "summary.json").read_text())["num_skipped_steps"] == 1


def test_a_bad_step_that_is_taken_again_is_listed_once(
    dataset: Callable[..., Path], tmp_path: Path, poisoned: Callable[[int], None]
) -> None:
    keys = settings(max_steps=4, save_steps=2, bad_loss="skip")
    recipe = load_recipe(str(dataset(num_eval=0, training=keys)))
    poisoned(3)
    train(recipe)
    run = RunDir(tmp_path / "run")
    run.summary.unlink()
    shutil.rmtree(run.checkpoints / "checkpoint-4")
    with (run.bad_steps / "steps.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    poisoned(1)
    train(recipe, resume=True)
    assert [line["step"] for line in lines(run.path)] == [3]


def test_checkpoints_from_before_bad_steps_are_not_deleted_until_a_good_one_is_taken(
    dataset: Callable[..., Path], tmp_path: Path, poisoned: Callable[[int], None]
) -> None:
    keys = settings(max_steps=3, save_steps=1, keep_checkpoints=1, bad_loss="skip")
    for bad, kept in ((3, {"checkpoint-2", "checkpoint-3"}), (2, {"checkpoint-3"})):
        poisoned(bad)
        folder = tmp_path / f"bad-{bad}"
        train(load_recipe(str(dataset(num_eval=0, training=keys)), [f"output.dir={folder}"]))
        assert {path.name for path in (folder / "checkpoints").glob("checkpoint-*")} == kept


def test_a_gradient_whose_norm_overflows_is_found_though_clipping_made_it_zero(
    dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.trainer import VisionSFTTrainer

    stock = VisionSFTTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = stock(self, *args, **kwargs)
        if torch.is_grad_enabled():
            found.register_hook(lambda gradient: gradient * 1e30)
        return found

    monkeypatch.setattr(VisionSFTTrainer, "compute_loss", compute_loss)
    recipe = load_recipe(str(dataset(num_eval=0, training=settings())))
    with pytest.raises(ModelError, match="step 1: its gradient holds no number"):
        train(recipe)


def test_a_run_that_stopped_at_a_bad_step_goes_on_with_skip(
    dataset: Callable[..., Path], tmp_path: Path, poisoned: Callable[[int], None]
) -> None:
    recipe = str(dataset(num_eval=0, training=settings(max_steps=4, save_steps=2)))
    poisoned(3)
    with pytest.raises(ModelError, match=r"--resume and training\.bad_loss=skip"):
        train(load_recipe(recipe))
    ended = tmp_path / "run" / "ended.json"
    told = json.loads(ended.read_text())
    assert told["why"].startswith("step 3: the loss is nan")
    assert told["resume_with"] == ["training.bad_loss=skip"]
    poisoned(1)
    others = ["training.bad_loss=skip", "training.num_workers=1", "data.read_retries=1"]
    assert train(load_recipe(recipe, others), resume=True) == 0
    assert not ended.exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_skipped_steps"] == 1


@pytest.mark.parametrize(
    "setting", ["training.bad_loss=skip", "training.spike_factor=3", "training.on_oom=split"]
)
def test_optimizers_that_step_within_the_backward_pass_cannot_be_held_back(
    dataset: Callable[..., Path], setting: str
) -> None:
    lomo = ["training.optimizer=lomo", "adapter.method=full", setting]
    with pytest.raises(RecipeError, match="steps within the backward pass"):
        load_recipe(str(dataset()), lomo)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_say_so_once(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    keys = {"learning_rate": 1e30, "warmup_ratio": 0, "max_steps": 20, "batch_size": 2}
    recipe = dataset(num_eval=0, training=keys | {"num_workers": 1})
    done = run(*FINETUNE, "train", str(recipe), "--processes", "2")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr  # of loading processes that are ended
    (line,) = lines(tmp_path / "run")
    assert len(line["rows"]) == 4  # of both
