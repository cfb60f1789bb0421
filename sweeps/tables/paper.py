"""Tables of the SJD2 paper (arXiv 2510.08994) and our values, blank where there is none.

`paper="Table 1"` on the command line, or set by experiment=, chooses the table. Runs of the paper's models stand beside
the published row of the same model, prompts, method and tuning. Another model (the embedded one) has rows of its own
below those of its method. SJD2 is the paper's rule=paper; the exact rule has rows of its own too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.declared import declared
from sjd2.errors import unknown
from sjd2.files import write_atomically
from sweeps.comparable import groups, table_machine
from sweeps.runs import Run, path_tail
from sweeps.tables.formats import Table, csv_cells, latex, markdown
from sweeps.tables.notes import withheld_reasons
from sweeps.tables.published import Published, printed_field, read
from sweeps.tables.rows import Row, make_rows

ARXIV = "2510.08994"
METHODS = {name: name.lower() for name in ("AR", "Jacobi", "SJD", "EAGLE", "LANTERN", "ZipAR", "SJD2")}
BLANK = (
    "Blank: not printed in the paper, or not run here. Ours was measured on the machine and prompts of its run; the paper's "
    "latency and memory depend on its hardware, its FID and CLIP score on its code, networks and reference images."
)
DERIVED = {"step_compression": "steps", "latency_speedup": "latency_s"}  # published field -> what AR's is divided by it
COUNTERPART = (
    "GenEval's detector does not apply to such images. All attributes right, the share of images that show everything "
    "the caption names, is the embedded model's counterpart."
)
DERIVED_NOTE = "In parentheses: not printed; computed here from the passes or seconds of the paper's AR row."
DENOISING_ONLY = "SJD2 denoising only"
MODELS = {"lumina-mgpt (768 px)": "lumina", "emu3": "emu3", "janus-pro-1b": "janus"}
SIZES = {"lumina": ("768", "768x768"), "emu3": ("720", "720x720"), "janus": ("384",)}  # that the paper uses
DATASETS = {"COCO2017": "coco2017", "COCO2014": "coco2014", "GenEval": "geneval", "COCO subset": "coco2017"}


@dataclass(frozen=True)
class Number:
    """One number of the table: its name in table.csv, its heading, and the format of ours."""

    name: str
    title: str
    form: str

    @property
    def field(self) -> str:
        """The published number of the same meaning, '' without one."""
        return printed_field(self.name) or ""


COSTS = (
    Number("forwards_mean", "passes", ".1f"),
    Number("step_compression", "step compression", ".2f"),
    Number("latency_s_median", "latency s", ".2f"),
    Number("speedup", "speed-up", ".2f"),
)
OF_MACHINE = Number("peak_memory_gb", "memory GB", ".1f"), Number("gflops_per_token", "GFLOP/token", ".3g")
ALL_ATTRIBUTES = Number("alignment_all", "all attributes right", ".2f")  # of the embedded model alone


def numbers() -> list[Number]:
    """Return every number that the paper prints and we measure: costs, and what the metrics declare."""
    scores = [info for info in declared([]).values() if info.title and printed_field(info.name)]
    return [*COSTS, *(Number(info.name, info.title, f".{info.digits}f") for info in scores), *OF_MACHINE]


@dataclass(frozen=True)
class RunFilter:
    """Which runs correspond to a published row; None leaves a property open."""

    decoder: str | None
    tuned: bool | None
    model: str | None
    prompts: str | None

    def fits(self, run: Run, *, stand_in: bool) -> bool:
        """Return whether a run matches; stand_in: its model is not one of the paper's, so only the method counts."""
        if run.decoder.removesuffix("-paper") != self.decoder or (
            self.tuned is not None and (run.adapter is not None) != self.tuned
        ):
            return False
        if stand_in:
            return True
        prompts, model = (run.config.get("prompts") or {}).get("name"), run.config["model"]
        if self.model is None or str(model.get("size", SIZES[self.model][0])) not in SIZES[self.model]:
            return False
        if self.model == "janus" and "7b" in path_tail(str(model.get("weights"))).lower():  # the paper's is the 1B one
            return False
        return model["name"] == self.model and self.prompts in (None, prompts)


def names(rows: Sequence[Published] | None = None) -> list[str]:
    """Return the tables and figures of the paper that print numbers."""
    return list(dict.fromkeys(_name(row) for row in (read() if rows is None else rows) if row.arxiv == ARXIV))


