"""The findings' recipes, what is made of their figures, and the boards and models they run on."""

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from finetune.recipe import Recipe, load_recipe, recipe_warnings
from finetune.rundir import RunDir
from finetune.train import train
from scripts import finding_boards, findings
from scripts.finding_backbones import BACKBONES, save_backbone
from scripts.finding_boards import BOARD_PX, SETS, Digits, write_set
from scripts.finding_models import MODELS, save_model
from scripts.findings import Job, recipes, record, run_all
from scripts.findings_page import (
    FINDINGS,
    MARGIN,
    Claim,
    difference,
    judged,
    num_spikes,
    write_page,
    write_scores,
)

CLAIMS = [claim for finding in FINDINGS for claim in finding.claims]
OF_ADAPTERS_ALONE = ("adapter.rank", "adapter.alpha", "adapter.dropout")


def shipped(name: str) -> Recipe:
    return load_recipe(f"findings/{name}", check_paths=False)


def settings(name: str) -> dict[str, Any]:
    """Of a recipe, by their keys, but for where it writes and what means nothing to its method."""
    recipe = shipped(name)
    found = {
        f"{section}.{key}": value
        for section, values in recipe.model_dump().items()
        for key, value in values.items()
    }
    idle = OF_ADAPTERS_ALONE if recipe.adapter.method == "full" else ()
    return {key: value for key, value in found.items() if key not in ("output.dir", *idle)}


def differing(first: str, second: str) -> set[str]:
    one, other = settings(first), settings(second)
    return {key for key in one.keys() & other.keys() if one[key] != other[key]}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.first)
def test_two_recipes_of_a_claim_differ_in_one_setting(claim: Claim) -> None:
    assert len(differing(claim.first, claim.second)) == 1


def test_every_recipe_belongs_to_a_claim_and_each_of_the_six_findings_has_one() -> None:
    assert {name for claim in CLAIMS for name in (claim.first, claim.second)} == set(recipes())
    assert [finding.number for finding in FINDINGS] == [1, 2, 3, 4, 5, 6]
    for finding in FINDINGS:
        for claim in finding.claims:
            assert claim.first[0] == claim.second[0] == str(finding.number)


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_has_no_idle_setting_and_opens_with_its_own_command(name: str) -> None:
    assert recipe_warnings(shipped(name)) == []
    text = (findings.recipes_dir() / "findings" / f"{name}.yaml").read_text(encoding="utf-8")
    commands = text.partition("\n\n")[0].splitlines()
    assert f"# finetune train findings/{name}" in commands
    assert any(line.startswith(f"# Finding {name[0]}: ") for line in commands)


def test_a_faster_recipe_is_the_slower_one_at_three_times_the_rate() -> None:
    assert differing("3-lora", "3-lora-fast") == {"training.learning_rate"}
    assert differing("3-full", "3-full-fast") == {"training.learning_rate"}


# Verdicts


def runs(recipe: str, shares: Sequence[float], *, num_rows: int = 400) -> list[dict[str, Any]]:
    """A run a seed, right on that share of its rows: the first ones."""
    return [
        {
            "recipe": recipe,
            "seed": seed,
            "exact_match": share,
            "loss": 0.5,
            "right": "".join("01"[i < share * num_rows] for i in range(num_rows)),
            "trainable": 1000,
            "parameters": 250_000,
            "tokens_a_row": 40.0,
            "views_a_row": 1.0,
            "flops_a_row": 94e6,
            "losses": [[step, 2.0 / (step + 1)] for step in range(10)],
            "machine": "a machine",
        }
        for seed, share in enumerate(shares)
    ]


@pytest.mark.parametrize(
    ("first", "second", "kind", "expected"),
    [
        ((0.6, 0.7, 0.6), (0.4, 0.5, 0.4), "higher", "agrees"),
        ((0.4, 0.5, 0.4), (0.6, 0.7, 0.6), "higher", "disagrees"),
        ((0.9, 0.9, 0.4), (0.5, 0.5, 0.5), "higher", "cannot tell"),  # one seed points elsewhere
        ((0.1, 0.1, 0.6), (0.5, 0.5, 0.5), "higher", "cannot tell"),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "higher", "cannot tell"),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "little lost", "agrees"),
        ((0.6, 0.6, 0.6), (0.5, 0.5, 0.5), "little lost", "agrees"),
        ((0.3, 0.3, 0.3), (0.5, 0.5, 0.5), "little lost", "disagrees"),
        ((0.45, 0.45, 0.45), (0.5, 0.5, 0.5), "little lost", "cannot tell"),
        ((0.56, 0.56, 0.42), (0.5, 0.5, 0.5), "little lost", "cannot tell"),  # one seed lost more
    ],
)
def test_a_verdict_needs_the_interval_and_every_seed(
    first: Sequence[float], second: Sequence[float], kind: Any, expected: str
) -> None:
    assert judged(Claim("", "a", "b", kind), runs("a", first), runs("b", second))[1] == expected


