"""Window x steps: the runs of one decoder that differ only in these two, as in the paper's figure 4."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup

from sweeps.report.charts import lines
from sweeps.tables.figures import scores
from sweeps.tables.rows import Row

MEASURES = (  # heading, value of a row
    ("step compression", lambda row: row.compression),
    ("latency of an image, median (s)", lambda row: row.latency_s),
    ("NLL/token, difference to AR", lambda row: row.nll_difference.mean if row.nll_difference else None),
)


@dataclass(frozen=True)
class Ablation:
    """One decoder over windows and steps: its plots, and step compression as a grid if both vary."""

    name: str
    plots: list[Markup]
    legend: list[tuple[int, str]]  # (colour, text) of the lines; empty if there is only one
    windows: list[int]
    steps: list[int]
    grid: list[list[Row | None]]  # [steps][windows]


def make_ablations(rows: Sequence[Row]) -> list[Ablation]:
    """Return one ablation per decoder and setting whose runs differ in window or steps alone."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        if row.run.identity["decoder"].get("window", 1) > 1:
            families.setdefault(_family(row), []).append(row)
    return [_ablation(members) for members in families.values() if len({_place(row) for row in members}) > 1]


def _scores(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], Any]]]:
    """Return heading and value of every score that a metric declared."""
    better = {True: "higher is better", False: "lower is better"}
    return [
        (f"{info.title} ({better[bool(info.higher_is_better)]})", partial(_score, name))
        for name, info in scores(rows).items()
    ]


def _score(name: str, row: Row) -> float | None:
    return row.metrics.get(name) if row.scored == row.n else None


def _place(row: Row) -> tuple[int, int]:
    decoder = row.run.identity["decoder"]
    return int(decoder["window"]), int(decoder.get("steps") or 0)


def _family(row: Row) -> str:
    """Return everything that identifies a run except window and steps, as text."""
    identity: dict[str, Any] = {key: value for key, value in row.run.identity.items() if key != "id"}
    identity["decoder"] = {key: value for key, value in identity["decoder"].items() if key not in ("window", "steps")}
    return json.dumps(identity, sort_keys=True, default=str)


def _ablation(rows: Sequence[Row]) -> Ablation:
    cells = {_place(row): row for row in rows}
    windows, steps = sorted({window for window, _ in cells}), sorted({step for _, step in cells})
    by_window = len(windows) > 1
    outer = steps if by_window else windows
    word = "steps" if by_window else "window"
    plots = []
    for title, value in [*MEASURES, *_scores(rows)]:
        series = {}
        for colour, fixed in enumerate(outer):
            line = [(cell, row) for cell, row in sorted(cells.items()) if cell[1 if by_window else 0] == fixed]
            points = [(float(cell[0 if by_window else 1]), value(row)) for cell, row in line]
            points = [(x, float(y)) for x, y in points if y is not None]
            if points:
                series[f"{word} {fixed}"] = (colour, points)
        if len({x for _, points in series.values() for x, _ in points}) > 1:
            plots.append(lines(series, "window" if by_window else "steps", title))
    both = len(windows) > 1 and len(steps) > 1
    words = [text for text in rows[0].run.label.split() if not text.startswith(("window=", "steps="))]
    return Ablation(
        name=" ".join(words),
        plots=plots,
        legend=[(colour, f"{word} {fixed}") for colour, fixed in enumerate(outer)] if len(outer) > 1 else [],
        windows=windows,
        steps=steps,
        grid=[[cells.get((window, step)) for window in windows] for step in steps] if both else [],
    )