def _name(row: Published) -> str:
    """Return 'Figure 9' for 'Figure 9a', 'Figure 6' for 'Figure 6, image 1'."""
    return row.table.partition(",")[0].rstrip("ab")


def check(table: str | None) -> None:
    """Raise `UserError` if the paper has no such table in published.csv."""
    if table is not None and table not in names():
        raise unknown("paper", table, names())


def run_filter(row: Published) -> RunFilter:
    """Return which runs correspond to a published row."""
    method = row.method.partition(" (")[0]
    decoder = "denoise" if method.startswith(DENOISING_ONLY) else METHODS.get(method)
    tuned = None
    if "not tuned" in row.method:
        tuned = False
    elif "tuned" in row.method or decoder == "sjd2":
        tuned = True
    prompts = next((ours for theirs, ours in DATASETS.items() if row.dataset.startswith(theirs)), None)
    return RunFilter(decoder, tuned, MODELS.get(row.model.lower()), prompts)


def make_paper_table(table: str, runs: Sequence[Run], out: Path) -> str:
    """Write paper.md, paper.tex and paper.csv of one table of the paper into `out`; return the Markdown.

    Raises `UserError` if the paper has no such table.
    """
    tables = paper_tables(table, runs)
    text = "\n".join(map(markdown, tables))
    out.mkdir(parents=True, exist_ok=True)
    for suffix, content in (("md", text), ("tex", "\n".join(map(latex, tables))), ("csv", csv_cells(tables))):
        write_atomically(out / f"paper.{suffix}", content.encode())
    return text


def paper_tables(table: str, runs: Sequence[Run]) -> list[Table]:
    """Return one table of the paper with our values, and another for each model that is not one of the paper's.

    Raises `UserError` if the paper has no such table.
    """
    check(table)
    published = [row for row in read() if row.arxiv == ARXIV and _name(row) == table]
    rows = [row for members in groups(runs) for row in make_rows(members, table_machine(members))]
    return [_table(table, published, rows, stand_in) for stand_in in _stand_ins(runs)]


def _stand_ins(runs: Sequence[Run]) -> list[str | None]:
    """Return None for the paper's own models, and the name of each other model among the runs."""
    others = {run.config["model"]["name"] for run in runs} - set(MODELS.values())
    own = any(run.config["model"]["name"] in MODELS.values() for run in runs)
    return [*([None] if own or not others else []), *sorted(others)]


def _table(name: str, published: Sequence[Published], rows: Sequence[Row], stand_in: str | None) -> Table:
    models = MODELS.values() if stand_in is None else (stand_in,)
    mine = [row for row in rows if row.run.config["model"]["name"] in models]
    shown = [n for n in numbers() if any(_printed(entry, n, published) for entry in published)]
    notes = [BLANK]
    if stand_in:
        shown = [n for n in numbers() if n in shown or (n in COSTS and any(_ours(row, n) for row in mine))]
        if any(number.field.startswith("geneval") for number in shown):
            shown.append(ALL_ATTRIBUTES)
            notes.append(COUNTERPART)
    found = {entry: [row for row in mine if _fits(entry, row, stand_in)] for entry in published}
    make = _rows_apart if stand_in else _rows_beside
    header, cells = make(found, shown, published)
    notes += [DERIVED_NOTE] * any(cell.startswith("(") for line in cells for cell in line)
    notes += withheld_reasons(mine)
    if unmatched := [row for row in mine if not any(row in fit for fit in found.values())]:
        who = ", ".join(map(_run, unmatched))
        notes.append(f"No published row matches {who}: another method, model, size, prompt list or tuning.")
    own = f"ours: {stand_in}, not one of the paper's models" if stand_in else "ours: the same models"
    return Table(f"SJD2 paper, {name} ({own})", header, cells, notes)


Found = Mapping[Published, Sequence[Row]]  # our runs of every published row


