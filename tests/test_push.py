"""Runs pushed by the real client to a small Hub on loopback, and used as their cards say."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from finetune import chat
from finetune.cli import app
from finetune.errors import DataError, HubError, RecipeError, RunDirError
from finetune.model.load import model_location
from finetune.push import push
from finetune.recipe import load_recipe
from finetune.recipe.loading import dump_recipe
from finetune.rundir import RunDir, write_json, write_jsonl
from tests.conftest import chat_row, noise, write_rows
from tests.hub_server import Hub
from tests.test_merge import Made, made_run

QUIET = Console(quiet=True)
SECRET = "a-word-that-nobody-may-read"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that the environment points to, with a token that may write there."""
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield hub


@pytest.fixture
def made(dataset: Callable[..., Path], tmp_path: Path) -> Made:
    """A run with what a finished one holds: figures, losses, an environment."""
    folder = tmp_path / SECRET
    folder.mkdir()
    noise(84, 28, 1).save(folder / "page.png")
    recipe = dataset(evaluation={"max_new_tokens": 6})
    write_rows(tmp_path / "train.jsonl", [chat_row(SECRET, SECRET, f"{SECRET}/page.png")])
    made = made_run(recipe, folder / "run", seed=3)
    finish(made)
    return made


def finish(made: Made, **more: Any) -> None:
    run = RunDir(made.run)
    versions = dict.fromkeys(("vlm_recipes", "torch", "transformers", "trl", "peft"), "1.0")
    write_json(run.environment, versions)
    figures = {"base": {"exact_match": 0.25}, "adapter": {"exact_match": 0.75}}
    counts = {"num_eval_rows": 4, "num_train_rows": 12, "steps": 4}
    write_json(run.summary, figures | counts | more)
    lines = [{"step": step, "loss": 3.0 - step} for step in range(3)]
    write_jsonl(run.metrics, [*lines, {"step": 2, "eval_loss": 1.5}])


def files_of(hub: Hub, repo: str = "user/name", branch: str = "main") -> dict[str, bytes]:
    return hub.repos[repo].branches[branch]


def test_what_is_pushed_gives_the_logits_of_the_run(made: Made, hub: Hub, tmp_path: Path) -> None:
    done = push(made.run, "user/name", console=QUIET)
    repo = hub.repos["user/name"]
    assert (repo.private, repo.was_public_while_empty) == (False, False)
    assert repo.commits == ["Upload by finetune push"]
    assert done.url == f"{hub.url}/user/name"
    assert set(files_of(hub)) == set(done.files)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, data in files_of(hub).items():
        (elsewhere / name).write_bytes(data)
    inputs = {"input_ids": torch.tensor([[1, 5, 9, 30]])}
    logits = []
    for folder in (made.run / "adapter", elsewhere):
        base = AutoModelForImageTextToText.from_pretrained(model_location("nano"))
        with torch.inference_mode():
            logits.append(PeftModel.from_pretrained(base, folder).eval()(**inputs).logits)
    assert torch.equal(*logits)


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_the_code_of_the_card_answers_as_finetune_chat(
    made: Made, hub: Hub, tmp_path: Path, merged: bool
) -> None:
    push(made.run, "user/name", merged=merged, console=QUIET)
    (code,) = re.findall(r"```python\n(.*?)```", files_of(hub)["README.md"].decode(), re.S)
    assert (PeftModel.__name__ in code) != merged
    noise(84, 28, 1).save(tmp_path / "scan.png")
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    here = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment | here,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = chat.answer(made.run, [tmp_path / "scan.png"], "What is written?")
    assert expected
    assert done.stdout.strip().startswith(expected)  # which stops earlier, by its own limit


def test_nothing_of_this_machine_or_of_the_rows_is_sent(
    made: Made, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "an-environment-value")
    push(made.run, "user/name", console=QUIET)
    push(made.run, "user/whole", merged=True, console=QUIET)
    for repo in hub.repos.values():
        assert len(repo.branches["main"]) > 8
        for name, data in repo.branches["main"].items():
            for word in (SECRET, str(tmp_path), hub.token, "an-environment-value", "page.png"):
                assert word.encode() not in data, (name, word)
    assert "train.jsonl" in files_of(hub)["recipe.yaml"].decode()


