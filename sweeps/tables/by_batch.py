"""Throughput and latency against batch size: a table and a plot of runs that differ in it."""

from __future__ import annotations

from collections.abc import Sequence

from sweeps.tables.formats import Table
from sweeps.tables.rows import Row

LATENCY = "latency of an image, median (s)"
THROUGHPUT = "images per second"


def by_batch(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Return {decoder with its settings: {batch size: its run}} of timed runs; {} if no decoder has two sizes."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row.latency_s is not None and row.images_per_s is not None:
            size = int(row.run.setting("batch_size") or 1)
            words = [word for word in row.run.label.split(" ") if word != f"batch_size={size}"]
            found.setdefault(" ".join(words), {})[size] = row
    return found if any(len(sizes) > 1 for sizes in found.values()) else {}


def batch_series(rows: Sequence[Row]) -> list[tuple[dict[str, list[tuple[float, float]]], str, str]]:
    """Return the panels of the plot: images per second and latency against the batch size; [] where there is none."""
    found, panels = by_batch(rows), []
    for title, value in (
        ((THROUGHPUT, lambda row: row.images_per_s), (LATENCY, lambda row: row.latency_s)) if found else ()
    ):
        series = {
            label: [(float(size), value(sizes[size])) for size in sorted(sizes)] for label, sizes in found.items()
        }
        panels.append((series, "batch size", title))
    return panels


def batch_table(rows: Sequence[Row]) -> Table | None:
    """Return a table of decoders by batch sizes, images per second and latency in each cell; None for one batch size."""
    found = by_batch(rows)
    if not found:
        return None
    sizes = sorted({size for runs in found.values() for size in runs})
    header = ["images/s (latency s) by batch size", *map(str, sizes)]
    cells = [[label, *(_cell(runs.get(size)) for size in sizes)] for label, runs in found.items()]
    note = (
        "Images per second count all parts of a batch, prompt to pixels; latency is prefill and decoding of the batch."
    )
    return Table("", header, cells, [note])


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{row.images_per_s:.3g} ({row.latency_s:.3g})"
