"""`finetune push`: what a run trained, on the Hub, with a card that says what it is."""

import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from matplotlib.figure import Figure
from rich.console import Console

from finetune.card import PLOT, Publication, card_of, portable
from finetune.errors import HubError, RunDirError
from finetune.merge import PROOF
from finetune.model.adapters import IMAGE_SETTINGS, refuse_unfinished
from finetune.model.load import EMBEDDED, quiet_libraries
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.files import HUB_ID
from finetune.recipe.loading import dump_recipe
from finetune.rundir import RunDir, open_run_dir, read_json, read_jsonl
from finetune.serve import servable
from finetune.tables import messages_console

try:  # what the client of this version speaks by
    import httpx2 as http
except ImportError:
    import httpx as http

FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    IMAGE_SETTINGS,
)
"""What is uploaded of an adapter's folder, where it is there; nothing else is."""

CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, or would be: files by their names there, and the page's address."""

    files: Mapping[str, bytes | Path]
    url: str
    commit: str | None = None

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of each file."""
        for name, held in self.files.items():
            yield name, held.stat().st_size if isinstance(held, Path) else len(held)


def push(
    path: str | Path,
    to: str,
    *,
    merged: bool = False,
    private: bool = False,
    revision: str = "main",
    base: str | None = None,
    dry_run: bool = False,
    console: Console | None = None,
) -> Pushed:
    """Upload a run's adapter, or its merged weights, in one commit, with a model card.

    A new repository is private until everything is there. `base` is the base's name on the Hub,
    where the recipe names a folder. Raises `FinetuneError`.
    """
    console = console or messages_console()
    quiet_libraries()
    run = open_run_dir(path)
    recipe = load_recipe(run.recipe, check_paths=False)
    if recipe.adapter.method in ("full", "frozen"):
        raise RunDirError(
            f"{path}: adapter.method {recipe.adapter.method} leaves no adapter; push is for "
            "adapters and what is merged of them"
        )
    refuse_unfinished(run.adapter, CONFIG, recipe)
    try:
        validate_repo_id(to)
        user, slash, _ = to.partition("/")
        if not (user and slash):
            raise HFValidationError("it has no USER/ before its name")
    except HFValidationError as error:
        raise HubError(f"--to {to}: is no name of a repository: {error}") from error
    if base is None and Path(recipe.model.name).is_dir() and recipe.model.name != EMBEDDED:
        raise HubError(
            f"model.name: {recipe.model.name} is a folder of this machine, which nobody else could "
            "load the base from; give its name on the Hub: --base USER/NAME"
        )
    base = base or recipe.model.name
    if base != EMBEDDED and not HUB_ID.fullmatch(base):
        raise HubError(f"{base[:100]!r} is no name of a base on the Hub; give --base USER/NAME")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    api = HfApi(endpoint=endpoint)
    licence = None if dry_run else _licence_of(api, base)
    kind = read_json(run.adapter / CONFIG).get("auto_mapping") or {}
    publication = Publication(to, base, licence, merged, kind.get("base_model_class", ""))
    files = _merged_files(run, console) if merged else _adapter_files(run, recipe, base)
    files |= {
        "README.md": card_of(run, recipe, publication).encode(),
        "recipe.yaml": dump_recipe(portable(recipe, base)).encode(),
    }
    if run.metrics.is_file():
        files[PLOT] = loss_plot(run)
    pushed = Pushed(files, f"{endpoint}/{to}")
    if dry_run:
        return pushed
    with _in_plain_words(to, revision):
        commit = _upload(api, to, files, private=private, revision=revision, console=console)
    return Pushed(files, pushed.url, commit)


def _adapter_files(run: RunDir, recipe: Recipe, base: str) -> dict[str, bytes | Path]:
    files: dict[str, bytes | Path] = {
        name: run.adapter / name for name in FILES if (run.adapter / name).is_file()
    }
    config = read_json(run.adapter / CONFIG) | {
        "base_model_name_or_path": base,
        "revision": recipe.model.revision if base != EMBEDDED else None,
    }
    files[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    return files


def _merged_files(run: RunDir, console: Console) -> dict[str, bytes | Path]:
    folder = servable(run.path, console)  # merged and verified once
    return {
        file.name: file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != PROOF
    }


def loss_plot(run: RunDir) -> bytes:
    """The loss by step as a PNG, of held-out rows as well where they were looked at."""
    lines = read_jsonl(run.metrics)
    figure = Figure(figsize=(7, 3.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for key, label in (("loss", "training"), ("eval_loss", "held-out rows")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _licence_of(api: HfApi, base: str) -> str | None:
    """What the base's page says; None where it says nothing or cannot be reached."""
    if base == EMBEDDED:
        return None
    try:
        data = api.model_info(base).card_data
    except (HfHubHTTPError, http.HTTPError, OSError):
        return None
    named = data.get("license") if data else None
    # their page is theirs, and the card ours
    return named if isinstance(named, str) and re.fullmatch(r"[\w.+-]{1,60}", named) else None


