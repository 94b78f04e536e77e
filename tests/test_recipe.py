import os
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune.errors import RecipeError
from finetune.recipe import (
    METRICS,
    Recipe,
    dump_recipe,
    load_recipe,
    recipe_warnings,
    recipes_dir,
    shipped_recipes,
)
from finetune.recipe import docs as recipe_docs
from finetune.recipe.fields import Optimizer, Scheduler

SMALL = """\
model:
  name: nano
data:
  train:
    - path: train.jsonl
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with rows to train on and to judge by."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text("{}\n")
    return tmp_path


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, *overrides: str, text: str = SMALL) -> Recipe:
    return load_recipe(write(folder, text), overrides)


def refusal(source: str | Path, *overrides: str, **options: Any) -> list[str]:
    """The lines of the message."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides, **options)
    return str(caught.value).splitlines()


def problems(folder: Path, *overrides: str, text: str = SMALL) -> list[str]:
    """The problems alone, without the title."""
    title, *lines = refusal(write(folder, text), *overrides)
    assert title.endswith(f": {len(lines)} problem" + ("" if len(lines) == 1 else "s"))
    return [line.removeprefix("  ") for line in lines]


# Names and values


def test_two_keys_are_enough_and_the_rest_are_defaults(folder: Path):
    recipe = load(folder)
    assert recipe.model.name == "nano"
    assert recipe.data.train[0].path == str(folder / "train.jsonl")
    assert set(recipe.images.model_dump().values()) == {None}  # the checkpoint's own
    assert (recipe.adapter.method, recipe.adapter.rank) == ("lora", 8)
    assert recipe.adapter.parts == ("language", "connector")
    assert (recipe.training.epochs, recipe.training.max_steps) == (1, None)
    assert recipe.training.learning_rate == 1e-4


def test_a_recipe_cannot_be_changed_after_loading(folder: Path):
    recipe = load(folder)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.adapter.rank = 16  # pyright: ignore[reportAttributeAccessIssue]


def test_a_misspelt_key_is_refused_and_the_right_one_named(folder: Path):
    assert problems(folder, "adapter.rnk=8") == ["adapter.rnk: unknown key; did you mean 'rank'?"]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("adaptor", "did you mean 'adapter'?"),
        ("data.train.0.paht", "did you mean 'path'?"),
        ("adapter.learning_rate", "'learning_rate' belongs under training"),
        ("data.batch_size", "'batch_size' belongs under training or evaluation"),
        ("rank", "'rank' belongs under adapter"),
        ("lora_r", "here it is called adapter.rank"),
        ("training.per_device_train_batch_size", "here it is called training.batch_size"),
        ("learning_rat", "did you mean 'training.learning_rate'?"),
        ("output.xyzzy", "known here: dir, trackers"),
    ],
)
def test_an_unknown_key_comes_with_the_best_hint(folder: Path, key: str, hint: str):
    assert problems(folder, f"{key}=8") == [f"{key}: unknown key; {hint}"]


def test_a_dotted_key_in_the_file_is_told_its_section(folder: Path):
    assert problems(folder, text=SMALL + "adapter.rank: 8\n") == [
        "adapter.rank: unknown key; 'rank' belongs under adapter"
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("adapter.rank=eight", "expected a whole number, found 'eight'"),
        ("adapter.rank=8.5", "expected a whole number, found 8.5"),
        ("adapter.rank=true", "expected a whole number, found true"),
        ("adapter.rank=", "expected a whole number, found nothing"),
        ("adapter.rank=0", "must be at least 1, found 0"),
        ("adapter.rank=[8]", "expected a whole number, found a list"),
        ("adapter.alpha=true", "expected a number, found true"),
        ("adapter.dropout=1", "must be less than 1, found 1"),
        ("training.weight_decay=.nan", "expected a finite number, found nan"),
        ("training.learning_rate=0", "must be more than 0, found 0"),
        ("training.learning_rate=fast", "expected a number, found 'fast'"),
        ("training.packing=1", "expected true or false, found 1"),
        (
            "training.vision_cache=20 apples",
            "expected off or a size such as 20GiB, found '20 apples'",
        ),
        ("training.vision_cache=true", "expected off or a size such as 20GiB, found true"),
        ("training.vision_cache=0GiB", "expected off or a size such as 20GiB, found '0GiB'"),
        ("model.revision=123", "expected text, found 123; put it in quotes"),
        ("model.name=", "expected text, found nothing"),
        ("model.name=' '", "expected a line of text, found ' '"),
        ("model.quantize=NF4", "expected one of none, nf4, int8, found 'NF4'; did you mean 'nf4'?"),
        ("training.share_images=maybe", "expected auto or off, found 'maybe'"),
        ("adapter.parts=[]", "is empty; give at least one"),
        ("adapter.parts=[vision, vision]", "'vision' is given twice; keep one"),
        ("evaluation.metrics=[]", "is empty; give at least one"),
        ("data.train=[]", "is empty; give at least one"),
        ("training=[]", "expected a mapping (key: value), found a list"),
    ],
)
def test_a_wrong_value_is_refused_in_plain_words(folder: Path, override: str, problem: str):
    key = override.partition("=")[0].removesuffix(".x")
    assert problems(folder, override) == [f"{key}: {problem}"]


