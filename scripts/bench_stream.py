"""Train on streams of more and more rows: are start-up, memory and rows a second the same?

    python -m scripts.bench_stream                            # prints the table
    python -m scripts.bench_stream --out docs/scale.md        # and writes it into the page
    python -m scripts.bench_stream --rows 10000 --repeats 1

Generates text rows as one JSON Lines file, and rows with a picture of 28 x 28 pixels as Parquet and
as tar shards of 10,000 rows each, in a temporary folder. Each is streamed through `finetune train`
on nano, one thread and one loading process, sizes in turn. Measured from outside: seconds from the
command to the first line of metrics.jsonl, rows a second from there to its last line, both by the
clock and by the processors' time, which a busy machine changes less, and the most memory that the
process and those that it starts held together (PSS: what they share counts once). And how long a
reader takes to its first row nine tenths in, by a checkpoint's place and by passing over all rows
before.
"""

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from finetune.data.containers import Stream, open_stream
from finetune.rundir import RunDir, read_jsonl
from scripts.bench_page import spread
from scripts.bench_results import machine
from scripts.marked_page import fill, row, table

SHARD_ROWS = 10_000
GROUP_ROWS = 1_000  # of a Parquet file
NUM_PICTURES = 1_000  # different ones, each used again and again
EDGE_PX = 28
TICK_SECONDS = 0.05
TICKS_A_SAMPLE = 5  # of the memory
LOGGING_STEPS = 10


@dataclass(frozen=True)
class Measured:
    """One training, and a reader that goes on in the same rows."""

    kind: str
    num_rows: int
    startup_seconds: float
    startup_cpu_seconds: float
    rows_per_second: float
    rows_per_cpu_second: float
    peak_mib: float
    by_place_seconds: float
    by_passing_seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print the table; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    parser.add_argument("--out", type=Path, help="a page with a place for the table")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for kind in args.kinds:
            for num_rows in args.rows:
                generate(kind, folder / f"{kind}-{num_rows}", num_rows)
        measured = []
        for repeat in range(args.repeats):
            for kind in args.kinds:
                # there and back, so that no size always comes after another
                for num_rows in args.rows[:: 1 - 2 * (repeat % 2)]:
                    data = folder / f"{kind}-{num_rows}"
                    measured.append(measure(kind, data, num_rows, args.steps, args.batch_size))
                    print(json.dumps(asdict(measured[-1])), file=sys.stderr, flush=True)
    lines = [*page(measured), "", f"{args.steps} steps of {args.batch_size} rows. {machine(1)}."]
    print("\n".join(lines))
    if args.out:
        text = args.out.read_text(encoding="utf-8")
        args.out.write_text(fill(text, "stream", lines), encoding="utf-8")
    return 0


def generate(kind: str, folder: Path, num_rows: int) -> None:
    """The same rows at every call, a shard after the other."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True)
    shard_rows = num_rows if kind == "jsonl" else SHARD_ROWS
    for shard, start in enumerate(range(0, num_rows, shard_rows)):
        numbers = range(start, min(start + shard_rows, num_rows))
        KINDS[kind](folder / f"part-{shard:05}", numbers)


def write_lines(path: Path, numbers: range) -> None:
    """Text rows, a question and an answer each."""
    with path.with_suffix(".jsonl").open("w") as file:
        for number in numbers:
            file.write(json.dumps({"messages": messages(number)}) + "\n")


def messages(number: int) -> list[dict[str, str]]:
    """A dialogue of one exchange."""
    return [
        {"role": "user", "content": f"What is the total of invoice number {number}?"},
        {"role": "assistant", "content": f"The total is {number * 7} euros."},
    ]


def write_parquet(path: Path, numbers: range) -> None:
    """Rows with their picture's bytes, as `datasets` stores them."""
    kept = pictures()
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("question", pa.string()), ("answer", pa.string())])
    with pq.ParquetWriter(path.with_suffix(".parquet"), schema, use_dictionary=False) as writer:
        for start in range(numbers.start, numbers.stop, GROUP_ROWS):
            rows = [
                {
                    "image": {"bytes": kept[number % NUM_PICTURES], "path": None},
                    "question": f"What is the number of picture {number}?",
                    "answer": str(number),
                }
                for number in numbers[start - numbers.start :][:GROUP_ROWS]
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))