@pytest.mark.parametrize(
    ("spiking", "expected"), [((0, 1, 2), "agrees"), ((0, 1), "cannot tell"), ((), "cannot tell")]
)
def test_a_steadier_loss_has_fewer_spikes_in_every_seed(
    spiking: Sequence[int], expected: str
) -> None:
    calm, wild = runs("a", (0.5,) * 3), runs("b", (0.5,) * 3)
    for seed in spiking:
        wild[seed]["losses"][4][1] = 9.0
    claim = Claim("", "a", "b", "steadier")
    assert judged(claim, calm, wild)[1] == expected
    assert judged(claim, wild, calm)[1] == {"agrees": "disagrees"}.get(expected, expected)


def test_a_difference_is_of_the_same_seeds_and_rows() -> None:
    found = difference(runs("a", (0.5, 0.6, 0.7)), list(reversed(runs("b", (0.4, 0.4, 0.4)))))
    assert found.mean == pytest.approx(0.2)
    assert found.by_seed == pytest.approx((0.1, 0.2, 0.3))
    assert found.interval[0] < 0.2 < found.interval[1]
    assert found.interval[1] - found.interval[0] < 2 * MARGIN


def test_a_spike_is_a_loss_of_twice_those_before() -> None:
    losses = [1.0, 1.0, 1.0, 1.0, 1.0, 1.9, 2.1, 1.0, 1.0]
    assert num_spikes(list(enumerate(losses))) == 1
    assert num_spikes(list(enumerate([9.0, 1.0]))) == 0
    assert num_spikes(list(enumerate([0.5, 1.2, 1.3]))) == 1  # as it begins, too


def test_the_page_tells_each_finding_and_leaves_out_what_was_not_run(tmp_path: Path) -> None:
    page = tmp_path / "findings.md"
    parts = ("summary", "backbones", "machine", *"123456")
    page.write_text("".join(f"<!-- measured: {p} -->\n<!-- end: {p} -->\n" for p in parts))
    records = runs("2-cross-attention", (0.6,) * 3) + runs("2-autoregressive", (0.4,) * 3)
    records += runs("3-lora", (0.6,) * 3) + runs("3-full", (0.2,) * 3)
    write_page(page, records, {"clip-1": {"parameters": 1234, "score": 0.5}})
    text = page.read_text()
    assert "| 2: cross-attention scores higher than autoregressive |" in text
    assert "+0.200 [" in text
    assert "**agrees**" in text
    assert "| `clip-1` | 1,234 | 0.500 |" in text
    assert "a machine." in text
    assert "LoRA scores higher" not in text  # two of its four recipes have no run
    assert [file.name for file in (tmp_path / "findings").iterdir()] == ["2.png"]
    assert Image.open(tmp_path / "findings" / "2.png").width > 600
    fast = runs("3-lora-fast", (0.6,) * 3) + runs("3-full-fast", (0.2,) * 3)
    write_page(page, records + fast, {})
    assert page.read_text().count("**agrees**") == 6  # three claims, in the summary and below
    assert page.read_text().count("0 spikes against 0") == 4
    listed = tmp_path / "README.md"
    listed.write_text("| [findings/3-lora](3-lora.yaml) | LoRA | 0.1 |\n| another | | 0.1 |\n")
    write_scores(listed, records)
    assert listed.read_text().splitlines() == [
        "| [findings/3-lora](3-lora.yaml) | LoRA | 0.600 |",
        "| another | | 0.1 |",
    ]


# Jobs


def test_what_is_made_is_not_made_again(tmp_path: Path) -> None:
    made = tmp_path / "run" / "summary.json"
    write = f"from pathlib import Path; Path({str(made.parent)!r}).mkdir(); "
    write += f"open({str(made)!r}, 'x').write('1')"  # fails where the file is there
    job = Job([sys.executable, "-c", write], made)
    run_all([job])
    run_all([job])
    assert made.read_text() == "1"


def test_what_began_with_something_that_was_made_again_is_made_again(tmp_path: Path) -> None:
    start, made = tmp_path / "start", tmp_path / "run" / "summary.json"
    start.touch()
    write = f"from pathlib import Path; p = Path({str(made)!r}); p.parent.mkdir(exist_ok=True); "
    job = Job([sys.executable, "-c", write + "p.open('a').write('1')"], made, of=start)
    run_all([job])
    run_all([job])
    assert made.read_text() == "1"
    later = made.stat().st_mtime + 1
    os.utime(start, (later, later))
    run_all([job])
    assert made.read_text() == "11"