def test_an_unknown_part_is_refused_with_its_place_and_the_nearest_one(folder: Path):
    assert problems(folder, "adapter.parts=[language, visoin]") == [
        "adapter.parts.1: expected one of language, connector, vision, found 'visoin'; "
        "did you mean 'vision'?"
    ]


def test_a_list_is_asked_for_where_one_word_was_given(folder: Path):
    assert problems(folder, "adapter.parts=language") == [
        "adapter.parts: expected a list (each entry on a line of its own after '- ', or [a, b]), "
        "found 'language'"
    ]


@pytest.mark.parametrize(
    ("edge_px", "use"), [(1500, "1498 or 1512"), (10, "14"), (15, "14 or 28"), (979, "966 or 980")]
)
def test_an_edge_off_the_patch_grid_is_refused_with_its_neighbours(
    folder: Path, edge_px: int, use: str
):
    assert problems(folder, f"images.longest_edge_px={edge_px}") == [
        f"images.longest_edge_px: {edge_px} is not a multiple of the patch size 14; use {use}"
    ]


def test_no_message_shows_pydantic_jargon(folder: Path):
    text = "model: 3\ndata: {train: {a: 1}, eval: 2}\nimages: [1]\n1: 2\noutput: {dir: [x]}\n"
    message = "\n".join(problems(folder, text=text))
    for jargon in ("Input should", "valid", "type=", "Extra", "pydantic", "Value error", "tuple"):
        assert jargon not in message


def test_missing_keys_are_named_with_what_they_mean(folder: Path):
    assert problems(folder, text="adapter: {rank: 4}\n") == [
        "model.name: is missing; expected: Hub id, local folder, or nano "
        "(the small model that comes with the package)",
        "data.train: is missing; expected: Where the rows to train on come from",
    ]


def test_all_problems_are_reported_at_once(folder: Path):
    text = """\
model: {name: nano, quantize: nf4}
images: {longest_edge_px: 1500}
adapter: {rnk: 8, method: full}
data:
  train: [{path: trian.jsonl}]
training: {seed: 1, seed: 2, epochs: 1, max_steps: 5}
"""
    found = refusal(write(folder, text), "output.dri=x", "nonsense")
    assert found[0] == f"{folder / 'mine.yaml'}: 8 problems"
    assert [line.strip().partition(": ")[0] for line in found[1:]] == [
        "line 6",
        "'nonsense' is no override; write KEY=VALUE, such as adapter.rank=16",
        "images.longest_edge_px",
        "adapter.rnk",
        "adapter.method",
        "data.train.0.path",
        "training.max_steps",
        "output.dri",
    ]


def test_settings_that_exclude_each_other_are_not_blamed_on_a_broken_one(folder: Path):
    found = problems(folder, "model.quantize=nf5", "adapter.method=full")
    assert [line.partition(":")[0] for line in found] == ["model.quantize"]


# The traps of YAML


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "'1e-4'", "0.0001", "1E-4"])
def test_a_learning_rate_is_a_number_with_or_without_a_dot(folder: Path, written: str):
    assert load(folder, f"training.learning_rate={written}").training.learning_rate == 1e-4


@pytest.mark.parametrize("written", ["off", "Off", "false", "none", "'off'", ""])
def test_off_is_off_however_yaml_reads_it(folder: Path, written: str):
    recipe = load(
        folder,
        f"training.vision_cache={written}",
        f"training.share_images={written}",
        f"model.quantize={written}",
    )
    assert recipe.training.vision_cache == recipe.training.share_images == "off"
    assert recipe.training.vision_cache_bytes is None
    assert recipe.model.quantize == "none"


