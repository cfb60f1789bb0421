"""Tables of the page: every cell with its text, its unrounded number to sort by, and the published values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sweeps.runs import Machine
from sweeps.tables.formats import Table, split_bold
from sweeps.tables.published import Published, printed_field, select
from sweeps.tables.rows import Row
from sweeps.tables.table import columns, csv_row

BARS = ("step_compression", "speedup")  # columns whose cells show a bar of the length of their number


@dataclass(frozen=True)
class Cell:
    """One cell: `text` and, smaller, `more` (interval, spread); `value` as in table.csv, '' if there is none."""

    text: str
    more: str = ""
    value: str = ""
    key: str = ""
    bold: bool = False
    bar: float = 0.0  # 0 to 1
    printed: str = ""  # values that papers print for this decoder
    sources: str = ""


@dataclass(frozen=True)
class Grid:
    """A table: `keys` are the CSV columns of the header; the first cell of a row names it."""

    header: list[str]
    rows: list[list[Cell]]
    keys: list[str] = field(default_factory=list)
    colours: list[int] = field(default_factory=list)  # of the rows' marks
    notes: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)


def main_grid(rows: Sequence[Row], machine: Machine | None, failed: Sequence[tuple[str, str]] = ()) -> Grid:
    """Return the table of one group, with the numbers of table.csv and the published ones below ours."""
    shown = [column for column in columns(rows, detail=True) if any(column.text(row) for row in rows)]
    values = [csv_row(row, machine) for row in rows]
    most = {key: max([float(v[key]) for v in values if key in v], default=0.0) for key in BARS}
    model = str(rows[0].run.config["model"]["name"])
    cells = []
    for row, numbers in zip(rows, values, strict=True):
        printed = [] if row.run.exact_rule else select(model, {row.run.decoder})
        cells.append([_cell(c.text(row), c.key, numbers, most, printed) for c in shown])
    return Grid(
        header=[column.title for column in shown],
        rows=cells,
        keys=[column.key for column in shown],
        colours=list(range(len(rows))),
        failed=list(failed),
    )


def _cell(text: str, key: str, numbers: dict[str, Any], most: dict[str, float], printed: Sequence[Published]) -> Cell:
    main, more, bold = _split(text) if key != "label" else (text, "", False)
    value = numbers.get(key, "")
    theirs = printed_field(key)
    found = [(row, getattr(row, theirs)) for row in printed] if theirs is not None else []
    found = [(row, number) for row, number in found if number is not None]
    sources = [f"{number:g}: {row.method}, {row.dataset} ({row.arxiv}, {row.table})" for row, number in found]
    return Cell(
        text=main,
        more=more,
        value=str(value),
        key=key,
        bold=bold,
        bar=float(value) / most[key] if key in most and value != "" and most[key] > 0 else 0.0,
        printed=_range([number for _, number in found]),
        sources="; ".join(sources),
    )


def _range(values: Sequence[float]) -> str:
    """Return published values as one number, or as their range."""
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _split(text: str) -> tuple[str, str, bool]:
    """Split '2.43 ± 0.01 (...)' into the number and the rest; '**lossy**' is bold."""
    words, rest = split_bold(text)
    plain, bold = words + rest, bool(words)
    found = re.match(r"(\S+)\s+([(±+\[].*)", plain)
    return (found[1], found[2], bold) if found else (plain, "", bold)


def plain_grid(table: Table) -> Grid:
    """Return a table of text; cells with a number can be sorted by it."""
    return Grid(
        header=list(table.header),
        rows=[[_plain(text, place) for place, text in enumerate(row)] for row in table.rows],
        notes=list(table.notes),
        failed=list(table.failed),
    )


def _plain(text: str, place: int) -> Cell:
    main, more, bold = _split(text) if place else (text, "", False)
    number = re.match(r"[-+−]?\d+(\.\d+)?×?$", main)
    return Cell(main, more, main.rstrip("×").replace("−", "-") if number else "", bold=bold)
