"""Intervals for differences between two runs that answered the same prompts.

A single FID has no honest bootstrap interval (resampling duplicates images and biases it upwards) and the spread
between prompts is far larger than the spread between decoders. So only differences get intervals, and both runs are
resampled by the same prompts: what a prompt has in common in both cancels.

# P prompts, B bootstrap replicates, N images of a run, M reference images, D feature width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from evaluation.bootstrap import draws
from evaluation.declared import declared
from evaluation.metrics.features import features_file, load_features
from evaluation.metrics.fid import FeatureDistance, Statistics, Subsets, cubic_kernel, frechet, kernel_distances
from evaluation.run_folder import Id, RunFolder, Snapshot
from evaluation.score import read_scores
from sjd2.errors import UserError, choose

RECORD_VALUES: dict[str, Callable[[dict], float]] = {
    "forwards": lambda record: record["forwards"],
    "step_compression": lambda record: record["tokens"] / record["forwards"],
    "nll": lambda record: record["nll"],
}
ALPHA = 0.01  # of all tests of one table together


@dataclass(frozen=True)
class Difference:
    """Run b minus run a: mean, interval at `level`, two-sided p-value, number of prompts and images.

    Interval and p-value are corrected for the number of comparisons they were made with.
    """

    mean: float
    low: float
    high: float
    p: float
    prompts: int
    images: int
    level: float

    @property
    def differs(self) -> bool:
        """Whether the corrected p-value is below ALPHA."""
        return self.p < ALPHA

    def with_interval(self, digits: int) -> str:
        """Return the mean with its interval as text, e.g. '+0.012 [-0.003, +0.027]'."""
        return f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"

    @property
    def p_text(self) -> str:
        """The p-value as text, e.g. '0.042' or '<0.001'."""
        return "<0.001" if self.p < 0.001 else f"{self.p:.3f}"


def image_values(run: RunFolder, name: str) -> dict[Id, float]:
    """Return one value per image: forwards, step_compression, nll (of the records), or a metric's (`MetricInfo.per_image`).

    Images without the value are left out. Raises UserError for an unknown name.
    """
    if name in RECORD_VALUES:
        records = (record for record in run.records() if name != "nll" or "nll" in record)
        return {tuple(record["id"]): float(RECORD_VALUES[name](record)) for record in records}
    known = [info.per_image for info in declared([run]).values() if info.per_image]
    if name not in known:
        raise UserError(f"no per-image value is called '{name}'. Valid: {', '.join((*RECORD_VALUES, *known))}.")
    return {key: row[name] for key, row in read_scores(run).items() if name in row}


# ----------------------------------------------------------------------------------------------------------- resampling
def _by_prompt(ids: list[Id]) -> tuple[np.ndarray, int]:
    """Return for each image the number of its prompt, 0..P-1, and P."""
    prompts, inverse = np.unique([key[0] for key in ids], return_inverse=True)
    return inverse, len(prompts)


def _checked(ids: list[Id], level: float, comparisons: int) -> float:
    """Return the level corrected for `comparisons` (Bonferroni); raise UserError where there is nothing to resample."""
    if not 0 < level < 1 or comparisons < 1:
        raise UserError(f"level={level} must lie in (0, 1) and comparisons={comparisons} be >= 1.")
    if len({key[0] for key in ids}) < 2:
        raise UserError(f"the two runs share {len(ids)} images of fewer than 2 prompts: no paired interval.")
    return 1 - (1 - level) / comparisons


def paired(
    a: Mapping[Id, float],
    b: Mapping[Id, float],
    *,
    replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    comparisons: int = 1,
) -> Difference:
    """Compare a value per image of two runs on the images both have: mean of b - a, percentile bootstrap over prompts.

    All repeats of a prompt are drawn together. The p-value is of the paired t-test on the prompts' mean differences;
    `comparisons` = m multiplies it by m and widens the interval (Bonferroni).
    Raises UserError when the runs share fewer than 2 prompts.
    """
    ids = sorted(a.keys() & b.keys())
    corrected = _checked(ids, level, comparisons)
    prompt, count = _by_prompt(ids)
    gaps = np.array([b[key] - a[key] for key in ids], np.float64)
    sums, sizes = np.bincount(prompt, gaps, count), np.bincount(prompt, minlength=count).astype(np.float64)
    means = np.concatenate([(w @ sums) / (w @ sizes) for w in draws(count, replicates, seed)])
    low, high = np.quantile(means, [(1 - corrected) / 2, (1 + corrected) / 2])
    p = min(1.0, comparisons * _t_test(sums / sizes))
    return Difference(float(gaps.mean()), float(low), float(high), p, count, len(ids), level)


def _t_test(values: np.ndarray) -> float:
    """Return the two-sided p-value of "the mean is zero"; 1 where all values are 0.

    Never below 2^(1 - P), which is what P values of one sign are worth without the normal distribution: two prompts
    prove nothing.
    """
    from scipy import stats

    least = 2.0 ** (1 - len(values))
    if np.ptp(values) == 0:
        return 1.0 if values[0] == 0 else least
    result: Any = stats.ttest_1samp(values, 0)  # the stubs lack its fields
    return max(least, float(result.pvalue))


def paired_distance(
    a: RunFolder, b: RunFolder, metric: FeatureDistance, kind: str, *, level: float = 0.95, comparisons: int = 1
) -> Difference:
    """Compare 'fid' or 'kid' of two scored runs from the features in their folders; loads no network.

    metric: as in a run's settings, `instantiate(run.config.evaluation.metrics.fid)`.
    Raises UserError where a run was not scored with this extractor, or the reference cannot give the distance.
    """
    choose("distance", kind, ("fid", "kid"))
    first, second = (load_features(features_file(run, metric.extractor)) for run in (a, b))
    for run, found in ((a, first), (b, second)):
        if not found:
            raise UserError(f"{run.path.name} holds no features of {metric.extractor.name}; run stage=score on it.")
    reference = metric.reference_for(Snapshot(a))
    if kind == "fid":
        return paired_fid(first, second, reference.statistics, level=level, comparisons=comparisons)
    if reference.features is None:
        raise UserError(f"reference {reference.name} holds moments only, which are enough for FID but not for KID.")
    return paired_kid(first, second, reference.features, subsets=metric.subsets, level=level, comparisons=comparisons)


def paired_fid(
    a: Mapping[Id, np.ndarray],
    b: Mapping[Id, np.ndarray],
    reference: Statistics,
    *,
    replicates: int = 200,
    seed: int = 0,
    level: float = 0.95,
    comparisons: int = 1,
) -> Difference:
    """Compare the Frechet distances of two runs, {id: features [D]} each, over the images both have.

    The interval is the difference on all images +- z standard deviations of the bootstrapped difference: resampling
    biases both replicates upwards, which cancels in their difference as far as it can and never moves the centre.
    Costs two Frechet distances per replicate: seconds at D = 64, minutes at D = 2048.
    """
    ids = sorted(a.keys() & b.keys())
    corrected = _checked(ids, level, comparisons)
    prompt, count = _by_prompt(ids)
    first, second = (np.stack([run[key] for key in ids]).astype(np.float64) for run in (a, b))

    def gap(rows: np.ndarray) -> float:
        return frechet(Statistics.of(second[rows]), reference) - frechet(Statistics.of(first[rows]), reference)

    everything = np.arange(len(ids))
    gaps = [
        gap(everything.repeat(weights.astype(int)[prompt]))
        for block in draws(count, replicates, seed)
        for weights in block
    ]
    return _normal(gap(everything), float(np.std(gaps, ddof=1)), corrected, level, comparisons, count, len(ids))


def paired_kid(
    a: Mapping[Id, np.ndarray],
    b: Mapping[Id, np.ndarray],
    reference: np.ndarray,
    *,
    subsets: Subsets | None = None,
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    comparisons: int = 1,
    limit: int = 5000,
) -> Difference:
    """Compare the KIDs of two runs to reference features [M, D], over the images both have.

    The difference is that of the two values in metrics.json, the means over `subsets`, if the runs have the same images.
    Its variance is that of a bootstrap over prompts of the unbiased distance on all images, which the subsets estimate,
    plus that of the mean over subsets. The reference is held fixed; at most `limit` images are resampled.
    """
    ids = sorted(a.keys() & b.keys())
    corrected = _checked(ids, level, comparisons)
    first, second = (np.stack([run[key] for key in ids]) for run in (a, b))
    gaps = np.subtract(*(kernel_distances(run, reference, subsets or Subsets()) for run in (second, first)))
    spread = float(gaps.std(ddof=1)) if len(gaps) > 1 else 0.0
    drawn = _bootstrapped_kid(ids[:limit], first[:limit], second[:limit], reference, replicates, seed)
    deviation = float(np.sqrt(np.var(drawn, ddof=1) + spread**2 / len(gaps)))
    prompts = len({key[0] for key in ids})
    return _normal(float(gaps.mean()), deviation, corrected, level, comparisons, prompts, len(ids))


def _bootstrapped_kid(
    ids: list[Id], first: np.ndarray, second: np.ndarray, reference: np.ndarray, replicates: int, seed: int
) -> np.ndarray:
    """Return the difference of the unbiased distances of all images at once in each replicate: [B].

    A drawn pair of images counts as often as its prompts were drawn, an image with itself never: the replicates stay
    unbiased.
    """
    prompt, count = _by_prompt(ids)
    within, across = 0.0, 0.0
    for sign, features in ((-1, first), (1, second)):
        own = cubic_kernel(features, features)
        np.fill_diagonal(own, 0)
        within += sign * own  # [N, N]
        across += sign * cubic_kernel(features, reference).mean(1)  # [N]

    def gap(weights: np.ndarray) -> np.ndarray:  # [B, N] -> [B]
        total = weights.sum(1)
        pairs = np.einsum("bi,bi->b", weights @ within, weights) / (total**2 - (weights**2).sum(1))
        return pairs - 2 * (weights @ across) / total

    return np.concatenate([gap(block[:, prompt]) for block in draws(count, replicates, seed)])


def _normal(
    centre: float, deviation: float, corrected: float, level: float, comparisons: int, prompts: int, images: int
) -> Difference:
    """Make an interval and a two-sided p-value from a bootstrapped standard deviation."""
    normal = NormalDist()
    half = normal.inv_cdf((1 + corrected) / 2) * deviation
    p = float(centre == 0) if deviation == 0 else 2 * normal.cdf(-abs(centre) / deviation)
    return Difference(centre, centre - half, centre + half, min(1.0, comparisons * p), prompts, images, level)
