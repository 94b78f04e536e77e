"""The benchmark at its smallest: that it measures what it says, not how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.data.containers import open_stream
from finetune.rundir import RunDir
from scripts import bench_stream
from scripts.bench_stream import KINDS, generate, main, time_going_on, watch

PAGE = "<!-- measured: stream -->\nunmeasured\n<!-- end: stream -->\n"


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_are_as_many_as_asked_and_the_same_each_time(kind: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        generate(kind, tmp_path / name, 230)
    files = [sorted((tmp_path / name).iterdir()) for name in ("a", "b")]
    assert [each.read_bytes() for each in files[0]] == [each.read_bytes() for each in files[1]]
    rows = [row for _, row in open_stream(tmp_path / "a").iterate(0, 1)]
    assert len(rows) == 230
    assert len({json.dumps(row, default=str) for row in rows}) == 230
    by_place, by_passing = time_going_on(open_stream(tmp_path / "a"), 207)
    assert by_place > 0
    assert by_passing > 0


def test_a_run_too_short_to_look_at_twice_is_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    all_at_once = f"open({str(run.metrics)!r}, 'w').write('{{}}\\n{{}}\\n')"
    popen = subprocess.Popen
    monkeypatch.setattr(
        bench_stream.subprocess,
        "Popen",
        lambda _, **others: popen([sys.executable, "-c", all_at_once], **others),
    )
    with pytest.raises(RuntimeError, match="between two looks"):
        watch(tmp_path / "recipe.yaml", run)


@pytest.mark.slow
def test_a_quick_run_fills_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    sizes = ["--rows", "150", "300", "--repeats", "1", "--kinds", "parquet"]
    assert main([*sizes, "--steps", "40", "--batch-size", "2", "--out", str(page)]) == 0
    text = page.read_text()
    assert "unmeasured" not in text
    assert "| 300 (pictures, Parquet shards) |" in text
    assert "| **300 against 150** |" in text
    printed = capsys.readouterr()
    assert "40 steps of 2 rows." in printed.out
    measured: list[dict[str, Any]] = [json.loads(line) for line in printed.err.splitlines()]
    assert [each["num_rows"] for each in measured] == [150, 300]
    for each in measured:
        assert each["startup_seconds"] > 0
        assert 100 < each["peak_mib"] < 10_000  # a process that has imported torch
        assert each["rows_per_second"] > 0
