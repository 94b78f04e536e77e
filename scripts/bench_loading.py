"""Time the way of a picture from its file to a batch, and what keeps a card waiting for it.

    python -m scripts.bench_loading [--rows-per-second N] [--no-loader]

Prints Markdown. First the CPU milliseconds a row of one core, by kind of picture, splitting and
settings, with what the settings change in the pixels, and those of the library's own processor,
which gives float32 and masks where ours gives bytes; with the rows a second of a card (a run's
`summary.json` says them), also how many cores it needs. Then the rows a second that torch's
DataLoader delivers with 0, 1 and 2 loading processes, and the share of the time that a trainer
stands waiting for them, by the number of batches that are kept ready.
"""

import argparse
import io
import math
import random
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from data_formats.chat import parse_chat
from finetune.data.collate import Collator
from finetune.data.examples import Encoder
from finetune.data.images import ImageAccess
from finetune.data.pictures import EXACT, Shortcuts
from finetune.data.sources import Row
from finetune.environment import environment
from finetune.families import FAMILIES
from finetune.model.load import load_processor
from finetune.recipe import ImagesSection, ModelSection
from scripts.drawing import MONO, load_font

SETTINGS = {
    "exact": EXACT,
    "reduced_decode": Shortcuts(reduced_decode=True),
    "fast_resize": Shortcuts(fast_resize=True),
    "both": Shortcuts(reduced_decode=True, fast_resize=True),
}
EDGES = {"longest_edge_px": 980, "shortest_edge_px": 378}  # idefics2-8b's own
NUM_QUESTIONS = 4  # about each page, in the document set
Split = Literal["always", "never"]


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_loading", description=__doc__)
    parser.add_argument("--rows-per-second", type=float, help="what the card trains")
    parser.add_argument("--no-loader", action="store_true", help="leave the second part out")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    print(environment(), end="\n\n")
    print_rows(time_rows(draw_pictures()), wanted.rows_per_second)
    if not wanted.no_loader:
        print_loader()


def draw_pictures(scale: float = 1) -> dict[str, bytes]:
    """A file of each kind, its edges times `scale`."""
    small, page, large = (
        (round(width * scale), round(height * scale))
        for width, height in ((640, 480), (1700, 2200), (4000, 3000))
    )
    return {
        "photo 640x480, JPEG": saved(draw_photo(*small), "JPEG"),
        "page 1700x2200, JPEG": saved(draw_page(*page), "JPEG"),
        "page 1700x2200, PNG": saved(draw_page(*page), "PNG"),
        "grey page 1700x2200, PNG": saved(draw_page(*page).convert("L"), "PNG"),
        "photo 4000x3000, JPEG": saved(draw_photo(*large), "JPEG"),
    }


def draw_page(width: int, height: int, seed: int = 0) -> Image.Image:
    """Lines of text on yellowish paper, with the noise of a scanner."""
    rng = random.Random(seed)
    page = Image.new("RGB", (width, height), (252, 250, 240))
    draw, font = ImageDraw.Draw(page), load_font(MONO, 28)
    for y in range(80, height - 80, 40):
        letters = rng.choices("abcdefghijklmnopqrstuvwxyz     ", k=rng.randint(20, 85))
        draw.text((100, y), "".join(letters), font=font, fill=(20, 20, 24))
    noise = np.random.default_rng(seed).normal(0, 2, (height, width, 1))
    return Image.fromarray((np.asarray(page) + noise).clip(0, 255).astype(np.uint8))


def draw_photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Colours that change at all scales, large ones most, as in nature."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    for divisor, weight in ((4, 0.5), (16, 0.25), (80, 0.15), (320, 0.1)):
        coarse = rng.integers(0, 256, (divisor, divisor, 3), dtype=np.uint8)
        fine = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pixels += weight * np.asarray(fine, dtype=np.float32)
    return Image.fromarray(pixels.astype(np.uint8))


def saved(image: Image.Image, kind: str) -> bytes:
    """The bytes of its file, of quality 85 where that can be said."""
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return file.getvalue()


def make_encoder(split: Split, shortcuts: Shortcuts = EXACT) -> Encoder:
    """nano's processor, cutting to the sizes of idefics2-8b: pixels do not know the vocabulary."""
    own = ImagesSection(split=split, longest_edge_px=224, shortest_edge_px=28)
    processor = load_processor(ModelSection(name="nano", dtype="float32"), own)[0]
    images, family = ImagesSection(split=split, **EDGES), FAMILIES["idefics2"]
    return Encoder(processor, family, images, packed_vision=True, shortcuts=shortcuts)


