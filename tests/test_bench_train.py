"""The benchmark at its smallest: that it measures what it says, not how fast anything is."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from scripts.bench_page import PARTS, write_page
from scripts.bench_sides import TAKEN_OUT, Job, run
from scripts.bench_train import ITEMS, QUICK, Bench, Results, in_own_process, main
from scripts.mid_model import FULL, KINDS, MID, forward_flops

MARKED = "".join(f"<!-- measured: {p} -->\nunmeasured {p}\n<!-- end: {p} -->\n" for p in PARTS)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Page and records of a quick run of all parts."""
    folder = tmp_path_factory.mktemp("bench")
    page, results = folder / "page.md", folder / "results.json"
    page.write_text(MARKED)
    arguments = ["--quick", "--out", str(page), "--results", str(results)]
    assert main([*arguments, "--folder", str(folder / "work")]) == 0
    return page, json.loads(results.read_text())


def of(records: list[dict[str, Any]], part: str, variant: str) -> list[dict[str, Any]]:
    return [each for each in records if (each["part"], each["variant"]) == (part, variant)]


@pytest.mark.slow
def test_a_quick_run_fills_every_part_of_the_page(
    measured: tuple[Path, list[dict[str, Any]]],
) -> None:
    page, _ = measured
    text = page.read_text()
    assert "unmeasured" not in text
    for item in ITEMS:
        assert f"| {item.name} |" in text
    assert (page.parent / "performance.png").stat().st_size > 1000


@pytest.mark.slow
def test_both_sides_train_the_same_rows_and_weights(
    measured: tuple[Path, list[dict[str, Any]]],
) -> None:
    _, records = measured
    stock, ours = (of(records, "main", side) for side in ("stock", "ours"))
    assert stock
    assert len(stock) == len(ours)
    for a, b in zip(stock, ours, strict=True):
        assert a["samples"] == b["samples"] > 0
        assert a["trainable"] == b["trainable"] > 0


@pytest.mark.slow
def test_losses_of_the_curves_begin_alike(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    _, records = measured
    (stock,), (ours,) = (of(records, "curves", side) for side in ("stock", "ours"))
    assert stock["losses"] == pytest.approx(ours["losses"], rel=1e-5)
    assert len(stock["losses"]) == QUICK.steps


@pytest.mark.slow
def test_stock_computes_at_least_what_the_rows_hold(
    measured: tuple[Path, list[dict[str, Any]]],
) -> None:
    _, records = measured
    (stock,), (ours,) = (
        [each for each in of(records, "main", side) if each["name"] == "mixed"]
        for side in ("stock", "ours")
    )
    assert stock["pixels"] > ours["row_pixels"] == ours["pixels"]
    assert stock["tokens"] >= ours["row_tokens"] - ours["num_rows"]  # stock has no BOS


@pytest.mark.slow
def test_with_the_vision_cache_the_tower_sees_pictures_in_the_first_epoch_alone(
    measured: tuple[Path, list[dict[str, Any]]],
) -> None:
    _, records = measured
    (cached,) = (
        each for each in of(records, "main", "ours") if each["name"] == "mixed, three epochs"
    )
    assert cached["samples"] == 3 * cached["num_rows"]
    assert cached["pixels"] == cached["row_pixels"]


@pytest.mark.slow
def test_a_training_in_its_own_process_has_the_losses_of_one_in_this(tmp_path: Path) -> None:
    bench = Bench(tmp_path, QUICK, threads=1)
    job = bench.job("stock", bench.set("mixed", 2), 2)
    apart, here = in_own_process(job), asdict(run(job))
    assert apart["losses"] == pytest.approx(here["losses"], rel=1e-6)
    assert apart["peak_mib"] >= apart["weights_mib"] > 0


def test_a_training_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho Traceback >&2\necho 'DataError: no rows' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    assert in_own_process(Job("ours", "model", "rows", 1)) == {"error": "DataError: no rows"}


def test_everything_that_is_taken_out_is_there_and_is_an_item() -> None:
    for targets in TAKEN_OUT.values():
        for target in targets:
            module, _, name = target.rpartition(".")
            assert callable(getattr(resolve_name(module), name))
    assert {name for item in ITEMS for name in item.without} == set(TAKEN_OUT)


def test_measuring_again_takes_the_place_of_what_was_measured(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    for batch_size in (1, 2):
        results.add({"part": "main", "batch_size": batch_size, "seconds": 1.0})
    again = Results(results.path)
    again.drop([{"part": "main", "batch_size": 2}])
    again.add({"part": "main", "batch_size": 2, "seconds": 3.0})
    assert [each["seconds"] for each in Results(results.path).records] == [1.0, 3.0]


def record(variant: str, repeat: int, seconds: float, mib: float, **more: Any) -> dict[str, Any]:
    return {
        "part": "main",
        "name": "mixed",
        "variant": variant,
        "batch_size": 4,
        "repeat": repeat,
        "machine": "a machine; 2026-01-01",
        "samples": 12,
        "step_seconds": [1.0] * 3,
        "seconds": seconds,
        "cpu_seconds": seconds,
        "weights_mib": 100.0,
        "peak_mib": 100.0 + mib,
        "tokens": 90,
        "pixels": 300,
        "num_rows": 12,
        "row_tokens": 60,
        "row_pixels": 100,
    } | more


def test_a_ratio_is_of_neighbouring_runs_with_its_spread(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(MARKED)
    stock = [record("stock", repeat, 60.0, 900) for repeat in range(3)]
    ours = [record("ours", repeat, 60.0 / (3 + repeat), 300) for repeat in range(3)]
    write_page(page, [*stock, *ours])
    text = page.read_text()
    assert "| 4.00x (3.00 to 5.00) at 0.33 (0.33 to 0.33) |" in text
    assert "| 4 | 1.50 | 1.50 | 3.00 | 3.00 |" in text
    assert "a machine; 2026-01-01." in text
    assert "unmeasured items" in text


def test_stock_at_its_best_is_its_fastest_batch_size(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(MARKED)
    alone = [record("stock", 0, 30.0, 900, batch_size=1), record("ours", 0, 20.0, 1, batch_size=1)]
    write_page(page, [record("stock", 0, 60.0, 900), record("ours", 0, 15.0, 300), *alone])
    assert "best batch size (1) | 2.5x | 2.00x |" in page.read_text()


def test_a_run_that_failed_is_told_and_not_counted(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(MARKED)
    broken = {key: record("ours", 0, 1.0, 1)[key] for key in ("part", "name", "batch_size")}
    broken |= {"variant": "ours", "repeat": 0, "machine": "m", "error": "refused here"}
    write_page(page, [record("stock", 0, 60.0, 900), broken])
    assert "Not measured: mixed, ours: refused here" in page.read_text()


def test_the_mid_size_model_spreads_its_work_as_the_8b_does() -> None:
    """A photo of 640 x 480 and half of it, cut in four beside the whole."""
    large = forward_flops(FULL, [(378, 378)] * 4 + [(640, 480)])
    small = forward_flops(MID, [(196, 196)] * 4 + [(320, 240)])
    for part in large:
        shares = (each[part] / sum(each.values()) for each in (large, small))
        assert next(shares) == pytest.approx(next(shares), abs=0.12)


def test_the_mixed_pictures_are_of_the_kinds_that_are_told() -> None:
    counts = {kind: KINDS.count(kind) for kind in dict.fromkeys(KINDS)}
    assert counts == {"photo": 8, "chart": 7, "receipt": 6, "scan": 3}
