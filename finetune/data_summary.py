"""`data.json`: what the rows of a run are, in numbers and distributions."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from finetune.checking import histogram
from finetune.preparation import PreparedRows


def data_summary(parts: Mapping[str, PreparedRows | None]) -> dict[str, Any]:
    """Totals of each part that there is, and histograms of tokens, learnt tokens and views."""
    found = {}
    for name, rows in parts.items():
        if rows is None:
            continue
        counts = rows.counts
        columns = ("num_tokens", "num_learnt_tokens", "num_images", "num_views")
        found[name] = {
            "num_rows": len(counts),
            **{key: int(counts[key].astype(int).sum()) for key in columns},
            "tokens": asdict(histogram(counts["num_tokens"].astype(int))),
            "learnt_tokens": asdict(histogram(counts["num_learnt_tokens"].astype(int))),
            "views": asdict(histogram(counts["num_views"].astype(int))),
        }
    return found
