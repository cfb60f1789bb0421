"""Whether the winner of a search is better than the decoder's own settings, on captions that no trial used."""

from __future__ import annotations

from typing import NamedTuple

from evaluation.run_folder import RunFolder
from sweeps.compare.pair import LATENCY, Measure, compare_two
from sweeps.runs import read_run
from sweeps.tune.space import OBJECTIVES, QUALITIES, UNITS, Tune

COSTS = {"passes": "passes per image", "latency": LATENCY}  # names in the comparison of two runs
AMOUNTS = {"passes": ("fewer passes", "more passes"), "latency": ("less time", "more time")}


class Verdict(NamedTuple):
    """better: beyond noise, and within the bound. lines: how the two compare, as sentences."""

    better: bool
    lines: list[str]


def judged(tune: Tune, reference: RunFolder, own: RunFolder, best: RunFolder) -> Verdict:
    """Compare the winner with the decoder's own settings, pair by pair, and in quality with AR."""
    key, images = OBJECTIVES[tune.objective], best.metrics["n_images"]
    gap = best.metrics[QUALITIES[tune.quality]] - reference.metrics[QUALITIES[tune.quality]]
    within = "kept" if gap <= tune.bound else "exceeded"
    if best.config.decoder.lossless:
        within += "; the decoder is lossless, so any difference is noise"
    quality = f"quality: {tune.quality} minus AR's {gap:+.4g} on {images} images, tune.bound={tune.bound} is {within}."
    if own.path == best.path:
        return Verdict(False, ["the winner has the decoder's own settings.", quality])
    found = compare_two(read_run(own.path), read_run(best.path))
    costs = {m.name: m for m in found.measures if m.name in COSTS.values() and m.tested}
    asked = costs.get(COSTS[tune.objective])
    ours, theirs = best.metrics[key], own.metrics[key]
    line = (
        f"judged on {images} other images: {ours:.4g} {UNITS[tune.objective]} against {theirs:.4g} with the decoder's own "
        f"settings ({amount(ours, theirs, tune.objective)}). {_proof(asked, list(costs.values()), found.tests)}."
    )
    kept = gap <= tune.bound or (best.config.decoder.lossless and tune.trust_lossless)
    return Verdict(asked is not None and asked.gap.differs and asked.gap.mean < 0 and kept, [line, quality])


def amount(ours: float, theirs: float, objective: str) -> str:
    """Return how much less or more a setting takes than another, e.g. '12.5 % less time'."""
    change = ours / theirs - 1
    return f"{100 * abs(change):.1f} % {AMOUNTS[objective][change > 0]}"


def _proof(asked: Measure | None, costs: list[Measure], tests: int) -> str:
    if asked is None:
        return "Not tested: too few images, or images that share their passes"
    gaps = "; ".join(f"{m.name} {m.gap.with_interval(m.digits)}, p {m.gap.p_text}" for m in costs)
    said = "The difference is significant" if asked.gap.differs else "No significant difference"
    return f"{said} (winner minus own, 99 %, corrected for {tests} tests: {gaps})"
