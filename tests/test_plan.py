"""`finetune plan`, end to end on nano, and on idefics2-8b without its weights."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.data.gathering import Limits
from finetune.errors import RecipeError
from finetune.fitting import Saving, combined, with_settings
from finetune.model.adapters import add_adapter, count_parameters
from finetune.model.load import load_model, quiet_libraries
from finetune.model.methods import make_trainable
from finetune.plan import plan, print_plan
from finetune.planning import Planner, RowCosts
from finetune.recipe import load_recipe
from finetune.tables import messages_console, results_console
from scripts.bench_memory import peak_above
from tests.conftest import chat_row, noise, write_dataset, write_rows

FINETUNE = str(Path(sys.executable).parent / "finetune")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet_libraries()


@pytest.fixture(scope="module")
def idefics2_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a download of idefics2-8b would leave, but its weights; with a recipe beside it."""
    from tests.models.idefics2 import SIZE, full_size, save_tiny

    folder = tmp_path_factory.mktemp("idefics2-8b")
    save_tiny(folder)
    (folder / "model.safetensors").unlink()
    full_size().config.save_pretrained(folder)
    for name, settings in (
        ("preprocessor_config.json", {"size": SIZE}),
        ("processor_config.json", {"image_seq_len": 64}),
    ):
        stored = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(stored | settings))
    rows = tmp_path_factory.mktemp("rows")
    recipe = write_dataset(
        rows,
        num_train=3,
        num_eval=0,
        model={"name": str(folder), "dtype": "bfloat16"},
        images={"split": "always", "longest_edge_px": 980, "shortest_edge_px": 378},
        training={"batch_size": 1, "gradient_accumulation": 1, "gradient_checkpointing": True},
    )
    return recipe


def test_idefics2_8b_is_planned_without_weights(idefics2_8b: Path) -> None:
    """Counts as FACTS has them; the weights in nf4 are what double quantisation leaves of them."""
    result = plan(load_recipe(str(idefics2_8b)), gpu="80GB")
    told = result.to_json()
    assert told["parameters"] == {
        "total": 8_402_768_112,
        "vision": 417_792_240,
        "connector": 91_750_400 + 651_468_800,
        "language": 7_110_672_384 + 131_084_288,
        "trainable": 23_326_720,
    }
    assert told["adapter_bytes"] == 4 * 23_326_720
    # 16 bits a weight; of adapters four bytes, and eight of Adam's state
    assert told["terms"]["weights"] == pytest.approx(2 * 8_402_768_112 / 2**30, rel=1e-3)
    assert told["terms"]["adapters"] == pytest.approx(4 * 23_326_720 / 2**30, abs=1e-3)
    assert told["terms"]["optimizer"] == pytest.approx(8 * 23_326_720 / 2**30, abs=1e-3)
    assert told["peak_memory_gib"] == pytest.approx(sum(told["terms"].values()), abs=0.01)
    assert told["gpu"]["fits"] is True
    assert told["worst"]["num_views"] == 5


@pytest.mark.slow
def test_four_bits_make_idefics2_8b_fit_where_sixteen_do_not(idefics2_8b: Path) -> None:
    result = plan(load_recipe(str(idefics2_8b)), gpu="16GiB")
    assert result.fits is False
    ways = {tuple(way.settings): way for way in result.ways}
    assert ways[("model.quantize",)].fits
    in_4_bits = plan(load_recipe(str(idefics2_8b), ["model.quantize=nf4"]), gpu="16GiB")
    assert in_4_bits.fits
    assert in_4_bits.plan.needed_bytes == ways[("model.quantize",)].peak_bytes
    # of the 32 layers of language 0.516 bytes a weight are left, the other 1.42e9 stay in 16 bits
    linears = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    weights = (0.516 * linears + 2 * (8_402_768_112 - linears)) / 2**30
    assert in_4_bits.to_json()["terms"]["weights"] == pytest.approx(weights, rel=1e-3)


def test_splitting_is_what_the_connector_pays_for(idefics2_8b: Path) -> None:
    recipe = load_recipe(str(idefics2_8b))
    split = plan(recipe).plan.worst.memory.terms
    whole = plan(load_recipe(str(idefics2_8b), ["images.split=never"])).plan.worst.memory.terms
    assert split["connector"] > 3 * whole["connector"]
    assert split["batch"] > 4 * whole["batch"]
    assert split["weights"] == whole["weights"]


@pytest.fixture
def nano_recipe(dataset: Callable[..., Path]) -> Path:
    return dataset(training={"batch_size": 4, "gradient_accumulation": 2, "max_steps": None})


