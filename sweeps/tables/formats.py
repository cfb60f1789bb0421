"""Write tables of text as Markdown and LaTeX; terminal.py shows them on a terminal.

The cells of a `Table` are for readers; numbers for programs go to the CSV (table.py). A cell or note may begin with
`**words**` in bold, and a note holds commands between backticks; every other text is shown as it stands.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

LATEX = {
    "†": r"$\dagger$",
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
    "−": r"$-$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "–": "--",
}


LATIN = 0x180  # the first character after Latin Extended-A
BOLD = re.compile(r"\*\*([^*]+)\*\*")


@dataclass
class Table:
    """Cells for readers, and the notes below them; `failed` holds (job, reason)."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    plots: list[tuple[str, str]] = field(default_factory=list)  # (caption, file name)


def markdown(table: Table, level: int = 2) -> str:
    """Return a table as Markdown: heading, rows, failed jobs, notes, plots."""
    lines = [f"{'#' * level} {literal(table.title)}", ""] if table.title else []
    width = len(table.header)
    rows = [list(row) for row in table.rows]
    rows += [[label, failure(reason), *[""] * (width - 2)] for label, reason in table.failed]
    lines += [_pipe(table.header), "|" + "|".join([" :--- "] + [" ---: "] * (width - 1)) + "|"]
    lines += [_pipe(row) for row in rows]
    for note in table.notes:
        lines += ["", _note(note)]
    for caption, name in table.plots:
        alt = re.sub(r"[\[\]]", r"\\\g<0>", literal(caption))
        lines += ["", f"![{alt}]({name})"]
    return "\n".join(lines) + "\n"


def failure(reason: str) -> str:
    """Return why a job has no run; one that has not started, or was stopped, has not failed."""
    return reason if reason.startswith(("has not started", "was stopped", "is still running")) else f"failed: {reason}"


def _pipe(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    bold, rest = split_bold(text)
    return (f"**{literal(bold)}**" * bool(bold) + literal(rest)).replace("|", "\\|")


def _note(text: str) -> str:
    bold, rest = split_bold(text)
    parts = (part if index % 2 else literal(part) for index, part in enumerate(re.split(r"(`[^`]+`)", rest)))
    line = f"**{literal(bold)}**" * bool(bold) + "".join(parts)
    return re.sub(r"^(\d*)([#+>.)-]+ )", r"\1\\\2", line)  # else a heading, a list, a quotation


def split_bold(text: str) -> tuple[str, str]:
    """Split one line into the words it begins with in bold, '' if there are none, and the rest."""
    text = " ".join(text.split())
    found = BOLD.match(text)
    return (found[1], text[found.end() :]) if found else ("", text)


def literal(text: str) -> str:
    """Put text on one line and escape what Markdown (GitHub's too: `$` is mathematics) would read as markup."""
    text = re.sub(r"\\(?=[!-/:-@\[-`{-~]|$)|[*`$~]|(?<!\w)_|_(?!\w)|(?<=\])\(", r"\\\g<0>", re.sub(r"\s+", " ", text))
    return re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")


def unescape(text: str) -> str:
    """Undo `literal`, for those who read a page of Markdown to show it otherwise."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text).replace("&lt;", "<").replace("&amp;", "&")


def escape(text: str) -> str:
    """Return text for LaTeX: special characters escaped, `**words**` at its beginning bold, unknown symbols as '?'."""
    bold, rest = ("".join(LATEX.get(c, c if c.isascii() else _fold(c)) for c in part) for part in split_bold(text))
    return (rf"\textbf{{{bold}}}" if bold else "") + rest


def _fold(character: str) -> str:
    """Keep Latin letters, which inputenc knows; replace what plain LaTeX has no glyph for."""
    return character if character.isalpha() and ord(character) < LATIN else "?"


def latex(table: Table) -> str:
    r"""Return a table as a LaTeX `table*` with booktabs rules; needs \\usepackage{booktabs}."""
    width = len(table.header)
    lines = [r"\begin{table*}[t]", r"\centering\small", rf"\caption{{{escape(table.title)}}}" if table.title else ""]
    lines += [rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}", r"\toprule"]
    lines += [" & ".join(map(escape, table.header)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(escape, row)) + r" \\" for row in table.rows]
    for label, reason in table.failed:
        lines.append(
            rf"{escape(label)} & \multicolumn{{{width - 1}}}{{p{{0.7\linewidth}}}}{{{escape(failure(reason))}}} \\"
        )
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\smallskip\footnotesize {escape(note)}" for note in table.notes]
    return "\n".join(line for line in [*lines, r"\end{table*}"] if line) + "\n"


def csv_cells(tables: Sequence[Table]) -> str:
    """Return the cells of tables with the same header as CSV, the title of its table first in each row."""
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    for table in tables:
        lines.writerow(["table", *table.header])
        lines.writerows([table.title, *row] for row in table.rows)
    return buffer.getvalue()
