"""The benchmark for a GPU, on a CPU at its smallest: that it measures what it says."""

import json
import math
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from finetune.data.collate import IGNORED_LABEL
from finetune.model.memory import step_loss
from scripts import bench_gpu
from scripts.bench_gpu import InTurn, main, run
from scripts.gpu_cases import (
    BATCH_SIZES,
    Case,
    Quantize,
    Side,
    Traced,
    Work,
    batch_of,
    build_adapted,
    cases,
    rows_of,
    set_up,
    set_up_stock,
    trained_of,
)
from scripts.mid_model import FULL, num_parameters

WORKS: tuple[Work, ...] = get_args(Work)
WEIGHTS: tuple[Quantize, ...] = get_args(Quantize)
SIDES: tuple[Side, ...] = get_args(Side)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The two files of a tiny run."""
    folder = tmp_path_factory.mktemp("bench")
    assert main(["--tiny", "--out", str(folder)]) == 0
    shown = json.loads((folder / "bench_gpu.json").read_text())
    return shown, (folder / "bench_gpu.md").read_text()


@pytest.fixture(scope="module")
def model() -> Any:
    """Tiny, on a CPU."""
    return build_adapted("none", "cpu", tiny=True)


def of(shown: dict[str, Any], work: str, side: str, quantize: str = "none") -> dict[str, Any]:
    wanted = {"work": work, "side": side, "quantize": quantize, "checkpointing": True}
    (found,) = (each for each in shown["cases"] if wanted.items() <= each.items())
    return found


def test_every_case_has_its_figures(measured: tuple[dict[str, Any], str]) -> None:
    shown, table = measured
    assert len(shown["cases"]) == len(cases(tiny=True))
    assert shown["not_run"] == []
    assert shown["ceiling_tflops"] > 0
    assert shown["machine"]["torch"].startswith(torch.__version__.partition("+")[0])
    for case in shown["cases"]:
        assert case["error"] == ""
        assert math.isfinite(case["loss"])
        for name in ("samples_per_second", "measured_gib", "computed_tflop", "computed_share"):
            assert case[name] > 0
        assert (case["times_stock"] is None) == (case["side"] == "stock") or case["batch_size"] == 1
    assert table.count("| stock |") == table.count("| ours |") - 1 == len(WORKS) + 1


@pytest.mark.parametrize("work", WORKS)
def test_stock_computes_what_ours_leaves_out(
    measured: tuple[dict[str, Any], str], work: Work
) -> None:
    stock, ours = (of(measured[0], work, side) for side in SIDES)
    # at the least a tower's backward pass, which takes twice its forward pass
    assert stock["computed_tflop"] > 1.3 * ours["computed_tflop"]
    assert ours["computed_tflop"] > 1.1 * ours["needed_tflop"]
    assert stock["needed_tflop"] == ours["needed_tflop"]
    assert stock["mfu"] < stock["computed_share"]


def test_small_pictures_and_questions_about_one_page_need_less(
    measured: tuple[dict[str, Any], str],
) -> None:
    needed = {work: of(measured[0], work, "ours")["needed_tflop"] for work in WORKS}
    assert needed["docvqa split"] < 0.6 * needed["page split"]
    assert needed["mixed split"] < 0.8 * needed["page split"]
    stock = {work: of(measured[0], work, "stock")["computed_tflop"] for work in WORKS}
    assert stock["mixed split"] == stock["docvqa split"] == stock["page split"]


def test_the_plan_beside_the_peak_is_of_the_same_step(
    measured: tuple[dict[str, Any], str],
) -> None:
    for work in WORKS:
        line = of(measured[0], work, "ours")
        assert line["planned_gib"] == pytest.approx(line["measured_gib"], rel=0.2)
        assert of(measured[0], work, "stock")["measured_gib"] > 2 * line["measured_gib"]


@pytest.mark.parametrize("work", WORKS)
def test_both_sides_predict_the_same_labels_alike(model: Any, work: Work) -> None:
    losses: dict[Side, float] = {}
    learnt = [row.loss_mask for row in rows_of(work, 4, tiny=True)]
    for side in SIDES:
        case = Case(work, 4, "none", side)
        batch = batch_of(case, tiny=True)
        if side == "stock":  # by itself it learns every token
            for labels, mask in zip(batch["labels"], learnt, strict=True):
                labels[: len(mask)][~torch.tensor(mask)] = IGNORED_LABEL
        set_up(model, case)
        model.eval()
        with torch.no_grad():
            losses[side] = step_loss(model, batch).item()
    assert losses["stock"] == pytest.approx(losses["ours"], rel=1e-5)


def test_only_stock_goes_back_through_the_frozen_tower(model: Any) -> None:
    tower = model.get_base_model().model.vision_model
    goes_back = []
    for side in SIDES * 2:
        case = Case("page whole", 1, "none", side)
        set_up(model, case)  # whatever hooks there were are gone
        tower.register_forward_hook(
            lambda *args: goes_back.append(args[2].last_hidden_state.requires_grad)
        )
        step_loss(model, batch_of(case, tiny=True))
    assert goes_back == [True, False, True, False]


def test_adapters_of_stock_qlora_are_bfloat16_as_trl_has_them(model: Any) -> None:
    def dtypes(case: Case) -> set[torch.dtype]:
        set_up(model, case)
        return {each.dtype for each in trained_of(model)}

    assert dtypes(Case("page whole", 1, "nf4", "stock")) == {torch.bfloat16}
    assert dtypes(Case("page whole", 1, "nf4", "ours")) == {torch.float32}
    assert dtypes(Case("page whole", 1, "none", "stock")) == {torch.float32}


def test_what_one_side_sets_up_is_gone_for_the_other(model: Any) -> None:
    set_up(model, Case("page whole", 1, "none", "stock"))
    set_up_stock(model, checkpointing=False)
    assert not any(module._forward_hooks for module in model.modules())
    set_up(model, Case("page whole", 1, "none", "ours"))
    hooked = [name for name, module in model.named_modules() if module._forward_hooks]
    assert hooked == ["base_model.model.model.text_model.embed_tokens"]


def test_every_case_of_the_8b_is_measured_on_both_sides() -> None:
    assert num_parameters(FULL) == 8_402_768_112
    ordered = cases()
    for side in SIDES:
        for quantize in WEIGHTS:
            for batch_size in BATCH_SIZES:
                for work in ("page split", "page whole"):
                    assert Case(work, batch_size, quantize, side) in ordered
            assert Case("docvqa split", 8, quantize, side) in ordered
    assert len(set(ordered)) == len(ordered)


def test_without_time_nothing_is_run_and_this_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--tiny", "--minutes", "0", "--out", str(tmp_path)]) == 0
    shown = json.loads((tmp_path / "bench_gpu.json").read_text())
    assert shown["cases"] == []
    assert len(shown["not_run"]) == len(cases(tiny=True))
    assert (
        "Not run for lack of time: 16 bits, page split" in (tmp_path / "bench_gpu.md").read_text()
    )
    assert "not run for lack of time: nf4, page split, batch 4, ours" in capsys.readouterr().out


def test_what_cannot_run_is_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered = [
        Case("page whole", 1, "none", "stock"),
        Case("page whole", 1, "none", "ours"),
        Case("page whole", 1, "nf4", "stock"),
        Case("page whole", 2, "none", "ours"),
    ]
    measure = bench_gpu.measure

    def or_fail(line: Any, *args: Any, **kwargs: Any) -> None:
        if line.case is ordered[0]:
            raise torch.cuda.OutOfMemoryError
        if line.case is ordered[3]:
            raise RuntimeError("no kernel\nfor this")
        measure(line, *args, **kwargs)

    monkeypatch.setattr(bench_gpu, "measure", or_fail)
    monkeypatch.setattr(bench_gpu, "trace", lambda case, tiny: Traced(1))
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn.modules", None)
    results = run(ordered, InTurn(), tmp_path, minutes=5, tiny=True)
    errors = [line.error for line in results.lines]
    assert errors[:2] == ["out of memory", ""]
    assert errors[2].startswith("bitsandbytes")
    assert errors[2].endswith(" is missing")
    assert errors[3] == "RuntimeError: no kernel"
    assert [line.has_failed for line in results.lines] == [False, False, False, True]
    table = (tmp_path / "bench_gpu.md").read_text()
    assert "| stock | out of memory |" in table