@pytest.mark.parametrize(
    ("written", "num_bytes"),
    [("20GiB", 20 * 2**30), ("1.5 TB", 1_500_000_000_000), ("3mib", 3 * 2**20)],
)
def test_a_cache_size_is_read_in_its_unit(folder: Path, written: str, num_bytes: int):
    assert load(folder, f"training.vision_cache={written}").training.vision_cache_bytes == num_bytes


def test_a_key_given_twice_is_refused_with_both_lines(folder: Path):
    text = SMALL + "training:\n  seed: 1\n  epochs: 2\n  seed: 3\n"
    assert problems(folder, text=text) == [
        "line 9: 'seed' is given twice, first on line 7; keep one"
    ]


def test_merge_keys_may_repeat_what_they_merge(folder: Path):
    text = """\
model: {name: nano}
data:
  train:
    - &rows {path: train.jsonl, weight: 2}
  eval:
    - {<<: *rows, path: eval.jsonl}
"""
    recipe = load(folder, text=text)
    assert recipe.data.eval[0].path == str(folder / "eval.jsonl")
    assert recipe.data.eval[0].weight == 2


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("model:\n  name: [nano\n", "line 3, column 1: is not YAML: "),
        ("model:\n\tname: nano\n", "line 2, column 1: a tab; YAML is indented with spaces"),
        ("model:\n  name: n\x07o\n", "line 2: holds a character that YAML does not allow"),
        ("output: {dir: 2025-13-01}\n", "is not usable YAML (month must be in 1..12)"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: is not YAML: "),
        ("", "is empty; expected at least model.name and data.train"),
        ("# only a comment\n", "is empty; "),
        ("- a\n- b\n", "expected sections such as 'model:' and 'data:'"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(folder: Path, text: str, start: str):
    (problem,) = problems(folder, text=text)
    assert problem.startswith(start)


def test_a_section_with_all_its_lines_commented_out_is_a_default_section(folder: Path):
    recipe = load(folder, text=SMALL + "  eval:\ntraining:\n  # seed: 3\n")
    assert recipe.training.seed == 0
    assert recipe.data.eval == ()


# The file itself


def test_a_missing_file_comes_with_the_nearest_one_and_the_shipped_names(folder: Path):
    write(folder, SMALL)
    (line,) = refusal("mien.yaml")
    assert line.startswith("mien.yaml: no such file; did you mean 'mine.yaml'?; shipped recipes: ")


def test_a_folder_is_refused_with_the_recipes_in_it(folder: Path):
    write(folder, SMALL, "mine/a.yaml")
    assert refusal("mine") == [
        "mine: is a folder; expected a recipe file; name one of its files: a.yaml"
    ]


def test_text_in_another_encoding_is_refused(folder: Path):
    (folder / "mine.yaml").write_bytes(b"model: {name: caf\xe9}\n")
    assert refusal("mine.yaml") == [
        "mine.yaml: is not UTF-8 text (byte 0xe9 at 17); save it as UTF-8"
    ]


def test_a_byte_order_mark_does_no_harm(folder: Path):
    (folder / "mine.yaml").write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert load_recipe("mine.yaml").model.name == "nano"


def test_a_shipped_recipe_is_found_by_name_and_a_misspelt_name_is_helped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    write(folder, SMALL, "shipped/nano/digits.yaml")
    monkeypatch.setattr("finetune.recipe.files.recipes_dir", lambda: folder / "shipped")
    assert shipped_recipes() == {"nano/digits": folder / "shipped/nano/digits.yaml"}
    assert load_recipe("nano/digits").model.name == "nano"
    assert "did you mean 'nano/digits'?; shipped recipes: nano/digits" in refusal("digits")[0]


# Overrides


def test_a_later_override_wins_and_yaml_is_read_in_it(folder: Path):
    recipe = load(
        folder,
        "adapter.rank=4",
        "adapter.rank=16",
        "adapter.parts=[vision]",
        "output.dir=runs/a=b",
        "data.eval.0.path=eval.jsonl",
        "data.train.0.weight=3",
    )
    assert recipe.adapter.rank == 16
    assert recipe.adapter.parts == ("vision",)
    assert recipe.output.dir == "runs/a=b"
    assert recipe.data.eval[0].path == str(folder / "eval.jsonl")
    assert recipe.data.train[0].weight == 3


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("adapter.rank", "'adapter.rank' is no override; write KEY=VALUE, such as adapter.rank=16"),
        ("=3", "'=3' is no override; write KEY=VALUE, such as adapter.rank=16"),
        (
            "data.train.2.path=x",
            "data.train.2.path: data.train is a list of 1 entry, numbered from 0; found '2'",
        ),
        (
            "data.train.path=x",
            "data.train.path: data.train is a list of 1 entry, numbered from 0; found 'path'",
        ),
        ("model.name.x=1", "model.name.x: model.name is 'nano', with no keys below it"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(folder: Path, override: str, problem: str):
    assert problems(folder, override) == [problem]


def test_max_steps_on_the_command_line_replaces_epochs_of_the_file(folder: Path):
    text = SMALL + "training: {epochs: 3}\n"
    training = load(folder, "training.max_steps=5", text=text).training
    assert (training.epochs, training.max_steps) == (None, 5)
    both = problems(folder, "training.max_steps=5", "training.epochs=2", text=text)
    assert both == ["training.max_steps: set either max_steps or epochs, not both"]


# Settings that must fit together


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["model.quantize=nf4", "adapter.method=full"], "adapter.method", "nf4 freezes"),
        (["model.quantize=int8", "adapter.method=pissa"], "adapter.method", "int8 rounds"),
        (
            ["model.quantize=int8", "adapter.method=dora"],
            "adapter.method",
            "set model.quantize: nf4, or adapter.method: lora",
        ),
        (
            ["adapter.parts=[vision]", "training.vision_cache=1GiB"],
            "training.vision_cache",
            "change at every step",
        ),
        (
            ["images.longest_edge_px=364", "images.shortest_edge_px=378"],
            "images.shortest_edge_px",
            "378 is more than",
        ),
        (["training.epochs="], "training.epochs", "set epochs or max_steps"),
        (
            ["training.learning_rate={language: 1e-4, connector: 1e-4, vision: 1e-5}"],
            "training.learning_rate",
            "names vision, which is not trained",
        ),
        (
            ["training.learning_rate={language: 1e-4}"],
            "training.learning_rate",
            "has no rate for connector, which is trained",
        ),
        (["adapter.rank={language: 8}"], "adapter.rank", "has no rank for connector"),
        (
            ["adapter.alpha={language: 8, connector: 8, vision: 1}"],
            "adapter.alpha",
            "names vision, which is not trained",
        ),
        (["adapter.method=frozen"], "adapter.method", "there is nothing to judge either"),
        (
            ["adapter={method: full, parts: [vision], extra_tokens: [x]}"],
            "adapter.extra_tokens",
            "add language to adapter.parts",
        ),
        (
            [
                "adapter={parts: [connector], extra_tokens: [x]}",
                "training.learning_rate={connector: 1e-4}",
            ],
            "adapter.extra_tokens",
            "training.learning_rate has no rate for; give one rate for all",
        ),
        (
            ["training.optimizer=galore_adamw"],
            "training.optimizer",
            "cheaper, which adapter.method: lora does not do",
        ),
        (
            ["training.loss_kernel=liger", "adapter.extra_tokens=[x]"],
            "training.loss_kernel",
            "trains beside it for adapter.extra_tokens",
        ),
        (
            ["training.loss_kernel=liger", "adapter.modules_to_save=[lm_head]"],
            "training.loss_kernel",
            "trains beside it for adapter.modules_to_save",
        ),
        (["training.optimizer=lomo"], "training.optimizer", "cannot gather gradients"),
        (
            [
                "training.optimizer=adalomo",
                "training.gradient_accumulation=1",
                "training.lora_plus_ratio=16",
            ],
            "training.optimizer",
            "has one rate for all weights",
        ),
        (
            ["model.attention=flash_attention_2", "model.dtype=float32"],
            "model.attention",
            "cannot work in float32",
        ),
        (["data.train.0.hub=user/name"], "data.train.0", "set either path or hub, not both"),
        (["data.train=[{format: chat}]"], "data.train.0", "set either path or hub"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    folder: Path, overrides: list[str], key: str, words: str
):
    (problem,) = problems(folder, *overrides)
    assert problem.startswith(f"{key}: ")
    assert words in problem


def test_a_recipe_built_in_python_is_checked_as_a_whole_too():
    with pytest.raises(ValidationError, match="378 is more than"):
        Recipe.model_validate(
            {
                "model": {"name": "nano"},
                "data": {"train": [{"hub": "user/name"}]},
                "images": {"longest_edge_px": 14, "shortest_edge_px": 378},
            }
        )


def test_a_learning_rate_may_be_given_by_part(folder: Path):
    recipe = load(folder, "training.learning_rate={language: 1e-4, connector: 2e-4}")
    assert recipe.training.learning_rate == {"language": 1e-4, "connector": 2e-4}
    (problem,) = problems(folder, "training.learning_rate={languge: 1e-4}")
    assert problem.startswith("training.learning_rate.languge: expected one of language, ")


def test_rank_and_alpha_may_be_given_by_part(folder: Path):
    adapter = load(
        folder,
        "adapter.rank={language: 8, connector: 32}",
        "adapter.alpha={language: 16, connector: 1e1}",
    ).adapter
    assert adapter.rank == {"language": 8, "connector": 32}
    assert adapter.alpha == {"language": 16, "connector": 10}
    (problem,) = problems(folder, "adapter.rank={language: 8, conector: 4}")
    assert problem.startswith("adapter.rank.conector: expected one of language, ")
    (problem,) = problems(folder, "adapter.rank={language: 8, connector: 0.5}")
    assert problem == "adapter.rank.connector: expected a whole number, found 0.5"


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (
            ["adapter.method=full", "training.lora_plus_ratio=16"],
            "training.lora_plus_ratio has no effect with adapter.method: full, which has no "
            "matrices A and B",
        ),
        (
            ["adapter.method=full", "adapter.modules_to_save=[lm_head]"],
            "adapter.modules_to_save has no effect with adapter.method: full; name their part in "
            "parts",
        ),
        (
            [
                "adapter.method=frozen",
                "data.eval.0.path=eval.jsonl",
                "adapter.extra_tokens=[x]",
            ],
            "adapter.extra_tokens has no effect with adapter.method: frozen",
        ),
        (
            ["adapter.method=frozen", "data.eval.0.path=eval.jsonl", "training.neftune_alpha=5"],
            "training.neftune_alpha has no effect with adapter.method: frozen, which trains "
            "nothing",
        ),
        (
            ["adapter.method=pissa"],
            "adapter.dropout with adapter.method: pissa leaves out the strongest directions of the "
            "model's own weights at random; set adapter.dropout: 0",
        ),
        (
            ["training.optimizer=adalomo", "training.gradient_accumulation=1"],
            "training.optimizer: adalomo leaves its state out of checkpoints: a resumed run does "
            "not end as an unbroken one",
        ),
        (
            ["adapter.method=full", "adapter.rank=8"],
            "adapter.rank has no effect with adapter.method: full",
        ),
        (
            ["model.revision=main"],
            "model.revision has no effect with model.name: nano, which is not on the Hub",
        ),
        (["data.train.0.split=train"], "data.train.0.split has no effect on a path, only with hub"),
        (
            ["data.eval.0={path: eval.jsonl, weight: 2}"],
            "data.eval.0.weight has no effect on held-out rows",
        ),
        (
            ["data.eval.0.path=train.jsonl"],
            "data.eval.0 is the same as data.train.0: its rows are trained on, not held out",
        ),
        ([], "data.eval is empty: the result will not be judged"),
        (
            ["evaluation.max_rows=3"],
            "evaluation.* has no effect without data.eval: there are no held-out rows to judge",
        ),
    ],
)
def test_a_setting_without_effect_is_warned_of(folder: Path, overrides: list[str], warning: str):
    assert warning in recipe_warnings(load(folder, *overrides))


