"""How sure a figure is: 95% bootstrap intervals, of one model and of the difference of two."""

from collections.abc import Callable, Iterator

import numpy as np

NUM_SAMPLES = 2000
SEED = 0
MIN_CHANGED = 6
"""Fewer rows that differ cannot tell two models apart at 5%: that five all go one way, chance
brings about once in 16 times."""

Figure = Callable[[np.ndarray], np.ndarray]
Interval = tuple[float, float]


def interval(columns: np.ndarray, figure: Figure) -> Interval | None:
    """Of a metric's columns by row [N, K]; None for fewer than two rows, or where a figure would be
    no finite number.

    Rows are drawn anew with replacement, and the middle 95% kept (Efron 1979, percentiles). Where
    all rows score the same, it has no width.
    """
    if len(columns) < 2 or not np.isfinite(columns).all():
        return None
    drawn = [figure(counts @ columns) for counts in _draws(len(columns))]
    return _middle(np.concatenate(drawn))


def paired_interval(base: np.ndarray, adapter: np.ndarray, figure: Figure) -> Interval | None:
    """Of the difference adapter - base, both asked the same rows [N, K], drawn together."""
    if len(base) < 2 or not (np.isfinite(base).all() and np.isfinite(adapter).all()):
        return None
    drawn = [figure(counts @ adapter) - figure(counts @ base) for counts in _draws(len(base))]
    return _middle(np.concatenate(drawn))


def _draws(num_rows: int) -> Iterator[np.ndarray]:
    """How often each row is drawn, some samples at a time [B, N]; the same ones every time."""
    generator = np.random.default_rng(SEED)
    block = max(1, min(NUM_SAMPLES, 4_000_000 // num_rows))
    for start in range(0, NUM_SAMPLES, block):
        size = min(block, NUM_SAMPLES - start)
        yield generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size).astype(float)


def _middle(drawn: np.ndarray) -> Interval | None:
    if not np.isfinite(drawn).all():
        return None
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)
