"""Merged folders against PEFT's own merge of the whole model, and against base and adapter."""

import json
import shutil
import weakref
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft.tuners.lora import LoraLayer
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from finetune import merge as merge_verb
from finetune.cli import app
from finetune.errors import ModelError, RecipeError, RunDirError
from finetune.merge import PROOF, merge
from finetune.model import merging, pissa
from finetune.model.checkpoint_files import INDEX, copy_tensors
from finetune.model.load import load_processor
from finetune.model.methods import load_trainable, load_trained, pissa_start, save_trained
from finetune.model.vocabulary import add_extra_tokens
from finetune.recipe import load_recipe
from finetune.recipe.loading import dump_recipe
from finetune.rundir import RunDir, read_json, write_json, write_text
from tests.families import CHECKPOINTS

QUIET = Console(quiet=True)


class Made(NamedTuple):
    """A run whose adapter was not learnt but drawn, and its base in files."""

    run: Path
    recipe: Any
    processor: Any


def made_run(recipe_path: Path, folder: Path, *overrides: str, seed: int = 0) -> Made:
    recipe = load_recipe(recipe_path, [*overrides, f"output.dir={folder}"])
    processor, _ = load_processor(recipe.model, recipe.images)
    add_extra_tokens(processor, recipe)
    torch.manual_seed(seed)  # LoRA's A is random
    model, _ = load_trainable(recipe, processor)
    run = RunDir(folder)
    if recipe.adapter.method == "pissa":
        pissa.save_start(model, pissa_start(run))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            spread = 0.2 * (parameter.std() if parameter.std() > 0 else 0.1)
            parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    save_trained(model, processor, recipe, run.adapter, start=pissa_start(run))
    write_text(run.recipe, dump_recipe(recipe))
    return Made(folder, recipe, processor)


def merged_by_peft(made: Made) -> dict[str, torch.Tensor]:
    model, _ = load_trained(made.recipe, made.run / "adapter", made.processor)
    return model.merge_and_unload().state_dict()


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].shape == weight.shape, name
        assert torch.allclose(found[name].float(), weight.float(), atol=1e-6), name


ADAPTERS = {
    "lora": {},
    "dora": {"method": "dora"},
    "rslora by part": {
        "method": "rslora",
        "rank": {"language": 4, "connector": 8},
        "alpha": {"language": 4, "connector": 16},
    },
    "pissa": {"method": "pissa"},
    "vision too": {"parts": ["language", "connector", "vision"]},
    "new tokens": {"extra_tokens": ["<price>", "<date>"]},
    "modules to save": {"modules_to_save": ["norm", "lm_head", "modality_projection"]},
}


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_a_merge_is_pefts_own_and_verifies(
    dataset: Callable[..., Path], tmp_path: Path, adapter: dict[str, Any]
) -> None:
    made = made_run(dataset(adapter=adapter), tmp_path / "run")
    done = merge(made.run, tmp_path / "merged", console=QUIET)
    assert done.likeness
    assert done.likeness.num_rows == 4
    assert done.likeness.num_tokens > 4
    assert done.asked
    assert done.asked.origin == "held-out rows"
    assert_same(loaded(tmp_path / "merged"), merged_by_peft(made))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_familys_folder_has_the_keys_and_shapes_of_its_base(
    dataset: Callable[..., Path], folder_of: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    base = folder_of(name)
    changed = {"model": {"name": str(base), "dtype": "float32"}}
    recipe = dataset(**changed)
    sections = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**sections, "images": {}}))
    made = made_run(recipe, tmp_path / "run")
    screen = StringIO()
    done = merge(made.run, tmp_path / "merged", console=Console(file=screen))
    assert done.likeness
    plain = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert (plain.chat_template is None) == ("chat template" in screen.getvalue())
    assert headers(tmp_path / "merged") == headers(base)
    assert_same(loaded(tmp_path / "merged"), merged_by_peft(made))
    written = set(done.plan.changed)
    before, after = weights(base), weights(tmp_path / "merged")
    different = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    assert different == written