def test_defaults_are_never_warned_of(folder: Path):
    assert recipe_warnings(load(folder, "data.eval.0.path=eval.jsonl", "adapter.method=full")) == []


# Paths


def test_data_is_found_from_the_current_folder_or_beside_the_recipe(folder: Path):
    write(folder, "{}", "recipes/near.jsonl")
    recipe = load_recipe(
        write(folder, SMALL, "recipes/mine.yaml"), ["data.train.1.path=near.jsonl"]
    )
    assert [source.path for source in recipe.data.train] == [
        str(folder / "train.jsonl"),
        str(folder / "recipes/near.jsonl"),
    ]


def test_a_path_that_means_two_files_is_refused_and_both_are_named(folder: Path):
    twin = write(folder, "{}", "recipes/train.jsonl")
    (_, problem) = refusal(write(folder, SMALL, "recipes/mine.yaml"))
    assert f"is two files: {folder / 'train.jsonl'} and {twin}; write the one meant" in problem


def test_a_link_to_the_same_file_is_one_file_and_keeps_its_name(folder: Path):
    (folder / "recipes").mkdir()
    (folder / "recipes/train.jsonl").symlink_to(folder / "train.jsonl")
    (folder / "blob").write_text("{}")
    (folder / "linked.jsonl").symlink_to(folder / "blob")
    source = write(folder, SMALL, "recipes/mine.yaml")
    recipe = load_recipe(source, ["data.train.1.path=linked.jsonl"])
    assert [Path(str(entry.path)).name for entry in recipe.data.train] == [
        "train.jsonl",
        "linked.jsonl",
    ]