def test_the_peak_is_that_of_a_run(nano_recipe: Path, tmp_path: Path) -> None:
    """The oracle is the trainer itself, watched by torch's profiler while it takes a step."""
    from finetune.arguments import training_arguments
    from finetune.data.collate import Collator
    from finetune.preparation import load_encoder, prepare_rows
    from finetune.rundir import RunDir
    from finetune.trainer import VisionSFTTrainer

    recipe = load_recipe(str(nano_recipe), ["training.max_steps=1", "adapter.rank=64"])
    planner = Planner.of_recipe(recipe, messages_console(), "cpu")
    planned = planner.plan()
    base, family = load_model(recipe.model)
    model: Any = add_adapter(base, family, recipe.adapter, recipe.model.name)
    assert count_parameters(model)[0] == planned.parameters.trainable
    encoder = load_encoder(recipe, messages_console())
    train, _ = prepare_rows(recipe, encoder, tmp_path, messages_console())
    heaviest = planner.rows.heaviest(Limits(4))[0]

    trainer = VisionSFTTrainer(
        model,
        training_arguments(recipe, RunDir(tmp_path / "run"), num_eval_rows=0),
        Collator(encoder, train.rows),
        [heaviest, heaviest],  # type: ignore[arg-type]  # what a loader asks of batches
        num_train_rows=len(train.rows),
    )
    resting = sum(each.numel() * each.element_size() for each in model.parameters())
    measured = resting + peak_above(lambda: trainer.train())
    # the first step begins without the optimizer's state
    predicted = planner.batch(heaviest).memory.peak_bytes
    predicted -= planner.batch(heaviest).memory.terms["optimizer"]
    assert predicted == pytest.approx(measured, rel=0.2)


def test_the_heaviest_batch_is_of_the_longest_rows_or_of_the_largest_views() -> None:
    counts = np.zeros(5, [("num_tokens", "i8"), ("num_view_pixels", "i8")])
    counts["num_tokens"] = [10, 50, 40, 20, 30]
    counts["num_view_pixels"] = [900, 0, 0, 800, 100]
    rows = RowCosts([], counts, 5)
    assert rows.heaviest(Limits(1)) == [[1], [0]]
    assert rows.heaviest(Limits(2)) == [[1, 0], [1, 2], [0, 3]]
    assert rows.heaviest(Limits(7))[0] == [1, 0, 2, 3, 4, 1, 0]
    assert rows.typical(1) == [4]  # of 30 tokens, which is the mean, and 100 of 360 pixels
    # by tokens and pixels, in shares of their means: 4, 2, 1, 0, 3
    assert rows.typical(7) == [4, 2, 2, 1, 0, 0, 3]


def test_of_rows_of_two_kinds_the_mean_batch_has_both() -> None:
    """As with images.split: auto, where no row is like the mean one."""
    counts = np.zeros(100, [("num_tokens", "i8"), ("num_view_pixels", "i8")])
    counts["num_tokens"] = [40] * 75 + [360] * 25
    counts["num_view_pixels"] = [3000] * 75 + [15000] * 25
    rows = RowCosts([], counts, 100)
    for number in (4, 8, 16):
        chosen = counts[rows.typical(number)]
        assert chosen["num_tokens"].mean() == counts["num_tokens"].mean()
        assert chosen["num_view_pixels"].mean() == counts["num_view_pixels"].mean()


def test_more_accumulation_holds_more_pixels(nano_recipe: Path) -> None:
    """The trainer collates all batches of a step before it computes the first."""
    one, four = (
        plan(load_recipe(str(nano_recipe), [f"training.gradient_accumulation={n}"])).plan
        for n in (1, 4)
    )
    assert four.mean.memory.terms["batch"] == 4 * one.mean.memory.terms["batch"]
    assert one.steps == 3  # 12 rows in batches of 4
    assert four.steps == 1
    assert one.flops_per_step * 4 == four.flops_per_step


def test_settings_that_help_are_told_the_cheapest_first(nano_recipe: Path) -> None:
    recipe = load_recipe(
        str(nano_recipe), ["training.batch_size=8", "training.gradient_checkpointing=false"]
    )
    needed = plan(recipe).plan.needed_bytes
    result = plan(recipe, gpu=f"{(needed - 2**20) / 1e9:.6f}GB")
    assert result.fits is False
    assert [next(iter(way.settings)) for way in result.ways[:2]] == [
        "training.batch_size",
        "training.gradient_checkpointing",
    ]
    assert result.ways[0].settings["training.batch_size"] == 4
    assert all(way.fits and way.peak_bytes <= (result.gpu_bytes or 0) for way in result.ways)
    # each is the plan of the recipe that it names
    for way in result.ways[:2]:
        changed = with_settings(recipe, way.settings)
        assert changed is not None
        assert plan(changed).plan.needed_bytes == pytest.approx(way.peak_bytes, rel=0.01)


