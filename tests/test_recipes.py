"""The shipped recipes of whole models: what they say of themselves, and a dry run of each on a tiny
model of its family.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.main import get_command

from finetune.cli import app
from finetune.plan import plan
from finetune.recipe import Recipe, load_recipe, recipe_warnings
from finetune.recipe.files import recipes_dir, shipped_recipes
from finetune.train import train
from tests.conftest import chat_row, noise, write_rows
from tests.families import CHECKPOINTS

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples" / "data"

# Model on the Hub -> the tiny checkpoint that stands for it
STAND_INS = {
    "HuggingFaceM4/idefics2-8b": "idefics2-8b",
    "HuggingFaceM4/idefics2-8b-base": "idefics2-8b-base",
    "HuggingFaceM4/idefics2-8b-chatty": "idefics2-8b",
    "llava-hf/llava-1.5-7b-hf": "llava-1.5-7b",
    "TIGER-Lab/Mantis-8B-clip-llama3": "mantis-8b-clip",
    "TIGER-Lab/Mantis-8B-siglip-llama3": "mantis-8b-siglip",
    "meta-llama/Llama-3.2-11B-Vision-Instruct": "llama-3.2-11b-vision",
    "HuggingFaceM4/idefics-9b-instruct": "idefics-9b-instruct",
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": "smolvlm2-2.2b",
}
# Format of a Hub data set -> an entry with rows of that shape
SAME_SHAPE = {
    "docvqa": {"path": "docvqa.parquet"},
    "cord": {"path": "cord"},
    "textvqa": {"path": "textvqa/rows.json"},
    "chartqa": {"path": "chartqa/rows.json", "image_root": "chartqa/png"},
}

OF_NANO = ("quickstart", "nano/", "findings/")
NAMES = [name for name in shipped_recipes() if not name.startswith(OF_NANO)]
each_recipe = pytest.mark.parametrize("name", NAMES)


def shipped(name: str) -> Recipe:
    return load_recipe(name, check_paths=False)


def opening(name: str) -> list[str]:
    """The comment that a recipe opens with, below the schema; a command over two lines as one."""
    text = shipped_recipes()[name].read_text(encoding="utf-8").replace("\\\n#  ", "")
    lines = text.partition("\n\n")[0].splitlines()[1:]
    assert all(line.startswith("#") for line in lines)
    return [line.removeprefix("#").strip() for line in lines]


def commands(name: str) -> list[str]:
    """The lines of the first paragraph."""
    lines = opening(name)[1:]
    return lines[: lines.index("")]


def prose(name: str) -> str:
    lines = opening(name)[1:]
    return " ".join(lines[lines.index("") + 1 :])


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint, saved once. Its weights are taken away: neither a dry run
    nor a plan may need them.
    """
    saved: dict[str, Path] = {}

    def save(checkpoint: str) -> Path:
        if checkpoint not in saved:
            saved[checkpoint] = tmp_path_factory.mktemp(checkpoint)
            CHECKPOINTS[checkpoint].save_tiny(saved[checkpoint])
            for weights in saved[checkpoint].glob("*.safetensors"):
                weights.unlink()
        return saved[checkpoint]

    return save


@pytest.fixture
def tiny(tmp_path: Path, tiny_of: Callable[[str], Path]) -> Callable[[str], Recipe]:
    """A shipped recipe on the tiny model of its family; a few rows stand in for the user's, and for
    those of the Hub some of the same shape. All else is the recipe's own.
    """

    def load(name: str) -> Recipe:
        recipe = shipped(name)
        data = {part: list(map(of_entry, getattr(recipe.data, part))) for part in ("train", "eval")}
        overrides = {
            "model.name": str(tiny_of(STAND_INS[recipe.model.name])),
            "data.train": data["train"],
            "data.eval": data["eval"],
            "output.dir": str(tmp_path / "run"),
        }
        return load_recipe(name, [f"{key}={inline(value)}" for key, value in overrides.items()])

    def of_entry(source: Any) -> dict[str, str]:
        if source.hub:
            entry = {key: str(EXAMPLES / file) for key, file in SAME_SHAPE[source.format].items()}
            return {**entry, "format": source.format}
        return {"path": str(own_rows(Path(source.path).name))}

    def own_rows(file: str) -> Path:
        rows = []
        for i, size in enumerate(((90, 60), (40, 130), (64, 64))):
            picture = f"{Path(file).stem}{i}.png"
            noise(*size, seed=i).save(tmp_path / picture)
            rows.append(chat_row("What is it?", "A cat.", picture))
        write_rows(tmp_path / file, rows)
        return tmp_path / file

    return load