def test_missing_data_is_refused_with_the_places_searched_and_the_nearest_name(folder: Path):
    source = write(folder, SMALL, "recipes/mine.yaml")
    assert refusal(source, "data.train.0.path=trian.jsonl")[1:] == [
        f"  data.train.0.path: 'trian.jsonl': no such file; looked in {folder} and "
        f"{folder / 'recipes'}; did you mean 'train.jsonl'?"
    ]


def test_missing_data_may_be_let_pass(folder: Path):
    source = write(folder, SMALL + "    - path: elsewhere.jsonl\n")
    train = load_recipe(source, check_paths=False).data.train
    assert [entry.path for entry in train] == [str(folder / "train.jsonl"), "elsewhere.jsonl"]


@pytest.mark.parametrize("path", ["x" * 5000, "~nobody-here/x", "a\\0b", "\\u0007"])
def test_an_odd_path_is_refused_like_any_other(folder: Path, path: str):
    assert any(
        "data.train.0.path" in line for line in problems(folder, f'data.train.0.path="{path}"')
    )


def test_a_model_folder_becomes_absolute_and_a_hub_id_stays(folder: Path):
    (folder / "models/mine").mkdir(parents=True)
    assert load(folder, "model.name=models/mine").model.name == str(folder / "models/mine")
    assert load(folder, "model.name=./models/mine").model.name == str(folder / "models/mine")
    hub_id = "HuggingFaceM4/idefics2-8b"
    assert load(folder, f"model.name={hub_id}").model.name == hub_id


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./models/mien", "no such folder; did you mean 'mine'?"),
        ("/nowhere/at/all", "no such folder"),
        ("~nobody-here/x", "no such folder"),
        ("train.jsonl", "is a file; name the folder that holds config.json"),
        ("a/b/c", "is neither a folder here nor a Hub id"),
    ],
)
def test_a_model_that_is_nowhere_is_refused(folder: Path, name: str, words: str):
    (folder / "models/mine").mkdir(parents=True)
    (problem,) = problems(folder, f"model.name={name}")
    assert problem.startswith("model.name: ")
    assert words in problem


