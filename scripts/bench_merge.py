"""How much memory a merge takes, beside how large the model is.

    python -m scripts.bench_merge [--folder FOLDER]

Draws an Idefics2 of about 2 GB in float32, in files of at most 300 MB, and an adapter; merges in a
process of its own, and prints, in Markdown, what that process held at the most while it wrote, over
what it held before: its own memory, and pages of the files that the system maps into it and takes
back when it likes. The verification that follows needs the whole model, one after the other.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from finetune.environment import environment
from finetune.model.load import load_processor
from finetune.model.merging import AdapterPart, Merger
from finetune.model.methods import load_trainable, save_trained
from finetune.recipe import Recipe, load_recipe
from scripts.mid_model import Build, save_model

LARGE = Build((1536, 4096, 16), (12, 4), (384, 1536, 6), 6, (64, 3, 8, 4), 96, 1024)
TINY = Build((32, 64, 2), (2, 1), (32, 64, 2), 2, (8, 1, 2, 1), 16, 1024)


def main() -> None:
    """Draw, merge, print."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_merge", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to draw; a temporary one by default")
    parser.add_argument("--tiny", action="store_true", help="the same code on a small model")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.child:
        print(json.dumps(measure(wanted.folder)))
        return
    with tempfile.TemporaryDirectory(dir=wanted.folder) as temporary:
        folder = Path(temporary)
        draw(folder, tiny=wanted.tiny)
        command = [sys.executable, "-m", "scripts.bench_merge", "--child", "--folder", temporary]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        figures = json.loads(done.stdout.splitlines()[-1])
    print("| | MiB |")
    print("| --- | --- |")
    for name, num_bytes in figures.items():
        print(f"| {name} | {num_bytes / 2**20:,.0f} |")
    print(f"\n{environment()}")


def draw(folder: Path, *, tiny: bool) -> None:
    """A model in several files and an adapter of rank 16 on language and connector."""
    save_model(folder / "model", TINY if tiny else LARGE, "100KB" if tiny else "300MB")
    recipe = {
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "adapter": {"rank": 16, "alpha": 16},
        "data": {"train": [{"path": str(folder / "none.jsonl")}]},
        "output": {"dir": str(folder / "run")},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    loaded = load(folder)
    processor, _ = load_processor(loaded.model, loaded.images)
    model, _ = load_trainable(loaded, processor)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    save_trained(model, processor, loaded, folder / "adapter")


def load(folder: Path) -> Recipe:
    """The drawn run's recipe; its rows are not there."""
    return load_recipe(folder / "recipe.yaml", check_paths=False)


def measure(folder: Path) -> dict[str, int]:
    """Bytes of the model, of its largest file and of the adapter, and the most that writing took of
    each kind of memory above what was held before.
    """
    recipe = load(folder)
    processor, _ = load_processor(recipe.model, recipe.images)
    merger = Merger([AdapterPart(recipe, folder / "adapter")], processor)
    plan = merger.plan(torch.float32)
    (folder / "merged").mkdir()
    before, most = held(), dict.fromkeys(held(), 0)
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for kind, num_bytes in held().items():
                most[kind] = max(most[kind], num_bytes)
            time.sleep(0.002)

    watching = threading.Thread(target=watch)
    watching.start()
    merger.write(plan, folder / "merged", lambda _: None)
    done.set()
    watching.join()
    return {
        "the model's weights": plan.num_bytes,
        "the largest of its files": max(plan.bytes_of_files.values()),
        "the adapter": (folder / "adapter" / "adapter_model.safetensors").stat().st_size,
        "own memory while writing, at the most": most["RssAnon"] - before["RssAnon"],
        "pages of files mapped, at the most": most["RssFile"] - before["RssFile"],
    }


def held() -> dict[str, int]:
    """Bytes that this process holds now: its own, and of mapped files. Source: proc(5)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {kind: int(lines[kind].split()[0]) * 1024 for kind in ("RssAnon", "RssFile")}


if __name__ == "__main__":
    main()
