"""The decoding race: the traces (`trace=N`) of several decoders on the same prompts, to be replayed side by side.

# N image-phase tokens, G x M grid rows and columns of the image
A cell is one patch of the image, that of one code of its grid; forced tokens (row ends, headers) and previews have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.run_folder import Id
from sweeps.report.encode import image_uri
from sweeps.runs import ImageCost, Run
from sweeps.tables.figures import num_drafted

if TYPE_CHECKING:
    from sjd2.models.layout import TokenGrid

LANES = 8  # decoders side by side: more would shrink the images to stamps
PROMPTS = 6
UNIT = 1e-4  # seconds: the resolution of the times on the page


@dataclass(frozen=True)
class Heat:
    """One decoder on one prompt.

    seconds: the end of each pass, from the start of the batch, prefill included; cells: their number after each pass;
    passes: the number of passes so far, prefill included. order: the cells as committed; None: in raster order.
    """

    seconds: list[float]
    cells: list[int]
    passes: list[int]
    order: list[int] | None
    tokens: int
    image: np.ndarray  # uint8 [H, W, 3]
    batch_rows: int
    machine: str


@dataclass(frozen=True)
class Lane:
    """One decoder: its row in the table, and its heats by image id."""

    run: Run
    index: int
    ahead: int  # positions after the committed tokens that a pass drafts
    out_of_order: bool  # commits out of raster order, and its traces do not record the order
    heats: dict[Id, Heat]


@dataclass(frozen=True)
class Race:
    """The traced decoders of one table on the prompts they share."""

    lanes: list[Lane]
    ids: list[Id]
    rows: int
    columns: int
    notes: list[str]

    def prompt(self, key: Id) -> str:
        """Return the prompt of one heat."""
        return next(lane.run.images[key].prompt for lane in self.lanes if key in lane.heats)


def make_race(runs: Sequence[Run]) -> Race | None:
    """Return the race of the runs of one table; None if no run has a trace.

    Raises UserError if an image cannot be read.
    """
    traced = {run.path: [key for key in run.folder.traces() if key in run.images] for run in runs}
    chosen = [(index, run) for index, run in enumerate(runs) if traced[run.path] and run.drawn]
    if not chosen:
        return None
    ids = _shared(list(traced.values()))
    fit = [(index, run) for index, run in chosen if set(ids) & set(traced[run.path])]
    layout = fit[0][1].layout
    fit = [(index, run) for index, run in fit if next(iter(run.images.values())).tokens == layout.length]
    lanes = [_lane(index, run, [key for key in ids if key in traced[run.path]], layout) for index, run in fit[:LANES]]
    lanes = [lane for lane in lanes if lane.heats]
    ids = [key for key in ids if any(key in lane.heats for lane in lanes)]
    return Race(lanes, ids, layout.rows, layout.columns, _notes(lanes, ids, len(fit))) if lanes else None


def _shared(traced: Sequence[Sequence[Id]]) -> list[Id]:
    """Return the ids that most runs have traced, at most PROMPTS, in their order."""
    count: dict[Id, int] = {}
    for keys in traced:
        for key in keys:
            count[key] = count.get(key, 0) + 1
    most = max(count.values())
    return sorted(key for key in count if count[key] == most)[:PROMPTS]


def _lane(index: int, run: Run, ids: Sequence[Id], layout: TokenGrid) -> Lane:
    before = np.concatenate([[0], np.cumsum(np.asarray(layout.shown))])  # cells among the first n tokens
    heats, known = {}, True
    for key, image in zip(ids, run.folder.images(ids), strict=True):
        trace, details = run.folder.trace(key)
        if not trace:
            continue
        order, cells = None, [int(before[committed]) for _, committed in trace]
        if "rows" in details:
            order, cells = _grown(details["rows"], layout.columns)
        known = known and (order is not None or not _many_rows(run))
        heats[key] = _heat(run, run.images[key], trace, cells, order, image)
    return Lane(run, index, num_drafted(run), not known, heats)


def _heat(
    run: Run,
    costs: ImageCost,
    trace: Sequence[tuple[float, int]],
    cells: list[int],
    order: list[int] | None,
    image: np.ndarray,
) -> Heat:
    launch = run.launches.get(costs.launch, {})
    first = costs.forwards - len(trace) + 1
    return Heat(
        seconds=[moment for moment, _ in trace],
        cells=cells,
        passes=list(range(first, costs.forwards + 1)),
        order=order,
        tokens=costs.tokens,
        image=image,
        batch_rows=int(run.setting("batch_size")),
        machine=machine_name(launch.get("hardware"), launch.get("threads")),
    )


def in_a_row(count: int, most: int) -> int:
    """Return how many of `count` things to put in a row, at most `most`, so that the rows are about equally long."""
    return -(-count // -(-count // most))


def machine_name(hardware: str | None, threads: int | None) -> str:
    """Return hardware and threads as text."""
    if hardware is None:
        return "unknown hardware"
    return hardware if threads is None or "thread" in hardware else f"{hardware}, {threads} CPU threads"


def _many_rows(run: Run) -> bool:
    return str(run.config["decoder"].get("_target_", "")).startswith(("baselines.zipar.", "baselines.pjd."))


def _grown(rows: Sequence[Sequence[int]], columns: int) -> tuple[list[int], list[int]]:
    """Return the cells in order of commit, and their number after each pass, from codes per grid row [passes][G]."""
    order: list[int] = []
    counts, old = [], [0] * len(rows[0])
    for new in rows:
        for row, (before, after) in enumerate(zip(old, new, strict=True)):
            order += range(row * columns + before, row * columns + after)
        counts.append(len(order))
        old = new
    return order, counts


def _notes(lanes: Sequence[Lane], ids: Sequence[Id], runs: int) -> list[str]:
    """Return notes on what the race shows and what it does not."""
    heats = [heat for lane in lanes for heat in lane.heats.values()]
    machines, sizes = sorted({heat.machine for heat in heats}), sorted({heat.batch_rows for heat in heats})
    dtypes = sorted({str(lane.run.setting("dtype")) for lane in lanes})
    rows = "one image at a time" if sizes == [1] else f"{' or '.join(map(str, sizes))} images decoded together"
    found = [
        (
            f"Measured on {' and on '.join(machines)}, {rows}, {', '.join(dtypes)}. The decoders ran one after "
            "another, not at once; the replay starts their clocks together. The clock covers prefill and decoding."
        ),
        (
            "Each pass of a traced image waits for the device, so these times are longer than those of the table, which "
            "excludes traced images."
        ),
        (
            "A patch of the finished image appears when its token is committed. In reality tokens become pixels only once, at "
            "the end, which the clock excludes."
        ),
    ]
    seeds = {key: {lane.run.images[key].seed for lane in lanes if key in lane.heats} for key in ids}
    warnings = []
    if any(len(values) > 1 for values in seeds.values()):
        warnings.append("the runs have different seeds, so their images do not share random numbers.")
    if len(machines) > 1 or len(sizes) > 1 or len(dtypes) > 1:
        warnings.append("hardware, batch size or dtype differ between the decoders, so their times are not comparable.")
    if unknown := [lane.run.label for lane in lanes if lane.out_of_order]:
        warnings.append(
            f"{', '.join(unknown)} decodes several rows at once, but this old trace does not record the order; "
            "it is shown row by row."
        )
    if runs > len(lanes):
        warnings.append(f"{len(lanes)} of {runs} traced runs are shown.")
    return found + [f"Warning: {text}" for text in warnings]


def race_json(race: Race, side: int) -> dict[str, Any]:
    """Return the race for the page's script; times and cells are differences, times in units of UNIT."""
    lanes = [
        {"label": lane.run.label, "lossless": lane.run.lossless, "colour": lane.index, "ahead": lane.ahead}
        for lane in race.lanes
    ]
    heats = []
    for key in race.ids:
        entries = [_packed(lane.heats[key], side) if key in lane.heats else None for lane in race.lanes]
        heats.append({"prompt": race.prompt(key), "lanes": entries})
    return {"unit": UNIT, "rows": race.rows, "columns": race.columns, "lanes": lanes, "heats": heats}


def _packed(heat: Heat, side: int) -> dict[str, Any]:
    moments = np.round(np.asarray(heat.seconds) / UNIT).astype(int)
    packed = {
        "times": np.diff(moments, prepend=0).tolist(),
        "cells": np.diff(heat.cells, prepend=0).tolist(),
        "passes": heat.passes[0],
        "tokens": heat.tokens,
        "image": image_uri(heat.image, side),
    }
    return packed if heat.order is None else packed | {"order": heat.order}