def test_the_card_has_the_figures_and_metadata_of_the_hub(made: Made, hub: Hub) -> None:
    push(made.run, "user/name", console=QUIET)
    card = files_of(hub)["README.md"].decode()
    _, head, text = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["library_name"] == "peft"
    assert metadata["pipeline_tag"] == "image-text-to-text"
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "exact_match", "value": 0.75, "name": "exact match"}]
    assert "| exact match | 0.250 | 0.750 | +0.500 |" in text
    assert "`train.jsonl`: 12 rows" in text
    assert files_of(hub)["loss.png"].startswith(b"\x89PNG")
    assert ("POST", "/api/validate-yaml") in hub.asked


def test_the_card_counts_the_rows_of_each_source(
    made: Made, hub: Hub, dataset: Callable[..., Path], tmp_path: Path
) -> None:
    more = {"hub": "user/scans", "split": "dev"}
    data = {"train": [{"path": "train.jsonl"}, more], "eval": [], "eval_fraction": 0.25}
    recipe = load_recipe(dataset(data=data), check_paths=False)
    RunDir(made.run).recipe.write_text(dump_recipe(recipe))
    finish(made, train_rows_by_source=[5, 7], eval_rows_by_source=[1, 3])
    card = push(made.run, "user/name", dry_run=True, console=QUIET).files["README.md"]
    assert isinstance(card, bytes)
    scans = "`user/scans dev main`"
    for line in (
        f"| training data | `train.jsonl`: 5 rows; {scans}: 7 rows; together 12 |",
        f"| held-out data | `train.jsonl`: 1 rows; {scans}: 3 rows; together 4 |",
    ):
        assert line in card.decode()


def test_the_pushed_recipe_loads_again(made: Made, hub: Hub, tmp_path: Path) -> None:
    push(made.run, "user/name", console=QUIET)
    (tmp_path / "again.yaml").write_bytes(files_of(hub)["recipe.yaml"])
    again = load_recipe(tmp_path / "again.yaml", check_paths=False)
    assert (again.images, again.adapter) == (made.recipe.images, made.recipe.adapter)


def test_a_base_on_the_hub_is_named_and_gives_its_licence(
    made: Made, hub: Hub, tmp_path: Path
) -> None:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url)
    api.create_repo("user/base", private=False)
    recipe = made.run / "recipe.yaml"
    local = str(model_location("nano"))
    recipe.write_text(recipe.read_text().replace("name: nano", f"name: {local}"))
    with pytest.raises(HubError, match="--base USER/NAME"):
        push(made.run, "user/name", console=QUIET)
    push(made.run, "user/name", base="user/base", console=QUIET)
    config = json.loads(files_of(hub)["adapter_config.json"])
    assert config["base_model_name_or_path"] == "user/base"
    card = files_of(hub)["README.md"].decode()
    assert "base_model: user/base" in card
    assert "perceiver_config.rms_norm_eps" in card
    assert local not in card