OPTIMIZER = Saving({"optimizer": "paged"}, "rounded state")
NF4 = Saving({"quantize": "nf4"}, "rounded weights")
UNSPLIT = Saving({"split": False}, "lost detail")
LORA = Saving({"method": "lora"}, "less learns")


def stub_peak(settings: Mapping[str, Any]) -> int | None:
    """Full training takes 100; nf4 is refused beside it, and a paged optimizer helps it alone."""
    is_lora, in_4_bits = "method" in settings, "quantize" in settings
    if in_4_bits and not is_lora:
        return None
    peak = (10 if in_4_bits else 20) if is_lora else (80 if "optimizer" in settings else 100)
    return peak - (2 if "split" in settings else 0)


@pytest.mark.parametrize(
    ("limit", "needed"),
    [
        (79, [OPTIMIZER, UNSPLIT]),
        (20, [LORA]),
        (18, [UNSPLIT, LORA]),
        (10, [NF4, LORA]),
        (8, [NF4, UNSPLIT, LORA]),
    ],
)
def test_a_saving_refused_alone_is_tried_beside_others_and_what_is_not_needed_left_out(
    limit: int, needed: list[Saving]
) -> None:
    groups = [[], [OPTIMIZER], [NF4], [UNSPLIT], [LORA]]
    way = combined(groups, stub_peak, limit)
    assert way is not None
    assert way.fits
    assert way.settings == {name: x for saving in needed for name, x in saving.settings.items()}
    assert way.costs == "; ".join(saving.costs for saving in needed)
    assert way.peak_bytes == stub_peak(way.settings)


def test_of_several_values_the_mildest_that_is_enough_is_told() -> None:
    sizes = [Saving({"size": size}, "slower") for size in (4, 2, 1)]

    def peak_with(settings: Mapping[str, Any]) -> int:
        return 40 + 10 * settings.get("size", 8) - 45 * ("method" in settings)

    way = combined([sizes, [LORA]], peak_with, 35)
    assert way is not None
    assert way.settings == {"size": 4, "method": "lora"}
    short = combined([sizes, [LORA]], peak_with, 1)
    assert short is not None
    assert not short.fits
    assert short.settings == {"size": 1, "method": "lora"}
    assert combined([[NF4]], lambda settings: None if settings else 7, 5) is None


def test_full_training_fits_in_four_bits_once_it_is_lora(nano_recipe: Path) -> None:
    settings = ["adapter.method=full", "training.batch_size=1", "training.gradient_accumulation=1"]
    recipe = load_recipe(str(nano_recipe), settings)
    in_4_bits = with_settings(recipe, {"adapter.method": "lora", "model.quantize": "nf4"})
    assert in_4_bits is not None
    needed = plan(in_4_bits).plan.needed_bytes
    result = plan(recipe, gpu=f"{needed / 1e9 + 1e-6:.6f}GB")
    (way,) = result.ways
    assert way.fits
    assert way.settings["adapter.method"] == "lora"
    assert way.settings["model.quantize"] == "nf4"
    changed = with_settings(recipe, way.settings)
    assert changed is not None
    assert plan(changed).plan.needed_bytes == way.peak_bytes


def test_other_image_settings_are_planned_with_the_new_words(nano_recipe: Path) -> None:
    recipe = load_recipe(str(nano_recipe), ["adapter.extra_tokens=[<total>]"])
    planner = Planner.of_recipe(recipe, messages_console())
    split = "never" if planner.recipe.images.split != "never" else "always"
    changed = with_settings(planner.recipe, {"images.split": split})
    assert changed is not None
    tokenizers = [each.encoder.processor.tokenizer for each in (planner, planner.varied(changed))]
    assert tokenizers[1] is not tokenizers[0]
    assert [len(each.encode("<total>", add_special_tokens=False)) for each in tokenizers] == [1, 1]


def test_where_nothing_is_enough_the_nearest_is_told_and_called_so(
    nano_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = plan(load_recipe(str(nano_recipe)), gpu="1MiB")
    assert [way.fits for way in result.ways] == [False]
    assert len(result.ways[0].settings) > 1
    print_plan(result, results_console())
    assert "no settings that were tried make it fit; the nearest:" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["big", "", "0GiB"])
def test_a_size_that_is_none_is_refused(nano_recipe: Path, size: str) -> None:
    with pytest.raises(RecipeError, match=f"expected a size such as 24GiB or 80GB, found '{size}'"):
        plan(load_recipe(str(nano_recipe)), gpu=size)