def _upload(
    api: HfApi,
    repo: str,
    files: Mapping[str, bytes | Path],
    *,
    private: bool,
    revision: str,
    console: Console,
) -> str:
    api.whoami()  # or a missing token would look like a missing repository
    held = _held(api, repo)
    is_new = held is None
    if held is None:
        api.create_repo(repo, private=True, exist_ok=True)
    elif private and not held.private:
        raise HubError(
            f"{repo} exists and is public, so that --private would not keep this private; make it "
            "private on its page, or take another --to"
        )
    else:
        console.print(f"{repo} exists; what differs is one more commit on {revision}")
    if revision != "main":
        api.create_branch(repo, branch=revision, exist_ok=True)
    operations = [CommitOperationAdd(name, held) for name, held in files.items()]
    console.print(f"uploading {len(operations)} files to {repo}", soft_wrap=True)
    done = api.create_commit(
        repo, operations, commit_message="Upload by finetune push", revision=revision
    )
    if is_new and not private:
        api.update_repo_settings(repo, private=False)
    return done.oid


def _held(api: HfApi, repo: str) -> ModelInfo | None:
    try:
        return api.model_info(repo)
    except RepositoryNotFoundError:
        return None


@contextmanager
def _in_plain_words(repo: str, revision: str) -> Iterator[None]:
    """The client's errors as messages that say what to do."""
    again = "what was uploaded is private; the same command goes on"
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError(
            "no token for the Hub was found; log in with `hf auth login`, or set HF_TOKEN to one "
            "that may write"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status == 401:
            message = "the Hub does not know the token; log in again with `hf auth login`"
        elif status == 403:
            message = f"the token may not write to {repo}; take one that may, or another --to"
        elif status == 404:
            message = f"{repo}: has no revision {revision}, or is not yours to see"
        else:
            message = f"the Hub answered {status or 'with a fault'}; {again}"
        raise HubError(f"{message} ({_first_line(error)})") from error
    except (http.HTTPError, OSError, RuntimeError) as error:  # the last where an upload breaks off
        raise HubError(
            f"the Hub cannot be reached, or broke off ({_first_line(error)}); {again}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def print_pushed(pushed: Pushed, console: Console) -> Any:
    """The files, and where they are; of a dry run the card as well."""
    for name, num_bytes in pushed.sizes():
        console.print(f"{num_bytes:>14,}  {name}")
    if pushed.commit:
        console.print(f"{pushed.url} (commit {pushed.commit[:12]})", soft_wrap=True)
        return
    card = pushed.files["README.md"]
    console.print(f"\nwould go to {pushed.url}, with this card:\n", soft_wrap=True)
    console.print(card.decode() if isinstance(card, bytes) else "", soft_wrap=True)