def test_an_adapter_on_the_hub_is_a_run(
    made: Made, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(made.run, "user/name", console=QUIET)
    noise(84, 28, 1).save(tmp_path / "scan.png")
    question = ["What is written?", "--image", str(tmp_path / "scan.png")]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    runner = CliRunner()
    there = runner.invoke(app, ["chat", "hub://user/name", *question])
    assert there.exception is None
    assert there.stdout == runner.invoke(app, ["chat", str(made.run), *question]).stdout
    merged = runner.invoke(app, ["merge", "hub://user/name@main", "--out", "merged"])
    assert merged.exception is None
    assert Path("merged/model.safetensors").is_file()
    with pytest.raises(RecipeError, match=r"train\.jsonl"):
        runner.invoke(app, ["train", "hub://user/name"], catch_exceptions=False)
    trained = ["train", "hub://user/name", "--dry-run"]
    data = [f"data.{part}=[{{path: {tmp_path}/eval.jsonl}}]" for part in ("train", "eval")]
    assert runner.invoke(app, [*trained, *data]).exit_code == 0
    for name in ("user/none", "user/no name"):
        with pytest.raises(HubError, match="cannot be fetched"):
            runner.invoke(app, ["chat", f"hub://{name}", *question], catch_exceptions=False)


def test_an_adapter_on_the_hub_is_judged_on_the_held_out_rows(
    made: Made, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(made.run, "user/name", console=QUIET)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    runner = CliRunner()
    with pytest.raises(DataError, match=r"eval\.jsonl"):
        runner.invoke(app, ["eval", "hub://user/name"], catch_exceptions=False)
    for file in (tmp_path / "eval.jsonl", *tmp_path.glob("eval*.png")):  # no row that was trained
        shutil.copy(file, file.name)
    there = runner.invoke(app, ["eval", "hub://user/name", "--json"])
    assert there.exception is None
    here = runner.invoke(app, ["eval", str(made.run), "--json"])
    assert json.loads(there.stdout) == json.loads(here.stdout)
    (summary,) = Path(".finetune-cache/hub").glob("*/*/summary.json")
    assert json.loads(summary.read_text())["eval_rows_by_source"] == [4]
    (report,) = Path(".finetune-cache/hub").glob("*/*/report.html")
    assert "Before and after" in report.read_text()
    (recipe,) = Path(".finetune-cache/hub").glob("*/*/recipe.yaml")
    drawn = load_recipe(recipe, ["data.eval=[]", "data.eval_fraction=0.5"], check_paths=False)
    recipe.unlink()  # a link
    recipe.write_text(dump_recipe(drawn))
    with pytest.raises(DataError, match="does not say which data"):
        runner.invoke(app, ["eval", "hub://user/name"], catch_exceptions=False)


def test_a_dry_run_sends_nothing(made: Made, hub: Hub) -> None:
    done = push(made.run, "user/name", dry_run=True, console=QUIET)
    assert hub.asked == []
    assert dict(done.sizes())["adapter_model.safetensors"] > 10_000
    assert done.commit is None


def test_private_stays_private_and_a_branch_is_made(made: Made, hub: Hub) -> None:
    push(made.run, "user/name", private=True, revision="v2", console=QUIET)
    assert hub.repos["user/name"].private
    assert files_of(hub) == {}
    assert "README.md" in files_of(hub, branch="v2")
    push(made.run, "user/name", console=QUIET)  # it is there, and stays as its owner set it
    assert hub.repos["user/name"].private
    assert "README.md" in files_of(hub)


def test_a_repository_that_exists_is_told_of(made: Made, hub: Hub) -> None:
    push(made.run, "user/name", console=QUIET)
    write_jsonl(RunDir(made.run).metrics, [{"step": 1, "loss": 9.0}])
    told = io.StringIO()
    push(made.run, "user/name", console=Console(file=told))
    assert "user/name exists; what differs is one more commit on main" in told.getvalue()
    commits = HfApi(endpoint=hub.url).list_repo_commits("user/name")
    assert [each.title for each in commits] == ["Upload by finetune push"] * 2
    before = len(hub.asked)
    with pytest.raises(HubError, match="exists and is public"):
        push(made.run, "user/name", private=True, console=QUIET)
    assert all(method == "GET" for method, _ in hub.asked[before:])


def test_large_files_are_sent_in_parts_and_verified(made: Made, hub: Hub) -> None:
    hub.part_bytes = 4096
    push(made.run, "user/name", console=QUIET)
    name = "adapter_model.safetensors"
    weights = (made.run / "adapter" / name).read_bytes()
    assert files_of(hub)[name] == weights
    assert len(hub.parts) >= len(weights) / 4096
    assert ("POST", "/verify") in hub.asked


def refusal(path: str, status: int, method: str = "POST") -> Callable[[str, str], int | None]:
    return lambda asked, at: status if asked == method and path in at else None


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (refusal("/repos/create", 403), "may not write"),
        (refusal("/whoami", 401, "GET"), "does not know the token"),
        (refusal("/commit/", 500), "the same command goes on"),
        (refusal("/blobs/", 0, "PUT"), "the same command goes on"),
        (refusal("/verify", 500), "the same command goes on"),
    ],
)
def test_a_push_that_breaks_off_leaves_nothing_half_public(
    made: Made, hub: Hub, fault: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's tries
    hub.fault = fault
    with pytest.raises(HubError, match=words):
        push(made.run, "user/name", console=QUIET)
    assert all(repo.private for repo in hub.repos.values())
    hub.fault = lambda _method, _path: None
    push(made.run, "user/name", private=True, console=QUIET)
    assert "adapter_model.safetensors" in files_of(hub)


def test_no_token_no_right_and_no_network_are_told_apart(
    made: Made, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match="may not write to other/name"):
        push(made.run, "other/name", console=QUIET)
    for name in ("no-slash", "user/a b", "user/x/y", "/x"):
        with pytest.raises(HubError, match="no name of a repository"):
            push(made.run, name, console=QUIET)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match="no token"):
        push(made.run, "user/name", console=QUIET)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(HubError, match="cannot be reached"):
        push(made.run, "user/name", console=QUIET)


def test_a_run_without_an_adapter_is_not_pushed(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    made = made_run(dataset(), tmp_path / "run", "adapter.method=frozen")
    with pytest.raises(RunDirError, match="leaves no adapter"):
        push(made.run, "user/name", console=QUIET)
