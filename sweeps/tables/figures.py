"""Choose what to draw of a table's runs: quality against latency, the same seeds side by side, acceptance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from omegaconf import OmegaConf

from evaluation.run_folder import Id
from sjd2.errors import UserError
from sweeps.runs import Run
from sweeps.tables.plots import COLUMNS_MAX, Point, acceptance_histogram, acceptance_maps, image_grid, pareto
from sweeps.tables.rows import Row

if TYPE_CHECKING:
    from sjd2.models.layout import TokenGrid

GRID_ROWS = 6  # prompts in the image grid
MAP_IMAGES = 256  # images averaged in an acceptance map
NAMES = ("pareto", "grid", "acceptance", "accepted")
QUALITIES = {  # key of metrics.json: (title, key of its spread, lower is better)
    "fid": ("FID", None, True),
    "kid": ("KID", "kid_std", True),
    "clip_score": ("CLIP score", None, False),
    "alignment": ("alignment", None, False),
}
LIKELIHOOD = "NLL/token, difference to AR"
PANELS = 3  # qualities in one Pareto plot


@dataclass
class Drawn:
    """The pictures of one table as (caption, file name), and what had to be left out."""

    pictures: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def draw(rows: Sequence[Row], out: Path, *, suffix: str, title: str) -> Drawn:
    """Draw all pictures that the runs of one table allow into `out`, as pareto.png ...; `suffix` tells tables apart."""
    drawn = Drawn()
    for name in NAMES:
        path = out / f"{name}{suffix}.png"
        path.unlink(missing_ok=True)  # a picture of earlier runs must not stand beside this table
        try:
            caption = {"pareto": _pareto, "grid": _grid, "acceptance": _maps, "accepted": _histogram}[name](
                rows, path, title
            )
        except UserError as error:
            drawn.notes.append(f"Left out: {path.name}, since {error}")
            continue
        if caption:
            drawn.pictures.append((caption, path.name))
    return drawn


def quality_panels(rows: Sequence[Row]) -> dict[str, tuple[list[Point], bool | None]]:
    """Return {quality: (points, lower is better)} of the scores that compare between these runs, at most PANELS.

    Where no score compares: the difference in likelihood to AR. Neither side of zero is better: it tells of bias.
    """
    panels: dict[str, tuple[list[Point], bool | None]] = {}
    for key, (name, spread, lower) in QUALITIES.items():
        # scores of different N or different networks share no axis
        fit = [row for row in rows if key in row.metrics and row.scored == row.n]
        alike = {
            (row.n if key == "fid" else 0, row.metrics.get("fid_extractor"), row.metrics.get("clip_model"))
            for row in fit
        }
        if len(fit) > 1 and len(alike) == 1 and len(panels) < PANELS:
            panels[name] = [_point(row, row.metrics[key], row.metrics.get(spread or "")) for row in fit], lower
    gaps = [row for row in rows if row.nll_difference]
    if panels or not gaps:
        return panels
    points = [_point(row, 0.0, None) for row in rows if row.run.is_ar]
    for row in gaps:
        difference = row.nll_difference
        points.append(_point(row, difference.mean, (difference.high - difference.low) / 2))
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
        return "Difference in NLL per token to AR (95 % interval) against latency: a lossless decoder's includes zero"
    return "Quality against latency; the grey line joins the runs that no other run beats in both"


def _point(row: Row, quality: float, error: float | None) -> Point:
    return Point(row.run.label, row.latency_s, quality, row.run.lossless, error)


def _grid(rows: Sequence[Row], path: Path, title: str) -> str:
    runs, ids = same_seeds([row.run for row in rows])
    if not ids:
        return ""
    shown, chosen = runs[:COLUMNS_MAX], ids[:GRID_ROWS]
    pictures = {run.label: list(run.folder.images(chosen)) for run in shown}
    note = "the same prompt and seed in a row" + (
        f"; the first {len(shown)} of {len(rows)} runs" if len(shown) < len(rows) else ""
    )
    image_grid(pictures, [shown[0].images[key].prompt for key in chosen], path, note=note)
    return f"Images of the same prompt and seed, decoder by decoder ({title})"


def same_seeds(runs: Sequence[Run]) -> tuple[list[Run], list[Id]]:
    """Return the runs that share images made from equal seeds, and the ids of those images, first repeats first.

    Runs with another `seed=`, and runs with no image in common with the others, are left out.
    """
    seeds = Counter(run.identity.get("seed") for run in runs)
    kept = [run for run in runs if run.identity.get("seed") == seeds.most_common(1)[0][0]]
    common: set[Id] = set(kept[0].images)
    alike = []
    for run in kept:
        both = {key for key in common & run.images.keys() if run.images[key].seed == kept[0].images[key].seed}
        if both:
            common = both
            alike.append(run)
    return alike, sorted(common, key=lambda key: (key[1], key[0]))


def waiting_maps(rows: Sequence[Row]) -> tuple[dict[str, np.ndarray], TokenGrid | None]:
    """Return {label: mean passes that each position waited as a guess [N]} of the runs that guess, and their layout."""
    drafting = [row.run for row in rows if row.run.identity["decoder"].get("window", 1) > 1]
    if not drafting:
        return {}, None
    from sjd2.config import instantiate

    layout = instantiate(OmegaConf.create(drafting[0].config["model"])).layout
    drafting = [run for run in drafting if next(iter(run.images.values())).tokens == layout.length]
    return {run.label: mean_waiting(run) for run in drafting}, layout


def _maps(rows: Sequence[Row], path: Path, title: str) -> str:
    maps, layout = waiting_maps(rows)
    if not maps:
        return ""
    acceptance_maps(maps, layout.rows, layout.columns, path, free=np.asarray(layout.free))
    return "Passes that each position of the picture waited as a guess, mean over images; AR waits nowhere"


def guesses_ahead(run: Run) -> int:
    """Return how many positions behind the committed tokens a pass guessed; less than window - 1 where there was a tree."""
    from sjd2.config import instantiate

    decoder = run.config["decoder"]
    if "_target_" not in decoder:
        return int(decoder["window"]) - 1
    return instantiate(OmegaConf.create(decoder)).ahead


def mean_waiting(run: Run) -> np.ndarray:
    """Return the mean number of passes that each position was a guess before it was committed: [N]."""
    from harness.grids import waiting

    window = guesses_ahead(run) + 1
    images = [run.images[key] for key in sorted(run.images)[:MAP_IMAGES]]
    return np.mean([waiting(image.accepted.tolist(), window) for image in images], axis=0)


def _histogram(rows: Sequence[Row], path: Path, title: str) -> str:
    counts = {row.run.label: accepted_counts(row.run) for row in rows if not row.run.is_ar}
    if not counts:
        return ""
    acceptance_histogram(counts, path)
    return "Share of passes by the number of tokens they committed (the prefill's one left out)"


def accepted_counts(run: Run) -> Counter[int]:
    """Count the passes after the prefill by the tokens they committed."""
    lengths = np.concatenate([image.accepted[1:] for image in run.images.values()])
    return Counter(
        {int(value): int(count) for value, count in zip(*np.unique(lengths, return_counts=True), strict=True)}
    )
