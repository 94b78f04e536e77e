"""Time what `finetune check` and the start of `finetune train` cost on many rows and many pictures.

    python -m scripts.bench_data [--rows 1000000] [--images 1000] [--folder DIR]

Prints one JSON object. Text rows: seconds to index the file, to check it, and to start a training
on it once checked, with the memory of that process. Pictures of one megapixel: rows checked a
second, against Pillow decoding the same files in a bare loop, one process a core, measured in turn.
"""

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageFilter
from rich.console import Console

from finetune.check import check
from finetune.data.containers import open_container
from finetune.environment import environment
from finetune.recipe import load_recipe

NUM_PICTURES = 50  # different ones, each used many times: as files, not as the pages of a cache


def main() -> None:
    """Run both, and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_data", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = wanted.folder or Path(temporary)
        figures: dict[str, Any] = {"environment": environment(), "cores": os.cpu_count()}
        if wanted.rows:
            figures["text_rows"] = time_text_rows(folder / "text", wanted.rows)
        if wanted.images:
            figures["images"] = time_images(folder / "images", wanted.images)
    print(json.dumps(figures, indent=2))


def time_text_rows(folder: Path, num_rows: int) -> dict[str, Any]:
    """A question and an answer a row, some 50 tokens by nano's tokenizer."""
    recipe = write_recipe(folder)
    with (folder / "train.jsonl").open("w") as file:
        for i in range(num_rows):
            question = {"role": "user", "content": f"What is the total of invoice number {i}?"}
            answer = {"role": "assistant", "content": f"The total is {i * 7} euros."}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    first = seconds(lambda: open_container(folder / "train.jsonl", folder / "cache"))
    second = seconds(lambda: open_container(folder / "train.jsonl", folder / "cache"))
    checked = check(load_recipe(recipe), str(recipe), console=Console(quiet=True))
    command = [sys.executable, "-m", "finetune", "train", str(recipe)]
    trained = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    started = seconds(
        lambda: subprocess.run([*command, "--dry-run"], check=True, capture_output=True)
    )
    return {
        "rows": num_rows,
        "file_mb": round((folder / "train.jsonl").stat().st_size / 1e6, 1),
        "index_seconds": round(first, 2),
        "index_again_seconds": round(second, 3),
        "check_seconds": round(checked.seconds, 1),
        "start_again_seconds": round(started, 1),
        "train_two_steps_seconds": round(trained, 1),
        "train_peak_memory_gib": round(peak_kib / 2**20, 2),
    }


def time_images(folder: Path, num_images: int, repeats: int = 3) -> dict[str, Any]:
    """JPEG files of 1152 x 896 pixels, as a camera or a scanner leaves them."""
    recipe = write_recipe(folder)
    rng = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(NUM_PICTURES)]
    for name in names:
        noise = Image.fromarray(rng.integers(0, 256, (896, 1152, 3), dtype=np.uint8))
        noise.filter(ImageFilter.GaussianBlur(2)).save(folder / name, quality=85)
    with (folder / "train.jsonl").open("w") as file:
        for i in range(num_images):
            image = {"type": "image", "image": names[i % NUM_PICTURES]}
            question = {"role": "user", "content": [image, {"type": "text", "text": "What?"}]}
            messages = [question, {"role": "assistant", "content": str(i)}]
            file.write(json.dumps({"messages": messages}) + "\n")
    files = [str(folder / names[i % NUM_PICTURES]) for i in range(num_images)]
    one, bare, checked = [], [], []
    for _ in range(repeats):
        one.append(num_images / 4 / seconds(lambda: decode(files[: num_images // 4])))
        bare.append(num_images / decode_on_all_cores(files))
        result = check(load_recipe(recipe), str(recipe), console=Console(quiet=True))
        checked.append(num_images / result.seconds)
    return {
        "images": num_images,
        "bare_loop_images_per_second": round(median(one), 1),
        "bare_loop_on_all_cores_images_per_second": round(median(bare), 1),
        "check_images_per_second": round(median(checked), 1),
        "ratio_to_all_cores": round(median(c / b for c, b in zip(checked, bare, strict=True)), 3),
    }


def decode(files: list[str]) -> None:
    """Pillow alone."""
    for file in files:
        with Image.open(file) as image:
            image.load()


def decode_on_all_cores(files: list[str]) -> float:
    """Seconds of the bare loop, its files dealt out over one process a core."""
    cores = os.cpu_count() or 1
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        pool.map(abs, range(cores))  # started before the clock is
        return seconds(lambda: pool.map(decode, [files[i::cores] for i in range(cores)]))


def write_recipe(folder: Path) -> Path:
    """A recipe for nano on `train.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "model": {"name": "nano", "dtype": "float32"},
        "images": {"split": "never", "longest_edge_px": 224, "shortest_edge_px": 28},
        "data": {"train": [{"path": str(folder / "train.jsonl")}]},
        "training": {"max_steps": 2, "batch_size": 2, "gradient_accumulation": 1},
        "output": {"dir": str(folder / "runs" / "bench")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
