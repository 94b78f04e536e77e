"""Odd input for what reads other people's files: recipes, rows, pictures. Each must be read, or
refused with the message that is promised; anything else is a fault, and so is a wait or a crash.

python -m scripts.fuzz --seconds 120 --out docs/security.md     all three, into the page
python -m scripts.fuzz --target images --inputs 100000          one of them

Inputs are mutated by atheris (libFuzzer), which looks for lines of our code not reached before;
where it is not installed, at random. Each target runs in a process of its own, which a crash ends
alone; what it was doing is kept.
"""

import argparse
import importlib.util
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.fuzz_targets import MAX_INPUT_BYTES, ROOT, TARGETS, Target, mutated, with_other_value

ENGINE = "atheris" if importlib.util.find_spec("atheris") else "random"
SECONDS_PER_INPUT = 10
MAX_MEMORY_MIB = 2048


class TooSlowError(BaseException):
    """Not an `Exception`: those are caught around decoders, and become messages."""


# The run.


class Run:
    """Counts what is tried, and keeps each fault once with the input that showed it first."""

    def __init__(self, target: Target, work: Path, *, seconds: float, inputs: int):
        self.target, self.work = target, work
        self.ends_at = time.monotonic() + seconds
        self.began = time.monotonic()
        self.num_asked = inputs
        self.num_inputs = self.num_read = self.num_refused = 0
        self.slowest_seconds = 0.0
        self.faults: dict[str, dict[str, str]] = {}

    def one(self, data: bytes) -> None:
        """Try an input; ends the process once there were enough."""
        data = bytes(data[:MAX_INPUT_BYTES])
        (self.work / "current").write_bytes(data)  # what a crash would leave
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_INPUT)
        try:
            is_read = self.target.attempt(data)
            self.num_read += is_read
            self.num_refused += not is_read
        except TooSlowError as error:
            self._note(f"took longer than {SECONDS_PER_INPUT} s", error, data)
        except Exception as error:
            self._note(type(error).__name__, error, data)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - began)
        self.num_inputs += 1
        if memory_mib() > MAX_MEMORY_MIB:
            self._note(f"took more than {MAX_MEMORY_MIB:,} MiB", None, data)
            self.finish()
        if self.num_inputs % 500 == 0:
            self.write()
        if self.num_inputs >= self.num_asked or time.monotonic() >= self.ends_at:
            self.finish()

    def _note(self, what: str, error: BaseException | None, data: bytes) -> None:
        frames = traceback.extract_tb(error.__traceback__) if error else []
        ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
        ours = [each for each in ours if ".venv" not in each.filename and each.filename != __file__]
        place = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}" if ours else ""
        key = f"{what} at {place}"
        if key not in self.faults:
            file = self.work / f"fault-{len(self.faults) + 1}"
            file.write_bytes(data)
            self.faults[key] = {"message": str(error)[:200], "input": str(file)}

    def write(self) -> None:
        """What is known by now, for who started this process."""
        result = {
            "inputs": self.num_inputs,
            "read": self.num_read,
            "refused": self.num_refused,
            "seconds": time.monotonic() - self.began,
            "slowest_seconds": self.slowest_seconds,
            "peak_memory_mib": memory_mib(),
            "faults": self.faults,
        }
        aside = self.work / "result.part"
        aside.write_text(json.dumps(result))
        aside.replace(self.work / "result.json")

    def finish(self) -> None:
        """libFuzzer has no way back."""
        self.write()
        os._exit(0)