def _rows_beside(
    found: Found, shown: Sequence[Number], published: Sequence[Published]
) -> tuple[list[str], list[list[str]]]:
    """Return header and cells with a published and an own column for each number; the exact rule has its own rows."""
    header = ["method", "model", "prompts"]
    header += [f"{number.title}, {whose}" for number in shown for whose in ("published", "ours")] + ["ours", "source"]
    cells = []
    for entry, fit in found.items():
        same = [row for row in fit if not row.run.exact_rule]
        for row in [*(same or [None]), *(row for row in fit if row.run.exact_rule)]:
            printed = row is None or not row.run.exact_rule
            values = [
                cell
                for number in shown
                for cell in (
                    _printed(entry, number, published) if printed else "",
                    "" if row is None else _ours(row, number),
                )
            ]
            label = entry.method if row is None else _label(entry.method, row.run)
            cells.append([label, entry.model, entry.dataset, *values, "" if row is None else _who(row)])
            cells[-1].append(_source(entry) if printed else "")
    return header, cells


def _rows_apart(
    found: Found, shown: Sequence[Number], published: Sequence[Published]
) -> tuple[list[str], list[list[str]]]:
    """Return header and cells with one column for each number: a method's published rows, then ours of another model."""
    header = ["method", "model", "prompts", *(number.title for number in shown), "source"]
    cells = []
    for method in dict.fromkeys(_method(entry) for entry in published):
        entries = [entry for entry in published if _method(entry) == method]
        for entry in entries:
            values = [_printed(entry, number, published) for number in shown]
            cells.append([entry.method, entry.model, entry.dataset, *values, _source(entry)])
        for row in {id(row): row for entry in entries for row in found[entry]}.values():
            model, prompts = row.run.config["model"]["name"], _prompts(row)
            values = [_ours(row, number) for number in shown]
            cells.append([_label(method, row.run), model, prompts, *values, f"ours, {_count(row)}"])
    return header, cells


def _fits(entry: Published, row: Row, stand_in: str | None) -> bool:
    return run_filter(entry).fits(row.run, stand_in=stand_in is not None)


def _method(entry: Published) -> str:
    return entry.method.partition(" (")[0]


def _source(entry: Published) -> str:
    return f"{entry.arxiv}, {entry.table}" + (f", {entry.hardware}" if entry.hardware else "")


def _run(row: Row) -> str:
    return f"{row.run.label} ({_who(row)})"


def _who(row: Row) -> str:
    """Return what our values are of: model, adapter, prompts and number of images (and that of the scores, if different)."""
    model = row.run.config["model"]["name"] + (" with adapter" if row.run.adapter is not None else "")
    return f"{model}, {_prompts(row)}, {_count(row)}"


def _prompts(row: Row) -> str:
    return str((row.run.config.get("prompts") or {}).get("name"))


def _count(row: Row) -> str:
    return f"N={row.n}" + (f", scores of {row.scored}" if row.scored not in (0, row.n) else "")


def _label(method: str, run: Run) -> str:
    """Return the published name, with what distinguishes our run from the paper's or from others of the method."""
    words = [word for word in run.label.split()[1:] if not word.startswith("rule=")]
    if run.exact_rule:
        words.insert(0, "exact rule, lossless")
    elif run.identity["decoder"].get("rule") == "paper":
        words.insert(0, "the paper's rule, lossy")
    return f"{method} ({', '.join(words)})" if words else method


def _printed(entry: Published, number: Number, published: Sequence[Published]) -> str:
    """Return a published value as text; in parentheses if it follows from the paper's AR row; '' without one."""
    value = getattr(entry, number.field) if number.field else None
    if value is not None:
        return f"{value:g}"
    of = DERIVED.get(number.field, "")
    place = (entry.model, entry.dataset, entry.table, entry.hardware)
    ar = [e for e in published if e.method == "AR" and (e.model, e.dataset, e.table, e.hardware) == place]
    if not of or not ar or getattr(entry, of) is None or getattr(ar[0], of) is None:
        return ""
    return f"({getattr(ar[0], of) / getattr(entry, of):.3g})"


def _ours(row: Row, number: Number) -> str:
    """Return our value as text: costs from the row (timed on one machine only), scores from metrics.json."""
    costs = {
        "forwards_mean": row.passes,
        "step_compression": row.compression,
        "latency_s_median": row.latency_s,
        "speedup": row.speedup.ratio if row.speedup else None,
    }
    if number.name in row.withheld:
        return "–"
    if number.name == "peak_memory_gb" and row.latency_s is None:  # not measured on the table's machine
        return ""
    value = costs[number.name] if number.name in costs else row.metrics.get(number.name)
    if number.name == "speedup" and row.speedup is not None:
        return row.speedup.text()
    return "" if value is None else f"{float(value):{number.form}}"