# Writing it back

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda text: text.isprintable() and text.strip() != ""
)
numbers = st.floats(1e-12, 1e12)
sections = {
    "model": st.fixed_dictionaries(
        {"name": st.just("nano")},
        optional={"revision": texts, "quantize": st.sampled_from(["none", "nf4"])},
    ),
    "adapter": st.fixed_dictionaries(
        {},
        optional={
            "rank": st.integers(1, 999)
            | st.fixed_dictionaries(
                {"language": st.integers(1, 99), "connector": st.integers(1, 99)}
            ),
            "alpha": numbers | st.fixed_dictionaries({"language": numbers, "connector": numbers}),
            "dropout": st.floats(0, 0.99),
            "extra_tokens": st.lists(texts, unique=True, max_size=3),
        },
    ),
    "data": st.fixed_dictionaries(
        {"train": st.just([{"hub": "user/name", "split": "yes"}])},
        optional={"bad_rows": st.sampled_from(["stop", "skip"])},
    ),
    "training": st.one_of(
        st.fixed_dictionaries({"max_steps": st.integers(1, 10**6)}),
        st.fixed_dictionaries(
            {},
            optional={
                "epochs": numbers,
                "learning_rate": numbers
                | st.fixed_dictionaries({"language": numbers, "connector": numbers}),
                "vision_cache": st.sampled_from(["off", "20GiB", "1.5 TB"]),
                "share_images": st.sampled_from(["auto", "off"]),
            },
        ),
    ),
    "evaluation": st.fixed_dictionaries(
        {},
        optional={"metrics": st.permutations(METRICS), "max_rows": st.none() | st.integers(1, 99)},
    ),
    "output": st.fixed_dictionaries({}, optional={"dir": texts}),
}