def headers(folder: Path) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in weights(folder).items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def in_shards(folder: Path, num: int) -> None:
    """Deal a checkpoint's weights out to several files, as the Hub stores large ones."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(num):
        file = f"model-{number + 1:05d}-of-{num:05d}.safetensors"
        part = {key: held[key] for key in sorted(held)[number::num]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})


def test_several_files_come_out_as_they_went_in(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(Path(merging.__file__).parents[1] / "nano", base)
    in_shards(base, 5)
    made = made_run(dataset(model={"name": str(base)}), tmp_path / "run")
    merge(made.run, tmp_path / "merged", console=QUIET)
    for file in [*base.glob("*.safetensors"), base / INDEX]:
        assert (tmp_path / "merged" / file.name).is_file()
    index = read_json(tmp_path / "merged" / INDEX)
    assert index["weight_map"] == read_json(base / INDEX)["weight_map"]
    assert_same(loaded(tmp_path / "merged"), merged_by_peft(made))


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """The file is the library's own, byte for byte, of several dtypes and shapes."""
    held = {
        "b": torch.randn(3, 5),
        "a": torch.randn(2, 2).bfloat16(),
        "scalar": torch.tensor(7),
        "none": torch.zeros(0, 4),
    }
    save_file(held, tmp_path / "source", metadata={"format": "pt"})
    alive: list[weakref.ref[torch.Tensor]] = []

    def change(_: str, tensor: torch.Tensor) -> torch.Tensor:
        assert sum(each() is not None for each in alive) <= 1  # the one before, being let go of
        alive.append(weakref.ref(tensor))
        return tensor

    written = {key: (tensor.dtype, tensor.shape) for key, tensor in held.items()}
    copy_tensors(tmp_path / "source", tmp_path / "copy", written, change)
    assert len(alive) == len(held)
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "source").read_bytes()


def test_adapters_add_up_by_their_weights(dataset: Callable[..., Path], tmp_path: Path) -> None:
    recipe = dataset()
    one = made_run(recipe, tmp_path / "one", seed=1)
    other = made_run(recipe, tmp_path / "other", "adapter.rank=4", seed=2)
    merge(one.run, tmp_path / "m", weight=0.75, added=[(str(other.run), -0.5)], console=QUIET)
    base = weights(Path(merging.__file__).parents[1] / "nano")
    first, second = merged_by_peft(one), merged_by_peft(other)
    expected = {
        name: base[name] + 0.75 * (first[name] - base[name]) - 0.5 * (second[name] - base[name])
        for name in base
    }
    assert any(not torch.equal(first[name], second[name]) for name in base)
    assert_same(loaded(tmp_path / "m"), expected)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"method": "dora"}, "DoRA"),
        ({"extra_tokens": ["<price>"]}, "extra_tokens"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
    ],
)
def test_what_cannot_be_added_up_is_refused(
    dataset: Callable[..., Path], tmp_path: Path, adapter: dict[str, Any], words: str
) -> None:
    made = made_run(dataset(adapter=adapter), tmp_path / "run")
    with pytest.raises(ModelError, match=words):
        merge(made.run, tmp_path / "merged", weight=0.5, console=QUIET)
    assert not (tmp_path / "merged").exists()


def test_in_bfloat16_the_sum_is_rounded_once(dataset: Callable[..., Path], tmp_path: Path) -> None:
    made = made_run(dataset(), tmp_path / "run")
    done = merge(made.run, tmp_path / "merged", dtype="bfloat16", console=QUIET)
    assert done.likeness
    assert done.likeness.agreement >= 0.95
    exact = merged_by_peft(made)
    for key, weight in weights(tmp_path / "merged").items():
        assert torch.equal(weight, exact[key].to(torch.bfloat16)), key


