"""How the draft token at a position changes from pass to pass until it is committed (as in SJD2's figure 8).

# T passes, N image-phase tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.run_folder import Id
from sweeps.report.encode import chart_uri
from sweeps.runs import Run

PLACES = (0.2, 0.35, 0.5, 0.65, 0.8)  # of the image: positions whose draft tokens are listed
LONGEST = 40  # draft tokens listed for one position, the last ones
NOTHING, COMMITTED, OTHER, CHANGED, FINAL = range(5)
COLOURS = np.array(  # RGBA, readable on light and dark paper
    [[0, 0, 0, 0], [128, 134, 148, 70], [226, 160, 63, 255], [196, 84, 36, 255], [24, 145, 118, 255]], np.uint8
)


@dataclass(frozen=True)
class Trajectory:
    """The draft tokens of one decoder's image.

    chart: a data URI, a column per pass and a row per position. width: passes, as a share of the slowest decoder's.
    changes: mean number of changes of a position's draft token before the commit; settled: share of positions whose last
    draft token was the committed one. samples: (position, draft tokens in order, committed token).
    """

    run: Run
    index: int
    chart: str
    passes: int
    width: float
    changes: float
    settled: float
    samples: list[tuple[int, list[int], int]]


def draft_table(trace: Sequence[tuple[float, int]], drafts: Sequence[Sequence[int]], tokens: int) -> np.ndarray:
    """Return the draft token after each pass at each position, [T, N]; -1: none."""
    table = np.full((len(trace), tokens), -1, np.int64)
    for step, ((_, committed), row) in enumerate(zip(trace, drafts, strict=True)):
        width = min(len(row), tokens - committed)
        table[step, committed : committed + width] = row[:width]
    return table


def make_trajectories(runs: Sequence[Run]) -> tuple[list[Trajectory], Id | None]:
    """Return the trajectories of the runs whose trace of one image has draft tokens, and that image's id."""
    kept: dict[Id, list[tuple[int, Run, np.ndarray, list[tuple[float, int]]]]] = {}
    for index, run in enumerate(runs):
        for key in run.folder.traces():
            if key not in run.images:
                continue
            trace, details = run.folder.trace(key)
            drafts = details.get("guesses")
            if drafts and len(drafts) == len(trace):
                table = draft_table(trace, drafts, run.images[key].tokens)
                kept.setdefault(key, []).append((index, run, table, trace))
    if not kept:
        return [], None
    key = max(sorted(kept), key=lambda key: len(kept[key]))
    most = max(len(table) for _, _, table, _ in kept[key])
    places = _places([table for _, _, table, _ in kept[key]])
    made = []
    for index, run, table, trace in kept[key]:
        final = run.folder.tokens({"id": list(key)}).astype(np.int64)
        committed = [count for _, count in trace]
        made.append(_trajectory(run, index, table, final, committed, places, most))
    return made, key


def _trajectory(
    run: Run, index: int, table: np.ndarray, final: np.ndarray, committed: list[int], places: list[int], most: int
) -> Trajectory:
    paths = [_path(table, position) for position in range(table.shape[1])]
    waited = [(path, int(token)) for path, token in zip(paths, final, strict=True) if path]
    changes = [sum(a != b for a, b in zip(path, [*path[1:], token], strict=True)) for path, token in waited]
    return Trajectory(
        run=run,
        index=index,
        chart=chart_uri(COLOURS[classes(table, final, committed)].transpose(1, 0, 2)),
        passes=len(table),
        width=len(table) / most,
        changes=float(np.mean(changes)) if changes else 0.0,
        settled=float(np.mean([path[-1] == token for path, token in waited])) if waited else 0.0,
        samples=[(place, paths[place][-LONGEST:], int(final[place])) for place in places if paths[place]],
    )


def classes(table: np.ndarray, final: np.ndarray, committed: Sequence[int]) -> np.ndarray:
    """Return what each pass had at each position, [T, N]: nothing, a committed token, or a kind of draft token."""
    kind = np.full(table.shape, OTHER)
    kind[1:][(table[1:] != table[:-1]) & (table[:-1] >= 0)] = CHANGED
    kind[table == final] = FINAL
    kind[table < 0] = NOTHING
    kind[np.arange(table.shape[1]) < np.asarray(committed)[:, None]] = COMMITTED
    return kind


def _path(table: np.ndarray, position: int) -> list[int]:
    return [int(token) for token in table[:, position] if token >= 0]


def _places(tables: Sequence[np.ndarray]) -> list[int]:
    """Return positions spread over the image that every decoder drafted."""
    tokens = min(table.shape[1] for table in tables)
    waited = np.all([(table[:, :tokens] >= 0).any(0) for table in tables], axis=0)
    fit = np.flatnonzero(waited)
    if not len(fit):
        fit = np.flatnonzero(np.any([(table[:, :tokens] >= 0).any(0) for table in tables], axis=0))
    if not len(fit):
        return []
    return sorted({int(fit[np.abs(fit - place * tokens).argmin()]) for place in PLACES})