def test_the_command_prints_json(nano_recipe: Path) -> None:
    done = subprocess.run(
        [FINETUNE, "plan", str(nano_recipe), "--gpu", "24GiB", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["measured"] is False
    assert told["gpu"]["fits"] is True
    assert told["rows_per_step"] == 8
    assert set(told["parameters"]) == {"total", "vision", "connector", "language", "trainable"}
    assert not (nano_recipe.parent / "run").exists()


def test_what_does_not_fit_ends_with_exit_code_2(nano_recipe: Path) -> None:
    command = [FINETUNE, "plan", str(nano_recipe), "--gpu", "1MiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "does not fit" in done.stdout


@pytest.mark.parametrize(("name", "is_told"), [("fsdp", True), ("zero2", True), ("ddp", False)])
def test_figures_that_leave_shares_out_of_account_say_so(
    name: str, is_told: bool, nano_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"training.distributed={name}", "evaluation.rows_in_training=0"]
    result = plan(load_recipe(str(nano_recipe), settings))
    print_plan(result, results_console())
    told = f"training.distributed: {name} is left out of account: these figures are as with ddp"
    assert (told in capsys.readouterr().out) == is_told
    assert result.to_json()["shares_left_out"] == (name if is_told else None)


def test_streamed_rows_are_planned_from_the_first_ones(nano_recipe: Path) -> None:
    path = str(nano_recipe.parent / "train.jsonl")
    recipe = load_recipe(
        str(nano_recipe),
        [f"data.train=[{{path: {path}, streaming: true}}]", "training.max_steps=7"],
    )
    result = plan(recipe)
    assert result.plan.is_streamed
    assert result.plan.steps == 7
    assert result.plan.worst.memory.peak_bytes > 0


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("share_images", ["auto", "off"])
def test_the_heaviest_batch_shows_different_pictures(
    dataset: Callable[..., Path], streaming: bool, share_images: str
) -> None:
    """A batch encodes a picture once, so that four questions about the largest are no heavy one."""
    recipe_file = dataset(training={"batch_size": 2, "max_steps": 3, "share_images": share_images})
    folder = recipe_file.parent
    lines = []
    for number, edge in enumerate((220, 220, 220, 200)):
        file = f"page-{edge}.png"
        noise(edge, edge, seed=edge).save(folder / file)
        lines.append(chat_row("Which?", f"{number}", file))
    path = folder / "pages.jsonl"
    write_rows(path, lines)
    entry = f"[{{path: {path}, streaming: {str(streaming).lower()}}}]"
    recipe = load_recipe(str(recipe_file), [f"data.train={entry}"])
    planner = Planner.of_recipe(recipe, messages_console(), "cpu")
    pixels = planner.rows.counts["num_view_pixels"]
    for numbers in planner.rows.heaviest(Limits(2)):
        assert len({int(pixels[each]) for each in numbers}) == 2


def test_planning_touches_no_weight(nano_recipe: Path) -> None:
    planner = Planner.of_recipe(load_recipe(str(nano_recipe)), messages_console())
    assert all(each.is_meta for each in planner.model.adapted.parameters())
    assert planner.plan().worst.memory.flops > 0
    assert torch.get_default_dtype() is torch.float32
    assert not torch.is_autocast_enabled()


@pytest.mark.parametrize("method", ["dora", "pissa", "full", "frozen"])
def test_every_method_is_planned_as_it_is_trained(nano_recipe: Path, method: str) -> None:
    recipe = load_recipe(str(nano_recipe), [f"adapter.method={method}"])
    planned = plan(recipe, device="cpu").plan
    model, family = load_model(recipe.model)
    trainable, total = count_parameters(make_trainable(model, family, recipe))
    assert planned.parameters.trainable == trainable
    assert planned.parameters.total == total - (0 if method in ("full", "frozen") else trainable)
    terms = planned.worst.memory.terms
    assert terms["adapters"] == 4 * trainable
    assert (terms["gradients"] > 0) == (trainable > 0)


def test_ranks_by_part_and_new_words_are_counted(nano_recipe: Path) -> None:
    plain, more = (
        plan(load_recipe(str(nano_recipe), settings), device="cpu").plan.parameters
        for settings in (
            ["adapter.rank={language: 8, connector: 8}", "adapter.alpha=8"],
            ["adapter.rank={language: 8, connector: 16}", "adapter.extra_tokens=[<total>]"],
        )
    )
    assert more.trainable > plain.trainable
    assert more.language == plain.language  # nano has a row to spare