def inline(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n")


@pytest.fixture
def silent() -> Console:
    return Console(quiet=True)


# What they say of themselves


def test_every_model_of_a_recipe_has_a_tiny_one_that_stands_for_it() -> None:
    assert {shipped(name).model.name for name in NAMES} == set(STAND_INS)


@each_recipe
def test_a_recipe_opens_with_download_check_plan_and_train_of_itself(name: str) -> None:
    recipe, lines = shipped(name), commands(name)
    hubs = {source.hub for source in (*recipe.data.train, *recipe.data.eval) if source.hub}
    memory = name.rpartition("x")[2].upper()
    downloads = [line for line in lines if line.startswith("hf download ")]
    assert downloads[0].split()[2] == recipe.model.name
    assert downloads[1:] == [f"hf download {hub} --repo-type dataset" for hub in sorted(hubs)]
    assert lines[-3:-1] == [f"finetune check {name}", f"finetune plan {name} --gpu {memory}"]
    num_gpus = int(name.rpartition("-")[2].partition("x")[0])
    launched = lines[-1].removesuffix(f" train {name}")
    if num_gpus == 1:
        assert launched == "finetune"
    else:
        assert re.search(rf"(--nproc_per_node|--num_processes) {num_gpus} .*-m finetune$", launched)


def test_the_commands_are_ones_that_the_program_has() -> None:
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    for name in NAMES:
        for line in commands(name):
            if found := re.search(r"\bfinetune (\w+) ", line):
                assert found[1] in verbs


@each_recipe
def test_a_recipe_says_where_its_numbers_come_from_and_what_was_not_run(name: str) -> None:
    text = prose(name)
    assert "Numbers: " in text
    gpus, _, memory = name.rpartition("-")[2].partition("x")
    card = f"{gpus} x {memory[:-2]} GB" if gpus != "1" else f"{memory[:-2]} GB"
    assert f"Planned for {card}, not yet run on one." in text


@each_recipe
def test_the_table_has_a_recipe_s_hardware_and_no_figure_that_was_not_measured(name: str) -> None:
    table = (recipes_dir() / "README.md").read_text(encoding="utf-8")
    (line,) = (line for line in table.splitlines() if f"({name}.yaml)" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    gpus, _, memory = name.rpartition("-")[2].partition("x")
    assert cells[3].startswith(f"{gpus} x {memory[:-2]} GB")
    adapter = shipped(name).adapter
    assert adapter.method == "full" or f"r={adapter.rank}" in cells[2]
    assert cells[4:] == ["", "", ""]


@each_recipe
def test_a_recipe_does_what_its_name_says(name: str) -> None:
    recipe = shipped(name)
    first = name.partition("/")[2].rsplit("-", 1)[0]
    methods = {"lora": "lora", "dora": "dora", "qlora": "lora", "full": "full"}
    assert recipe.adapter.method == methods.get(first, "lora")
    formats = {source.format for source in recipe.data.train if source.hub}
    assert all(first.startswith(each) for each in formats)
    is_small = name.endswith("24gb")
    assert recipe.model.quantize == ("nf4" if is_small else "none")


@each_recipe
def test_no_setting_of_a_shipped_recipe_is_idle(name: str) -> None:
    assert recipe_warnings(shipped(name)) == []


def test_no_two_recipes_write_into_the_same_run() -> None:
    folders = [shipped(name).output.dir for name in shipped_recipes()]
    assert len(set(folders)) == len(folders)


def test_eight_cards_take_as_many_rows_a_step_as_one() -> None:
    def rows_a_step(name: str, num_devices: int) -> int:
        training = shipped(name).training
        assert training.batch_size
        return training.batch_size * training.gradient_accumulation * num_devices

    assert rows_a_step("idefics2-8b/lora-8x80gb", 8) == rows_a_step("idefics2-8b/lora-1x80gb", 1)


# Whether they run


@each_recipe
def test_a_recipe_dry_runs_on_a_tiny_model_of_its_family(
    name: str, tiny: Callable[[str], Recipe], silent: Console, tmp_path: Path
) -> None:
    assert train(tiny(name), name, dry_run=True, console=silent, results=silent) == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@each_recipe
def test_a_recipe_is_planned_without_weights(
    name: str, tiny: Callable[[str], Recipe], silent: Console
) -> None:
    recipe = tiny(name)
    planned = plan(recipe, console=silent).plan
    parameters = planned.parameters
    assert parameters.total == parameters.vision + parameters.connector + parameters.language
    assert parameters.trainable > 0
    assert planned.steps > 0
    assert planned.worst.memory.peak_bytes > planned.worst.memory.terms["weights"] > 0


@pytest.mark.slow
def test_recipes_copied_out_of_an_installed_wheel_are_the_shipped_ones(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel]
    subprocess.run(pip, check=True)
    for number, name in enumerate(NAMES):
        copy = tmp_path / f"{number}.yaml"
        subprocess.run(
            [sys.executable, "-m", "finetune", "recipes", "copy", name, copy],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(site)},
            check=True,
        )
        first = copy.read_text(encoding="utf-8").splitlines()[0]
        schema = Path(first.partition("$schema=")[2])
        assert schema.is_relative_to(site)
        assert schema.is_file()
        assert load_recipe(copy, check_paths=False) == shipped(name)