def make_row(picture: bytes | str, question: str, folder: Path = Path()) -> Row:
    """A question about one picture."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    return Row(question, parse_chat({"messages": messages}), ImageAccess(folder))


def time_rows(pictures: dict[str, bytes], repeats: int = 15) -> list[dict[str, Any]]:
    """CPU milliseconds of each kind under each setting, in turn, the median of all; and how far
    pixels are from the exact ones, of 255. Other programs change the clock's time, not this.
    """
    figures = []
    splits: tuple[Split, ...] = ("always", "never")
    for name, data in pictures.items():
        for split in splits:
            encoders = {kind: make_encoder(split, cuts) for kind, cuts in SETTINGS.items()}
            row = make_row(data, "Is it?")
            views = {kind: each.encode(row).views for kind, each in encoders.items()}
            ways: dict[str, Callable[[], Any]] = {"library": partial(by_library, data, split)}
            ways |= {kind: partial(each.encode, row) for kind, each in encoders.items()}
            times: dict[str, list[float]] = {kind: [] for kind in ways}
            for _ in range(repeats):
                for kind, way in ways.items():
                    start = time.process_time()
                    way()
                    times[kind].append(time.process_time() - start)
            views["library"] = views["exact"]  # as tests/test_images.py shows
            for kind in ways:
                differences = [
                    np.abs(ours.astype(np.int16) - theirs)
                    for ours, theirs in zip(views[kind], views["exact"], strict=True)
                ]
                figures.append(
                    {
                        "picture": name,
                        "split": split,
                        "settings": kind,
                        "milliseconds": 1000 * median(times[kind]),
                        "mean_difference": float(np.mean([d.mean() for d in differences])),
                        "largest_difference": int(max(d.max() for d in differences)),
                    }
                )
    return figures


def by_library(data: bytes, split: Split) -> Any:
    """What transformers' own processor makes of the file, in torch's tensors."""
    size = {"longest_edge": EDGES["longest_edge_px"], "shortest_edge": EDGES["shortest_edge_px"]}
    processor = Idefics2ImageProcessorPil(do_image_splitting=split == "always", size=size)
    with Image.open(io.BytesIO(data)) as image:
        return processor(image.convert("RGB"), return_tensors="pt")


def cores_needed(milliseconds_a_row: float, rows_per_second: float) -> int:
    """Loading processes that keep a card of this speed busy, each on a core of its own."""
    return math.ceil(milliseconds_a_row * rows_per_second / 1000)


def print_rows(figures: list[dict[str, Any]], rows_per_second: float | None) -> None:
    """A row a kind, splitting and setting."""
    cores = f" cores for {rows_per_second:g} rows/s |" if rows_per_second else ""
    print(f"| picture | split | settings | ms a row | mean | largest difference |{cores}")
    print("| --- | --- | --- | --- | --- | --- |" + (" --- |" if cores else ""))
    for each in figures:
        line = (
            f"| {each['picture']} | {each['split']} | {each['settings']} "
            f"| {each['milliseconds']:.1f} | {each['mean_difference']:.3f} "
            f"| {each['largest_difference']} |"
        )
        if rows_per_second:
            line += f" {cores_needed(each['milliseconds'], rows_per_second)} |"
        print(line)
    print()


def print_loader(num_rows: int = 64, batch_size: int = 2) -> None:
    """Rows a second by number of processes, and the waiting of a trainer that accumulates."""
    pages = [saved(draw_page(1700, 2200, seed), "JPEG") for seed in range(4)]
    photos = [saved(draw_photo(640, 480, seed), "JPEG") for seed in range(4)]
    sets = {
        "pages and photos in turn": [
            make_row((pages, photos)[i % 2][i // 2 % 4], f"Is it {i}?") for i in range(num_rows)
        ],
        f"{NUM_QUESTIONS} questions a page": [
            make_row(pages[i // NUM_QUESTIONS % 4], f"Is it {i}?") for i in range(num_rows)
        ],
    }
    print("| rows, split, in batches of | processes | exact, rows/s | fast_resize, rows/s |")
    print("| --- | --- | --- | --- |")
    for name, rows in sets.items():
        size = NUM_QUESTIONS if name.startswith(str(NUM_QUESTIONS)) else batch_size
        for num_workers in (0, 1, 2):
            rates = [
                rows_per_second(rows, loader(rows, size, num_workers, cuts))
                for cuts in (EXACT, SETTINGS["fast_resize"])
            ]
            print(f"| {name}, {size} | {num_workers} | {rates[0]:.1f} | {rates[1]:.1f} |")
    print()
    print_waiting()


def print_waiting(num_workers: int = 2, accumulation: int = 8, num_steps: int = 12) -> None:
    """What of a step is waiting, where the trainer takes all its batches before the first is
    computed: with torch's two batches kept ready by a process, and with a step's. Loading, too, is
    stood in for by sleeping, so that the queue alone is seen.
    """
    batch_seconds = 0.05
    for share in (0.5, 0.8):
        pause = batch_seconds / num_workers / share  # of a card that takes this share of the rows
        for kept in (2, math.ceil(accumulation / num_workers)):
            batches = iter(
                DataLoader(
                    range(accumulation * num_steps),  # type: ignore[arg-type]
                    collate_fn=partial(wait, batch_seconds),
                    num_workers=num_workers,
                    prefetch_factor=kept,
                )
            )
            waits, steps = [], []
            for _ in range(num_steps):
                start = time.perf_counter()
                taken = list(islice(batches, accumulation))
                waits.append(time.perf_counter() - start)
                time.sleep(pause * len(taken))
                steps.append(time.perf_counter() - start)
            # the first step waits for the processes to start
            waiting = sum(waits[1:]) / sum(steps[1:])
            print(
                f"A card that takes {share:.0%} of the rows that {num_workers} processes deliver, "
                f"{accumulation} batches a step, {kept} kept ready by each: waits {waiting:.0%} of "
                "the time."
            )


def wait(duration: float, numbers: list[int]) -> list[int]:
    """A collator that takes its time."""
    time.sleep(duration)
    return numbers


def loader(
    rows: list[Row],
    batch_size: int,
    num_workers: int,
    shortcuts: Shortcuts = EXACT,
) -> DataLoader:
    """As the trainer makes it, over these rows in their order."""
    return DataLoader(
        [{"row": i} for i in range(len(rows))],  # type: ignore[arg-type]
        batch_size=batch_size,
        collate_fn=Collator(make_encoder("always", shortcuts), rows),
        num_workers=num_workers,
    )


def rows_per_second(rows: list[Row], batches: DataLoader) -> float:
    """Of all batches, the start of the processes included."""
    start = time.perf_counter()
    for _ in batches:
        pass
    return len(rows) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
