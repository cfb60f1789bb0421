"""The window that is fastest on a machine: from the cost of a pass and how often draft tokens are accepted, by depth.

A draft token of a Jacobi window gets better with each pass that it waits, so its acceptance at a depth depends on how far the
window reaches beyond it. Two short runs tell the two effects apart: at the widest window all tokens that are reached have
waited long; at a narrow one they have not.

# D draft tokens of a pass after the committed one, on the main chain; N image-phase tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evaluation.acceptance import depth_counts
from sjd2.errors import UserError

FEWEST_BATCHES = 8  # of each run that is checked: pairs of an interval
NARROW = (
    8  # the narrow short run has the width nearest to this: deep enough to wait for two passes, reached often enough
)
SHORTFALLS, SPEEDS = np.linspace(0, 1, 41), np.geomspace(0.05, 5, 41)  # searched for `Acceptance`


@dataclass(frozen=True, kw_only=True)
class TuneWindow:
    """What stage=tune tune=window measures and runs.

    widths: of decoder.window. passes: timed per width and round; rounds: in which the widths take turns. images: of each of
    two short runs, at the widest window and at a narrow one. checked: how many of the best predicted widths are run; finals:
    images of each of these runs.
    """

    name: str
    widths: list[int]
    passes: int = 8
    rounds: int = 3
    images: int = 16
    checked: int = 2
    finals: int = 24
    fixed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if wrong := [k for k in ("passes", "rounds", "images", "checked", "finals") if getattr(self, k) < 1]:
            raise UserError(f"tune.{wrong[0]} must be 1 or more, got {getattr(self, wrong[0])}.")
        if len(set(self.widths)) < 2 or min(self.widths) < 2:
            raise UserError(
                f"tune.widths must be two or more windows of 2 or more, e.g. tune.widths=[8,16,32], got {list(self.widths)}; "
                "AR, the window of 1, is always measured."
            )

    def whole_batches(self, batch: int) -> tuple[int, int]:
        """Return the images of a short run and of each checked run, in whole batches of `batch`."""
        return -(-self.images // batch) * batch, max(-(-self.finals // batch), FEWEST_BATCHES) * batch


@dataclass(frozen=True)
class Counts:
    """What a short run counted of its draft tokens: reached, accepted [D]; passes: mean of an image, prefill left out."""

    reached: np.ndarray
    accepted: np.ndarray
    passes: float

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], *, depth: int, free: float) -> Counts:
        """Count in records. free: share of positions that the model really chooses; a forced token is always accepted.

        A token that is reached but cannot be tested yet (SJD2's noisy ones) counts as not accepted.
        """
        tests, accepts = (
            np.pad(x.astype(float), (0, depth - len(x))) for x in depth_counts([r["drafts"] for r in records])
        )
        passes = [record["forwards"] - 1 for record in records]
        inside = 1 - np.arange(1, depth + 1) / records[0]["tokens"]  # the others lie beyond the image
        before = np.concatenate([[free * sum(passes)], accepts[:-1]])
        return cls(np.maximum(tests, before * inside.clip(0)), accepts, float(np.mean(passes)))


@dataclass(frozen=True)
class Acceptance:
    """How likely draft tokens are accepted once they are reached.

    settled [D]: by depth, of tokens that have waited long. fresh: the share of that which a token has in its first pass;
    shortfall, speed: after x passes it has 1 - shortfall * exp(-speed * x). free: share of positions that are not forced.
    """

    settled: np.ndarray
    fresh: float
    shortfall: float
    speed: float
    free: float = 1.0

    @classmethod
    def fit(cls, wide: Counts, narrow: Counts, *, length: int, free: float) -> Acceptance:
        """Fit the shares to a run at a narrow window (maximum likelihood), where a run at the widest has the settled ones."""
        settled = wide.accepted / np.maximum(wide.reached, 1)
        depth = len(narrow.accepted)
        ceiling = np.maximum(settled[:depth], 1e-9)
        waited = np.arange(depth)[::-1] / max((length - 1) / narrow.passes, 1)  # passes
        fresh = float(np.clip(narrow.accepted[-1] / max(narrow.reached[-1], 1) / ceiling[-1], 0, 1))
        best = (-np.inf, 0.0, 1.0)
        for shortfall in SHORTFALLS:
            for speed in SPEEDS:
                rate = (ceiling * (1 - shortfall * np.exp(-speed * waited))).clip(1e-9, 1 - 1e-9)[:-1]
                hits, misses = narrow.accepted[:-1], (narrow.reached - narrow.accepted)[:-1]
                likelihood = float(hits @ np.log(rate) + misses @ np.log(1 - rate))
                best = max(best, (likelihood, float(shortfall), float(speed)))
        return cls(settled, fresh, best[1], best[2], free)

    def rates(self, depth: int, tokens_per_pass: float) -> np.ndarray:
        """Return the acceptance by depth in a window of `depth` draft tokens that moves by so many tokens per pass: [D]."""
        waited = np.arange(depth)[::-1] / tokens_per_pass
        share = 1 - self.shortfall * np.exp(-self.speed * waited)
        share[-1:] = self.fresh
        return self.free * self.settled[:depth] * share + 1 - self.free


def expected_passes(rates: np.ndarray, length: int) -> float:
    """Return the passes that an image of `length` tokens takes on average, the prefill's first token not counted.

    rates [D]: probability that the draft token of each depth is accepted once reached; [0] are AR's. A pass commits k accepted
    draft tokens and one more; the last pass is cut off at the end of the image.
    """
    reached = np.concatenate([[1.0], np.cumprod(rates), [0.0]])
    stops = -np.diff(reached)  # [D + 1] the probability that a pass accepts exactly k
    size = len(stops)
    left = np.zeros(length - 1 + size)  # passes for n more tokens at place n - 1 + size, none for n <= 0
    for place in range(size, len(left)):
        left[place] = 1 + stops @ left[place - size : place][::-1]
    return float(left[-1])


def predicted_passes(found: Acceptance, depth: int, length: int) -> float:
    """Return the passes of an image in a window of `depth` draft tokens, whose speed decides how long tokens wait."""
    passes = float(length - 1)
    for _ in range(20 if depth else 0):
        passes = expected_passes(found.rates(depth, (length - 1) / passes), length)
    return passes


@dataclass
class WindowRow:
    """One width: what a pass costs, what is predicted, and what was measured where it was run.

    depth: D. pass_s: seconds of a pass. passes: of the mean image, predicted. rate: tokens per second, predicted. measured,
    measured_passes: the same two, where it was run. disturbed: what inflated these timings, '' if nothing is known to have.
    against_own: time of an image over that with the command's own window, with its interval.
    """

    width: int
    depth: int
    pass_s: float
    passes: float
    rate: float
    measured: float | None = None
    measured_passes: float | None = None
    disturbed: str = ""
    against_own: tuple[float, float | None, float | None] | None = None

    @property
    def error(self) -> float | None:
        """Return how far the prediction is above the measurement, as a share of it."""
        return None if self.measured is None else self.rate / self.measured - 1


def batch_overhead(records: Sequence[Mapping[str, Any]], *, refill: bool) -> tuple[float, float]:
    """Return how many times the mean row's passes the slowest row of a batch takes, and the median seconds of a prefill.

    Where finished rows are refilled, nobody waits for the slowest, and prompts enter among the passes: (1, 0).
    """
    if refill:
        return 1.0, 0.0
    batches: dict[int, list[int]] = {}
    for record in records:
        batches.setdefault(record["batch"], []).append(record["forwards"] - 1)
    slowest = [max(passes) * len(passes) / sum(passes) for passes in batches.values()]
    return float(np.mean(slowest)), float(np.median([record["seconds"]["prefill"] for record in records]))
