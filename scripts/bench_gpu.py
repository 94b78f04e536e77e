"""Speed and memory of training Idefics2-8B on a GPU: as TRL does it, and as `finetune train`.

    python -m scripts.bench_gpu --out FOLDER

Random weights, made on the card: memory and time do not depend on their values, and nothing is
downloaded. Writes bench_gpu.json and bench_gpu.md to FOLDER ($OUT without the option) after every
case, and begins none that would not end within `--minutes`; `--tiny` runs the same code on a CPU.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from finetune.model.kernels import Device
from finetune.model.memory import step_loss, tensors_of
from scripts.bench_memory import num_bytes, peak_above
from scripts.gpu_cases import (
    Case,
    Traced,
    batch_of,
    build_adapted,
    cases,
    dtype_of,
    set_up,
    trace,
    trained_of,
)

TIMED_STEPS = 3
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")


@dataclass
class Line:
    """What a case took, in GiB and seconds; `error` where it did not run."""

    case: Case
    seconds_a_step: float | None = None
    """The median; the batch's way to the card is part of a step, its making is not."""
    measured_gib: float | None = None
    reserved_gib: float | None = None
    """With the gaps that torch's allocator keeps."""
    on_card_gib: float | None = None
    """As the driver tells, CUDA's own share included."""
    loss: float | None = None
    error: str = ""
    has_failed: bool = False
    """Otherwise than for lack of memory or of a package."""
    planned_gib: float | None = None
    needed_tflop: float | None = None
    """Of a step: forward and backward of what these rows take at the least, on either side."""
    computed_tflop: float | None = None
    """What this side computes of it and beyond."""

    @property
    def samples_per_second(self) -> float | None:
        """Rows, of which several may ask about one page."""
        return self.case.batch_size / self.seconds_a_step if self.seconds_a_step else None

    def share(self, tflop: float | None, ceiling_tflops: float) -> float | None:
        """The arithmetic over what the card could have computed in that time."""
        if tflop is None or not self.seconds_a_step:
            return None
        return tflop / self.seconds_a_step / ceiling_tflops


@dataclass
class Results:
    """Everything measured so far."""

    machine: dict[str, str]
    ceiling_tflops: float
    lines: list[Line]
    not_run: list[Case]

    def to_json(self) -> dict[str, Any]:
        """A dictionary a line, with what is worked out of several."""
        shown = []
        for line in self.lines:
            rate = line.samples_per_second
            stock = self.stock_beside(line)
            beside = stock.samples_per_second if stock else None
            worked_out = {
                "samples_per_second": rate,
                "times_stock": rate / beside if rate and beside else None,
                "mfu": line.share(line.needed_tflop, self.ceiling_tflops),
                "computed_share": line.share(line.computed_tflop, self.ceiling_tflops),
            }
            shown.append(asdict(line.case) | asdict(line) | worked_out)
            del shown[-1]["case"]
        return {
            "machine": self.machine,
            "ceiling_tflops": self.ceiling_tflops,
            "cases": shown,
            "not_run": [str(case) for case in self.not_run],
        }

    def stock_beside(self, line: Line) -> Line | None:
        """Stock on the same rows; None for itself."""
        if line.case.side == "stock":
            return None
        wanted = asdict(line.case) | {"side": "stock"}
        return next((each for each in self.lines if asdict(each.case) == wanted), None)

    def fill_in(self, traces: dict[Case, "Future[Traced]"], *, wait: bool) -> None:
        """What has been traced meanwhile, or `wait` for all of it."""
        for line in self.lines:
            future = traces[line.case]
            if not (wait or future.done()):
                continue
            traced = future.result()
            line.computed_tflop = traced.computed_flops / 1e12
            if traced.planned_bytes is not None:
                line.planned_gib = round(traced.planned_bytes / 2**30, 3)
            if traced.needed_flops is not None:
                line.needed_tflop = traced.needed_flops / 1e12
                if stock := self.stock_beside(line):
                    stock.needed_tflop = line.needed_tflop

    def write(self, folder: Path) -> None:
        """Both files."""
        shown = self.to_json()
        (folder / "bench_gpu.json").write_text(json.dumps(shown, indent=2), encoding="utf-8")
        (folder / "bench_gpu.md").write_text(table(shown), encoding="utf-8")


