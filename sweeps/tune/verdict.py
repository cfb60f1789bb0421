"""Whether the winner of a search is better than the decoder's own settings, on captions that no trial used."""

from __future__ import annotations

from typing import NamedTuple

from evaluation.declared import declared, withheld
from evaluation.run_folder import RunFolder
from sweeps.compare.pair import LATENCY, Measure, compare_two
from sweeps.runs import read_run
from sweeps.tune.space import OBJECTIVES, QUALITIES, UNITS, Tune

COSTS = {"passes": "passes per image", "latency": LATENCY}  # names in the comparison of two runs
AMOUNTS = {"passes": ("fewer passes", "more passes"), "latency": ("less time", "more time")}

# why a cost may not be tested
UNTOLD = {
    "passes": "too few images to tell",
    "latency": "too few images to tell, or images that share their passes",
}


class Verdict(NamedTuple):
    """better: beyond noise, and within the bound. tested: whether noise is known. lines: how the two compare."""

    better: bool
    tested: bool
    lines: list[str]


def judged(tune: Tune, reference: RunFolder, own: RunFolder, best: RunFolder) -> Verdict:
    """Compare the winner with the decoder's own settings, pair by pair, and in quality with AR."""
    key, images = OBJECTIVES[tune.objective], best.metrics["n_images"]
    gap = best.metrics[QUALITIES[tune.quality]] - reference.metrics[QUALITIES[tune.quality]]
    within = "kept" if gap <= tune.bound else "exceeded"
    if best.config.decoder.lossless:
        within += "; the decoder is lossless, so any difference is noise"
    few = withheld(best.metrics, declared([best])).get(QUALITIES[tune.quality])
    shown = f"{gap:+.4g}" if few is None else f"– ({few})"
    quality = f"quality: {tune.quality} minus AR's {shown} on {images} images, tune.bound={tune.bound} is {within}."
    if own.path == best.path:
        return Verdict(False, True, ["the winner has the decoder's own settings.", quality])
    found = compare_two(read_run(own.path), read_run(best.path))
    costs = {m.name: m for m in found.measures if m.name in COSTS.values() and m.tested}
    asked = costs.get(COSTS[tune.objective])
    ours, theirs = best.metrics[key], own.metrics[key]
    line = (
        f"judged on {images} other images: {ours:.4g} {UNITS[tune.objective]} against {theirs:.4g} with the decoder's own "
        f"settings ({amount(ours, theirs, tune.objective)})."
    )
    if asked is None:
        return Verdict(False, False, [line, quality])
    line += f" {_proof(asked, list(costs.values()), found.tests)}."
    kept = gap <= tune.bound or (best.config.decoder.lossless and tune.trust_lossless)
    return Verdict(asked.gap.differs and asked.gap.mean < 0 and kept, True, [line, quality])


def amount(ours: float, theirs: float, objective: str) -> str:
    """Return how much less or more a setting takes than another, e.g. '12.5 % less time'."""
    change = ours / theirs - 1
    return f"{100 * abs(change):.1f} % {AMOUNTS[objective][change > 0]}"


def _proof(asked: Measure, costs: list[Measure], tests: int) -> str:
    gaps = "; ".join(f"{m.name} {m.gap.with_interval(m.digits)}, p {m.gap.p_text}" for m in costs)
    said = "The difference is significant" if asked.gap.differs else "No significant difference"
    return f"{said} (winner minus own, 99 %, corrected for {tests} tests: {gaps})"
