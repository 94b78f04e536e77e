"""What several tests stand on: the embedded model, the real Idefics2 vocabulary, small data on
disk.
"""

import gc
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from finetune.data.examples import Encoder
from finetune.families import FAMILIES
from finetune.model.load import load_model, load_processor
from finetune.recipe import ImagesSection, ModelSection
from tests.families import CHECKPOINTS

NANO = ModelSection(name="nano", dtype="float32")
NANO_IMAGES = ImagesSection(split="never", longest_edge_px=224, shortest_edge_px=28)

# The same inputs at every call, or a fault that a change did not make would be found as its own;
# and how long they take to draw tells of the machine
hypothesis.settings.register_profile(
    "always the same",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("always the same")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test draws the same numbers whatever ran before it in this process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> None:
    """Every training collects garbage several times, and would go through all of torch each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def nano_processor() -> Any:
    return load_processor(NANO, NANO_IMAGES)[0]


@pytest.fixture
def nano_model() -> Any:
    """A fresh nano in float32, on the CPU."""
    return load_model(NANO)[0]


@pytest.fixture(scope="session")
def encoder(nano_processor: Any) -> Encoder:
    return Encoder(nano_processor, FAMILIES["idefics2"], NANO_IMAGES)


@pytest.fixture(scope="session")
def idefics2_processor() -> Any:
    """Idefics2's processor with its real vocabulary of 32,003 pieces, built without a download."""
    from tests.models.idefics2 import build_processor

    return build_processor()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny checkpoint of this name, saved when it is first asked for."""
    saved: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in saved:
            saved[name] = tmp_path_factory.mktemp(name)
            CHECKPOINTS[name].save_tiny(saved[name])
        return saved[name]

    return save


@pytest.fixture
def picture() -> Callable[..., PilImage.Image]:
    """A picture of noise: `picture(width, height, seed)`."""
    return noise


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., Path]:
    """Writes data and a recipe of few steps into the test's folder; gives the recipe's path."""
    return partial(write_dataset, tmp_path)


def noise(width: int, height: int, seed: int = 0) -> PilImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PilImage.fromarray(pixels)


def write_dataset(
    folder: Path, num_train: int = 12, num_eval: int = 4, **sections: dict[str, Any]
) -> Path:
    for name, count in (("train", num_train), ("eval", num_eval)):
        rows = []
        for i in range(count):
            file = f"{name}{i}.png"
            noise(28 * (2 + i % 3), 28 * (1 + i % 2), seed=i).save(folder / file)
            rows.append(chat_row("What is written?", f"A{i}7", file))
        write_rows(folder / f"{name}.jsonl", rows)
    recipe: dict[str, Any] = {
        "model": {"name": "nano", "dtype": "float32"},
        "images": NANO_IMAGES.model_dump(),
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "eval": [{"path": str(folder / "eval.jsonl")}] if num_eval else [],
        },
        "training": {
            "max_steps": 4,
            "batch_size": 4,
            "gradient_accumulation": 1,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 2,
            "num_workers": 0,
        },
        "evaluation": {"max_new_tokens": 4, "every_steps": 2},
        "output": {"dir": str(folder / "run")},
    }
    for section, settings in sections.items():
        recipe.setdefault(section, {}).update(settings)
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def chat_row(question: str, answer: str, *images: str) -> dict[str, Any]:
    content = [*({"type": "image", "image": i} for i in images), {"type": "text", "text": question}]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