def memory_mib() -> float:
    """The most this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _is_late(*_: object) -> None:
    raise TooSlowError


def fuzz(name: str, engine: str, work: Path, *, seconds: float, inputs: int, seed: int) -> None:
    """Try inputs in this process until there were enough, which ends it."""
    warnings.simplefilter("ignore")
    target = TARGETS[name]
    signal.signal(signal.SIGALRM, _is_late)
    os.chdir(work)
    if engine == "random":
        seeds, rng = list(target.seeds()), random.Random(seed)
        run = Run(target, work, seconds=seconds, inputs=inputs)
        for data in seeds:
            run.one(data)
        while True:
            run.one(mutated(rng, target, seeds))
    import atheris as untyped

    atheris: Any = untyped

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        changed = (
            with_other_value(rng, data) if (rng := random.Random(seed)).random() < 0.3 else None
        )
        return changed[:max_size] if changed else atheris.Mutate(data, max_size)

    with atheris.instrument_imports(include=["finetune", "data_formats"]):
        for data in target.seeds():  # imports all that is used
            with suppress(Exception):
                target.attempt(data)
    corpus = work / "corpus"
    corpus.mkdir()
    for number, data in enumerate(target.seeds()):
        (corpus / f"{number:03d}").write_bytes(data[:MAX_INPUT_BYTES])
    words, lines = work / "words", []
    for word in target.words:
        escaped = "".join(f"\\x{byte:02x}" for byte in word)
        lines.append(f'"{escaped}"\n')
    words.write_text("".join(lines))
    run = Run(target, work, seconds=seconds, inputs=inputs)
    flags = [
        f"-seed={seed + 1}",
        f"-dict={words}",
        f"-max_len={MAX_INPUT_BYTES}",
        "-rss_limit_mb=0",
    ]
    atheris.Setup(
        [sys.argv[0], *flags, "-timeout=0", "-verbosity=0", str(corpus)],
        run.one,
        custom_mutator=mutate,
    )
    atheris.Fuzz()


def in_own_process(name: str, engine: str, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own found; where it crashed, that is a fault, and another goes on."""
    total: dict[str, Any] = {"inputs": 0, "read": 0, "refused": 0, "seconds": 0.0, "faults": {}}
    total |= {"slowest_seconds": 0.0, "peak_memory_mib": 0.0}
    for attempt in range(5):
        left, place = args.inputs - total["inputs"], work / f"{name}-{attempt}"
        seconds = args.seconds - total["seconds"]
        if left <= 0 or seconds <= 0:
            break
        place.mkdir(parents=True)
        command = [sys.executable, "-m", "scripts.fuzz", "--target", name, "--engine", engine]
        command += [
            "--seconds",
            str(seconds),
            "--inputs",
            str(left),
            "--seed",
            str(args.seed + attempt),
        ]
        with (place / "said").open("wb") as said:
            try:
                code = subprocess.run(
                    [*command, "--work", str(place)],
                    cwd=ROOT,
                    stdout=said,
                    stderr=said,
                    timeout=seconds + 120,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        file = place / "result.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        for key in ("inputs", "read", "refused", "seconds"):
            total[key] += found.get(key, 0)
        for key in ("slowest_seconds", "peak_memory_mib"):
            total[key] = max(total[key], found.get(key, 0))
        total["faults"] = found.get("faults", {}) | total["faults"]
        if code == 0:
            break
        ended = "did not end" if code is None else f"ended with {code}"
        total["faults"][f"the process {ended}"] = {
            "message": f"see {place / 'said'}",
            "input": str(place / "current"),
        }
        if not found:
            total["seconds"] += 30  # or it would crash for ever
    return total


def page_lines(results: dict[str, dict[str, Any]], engine: str) -> list[str]:
    """The table for docs/security.md."""
    from scripts.marked_page import row, table

    packages = ("pillow", "pyyaml", "pypdfium2", *(("atheris",) if engine == "atheris" else ()))
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    head = ("what", "inputs", "read", "refused with a message", "slowest", "peak memory", "faults")
    lines = table(*head)
    for name, found in results.items():
        lines.append(
            row(
                TARGETS[name].title,
                f"{found['inputs']:,}",
                f"{found['read']:,}",
                f"{found['refused']:,}",
                f"{found['slowest_seconds']:.1f} s",
                f"{found['peak_memory_mib']:,.0f} MiB",
                len(found["faults"]),
            )
        )
    seconds = sum(found["seconds"] for found in results.values())
    how = "atheris, led by coverage" if engine == "atheris" else "mutation at random"
    return [
        *lines,
        "",
        f"Measured {datetime.now(UTC):%Y-%m-%d} in {seconds / 60:.0f} minutes by {how}; Python "
        f"{sys.version.split()[0]}, {versions}.",
    ]


def main() -> int:
    """Fuzz, print what was found, and exit 1 where there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m scripts.fuzz", description=main.__doc__)
    parser.add_argument("--target", choices=TARGETS, help="one of them; all by default")
    parser.add_argument("--seconds", type=float, default=120, help="of each target")
    parser.add_argument("--inputs", type=int, default=10**9, help="of each target, at most")
    parser.add_argument("--engine", choices=["atheris", "random"], default=ENGINE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a page with the marks to fill")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        limits = {"seconds": args.seconds, "inputs": args.inputs, "seed": args.seed}
        fuzz(args.target, args.engine, args.work, **limits)
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    results = {}
    for name in [args.target] if args.target else TARGETS:
        found = results[name] = in_own_process(name, args.engine, work, args)
        num_faulty = found["inputs"] - found["read"] - found["refused"]
        print(
            f"{name}: {found['inputs']:,} inputs in {found['seconds']:.0f} s, {found['read']:,} "
            f"read, {len(found['faults'])} faults, by {num_faulty:,} inputs; slowest "
            f"{found['slowest_seconds']:.2f} s",
            flush=True,
        )
        for fault, kept in found["faults"].items():
            print(f"  {fault}: {kept['message']}\n    {kept['input']}")
    if args.out:
        from scripts.marked_page import fill

        text = args.out.read_text(encoding="utf-8")
        args.out.write_text(fill(text, "fuzz", page_lines(results, args.engine)), encoding="utf-8")
    return int(any(found["faults"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