@given(st.fixed_dictionaries(sections))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_written_recipe_reads_back_the_same(tmp_path: Path, raw: dict[str, Any]):
    recipe = Recipe.model_validate(raw)
    source = write(tmp_path, dump_recipe(recipe))
    assert load_recipe(source, check_paths=False) == recipe


def test_a_written_recipe_works_from_any_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "run").mkdir()
    recipe = load(folder)
    source = write(folder, dump_recipe(recipe), "run/recipe.yaml")
    monkeypatch.chdir("/")
    assert load_recipe(source) == recipe


def test_a_written_recipe_has_every_key_in_the_order_of_the_documentation(folder: Path):
    written = yaml.safe_load(dump_recipe(load(folder)))
    assert list(written) == list(Recipe.model_fields)
    assert list(written["training"])[:3] == ["epochs", "max_steps", "logging_steps"]


@given(
    st.text(string.printable, max_size=60)
    | st.binary(max_size=40).map(lambda b: b.decode("latin-1"))
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_text_at_all_is_a_recipe_error_at_worst(tmp_path: Path, text: str):
    with pytest.raises(RecipeError):
        load_recipe(write(tmp_path, text))


# What is shipped


def test_every_shipped_recipe_loads():
    for name in shipped_recipes():
        load_recipe(name, check_paths=False)


def test_every_shipped_recipe_points_editors_to_the_schema():
    schema = recipes_dir() / "schema.json"
    assert schema.is_file()
    for name, path in shipped_recipes().items():
        relative = Path(os.path.relpath(schema, path.parent)).as_posix()
        first_line = path.read_text(encoding="utf-8").splitlines()[0]
        assert first_line == f"# yaml-language-server: $schema={relative}", name


def test_every_shipped_recipe_stands_in_the_table():
    table = (recipes_dir() / "README.md").read_text(encoding="utf-8")
    for name in shipped_recipes():
        assert f"[{name}]({name}.yaml)" in table


def test_the_schema_and_the_documentation_are_fresh():
    assert recipe_docs.stale() == [], "run python -m finetune.recipe.docs"


def test_the_documented_sample_is_a_recipe(folder: Path):
    for name in ("data/train.jsonl", "data/eval.jsonl", "data/images/1.png"):
        write(folder, "", name)
    recipe = load(folder, text=recipe_docs.sample_text())
    assert recipe.model.name == "HuggingFaceM4/idefics2-8b"
    for section in Recipe.model_fields:
        for key in type(getattr(recipe, section)).model_fields:
            assert (
                f" {key}: " in recipe_docs.sample_text()
                or f" {key}:\n" in recipe_docs.sample_text()
            )


def test_every_field_is_documented():
    definitions = Recipe.model_json_schema()["$defs"]
    for section in definitions.values():
        for key, field in section["properties"].items():
            assert field.get("description", "").endswith("."), key


@pytest.mark.slow  # the library takes seconds to import
def test_names_of_optimizers_and_schedulers_are_those_of_transformers():
    training_args = pytest.importorskip("transformers.training_args")
    trainer_utils = pytest.importorskip("transformers.trainer_utils")
    assert set(Optimizer.__args__) == {each.value for each in training_args.OptimizerNames}
    assert set(Scheduler.__args__) <= {each.value for each in trainer_utils.SchedulerType}


def test_reading_a_recipe_does_not_import_torch():
    code = "import sys, finetune.recipe; print({'torch', 'transformers'} & set(sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "set()"


def test_one_row_a_step_is_warned_of(folder: Path) -> None:
    one = load(folder, "training.batch_size=1", "training.gradient_accumulation=1")
    assert any("every step follows a single row" in warning for warning in recipe_warnings(one))
    usual = load(folder, "training.gradient_accumulation=1")
    assert not any("single row" in warning for warning in recipe_warnings(usual))