def write_tar(path: Path, numbers: range) -> None:
    """Samples of a picture and a JSON file, in webdataset's layout."""
    kept = pictures()
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        for number in numbers:
            texts = {"question": f"What is picture {number}?", "answer": str(number)}
            members = {"png": kept[number % NUM_PICTURES], "json": json.dumps(texts).encode()}
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{number:08}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


KINDS: dict[str, Callable[[Path, range], None]] = {
    "jsonl": write_lines,
    "parquet": write_parquet,
    "tar": write_tar,
}
TITLES = {
    "jsonl": "text, one JSON Lines file",
    "parquet": "pictures, Parquet shards",
    "tar": "pictures, tar shards",
}


def pictures() -> list[bytes]:
    """Grey noise, as PNG files."""
    rng = np.random.default_rng(0)
    files = []
    for pixels in rng.integers(0, 256, (NUM_PICTURES, EDGE_PX, EDGE_PX), dtype=np.uint8):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    return files


def measure(kind: str, data: Path, num_rows: int, steps: int, batch_size: int) -> Measured:
    """Train once, and go on once."""
    with tempfile.TemporaryDirectory(dir=data.parent) as temporary:
        recipe = write_recipe(kind, data, Path(temporary), steps, batch_size)
        run = RunDir(Path(temporary) / "run")
        begun, ended, peak_mib = watch(recipe, run)
        logged = [line for line in read_jsonl(run.metrics) if "loss" in line]
    first, last = logged[0], logged[-1]
    assert last["step"] == steps
    trained = last["samples"] - first["samples"]
    figures = (
        begun.seconds,
        begun.cpu_seconds,
        trained / (last["seconds"] - first["seconds"]),
        trained / (ended.cpu_seconds - begun.cpu_seconds),
        peak_mib,
        *time_going_on(open_stream(data), num_rows * 9 // 10),
    )
    return Measured(kind, num_rows, *(round(figure, 4) for figure in figures))


def write_recipe(kind: str, data: Path, folder: Path, steps: int, batch_size: int) -> Path:
    """A streamed run of nano, whose only checkpoint is the last."""
    columns = {"image": "image", "question": "question", "answer": "answer"}
    source = {"path": str(data), "streaming": True}
    recipe = {
        "model": {"name": "nano", "dtype": "float32"},
        "images": {"split": "never", "longest_edge_px": 224, "shortest_edge_px": EDGE_PX},
        "data": {"train": [source if kind == "jsonl" else source | {"columns": columns}]},
        "training": {
            "max_steps": steps,
            "batch_size": batch_size,
            "gradient_accumulation": 1,
            "logging_steps": LOGGING_STEPS,
            "save_steps": steps,
            "num_workers": 1,
        },
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


@dataclass(frozen=True)
class Spent:
    """Since the command was given."""

    seconds: float
    cpu_seconds: float


def watch(recipe: Path, run: RunDir) -> tuple[Spent, Spent, float]:
    """Train; what was spent at the first and at the last line of its metrics, and the peak memory
    in MiB.

    Raises:
        RuntimeError: The run was too short to see the one without the other.
    """
    command = [sys.executable, "-m", "finetune", "train", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    spent: list[Spent] = []  # line by line, those of one tick together
    num_bytes, peak_bytes = 0, 0
    with (recipe.parent / "messages.txt").open("w+") as messages:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=messages
        )
        for tick in itertools.count():
            if process.poll() is not None:
                break
            written = run.metrics.stat().st_size if run.metrics.is_file() else 0
            if written > num_bytes:
                num_bytes = written
                cpu_seconds = cpu_seconds_of_tree(process.pid)
                spent.append(Spent(time.perf_counter() - begun, cpu_seconds))
            if tick % TICKS_A_SAMPLE == 0:  # which takes some milliseconds
                peak_bytes = max(peak_bytes, memory_of_tree(process.pid))
            time.sleep(TICK_SECONDS)
        messages.seek(0)
        assert process.returncode == 0, messages.read()
    if len(spent) < 2:
        raise RuntimeError(
            f"{run.metrics} was written between two looks at it, {TICK_SECONDS} s apart: nothing "
            "between its first and last line can be measured. Give more --steps."
        )
    return spent[0], spent[-1], peak_bytes / 2**20


def tree(pid: int) -> Iterator[psutil.Process]:
    """A process and those below it, as long as they are there."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        yield parent
        yield from parent.children(recursive=True)


def cpu_seconds_of_tree(pid: int) -> float:
    """What the processes, and those that have ended before them, have computed."""
    found = 0.0
    for process in tree(pid):
        with suppress(psutil.NoSuchProcess):
            found += sum(process.cpu_times()[:4])
    return found


def memory_of_tree(pid: int) -> int:
    """Bytes that a process and those below it hold, shared pages counted once."""
    found = 0
    for process in tree(pid):
        with suppress(psutil.NoSuchProcess):
            found += _memory_of(process)
    return found


def _memory_of(process: psutil.Process) -> int:
    rollup = Path(f"/proc/{process.pid}/smaps_rollup")
    with suppress(OSError):  # not on Linux, or it has ended
        for line in rollup.read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return process.memory_info().rss


def time_going_on(stream: Stream, passed: int) -> tuple[float, float]:
    """Seconds to the row after so many: by its place, and by passing over those before."""
    reading = stream.iterate(0, 1, skip=passed - 1)
    next(reading)
    begun = time.perf_counter()
    by_passing = next(stream.iterate(0, 1, skip=passed))
    between = time.perf_counter()
    by_place = next(stream.iterate(0, 1, start=reading.place))
    ended = time.perf_counter()
    assert by_place == by_passing
    return ended - between, between - begun


FIGURES = (
    *("startup_seconds", "startup_cpu_seconds", "rows_per_second", "rows_per_cpu_second"),
    "peak_mib",
)


def page(measured: Sequence[Measured]) -> Iterator[str]:
    """A row for each kind and size, and after each kind the largest against the smallest."""
    yield from table(
        *("rows", "start-up, s", "CPU s", "rows/s", "rows/CPU s", "peak memory, MiB"),
        *("going on at 9/10, s", "by passing over, s"),
    )
    for kind in dict.fromkeys(each.kind for each in measured):
        of_kind = [each for each in measured if each.kind == kind]
        sizes = sorted({each.num_rows for each in of_kind})
        for size in sizes:
            of_size = [each for each in of_kind if each.num_rows == size]
            yield row(
                f"{size:,} ({TITLES[kind]})",
                *(spread([getattr(each, figure) for each in of_size]) for figure in FIGURES[:-1]),
                f"{median(each.peak_mib for each in of_size):,.0f}",
                f"{median(each.by_place_seconds for each in of_size):.3f}",
                f"{median(each.by_passing_seconds for each in of_size):.2f}",
            )
        small, large = (
            [each for each in of_kind if each.num_rows == size] for size in (sizes[0], sizes[-1])
        )
        yield row(
            f"**{sizes[-1]:,} against {sizes[0]:,}**",
            *(f"**{spread(ratios(small, large, figure), 'x')}**" for figure in FIGURES),
            *("", ""),
        )


def ratios(small: Sequence[Any], large: Sequence[Any], figure: str) -> list[float]:
    """Of each turn."""
    return [getattr(b, figure) / getattr(a, figure) for a, b in zip(small, large, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
