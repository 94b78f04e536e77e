"""Rows of a dataset on a Hub, read by the real client from one on loopback."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from tests.conftest import noise
from tests.hub_server import Hub, Repo

COLUMNS = "format: columns, columns: {image: image, question: question, answer: answer}"


def parquet(num_rows: int) -> bytes:
    rows = []
    for seed in range(num_rows):
        file = io.BytesIO()
        noise(84, 28, seed).save(file, format="PNG")
        picture = {"bytes": file.getvalue(), "path": None}
        rows.append({"image": picture, "question": f"What is it, {seed}?", "answer": "noise"})
    out = io.BytesIO()
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(out)
    return out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_is_read_from_its_server(
    dataset: Callable[..., Path], tmp_path: Path, streaming: bool
) -> None:
    recipe = dataset()
    with Hub() as hub:
        held = {"data/train-00000-of-00001.parquet": parquet(5)}
        hub.repos["datasets/user/rows"] = Repo(private=False, branches={"main": held})
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
        }

        def check(source: str) -> "subprocess.CompletedProcess[str]":
            stream = str(streaming).lower()
            settings = [f"data.train=[{{{source}, {COLUMNS}, streaming: {stream}}}]"]
            command = [sys.executable, "-m", "finetune", "check", str(recipe), *settings]
            # the endpoint is read as the client is imported
            return subprocess.run(
                command, env=environment, cwd=tmp_path, capture_output=True, text=True
            )

        done = check("hub: user/rows")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "user/rows" in done.stdout
        assert " 5 " in done.stdout
        assert any(path.endswith(".parquet") for _, path in hub.asked)
        absent = check("hub: user/rows, revision: nowhere")
        assert absent.returncode == 2
        assert "has no revision 'nowhere'" in absent.stderr