def test_onto_the_plain_base_though_trained_on_four_bits(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    made = made_run(dataset(), tmp_path / "run")
    recipe = load_recipe(made.run / "recipe.yaml", ["model.quantize=nf4"])
    write_text(made.run / "recipe.yaml", dump_recipe(recipe))
    merge(made.run, tmp_path / "merged", console=QUIET)
    assert_same(loaded(tmp_path / "merged"), merged_by_peft(made))


def test_a_package_that_is_missing_is_told_of_before_anything_is_merged(
    dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_run(dataset(), tmp_path / "run")
    monkeypatch.setattr("finetune.merge.find_spec", lambda _: None)
    with pytest.raises(RecipeError, match="needs the package bitsandbytes"):
        merge(made.run, tmp_path / "merged", quantize="nf4", console=QUIET)
    assert merge(made.run, tmp_path / "m", quantize="nf4", dry_run=True, console=QUIET).plan


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_folder_loads_as_it_was_saved(
    dataset: Callable[..., Path], tmp_path: Path, quantize: str
) -> None:
    pytest.importorskip("bitsandbytes")
    made = made_run(dataset(), tmp_path / "run")
    done = merge(made.run, tmp_path / "merged", quantize=quantize, console=QUIET)
    assert done.likeness
    assert done.likeness.largest_difference < 1e-4
    assert done.quantised
    assert done.quantised.largest_difference > 1e-4
    files = list((tmp_path / "merged").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 0.8 * done.plan.num_bytes
    config = read_json(tmp_path / "merged" / "config.json")
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"


@pytest.mark.parametrize("fault", ["a weight", "a key"])
def test_a_merge_that_does_not_verify_leaves_nothing_behind(
    dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    made = made_run(dataset(), tmp_path / "run")
    stock = merging.copy_tensors
    key = "model.text_model.layers.1.mlp.down_proj.weight"

    def damaged(source: Path, out: Path, written: Any, change: Any) -> None:
        stock(source, out, written, lambda k, w: change(k, w) + (0.01 if k == key else 0))
        if fault == "a key":
            held = load_file(out)
            held["another"] = held.pop(key)
            save_file(held, out)

    monkeypatch.setattr(merging, "copy_tensors", damaged)
    with pytest.raises(ModelError, match="Nothing was kept"):
        merge(made.run, tmp_path / "merged", console=QUIET)
    assert {each.name for each in tmp_path.iterdir() if "merged" in each.name} == set()


def test_a_dry_run_plans_and_writes_nothing(dataset: Callable[..., Path], tmp_path: Path) -> None:
    made = made_run(dataset(), tmp_path / "run")
    before = set(tmp_path.rglob("*"))
    done = merge(made.run, tmp_path / "merged", dtype="bfloat16", dry_run=True, console=QUIET)
    assert set(tmp_path.rglob("*")) == before
    merge(made.run, tmp_path / "merged", dtype="bfloat16", console=QUIET)
    file = tmp_path / "merged" / "model.safetensors"
    assert 0 <= file.stat().st_size - done.plan.num_bytes < 2**16  # its header
    with safe_open(file, "pt") as opened:
        assert len(done.plan.written) == len(list(opened.keys()))
    adapted = load_trained(made.recipe, made.run / "adapter", made.processor).model
    num_adapted = sum(isinstance(module, LoraLayer) for module in adapted.modules())
    assert len(done.plan.changed) == num_adapted


def test_where_no_row_is_left_a_made_up_one_is_asked(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    made = made_run(dataset(), tmp_path / "run")
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).unlink()
    done = merge(made.run, tmp_path / "merged", console=QUIET)
    assert done.asked
    assert "made-up" in done.asked.origin
    assert done.likeness
    assert done.likeness.num_tokens > 5
    assert read_json(tmp_path / "merged" / PROOF)["verified_on"] == done.asked.origin


def test_the_folder_says_nothing_of_where_it_was_made(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    made = made_run(dataset(), tmp_path / "run")
    merge(made.run, tmp_path / "merged", console=QUIET)
    for file in (tmp_path / "merged").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter.method=full"], "whole checkpoint"),
        (["adapter.method=frozen"], "trains nothing"),
    ],
)
def test_methods_without_an_adapter_have_nothing_to_merge(
    dataset: Callable[..., Path], tmp_path: Path, overrides: list[str], words: str
) -> None:
    made = made_run(dataset(), tmp_path / "run", *overrides)
    with pytest.raises(RunDirError, match=words):
        merge(made.run, tmp_path / "merged", console=QUIET)


def test_bad_input_is_refused_before_anything_is_loaded(
    dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_run(dataset(), tmp_path / "run")
    monkeypatch.setattr(merge_verb, "Merger", None)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    settings: dict[str, Any]
    for settings, error, words in (
        ({"out": tmp_path / "taken"}, RunDirError, "is there already"),
        ({"dtype": "int4"}, RecipeError, "--dtype"),
        ({"quantize": "gptq"}, RecipeError, "--quantize"),
        ({"added": [(str(tmp_path / "none"), 1.0)]}, RunDirError, "no such run"),
    ):
        given: dict[str, Any] = {"out": tmp_path / "merged", "console": QUIET, **settings}
        with pytest.raises(error, match=words):
            merge(made.run, **given)
    result = CliRunner().invoke(
        app, ["merge", str(made.run), "--out", "x", "--add", f"{made.run}=much"]
    )
    assert isinstance(result.exception, RecipeError)


def test_a_full_disk_is_told_before(
    dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_run(dataset(), tmp_path / "run")
    full = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(RunDirError, match=r"GiB free"):
        merge(made.run, tmp_path / "merged", console=QUIET)


def test_an_adapter_of_another_base_is_refused(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    made = made_run(dataset(), tmp_path / "run")
    base = tmp_path / "base"
    shutil.copytree(Path(merging.__file__).parents[1] / "nano", base)
    other = made_run(dataset(model={"name": str(base)}), tmp_path / "other")
    with pytest.raises(ModelError, match="one base"):
        merge(made.run, tmp_path / "merged", added=[(str(other.run), 1.0)], console=QUIET)
