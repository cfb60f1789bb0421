"""How likely a draft token is accepted once it is reached, by its depth in the pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evaluation.acceptance import depth_counts
from sweeps.tables.rows import Row

FEWEST_TESTS = 30  # of a depth, below which its rate is not drawn


def depth_series(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Return {label: [(depth, acceptance probability given that it was reached)]} of the runs that draft."""
    found = {}
    for row in rows:
        tests, accepts = depth_counts(row.drafts)
        rates = [
            (float(depth), float(accepted / tested))
            for depth, (tested, accepted) in enumerate(zip(tests, accepts, strict=True), 1)
            if tested >= FEWEST_TESTS
        ]
        if rates:
            found[row.run.label] = rates
    return found


def depth_lines(rows: Sequence[Row], title: str) -> list[dict[str, Any]]:
    """Return a line for each run and depth: tests, accepted, and their ratio."""
    return [
        {"table": title, "label": row.run.label, "depth": depth, "tests": int(tested), "accepted": int(accepted)}
        | {"accept_rate": float(accepted / tested) if tested else None}
        for row in rows
        for depth, (tested, accepted) in enumerate(zip(*depth_counts(row.drafts), strict=True), 1)
    ]
