"""Adapters on the Hub that `finetune push` put there, as runs of this machine."""

import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from finetune.errors import HubError
from finetune.rundir import RunDir, replacing

PREFIX = "hub://"


def fetch_run(name: str) -> Path:
    """A folder laid out as a run, with the recipe and adapter of `hub://USER/NAME`, or of a
    revision of it, `hub://USER/NAME@REVISION`; kept in the cache of the current folder.

    Raises `HubError`.
    """
    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"))
    try:
        # `*.yaml` and no more: what a stranger put there is data, not code
        kinds = ["*.json", "*.safetensors", "*.jinja", "*.model", "recipe.yaml"]
        found = Path(api.snapshot_download(repo, revision=revision or None, allow_patterns=kinds))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise HubError(
            f"{name}: cannot be fetched from the Hub: {str(error).splitlines()[0][:200]}"
        ) from error
    for needed in ("recipe.yaml", "adapter_config.json"):
        if not (found / needed).is_file():
            raise HubError(
                f"{name}: has no {needed}; only adapters that finetune push sent can be used so"
            )
    run = RunDir(Path(".finetune-cache") / "hub" / repo.replace("/", "--") / found.name)
    if not run.recipe.is_file():
        with replacing(run.path) as folder:
            (folder / "adapter").mkdir(parents=True)
            for file in found.iterdir():
                place = folder if file.name == "recipe.yaml" else folder / "adapter"
                # a link: weights are large, and the client's own cache keeps them
                (place / file.name).symlink_to(file.resolve())
    return run.path
