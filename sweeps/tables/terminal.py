"""Show a Markdown page on a terminal: its tables in blocks that fit the width, no number ever cut.

Of the notes it shows the two most important warnings, a line each; all of them stay in the file.

A row that is wider than the terminal continues in the next block, again below its label: first what decoding costs, then
quality.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from rich.cells import cell_len, set_cell_size

from harness.console import answer
from sweeps.tables.formats import unescape

# headings of a table whose model has a diffusion stage, for which "latency" and "speed-up" would be ambiguous
AR_STAGE = {"latency s": "AR stage s", "speed-up": "AR stage speed-up"}
WHOLE = ("diffusion s", "whole image s", "whole speed-up")
# of the first block, in this order
COSTS = ("lossless", "passes", "step compression", *AR_STAGE, *AR_STAGE.values(), *WHOLE)
OTHER_COSTS = ("N", "batch", "images/s")  # after them; N and batch only where they differ between the rows
# what no line break separates: "[low, high]", "± 0.02", "+ 61.0", "score ↑", "latency s"
ATOM = re.compile(r"\[[^\]]*\]\S*|[±+−/] \S+|\S+(?: (?:[↑↓]|s)(?!\S))?")
SOURCE = re.compile(r" \(.*\)(?= [↑↓]$)")  # which network made a score; the notes name it too
BOLD = re.compile(r"(?<!\\)\*\*(.*?)(?<!\\)\*\*")
GAP = 2  # blanks between two columns
WARNINGS = 2  # shown on a terminal, shortened to one line each
# the most important notes, in this order; then other warnings
FIRST = ("Warning: no speed-up", "No speed-up", "Not compared: latency", "Warning: intervals", "Warning: ")
FAILED = ("failed: ", "has not started", "was stopped", "is still running")


@dataclass
class PageTable:
    """One table of a page; `failed` holds (job, why it has no run)."""

    title: str = ""
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)


def show(text: str, file: Path | None = None, output: str = "auto") -> None:
    """Print a Markdown page: in blocks on a terminal, as it is through a pipe; `output` may ask for text, markdown or json.

    file: where the page is, named after it; the JSON is the file beside it.
    """
    if output == "json" and file is not None:
        answer(json.loads(file.with_suffix(".json").read_text(encoding="utf-8")))
    elif output == "text" or (output == "auto" and sys.stdout.isatty()):
        _print_blocks(text, file)
    else:
        print(_plain(text), f"table: {file}", sep="\n\n", flush=True) if file else print(_plain(text), flush=True)


def _plain(text: str) -> str:
    """Return a page without its images, which no terminal shows, and without HTML escapes."""
    text = "\n".join(line for line in text.split("\n") if not line.startswith("!["))
    return re.sub(r"\n{3,}", "\n\n", text).strip().replace("&lt;", "<")


def _print_blocks(text: str, file: Path | None) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)  # lines are wrapped here, and by nobody else
    tables, notes = read_page(_plain(text))
    for table in tables:
        for line in layout(table, shutil.get_terminal_size().columns):
            parts = [unescape(part) for part in BOLD.split(line)]  # every second one is bold
            console.print(Text.assemble(*((part, "bold" if place % 2 else "") for place, part in enumerate(parts))))
        console.print()
    for line in first_warnings(notes, shutil.get_terminal_size().columns):
        console.print(Text(line))
    if file is not None:
        warnings = sum(note.startswith("Warning:") for note in notes)
        counts = [(warnings, "warning"), (len(notes) - warnings, "note")]
        words = ["table", *(f"{count} {word}{'s' * (count > 1)}" for count, word in counts if count)]
        console.print(Text(f"{', '.join(words)}: {file}"))


def first_warnings(notes: Sequence[str], width: int) -> list[str]:
    """Return the most important warnings, each shortened to one line of at most `width` columns."""
    ranked = [note for words in FIRST for note in notes if note.startswith(words)]
    return [_shortened(unescape(note), width) for note in list(dict.fromkeys(ranked))[:WARNINGS]]


def _shortened(text: str, width: int) -> str:
    """Return the whole words of a text that fit `width` columns, with dots in place of the others."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 3).rpartition(" ")[0] + " ..."


def read_page(text: str) -> tuple[list[PageTable], list[str]]:
    """Return the tables of a Markdown page and the paragraphs around them."""
    tables, notes, title = [], [], ""
    for block in filter(str.strip, re.split(r"\n\n+", text)):
        lines = block.strip().split("\n")
        if lines[0].startswith("#"):
            title = lines.pop(0).lstrip("# ")
        if lines and lines[0].startswith("|"):
            header, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
            tables.append(_grid(title, header, rows))
            title = ""
        elif lines:
            notes.append(" ".join(lines))
    return tables, notes


