"""Choose what to plot of a table's runs: quality against latency, the same seeds side by side, acceptance."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evaluation.declared import declared
from evaluation.run_folder import Id
from evaluation.score import FEWEST, MetricInfo
from sjd2.config import instantiate
from sjd2.errors import first_line
from sweeps.runs import Run
from sweeps.tables.by_batch import batch_series
from sweeps.tables.depths import depth_series
from sweeps.tables.plots import (
    COLUMNS_MAX,
    Point,
    acceptance_histogram,
    acceptance_maps,
    comparison_grid,
    line_plots,
    pareto,
)
from sweeps.tables.rows import FEWEST_PROMPTS, Row

if TYPE_CHECKING:
    from sjd2.models.layout import TokenGrid

log = logging.getLogger(__name__)

GRID_ROWS = 6  # prompts in the image grid
MAP_IMAGES = 256  # images averaged in an acceptance map
LIKELIHOOD = "NLL/token, difference to AR"
PANELS = 3  # qualities in one Pareto plot


@dataclass
class Plots:
    """The plots of one table as (caption, file name), and notes on those that could not be drawn."""

    files: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def draw_plots(rows: Sequence[Row], out: Path, *, suffix: str, title: str) -> Plots:
    """Draw every plot that the runs of one table allow into `out`, as pareto.png ...; `suffix` tells tables apart."""
    plots = Plots()
    for name, draw in PLOTS.items():
        path = out / f"{name}{suffix}.png"
        path.unlink(missing_ok=True)  # a plot of earlier runs must not stay beside this table
        try:
            caption = draw(rows, path, title)
        except Exception as error:  # the numbers do not wait for a plot that cannot be drawn
            log.debug("%s", path, exc_info=True)
            plots.notes.append(f"Skipped {path.name}: {first_line(error)}")
            continue
        if caption:
            plots.files.append((caption, path.name))
    return plots


def scores(rows: Sequence[Row]) -> dict[str, MetricInfo]:
    """Return the declared numbers that say how good images are: with a column of their own and a better direction."""
    known = declared(row.run.folder for row in rows).items()
    return {name: info for name, info in known if info.title and not info.group and info.higher_is_better is not None}


def quality_panels(rows: Sequence[Row]) -> dict[str, tuple[list[Point], bool | None]]:
    """Return {quality: (points, lower is better)} of the scores comparable between these runs, at most PANELS.

    If no score is comparable: the difference in likelihood to AR, where neither sign is better: it shows a bias.
    """
    panels: dict[str, tuple[list[Point], bool | None]] = {}
    known = scores(rows)
    sources = {info.source for info in known.values() if info.source}
    for key, info in known.items():
        # scores at different N or of different networks cannot share an axis
        fit = [row for row in rows if key in row.metrics and row.scored == row.n]
        alike = {(row.n if info.biased else 0, *(row.metrics.get(source) for source in sources)) for row in fit}
        if len(fit) > 1 and len(alike) == 1 and len(panels) < PANELS:
            points = [_point(row, row.metrics[key], row.metrics.get(info.spread)) for row in fit]
            panels[info.title] = points, not info.higher_is_better
    gaps = [(row, gap) for row in rows if (gap := row.nll_difference) is not None]
    if panels or not gaps:
        return panels
    points = [_point(row, 0.0, None) for row in rows if row.run.is_ar]
    points += [
        _point(row, gap.mean, (gap.high - gap.low) / 2 if gap.prompts >= FEWEST_PROMPTS else None) for row, gap in gaps
    ]
    return {LIKELIHOOD: (points, None)}


def _pareto(rows: Sequence[Row], path: Path, title: str) -> str:
    timed = [row for row in rows if row.latency_s is not None]
    panels = quality_panels(timed)
    if not panels:
        return ""
    scored = LIKELIHOOD not in panels
    n = ", ".join(map(str, sorted({row.n for row in timed})))
    pareto(panels, path, caption=f"{title}, N={n}" if scored else title)
    if not scored:
        return (
            "Difference in NLL per token to AR (95 % interval) against latency: for a lossless decoder it should include "
            "zero, 95 times in 100"
        )
    return f"Quality against latency; {pareto_line(panels)}"


def pareto_line(panels: Mapping[str, tuple[Sequence[Point], bool | None]]) -> str:
    """Return what the line of the Pareto-optimal runs joins, or why there is none."""
    ranked = {point.ranked for points, _ in panels.values() for point in points}
    which = "" if ranked == {True} else f" of at least {FEWEST} images"
    return (
        f"the line joins the Pareto-optimal runs{which}" if True in ranked else f"no Pareto line below {FEWEST} images"
    )


def _point(row: Row, quality: float, error: float | None) -> Point:
    latency_s = math.nan if row.latency_s is None else row.latency_s  # a page then plots against passes
    return Point(row.run.label, latency_s, quality, row.run.lossless, error, ranked=row.n >= FEWEST)


def _grid(rows: Sequence[Row], path: Path, title: str) -> str:
    runs, ids = same_seeds([row.run for row in rows])
    if not ids:
        return ""
    shown, chosen = runs[:COLUMNS_MAX], ids[:GRID_ROWS]
    images = {run.label: list(run.folder.images(chosen)) for run in shown}
    note = "the same prompt and seed in a row" + (
        f"; the first {len(shown)} of {len(rows)} runs" if len(shown) < len(rows) else ""
    )
    comparison_grid(images, [shown[0].images[key].prompt for key in chosen], path, note=note)
    return f"Images of the same prompt and seed, decoder by decoder ({title})"


def same_seeds(runs: Sequence[Run]) -> tuple[list[Run], list[Id]]:
    """Return the runs that share images made from the same seeds, and the ids of those images, first repeats first.

    Runs with another `seed=`, runs without an image in common with the others, and tokens without images are left out.
    """
    runs = [run for run in runs if run.drawn]
    if not runs:
        return [], []
    seeds = Counter(run.identity.get("seed") for run in runs)
    same = [run for run in runs if run.identity.get("seed") == seeds.most_common(1)[0][0]]
    common: set[Id] = set(same[0].images)
    alike = []
    for run in same:
        both = {key for key in common & run.images.keys() if run.images[key].seed == same[0].images[key].seed}
        if both:
            common = both
            alike.append(run)
    return alike, sorted(common, key=lambda key: (key[1], key[0]))


def waiting_maps(rows: Sequence[Row]) -> tuple[dict[str, np.ndarray], TokenGrid] | None:
    """Return {label: mean passes that each position was a draft token [N]} of the runs that draft, and their layout.

    None if no run drafts.
    """
    drafting = [row.run for row in rows if row.run.identity["decoder"].get("window", 1) > 1]
    if not drafting:
        return None
    layout = drafting[0].layout
    maps = {r.label: mean_waiting(r) for r in drafting if next(iter(r.images.values())).tokens == layout.length}
    return (maps, layout) if maps else None


def _maps(rows: Sequence[Row], path: Path, title: str) -> str:
    if (found := waiting_maps(rows)) is None:
        return ""
    maps, layout = found
    acceptance_maps(maps, layout.rows, layout.columns, path, shown=np.asarray(layout.shown))
    return "Passes that each image position was a draft token before it was committed, mean over images; none with AR"


def num_drafted(run: Run) -> int:
    """Return how many positions after the committed tokens a pass drafts: window - 1 for a chain, fewer for a tree."""
    decoder = run.folder.config["decoder"]
    if "_target_" not in decoder:
        return int(decoder["window"]) - 1
    return instantiate(decoder).lookahead


def mean_waiting(run: Run) -> np.ndarray:
    """Return the mean number of passes that each position was a draft token before it was committed: [N]."""
    from harness.grids import waiting

    window, early = num_drafted(run) + 1, bool(run.folder.config["decoder"].get("draft_in_prefill", False))
    images = [run.images[key] for key in sorted(run.images)[:MAP_IMAGES]]
    return np.mean([waiting(image.accepted.tolist(), window, early) for image in images], axis=0)


def _histogram(rows: Sequence[Row], path: Path, title: str) -> str:
    counts = {row.run.label: accepted_counts(row.run) for row in rows if not row.run.is_ar}
    if not counts:
        return ""
    acceptance_histogram(counts, path)
    return "Share of passes by the number of tokens they committed (without the prefill)"


def _depths(rows: Sequence[Row], path: Path, title: str) -> str:
    if not (series := depth_series(rows)):
        return ""
    line_plots([(series, "depth of the draft token in its pass", "acceptance probability, once reached")], path)
    return "How likely a draft token is accepted once all before it in its pass were, by its depth"


def _batches(rows: Sequence[Row], path: Path, title: str) -> str:
    if not (panels := batch_series(rows)):
        return ""
    line_plots(panels, path, doubling=True)
    return "Images per second and latency against batch size"


def accepted_counts(run: Run) -> Counter[int]:
    """Count the passes after the prefill by the number of tokens they committed."""
    lengths = np.concatenate([image.accepted[1:] for image in run.images.values()])
    return Counter(
        {int(value): int(count) for value, count in zip(*np.unique(lengths, return_counts=True), strict=True)}
    )


PLOTS: dict[str, Callable[[Sequence[Row], Path, str], str]] = {
    "pareto": _pareto,
    "grid": _grid,
    "acceptance": _maps,
    "accepted": _histogram,
    "depths": _depths,
    "batches": _batches,
}  # each draws its file and returns its caption, '' where the runs allow none