class InTurn(Executor):
    """Computes what it is given at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """A future that is done."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def measure(line: Line, model: Any, *, tiny: bool) -> None:
    """Train a few steps of the line's case and write down what they took."""
    case, on_gpu = line.case, not tiny
    device: Device = "cuda" if on_gpu else "cpu"
    torch.manual_seed(0)
    set_up(model, case)
    batch = batch_of(case, tiny=tiny)
    if on_gpu:  # as the loader's thread does
        batch = {name: each.pin_memory() for name, each in batch.items()}
    trained = trained_of(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> torch.Tensor:
        moved = {name: each.to(device, non_blocking=True) for name, each in batch.items()}
        with torch.autocast("cuda", dtype_of(tiny=tiny)) if on_gpu else nullcontext():
            loss = step_loss(model, moved)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    try:
        line.loss = step().item()  # afterwards kernels are chosen and the optimizer has its state
        if on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            states = [each for state in optimizer.state.values() for each in state.values()]
            there = [*model.parameters(), *model.buffers(), *states]
            resting = num_bytes([*there, *tensors_of(list(batch.values()))])
            line.measured_gib = round((resting + peak_above(step)) / 2**30, 6)
        line.seconds_a_step = statistics.median(seconds_of(step) for _ in range(TIMED_STEPS))
        if on_gpu:
            line.measured_gib = round(torch.cuda.max_memory_allocated() / 2**30, 3)
            line.reserved_gib = round(torch.cuda.max_memory_reserved() / 2**30, 3)
            free, total = torch.cuda.mem_get_info()
            line.on_card_gib = round((total - free) / 2**30, 3)
    finally:
        for parameter in trained:  # of a step that was cut short
            parameter.grad = None


def seconds_of(run: Callable[[], Any]) -> float:
    """Until the card is done with it."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_ceiling(*, tiny: bool) -> float:
    """The most TFLOP/s of a product of square matrices, of noise since zeros draw less power."""
    device, dtype = ("cpu" if tiny else "cuda"), dtype_of(tiny=tiny)
    rates = []
    for edge, times in ((128, 4),) if tiny else ((4096, 50), (8192, 20), (16384, 4)):
        left, right = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))

        def multiply(left: Any = left, right: Any = right, times: int = times) -> None:
            for _ in range(times):
                torch.mm(left, right)

        seconds_of(multiply)
        rates.append(2 * edge**3 * times / min(seconds_of(multiply) for _ in range(3)) / 1e12)
    return max(rates)


def machine(*, tiny: bool) -> dict[str, str]:
    """The card, and the versions that matter."""
    told = {"card": "CPU" if tiny else torch.cuda.get_device_name()}
    told["date"] = datetime.now(UTC).date().isoformat()
    for name in PACKAGES:
        try:
            told[name] = version(name)
        except PackageNotFoundError:
            told[name] = "missing"
    return told


COLUMNS = (
    "weights",
    "work",
    "rows",
    "side",
    "samples/s",
    "times stock",
    "MFU",
    "computed TFLOP/s",
    "TFLOP a step: needed",
    "computed",
    "peak GiB",
    "planned GiB",
    "off",
    "with gaps GiB",
    "on the card GiB",
)


def table(shown: dict[str, Any]) -> str:
    """Markdown, a line a case, of what `Results.to_json` gives."""
    told = ", ".join(
        value if name == "card" else f"{name} {value}" for name, value in shown["machine"].items()
    )
    lines = [
        f"{told}. Largest product of matrices: {shown['ceiling_tflops']:,.1f} TFLOP/s.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- " * len(COLUMNS) + "|",
    ]
    lines += [f"| {' | '.join(_cells(case))} |" for case in shown["cases"]]
    if shown["not_run"]:
        lines += ["", f"Not run for lack of time: {'; '.join(shown['not_run'])}."]
    return "\n".join(lines) + "\n"


def _cells(case: dict[str, Any]) -> list[str]:
    rate, seconds = case["computed_tflop"], case["seconds_a_step"]
    planned, measured = case["planned_gib"], case["measured_gib"]
    return [
        "16 bits" if case["quantize"] == "none" else case["quantize"],
        case["work"] + ("" if case["checkpointing"] else ", without checkpointing"),
        str(case["batch_size"]),
        case["side"],
        case["error"] or _number(case["samples_per_second"], ".2f"),
        _number(case["times_stock"], ".2f"),
        _number(case["mfu"], ".1%"),
        _number(rate / seconds if rate and seconds else None, ",.1f"),
        _number(case["needed_tflop"], ",.1f"),
        _number(rate, ",.1f"),
        _number(measured, ".2f"),
        _number(planned, ".2f"),
        _number(planned / measured - 1 if planned and measured else None, "+.1%"),
        _number(case["reserved_gib"], ".2f"),
        _number(case["on_card_gib"], ".2f"),
    ]


def _number(value: float | None, shape: str) -> str:
    return "" if value is None else format(value, shape)


def run(
    ordered: Sequence[Case], executor: Executor, out: Path, *, minutes: float, tiny: bool
) -> Results:
    """Measure the cases one after the other, while the executor traces them."""
    start = time.perf_counter()
    traces: dict[Case, Future[Traced]] = {}
    if minutes > 0:
        traces = {case: executor.submit(trace, case, tiny=tiny) for case in ordered}
    results = Results(machine(tiny=tiny), measure_ceiling(tiny=tiny), [], list(ordered))
    results.write(out)
    model, built, longest = None, "", 0.0
    for case in ordered:
        began = time.perf_counter()
        if began - start + longest >= minutes * 60:
            break
        line = Line(case)
        try:
            if model is None or built != case.quantize:
                model, built = None, case.quantize  # one at a time is on the card
                _let_go()
                model = build_adapted(case.quantize, "cpu" if tiny else "cuda", tiny=tiny)
            measure(line, model, tiny=tiny)
        except ModuleNotFoundError as error:
            line.error = f"{error.name} is missing"
        except torch.cuda.OutOfMemoryError:
            line.error = "out of memory"
        except Exception as error:  # a card is lent for minutes: the other cases go on
            traceback.print_exc()
            line.has_failed = True
            line.error = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        _let_go()
        results.lines.append(line)
        results.not_run.remove(case)
        results.fill_in(traces, wait=False)
        results.write(out)
        longest = max(longest, time.perf_counter() - began)
        rate = line.samples_per_second
        told = line.error or f"{rate:.2f} samples/s, {line.measured_gib:.2f} GiB"
        print(f"{time.perf_counter() - start:4.0f} s  {case}: {told}", flush=True)
    for case in results.not_run:
        if case in traces:
            traces[case].cancel()
    results.fill_in(traces, wait=True)
    results.write(out)
    return results


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the two files and say what was left out; 1 where a case failed.

    Memory or a package that is missing is no failure.
    """
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or ".")
    parser.add_argument("--minutes", type=float, default=7.5, help="to end within, start aside")
    parser.add_argument("--tiny", action="store_true", help="a small model, on a CPU")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("no CUDA device here; --tiny runs the same code on a CPU", file=sys.stderr)
        return 2
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    # cards have cores to spare beside them, and following a step takes one some seconds
    workers = max((os.cpu_count() or 1) // 2, 1)
    beside = partial(ProcessPoolExecutor, workers, mp_context=get_context("spawn"))
    with InTurn() if options.tiny else beside() as executor:
        ordered = cases(tiny=options.tiny)
        results = run(ordered, executor, out, minutes=options.minutes, tiny=options.tiny)
    for case in results.not_run:
        print(f"not run for lack of time: {case}", flush=True)
    return int(any(line.has_failed for line in results.lines))


if __name__ == "__main__":
    raise SystemExit(main())