def _grid(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> PageTable:
    table = PageTable(title, [SOURCE.sub("", cell) for cell in header])
    for row in rows:
        if len(row) > 1 and row[1].startswith(FAILED) and not any(row[2:]):
            table.failed.append((row[0], row[1]))
        else:
            table.rows.append(list(row))
    return table


def layout(table: PageTable, width: int) -> Iterator[str]:
    """Yield the lines of one table, each at most `width` columns wide unless a single number is wider; `**text**` is bold."""
    common, order = _order(table)
    title = ", ".join(filter(None, (table.title, *common)))
    yield from (f"**{line}**" for line in _wrap(title, width))
    for block in _blocks(table, order, width) if table.rows else []:
        yield ""
        yield from _lines(table, block, width)
    if table.failed:
        yield ""
    for label, reason in table.failed:
        yield from _wrap(f"{label}: {reason}", width)


def _order(table: PageTable) -> tuple[list[str], list[int]]:
    """Return what all rows share as words ('N 24'), and the columns to show, costs before quality."""
    places = {title: place for place, title in enumerate(table.header)}
    if not places.keys() & {"speed-up", AR_STAGE["speed-up"]}:
        return [], list(range(len(table.header)))
    shared = {
        title: table.rows[0][places[title]]
        for title in ("N", "batch")
        if title in places and len({row[places[title]] for row in table.rows}) == 1
    }
    costs = [places[title] for title in (*COSTS, *OTHER_COSTS) if title in places and title not in shared]
    rest = [place for place, title in enumerate(table.header) if place and place not in costs and title not in shared]
    return [f"{title} {value}" for title, value in shared.items()], [0, *costs, *rest]


def _blocks(table: PageTable, order: Sequence[int], width: int) -> list[list[int]]:
    """Divide the columns into blocks that fit; the first is repeated, and quality begins a block of its own if it can."""
    costs = {place for place, title in enumerate(table.header) if title in (*COSTS, *OTHER_COSTS)}
    blocks = [[order[0]]]
    for place in order[1:]:
        wide = _total(table, [*blocks[-1], place], least=table.header[place] in COSTS) > width
        quality = bool(costs) and place not in costs and set(blocks[-1][1:]) <= costs and len(blocks) == 1
        if (wide or quality) and len(blocks[-1]) > 1:
            blocks.append([order[0]])
        blocks[-1].append(place)
    return blocks


def _total(table: PageTable, block: Sequence[int], *, least: bool) -> int:
    widths = [_bounds(table, place)[0 if least or place == block[0] else 1] for place in block]
    return sum(widths) + GAP * (len(block) - 1)


def _bounds(table: PageTable, place: int) -> tuple[int, int]:
    """Return the least width of a column, at which cells and heading break between atoms, and that of its whole cells."""
    cells = [row[place] for row in table.rows]
    least = max(_width(atom) for text in (*cells, table.header[place], " .") for atom in ATOM.findall(text))
    return least, max([least, *map(_width, cells)])


def _lines(table: PageTable, block: Sequence[int], width: int) -> Iterator[str]:
    """Yield one block: heading, rule, rows."""
    bounds = [_bounds(table, place) for place in block]
    widths = [least for least, _ in bounds]
    headings = [max(whole, _width(table.header[place])) for place, (_, whole) in zip(block, bounds, strict=True)]
    # what is left goes, a blank at a time, to the columns whose cells would break, then to those whose headings would
    for wanted in ([whole for _, whole in bounds], headings):
        while sum(widths) + GAP * (len(widths) - 1) < width and widths != wanted:
            narrow = [n for n, most in enumerate(wanted) if widths[n] < most]
            widths[min(narrow, key=lambda n: wanted[n] - widths[n])] += 1
    yield from _row([table.header[place] for place in block], widths)
    yield "─" * (sum(widths) + GAP * (len(widths) - 1))
    for row in table.rows:
        yield from _row([row[place] for place in block], widths)


def _row(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    columns = [_wrap(cell, width) for cell, width in zip(cells, widths, strict=True)]
    for parts in zip_longest(*columns, fillvalue=""):
        padded = [" " * (width - _width(part)) for part, width in zip(parts, widths, strict=True)]
        first, *rest = (
            part + blank if not n else blank + part for n, (part, blank) in enumerate(zip(parts, padded, strict=True))
        )
        yield (" " * GAP).join([first, *rest]).rstrip()


def _wrap(text: str, width: int) -> list[str]:
    """Break text between atoms into lines of at most `width`, where no atom alone is wider."""
    lines: list[str] = []
    for atom in ATOM.findall(text):
        if lines and _width(f"{lines[-1]} {atom}") <= width:
            lines[-1] += f" {atom}"
        else:
            lines.append(atom)
    return lines


def _width(text: str) -> int:
    return cell_len(unescape(BOLD.sub(r"\1", text)))