@pytest.mark.parametrize("name", [name for name in recipes() if name[0] in findings.STARTS])
def test_a_recipe_begins_with_what_another_leaves(name: str) -> None:
    recipe, start = shipped(name), shipped(findings.STARTS[name[0]])
    text = (findings.recipes_dir() / "findings" / f"{name}.yaml").read_text(encoding="utf-8")
    if merged := re.search(r"^# finetune merge (\S+) --out (\S+)$", text, re.MULTILINE):
        assert merged.groups() == (start.output.dir, recipe.model.name)
    else:
        assert recipe.model.name == f"{start.output.dir}/adapter"


def test_a_command_that_fails_ends_all_and_names_its_log(tmp_path: Path) -> None:
    failing = Job(
        [sys.executable, "-c", "print('why'); exit(2)"], tmp_path / "run" / "summary.json"
    )
    with pytest.raises(SystemExit, match=r"failed: .*run\.log"):
        run_all([failing])
    assert (tmp_path / "run.log").read_text() == "why\n"


# Boards and models


def test_no_digit_of_a_held_out_board_is_in_a_trained_one() -> None:
    trained, judged = (
        {each.tobytes() for each in Digits(held_out=h).pixels} for h in (False, True)
    )
    assert len(judged) == finding_boards.NUM_HELD_OUT
    assert not trained & judged


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("boards", {(56, 56)}),
        ("long", {(56, 28), (56, 56), (28, 56)}),
        ("pages", {(56, 56), (112, 112)}),
    ],
)
def test_a_set_has_pictures_of_its_sizes_and_asks_its_questions(
    name: str, sizes: set[tuple[int, int]], tmp_path: Path
) -> None:
    write_set(name, tmp_path, num_train=30, num_eval=2)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 30
    assert {Image.open(file).size for file in (tmp_path / "images").iterdir()} == sizes
    asked = {row["messages"][0]["content"][1]["text"] for row in rows}
    assert asked == set(SETS[name][1])


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Which digits?", "7 0 9 7"),
        ("In order?", "0 7 7 9"),
        ("The largest?", "9"),
        ("Their sum?", "23"),
    ],
)
def test_answers_are_of_all_four_digits(question: str, answer: str) -> None:
    assert finding_boards.QUESTIONS[question]((7, 0, 9, 7)) == answer


def test_a_digit_stands_in_its_own_cell() -> None:
    digits = Digits(held_out=False)
    digits.pixels = np.zeros_like(digits.pixels)
    board = digits.board(finding_boards.random.Random(0), cell_px=BOARD_PX)
    dark = board.pixels == 0
    for row in (0, BOARD_PX):
        for column in (0, BOARD_PX):
            assert dark[row : row + BOARD_PX, column : column + BOARD_PX].sum() == 28 * 28


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model, of backbones that took two steps, and boards."""
    folder = tmp_path_factory.mktemp("findings")
    for name in BACKBONES:
        save_backbone(name, folder / "backbones" / name, steps=2)
    for name in MODELS:
        save_model(name, folder / "backbones", folder / "models" / name, seed=0)
    for name in SETS:
        write_set(name, folder / name, num_train=16, num_eval=4)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("1-stronger-language", "stronger-language"),
        ("2-cross-attention", "cross-attention"),
        ("4-no-pooling", "no-pooling"),
        ("6-split-auto", "latents-16"),
    ],
)
def test_a_recipe_trains_on_the_model_that_is_made_for_it(
    name: str, model: str, untrained: Path, tmp_path: Path
) -> None:
    kind = Path(shipped(name).data.train[0].path or "").parent.name
    changes = [
        f"model.name={untrained / 'models' / model}",
        f"data.train.0.path={untrained / kind / 'train.jsonl'}",
        f"data.eval.0.path={untrained / kind / 'eval.jsonl'}",
        f"output.dir={tmp_path / 'run'}",
        "training.max_steps=2",
    ]
    silent = Console(quiet=True)
    recipe = load_recipe(f"findings/{name}", changes)
    assert train(recipe, name, console=silent, results=silent) == 0
    found = record(RunDir(tmp_path / "run"), recipe=name, seed=0)
    assert len(found["right"]) == 4
    assert found["losses"][0][0] == 1
    assert 0 < found["trainable"] < found["parameters"]
    assert found["views_a_row"] > 1 or kind != "pages"
