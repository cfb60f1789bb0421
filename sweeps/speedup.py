"""How much faster a run is than another: which of their timings compare, the ratio with its interval, or why there is none.

Table, report and stage=compare take every speed-up from here. A machine's speed drifts, so timings taken in turns within
one launch are compared pair by pair; timings of separate launches are compared as they are, and marked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from evaluation.bootstrap import median_of_ratios, ratio_of_medians
from evaluation.run_folder import Id
from evaluation.timings import disturbance
from sweeps.comparable import NO_BASELINE, baseline, obstacles
from sweeps.runs import ImageCost, Machine, Run

TIMINGS = 6  # below them no interval of a median reaches 95 %: the range of n values covers it with 1 - 2^(1 - n)
CPU = ("got only ", " of its CPU")  # what two runs can share in one sentence
Pairs = dict[Id, tuple[ImageCost, ImageCost]]
Seconds = Callable[[ImageCost], float]  # which seconds of an image are compared


def latency(image: ImageCost) -> float:
    """Return the seconds of an image's tokens: the AR stage where a diffusion stage follows."""
    return image.latency


def whole(image: ImageCost) -> float:
    """Return the seconds from prompt to pixels of an image that a diffusion stage draws."""
    return math.nan if image.whole is None else image.whole


@dataclass(frozen=True)
class SpeedUp:
    """Seconds of the other run / seconds of this one, with its 95 % interval (None: a single timing).

    In turns (`paired`): the median over pairs of timings; else the ratio of the medians. timings: separate ones, of the
    run that has fewer.
    """

    ratio: float
    low: float | None
    high: float | None
    images: int
    timings: int
    paired: bool

    @property
    def interval(self) -> str:
        """The interval as text, '' if there is none: '[1.58, 1.69]'."""
        return "" if self.low is None or self.high is None else f"[{self.low:.2f}, {self.high:.2f}]"

    def text(self, mark: str = "") -> str:
        """Return the ratio with its interval as text, e.g. '1.63× [1.58, 1.69]'; `mark` follows the ratio."""
        return f"{self.ratio:.2f}×{mark} {self.interval}".rstrip()


def has_stages(*runs: Run) -> bool:
    """Return whether all images of these runs were drawn by a diffusion stage, after the AR stage."""
    return all(image.whole is not None for run in runs for image in run.images.values())


def speed_up_over_ar(
    run: Run, runs: Iterable[Run], machine: Machine | None, seconds: Seconds = latency
) -> tuple[SpeedUp | None, Run | None, str]:
    """Return the speed-up over the AR run with equal settings, that AR run, and why there is none ('' where there is)."""
    if run.is_ar:
        timed = run.timed(machine)
        timings = len(separate_timings(timed.values(), run, seconds))
        return (SpeedUp(1.0, None, None, len(timed), timings, False) if timed else None), run, ""
    reference, missing = baseline(run, runs, machine)
    if reference is None:
        named = ", ".join(missing)
        return None, None, named if named == NO_BASELINE else f"the nearest AR run differs in {named}"
    found = speed_up(run, reference, machine, seconds)
    return (found, reference, "") if isinstance(found, SpeedUp) else (None, reference, found)


def speed_up(run: Run, other: Run, machine: Machine | None, seconds: Seconds = latency) -> SpeedUp | str:
    """Return how much faster `run` is than `other`, or why no speed-up may be given."""
    if reasons := obstacles(run, other, machine):
        return f"not the same {', '.join(reasons)}"
    if seconds is whole and run.placement != other.placement:
        return "not the same device or offloading of the diffusion stage"
    pairs, paired = comparable_timings(run, other, machine)
    if reason := disturbances(run, other, pairs):
        return reason
    if paired:
        both = [(seconds(theirs), seconds(ours), images) for ours, theirs, images in separate_pairs(pairs)]
        return SpeedUp(*median_of_ratios(both), images=len(pairs), timings=len(both), paired=True)
    ours, theirs = (
        separate_timings((pair[side] for pair in pairs.values()), (run, other)[side], seconds) for side in (0, 1)
    )
    timings = min(len(ours), len(theirs))
    return SpeedUp(*ratio_of_medians(theirs, ours), images=len(pairs), timings=timings, paired=False)


def comparable_timings(run: Run, other: Run, machine: Machine | None) -> tuple[Pairs, bool]:
    """Return {image: (timing of run, timing of other)} on one machine, and whether they were taken in turns.

    In turns if TIMINGS batches were, or all that the runs have in common.
    """
    ours, theirs = run.timed(machine), other.timed(machine)
    common = {key: (ours[key], theirs[key]) for key in sorted(ours.keys() & theirs.keys())}
    in_turns: Pairs = {}
    for key, image in ours.items():
        partner = other.in_turns.get((image.turns, key)) if image.turns else None
        if partner is not None and partner.machine == machine:
            in_turns[key] = image, partner
    in_turns = {key: in_turns[key] for key in sorted(in_turns)}
    enough = len(separate_pairs(in_turns)) >= min(TIMINGS, len(separate_pairs(common)))
    return (in_turns, True) if in_turns and enough else (common, False)


def disturbances(run: Run, other: Run, pairs: Pairs) -> str:
    """Return what disturbed the launches that took these timings, and what times them again; '' if nothing is known to."""
    found = []
    for index, side in enumerate((run, other)):
        numbers = sorted({pair[index].batch[0] for pair in pairs.values()})
        if what := disturbance([side.launches[number] for number in numbers if number in side.launches]):
            found.append((side.label or side.decoder, what))
    if not found:
        return ""
    if len(found) == 2 and all(what.startswith(CPU[0]) and what.endswith(CPU[1]) for _, what in found):
        found = [
            (found[0][0], found[0][1].removesuffix(CPU[1])),
            (found[1][0], found[1][1].replace(CPU[0], "only ", 1)),
        ]
    made = "it times it" if len(found) == 1 else "them times both"
    who = " and ".join(f"{name} {what}" for name, what in found)
    return f"{who}; retime=true in the command that made {made} again, when the machine is quieter"


def separate_timings(images: Iterable[ImageCost], run: Run, seconds: Seconds = latency) -> list[tuple[float, int]]:
    """Return (median seconds, images) of every separate timing: of a batch, with refill of as many images as rows."""
    found: dict[tuple[int, int], list[float]] = {}
    rows = int(run.setting("batch_size") or 1) if run.setting("refill") else 1
    for image in images:
        launch, batch = image.batch
        found.setdefault((launch, batch // rows), []).append(seconds(image))
    return [(sorted(latencies)[len(latencies) // 2], len(latencies)) for latencies in found.values()]


def separate_pairs(pairs: Pairs) -> Sequence[tuple[ImageCost, ImageCost, int]]:
    """Return one (timing of run, timing of other, images) for each pair of batches."""
    found: dict[tuple[tuple[int, int], tuple[int, int]], list[tuple[ImageCost, ImageCost]]] = {}
    for ours, theirs in pairs.values():
        found.setdefault((ours.batch, theirs.batch), []).append((ours, theirs))
    return [(*members[0], len(members)) for members in found.values()]
