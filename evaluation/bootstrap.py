"""Resampling without a network or a table: bootstrap weights, ratios of times, intervals of few values.

# B bootstrap replicates, T separate timings, P prompts
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np

BLOCK = 100  # replicates made at once
Interval = tuple[float, float | None, float | None]  # value, low, high


def draws(count: int, replicates: int, seed: int) -> Iterator[np.ndarray]:
    """Yield bootstrap weights in blocks: how often each of `count` was drawn, [<=BLOCK, count]; each row sums to it."""
    rng = np.random.default_rng(seed)
    for start in range(0, replicates, BLOCK):
        size = min(BLOCK, replicates - start)
        yield rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)


def median_of_ratios(
    pairs: Sequence[tuple[float, float, int]], *, level: float = 0.95, replicates: int = 2000, seed: int = 0
) -> Interval:
    """Return the median of above / below over pairs of timings taken in turns: (above, below, images) each.

    What slows both timings of a pair cancels in their ratio. A pair counts as often as it has images.
    """
    ratios = _Medians([(above / below, images) for above, below, images in pairs])
    value = float(ratios.of(np.ones((1, len(pairs))))[0])
    return _interval(value, len(pairs), [ratios.of(drawn) for drawn in draws(len(pairs), replicates, seed)], level)


def ratio_of_medians(
    above: Sequence[tuple[float, int]],
    below: Sequence[tuple[float, int]],
    *,
    level: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return median(above) / median(below) over separate timings (seconds, images), each side drawn by itself."""
    first, second = _Medians(above), _Medians(below)
    ratio = first.of(np.ones((1, len(above)))) / second.of(np.ones((1, len(below))))
    sides = zip(draws(len(above), replicates, seed), draws(len(below), replicates, seed + 1), strict=True)
    return _interval(
        float(ratio[0]), min(len(above), len(below)), [first.of(a) / second.of(b) for a, b in sides], level
    )


def _interval(value: float, count: int, replicates: Sequence[np.ndarray], level: float) -> Interval:
    """Return a value and its bootstrap interval; (value, None, None) for fewer than two timings.

    The percentiles are expanded to a t-interval's for few timings (Hesterberg 2015, arXiv 1411.5279, section 5.3).
    """
    if count < 2:
        return value, None, None
    tail = NormalDist().cdf(-t_quantile(count, level) * (count / (count - 1)) ** 0.5)
    low, high = np.quantile(np.concatenate(replicates), [tail, 1 - tail])
    return value, float(low), float(high)


def t_quantile(n: int, level: float = 0.95) -> float:
    """Return the factor of a standard error in the t-interval of a mean of n values."""
    from scipy import stats

    return float(stats.t.ppf((1 + level) / 2, n - 1))


class _Medians:
    """Medians of resampled values (value, images): `of` takes how often each one was drawn, [B, T] -> [B]."""

    def __init__(self, values: Sequence[tuple[float, int]]) -> None:
        self.order = np.argsort([value for value, _ in values], kind="stable")
        self.values, self.images = np.array(values, np.float64)[self.order].T

    def of(self, drawn: np.ndarray) -> np.ndarray:
        counts = np.cumsum(drawn[:, self.order] * self.images, axis=1)
        half = counts[:, -1:] / 2
        return (self.values[np.argmax(counts >= half, 1)] + self.values[np.argmax(counts > half, 1)]) / 2
