"""Tables of the SJD2 paper (arXiv 2510.08994) with our value beside every published one, blank where there is none.

`paper="Table 1"` on the command line, or set by experiment=, chooses the table. Our runs are matched by model, prompts,
decoder and whether the weights are fine-tuned. On a model that the paper does not have (the embedded one) they are
matched by decoder alone, and the heading says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sjd2.errors import unknown
from sjd2.files import write_atomically
from sweeps.comparable import groups, table_machine
from sweeps.runs import Run, path_tail
from sweeps.tables.formats import Table, csv_cells, latex, markdown
from sweeps.tables.published import Published, read
from sweeps.tables.rows import Row, make_rows

ARXIV = "2510.08994"
# published column, heading, our metric, and the format of ours
METRICS = (
    ("steps", "passes", "forwards_mean", ".1f"),
    ("step_compression", "step compression", "step_compression", ".2f"),
    ("latency_s", "latency s", "latency_s_median", ".2f"),
    ("latency_speedup", "speed-up", "speedup", ".2f"),
    ("fid", "FID", "fid", ".2f"),
    ("clip_score", "CLIP score", "clip_score", ".2f"),
    ("geneval_single_object", "single", "geneval_single_object", ".2f"),
    ("geneval_two_object", "two", "geneval_two_object", ".2f"),
    ("geneval_counting", "counting", "geneval_counting", ".2f"),
    ("geneval_colors", "colors", "geneval_colors", ".2f"),
    ("geneval_position", "position", "geneval_position", ".2f"),
    ("geneval_color_attr", "attribute", "geneval_color_attr", ".2f"),
    ("geneval_overall", "GenEval", "geneval_overall", ".2f"),
    ("memory_gb", "memory GB", "peak_memory_gb", ".1f"),
    ("gflops_per_token", "GFLOP/token", "gflops_per_token", ".3g"),
)
ALL_ATTRIBUTES = ("", "all attributes right", "alignment_all", ".2f")  # of the embedded model alone
METHODS = {name: name.lower() for name in ("AR", "Jacobi", "SJD", "EAGLE", "LANTERN", "ZipAR", "SJD2")}
BLANK = (
    "Blank: not printed in the paper, or not run here. Ours was measured on the machine and prompts of its run; the paper's "
    "latency and memory depend on its hardware, its FID and CLIP score on its code, networks and reference images."
)
DENOISING_ONLY = "SJD2 denoising only"
MODELS = {"lumina-mgpt (768 px)": "lumina", "emu3": "emu3", "janus-pro-1b": "janus"}
SIZES = {"lumina": ("768", "768x768"), "emu3": ("720", "720x720"), "janus": ("384",)}  # that the paper uses
DATASETS = {"COCO2017": "coco2017", "COCO2014": "coco2014", "GenEval": "geneval", "COCO subset": "coco2017"}


@dataclass(frozen=True)
class RunFilter:
    """Which runs correspond to a published row; None leaves a property open."""

    decoder: str | None
    tuned: bool | None
    model: str | None
    prompts: str | None

    def fits(self, run: Run, *, stand_in: bool) -> bool:
        """Return whether a run matches; stand_in: its model is not one of the paper's, so only the method counts."""
        # the paper's SJD2 is rule=paper; ours with the exact rule is listed too, and labelled
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
    mine = [row for row in rows if stand_in is None or row.run.config["model"]["name"] == stand_in]
    shown = [metric for metric in METRICS if any(getattr(row, metric[0]) is not None for row in published)]
    header = ["method", "model", "prompts"]
    notes = [BLANK]
    if stand_in and any(theirs.startswith("geneval") for theirs, *_ in shown):
        shown.append(ALL_ATTRIBUTES)
        notes.append(
            "GenEval's detector does not apply to such images. All attributes right, the share of images that show everything "
            "the caption names, is the embedded model's counterpart."
        )
    for theirs, title, _, _ in shown:
        header += [f"{title}, published"] * bool(theirs) + [f"{title}, ours"]
    header += ["ours", "source"]
    found = [(entry, [row for row in mine if _fits(entry, row, stand_in)]) for entry in published]
    cells = [line for entry, fit in found for line in _lines(entry, fit, shown, stand_in is not None)]
    own = f"ours: {stand_in}, not one of the paper's models" if stand_in else "ours: the same models"
    own_models = [row for row in mine if stand_in or row.run.config["model"]["name"] in MODELS.values()]
    unmatched = [row for row in own_models if not any(row in fit for _, fit in found)]
    if unmatched:
        who = ", ".join(map(_run, unmatched))
        notes.append(f"No published row matches {who}: another method, model, size, prompt list or tuning.")
    return Table(f"SJD2 paper, {name} ({own})", header, cells, notes)


def _run(row: Row) -> str:
    return f"{row.run.label} ({_who(row)})"


def _fits(entry: Published, row: Row, stand_in: str | None) -> bool:
    return run_filter(entry).fits(row.run, stand_in=stand_in is not None)


def _lines(
    entry: Published, found: Sequence[Row], shown: Sequence[tuple[str, str, str, str]], stand_in: bool
) -> list[list[str]]:
    """Return one line per run that corresponds to the published row, or one with blanks if there is none."""
    lines = []
    for row in found or [None]:
        values = [cell for metric in shown for cell in _pair(entry, row, metric)]
        label = entry.method if row is None else _label(entry, row.run)
        source = f"{entry.arxiv}, {entry.table}" + (f", {entry.hardware}" if entry.hardware else "")
        lines.append([label, entry.model, entry.dataset, *values, "" if row is None else _who(row, stand_in), source])
    return lines


def _who(row: Row, stand_in: bool = False) -> str:
    """Return what our values are of: model, adapter, prompts and number of images (and that of the scores, if different).

    For a model that is not one of the paper's only the method counts, so its adapter is not named.
    """
    tuned = row.run.adapter is not None and not stand_in
    model = row.run.config["model"]["name"] + (" with adapter" if tuned else "")
    scored = f", scores of {row.scored}" if row.scored not in (0, row.n) else ""
    return f"{model}, {(row.run.config.get('prompts') or {}).get('name')}, N={row.n}{scored}"


def _label(entry: Published, run: Run) -> str:
    """Return the published name, with what distinguishes our run from the paper's or from others in the row."""
    own = [] if run.label == run.decoder else [run.label]
    if run.identity["decoder"].get("rule") == "exact" and run.decoder != "denoise":  # which verifies no draft token
        own.append("rule=exact")
    return f"{entry.method} ({', '.join(own)})" if own else entry.method


def _pair(entry: Published, row: Row | None, metric: tuple[str, str, str, str]) -> list[str]:
    """Return the published value and ours as text; ours alone if no paper has such a value."""
    theirs, _, ours, form = metric
    value, mine = getattr(entry, theirs) if theirs else None, None if row is None else _ours(row, ours)
    cells = ["" if value is None else f"{value:g}", "" if mine is None else f"{mine:{form}}"]
    return cells if theirs else cells[1:]


def _ours(row: Row, name: str) -> float | None:
    """Return our value of a metric: costs from the row (timed on one machine only), scores from metrics.json."""
    costs = {
        "forwards_mean": row.passes,
        "step_compression": row.compression,
        "latency_s_median": row.latency_s,
        "speedup": row.speedup.ratio if row.speedup else None,
    }
    if name == "peak_memory_gb" and row.latency_s is None:  # not measured on the table's machine
        return None
    value = costs[name] if name in costs else row.metrics.get(name)
    return None if value is None else float(value)
