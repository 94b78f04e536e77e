"""`summary.json`: the figures of a finished run."""

from collections.abc import Mapping
from typing import Any

from finetune.environment import environment, peak_memory_gib
from finetune.finished import digest_of_weights
from finetune.judging import Judgement
from finetune.rundir import RunDir, read_jsonl
from finetune.training import Prepared


def figures_of(
    prepared: Prepared,
    judgement: Judgement,
    *,
    streamed: Mapping[str, int],
    trainable: int,
    total: int,
    best_step: int | None,
) -> dict[str, Any]:
    """What was learnt in which time and memory, the figures of base and adapter, and how many rows
    that is of; `streamed` is what became of streamed rows, `trainable` and `total` are parameters.
    """
    run = RunDir(prepared.recipe.output.dir)
    return (
        _training_figures(run)
        | judgement.figures()
        | _rows_by_source(prepared, judgement, streamed)
        | ({"best_step": best_step} if best_step else {})
        | {
            "num_skipped_rows": prepared.num_left_out() + streamed.get("left out", 0),
            "peak_memory_gib": round(peak_memory_gib(), 3),
            "trainable_parameters": trainable,
            "total_parameters": total,
            "device": environment()["device"],
            "weights_xxh3_128": digest_of_weights(run.adapter),
        }
    )


def _rows_by_source(
    prepared: Prepared, judgement: Judgement, streamed: Mapping[str, int]
) -> dict[str, Any]:
    """How many rows were trained and judged; those streamed are not counted by source."""
    counts: dict[str, Any] = {"num_train_rows": streamed.get("trained", 0)}
    if prepared.train:
        counts["num_train_rows"] = len(prepared.train.rows)
        counts["train_rows_by_source"] = prepared.train.rows.num_of_sources()
    if prepared.held_out:
        judged = prepared.held_out.rows[: judgement.num_rows]
        counts["eval_rows_by_source"] = judged.num_of_sources()
    return counts


def _training_figures(run: RunDir) -> dict[str, Any]:
    """Losses, steps and speed from metrics.jsonl; no step was taken where nothing is trained."""
    lines = read_jsonl(run.metrics)
    logged = [line for line in lines if "loss" in line]
    counts = {
        f"num_{name}": max(line[name] for line in lines if name in line)
        for name in ("skipped_steps", "oom_splits")
        if any(name in line for line in lines)
    }
    if not logged:
        return {"steps": max((line["step"] for line in lines), default=0)} | counts
    first, last = logged[0], logged[-1]
    timed = next(line for line in reversed(lines) if "seconds" in line)
    return counts | {
        "first_loss": first["loss"],
        "last_loss": last["loss"],
        "steps": timed["step"],
        "train_seconds": timed["seconds"],
        "samples_per_second": round(timed["samples"] / timed["seconds"], 3),
    }
