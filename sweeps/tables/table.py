"""Make tables of run folders, one per model, prompts and sampling parameters: table.md, .tex, .csv, .json, and plots.

Beside them: depths.csv, the acceptance by depth; breakdown.csv, the step compression by groups of prompts.

What a metric measured stands under the heading that the metric declares (`MetricInfo`, evaluation/score.py), so a new
metric needs no line here. What follows from records, times and AR is one line in `columns` (for readers) and one in
`csv_row` (for programs).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from evaluation.declared import declared
from evaluation.score import MetricInfo
from sjd2.errors import UserError
from sjd2.files import write_atomically
from sweeps.comparable import groups, table_machine
from sweeps.labels import swept
from sweeps.runs import Machine, Part, Run, chosen_folders, only, read_runs, with_baselines
from sweeps.speedup import SpeedUp
from sweeps.tables.breakdown import breakdown_lines, breakdown_tables
from sweeps.tables.by_batch import batch_table
from sweeps.tables.depths import depth_lines
from sweeps.tables.formats import Table, latex, markdown
from sweeps.tables.latency import FEWEST
from sweeps.tables.notes import has_forced_tokens, notes, shared_value
from sweeps.tables.paper import make_paper_table
from sweeps.tables.published import Published, select
from sweeps.tables.rows import FEWEST_PROMPTS, Row, make_rows
from sweeps.tables.terminal import AR_STAGE, show

if TYPE_CHECKING:
    from evaluation.statistics import Difference

__all__ = ["make_tables", "show", "with_baselines"]


@dataclass(frozen=True)
class Column:
    """One column for readers: `text` returns the cell, '' without a value; a column without any value is left out.

    key: the column of the CSV that holds its number, by which a report sorts and which it can show unrounded. detail: it
    is in the report and with columns=all only.
    """

    title: str
    text: Callable[[Row], str]
    key: str = ""
    always: bool = False
    detail: bool = False


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _significant(value: float | None, digits: int = 3) -> str:
    """Return a number with `digits` significant digits and no exponent."""
    if value is None:
        return ""
    text = f"{value:.{digits}g}"
    return f"{float(text):f}".rstrip("0").rstrip(".") if "e" in text else text


def _compression(row: Row, with_free: bool) -> str:
    error = f" ± {row.compression_error:.2f}" if row.compression_error else ""
    free = f" ({row.compression_free:.2f})" if with_free and row.compression_free is not None else ""
    return f"{row.compression:.2f}{error}{free}"


def _passes(row: Row) -> str:
    return f"{row.passes:.1f}" + (f" + {row.draft_passes:.1f} draft" if row.draft_passes else "")


def _latency(row: Row) -> str:
    error = f" ± {_significant(row.latency_error_s, 2)}" if row.latency_error_s else ""
    return f"{_significant(row.latency_s)}{error}"


def _speedup(row: Row, speedup: SpeedUp | None) -> str:
    return speedup.text("†" * row.other_adapter) if speedup else "–" * bool(row.speedup_missing)


def _nll(row: Row) -> str:
    text, gap = _number(row.nll_per_token, 3) or "–", row.nll_difference
    return f"{text} ({_difference(gap)})" if gap else text


def _difference(gap: Difference) -> str:
    return gap.with_interval(3) if gap.prompts >= FEWEST_PROMPTS else f"{gap.mean:+.3f} [–]"


def _percentile(share: int) -> Column:
    def text(row: Row) -> str:
        return _significant(row.latency_percentiles.get(share)) if row.timed >= FEWEST[share] else "–" * bool(row.timed)

    return Column(f"p{share} s", text, f"latency_s_p{share}", detail=True)


def columns(rows: Sequence[Row], *, detail: bool = False) -> list[Column]:
    """Return the columns of a table: what follows from records, times and AR, then what metrics declare.

    detail: also those that a report shows beside the usual ones.
    """
    forced, metered = has_forced_tokens(rows), any(row.energy_j is not None for row in rows)
    stages = any(row.whole_s is not None for row in rows)
    found = [
        Column("decoder", lambda row: row.run.label, "label", always=True),
        Column("lossless", lambda row: "yes" if row.run.lossless else "**lossy**", "lossless", always=True),
        Column("N", lambda row: str(row.n), "n", always=True),
        Column("batch", lambda row: str(row.run.setting("batch_size")), "batch_size", always=True),
        Column("passes", _passes, "forwards_mean", always=True),
        Column("step compression", lambda row: _compression(row, forced), "step_compression", always=True),
        Column(AR_STAGE["latency s"] if stages else "latency s", _latency, "latency_s_median", always=True),
        Column(
            AR_STAGE["speed-up"] if stages else "speed-up",
            lambda row: _speedup(row, row.speedup),
            "speedup",
            always=True,
        ),
        Column("diffusion s", lambda row: _significant(row.diffusion_s), "diffusion_s_median"),
        Column("whole image s", lambda row: _significant(row.whole_s), "whole_latency_s_median"),
        Column("whole speed-up", lambda row: _speedup(row, row.whole_speedup) * stages, "whole_speedup"),
        Column("images/s", lambda row: _significant(row.images_per_s), "images_per_s"),
        Column("NLL/token (Δ to AR)", _nll, "nll_per_token"),
        *_declared_columns(rows),
        Column("accept rate", lambda row: _number(row.accept_rate, 3), "accept_rate", detail=True),
        Column("accept length", lambda row: _number(row.accept_length, 2), "accept_length", detail=True),
        *(_percentile(share) for share in (95, 99)),
        Column("first row s", lambda row: _significant(row.first_row_s), "first_row_s_median", detail=True),
        Column("J/image", lambda row: _significant(row.energy_j) or "–" * metered, "energy_j_mean", detail=True),
    ]
    found = [column for column in found if detail or not column.detail]
    return [column for column in found if column.always or any(column.text(row) for row in rows)]


def _declared_columns(rows: Sequence[Row]) -> list[Column]:
    """Return a column for each number that its metric gave a title, one for each group of numbers."""
    titled = [info for info in declared(row.run.folder for row in rows).values() if info.title]
    groups: dict[str, list[MetricInfo]] = {}
    for info in titled:
        groups.setdefault(info.group or info.name, []).append(info)
    return [_group_column(infos) if infos[0].group else _number_column(infos[0], rows) for infos in groups.values()]


def _number_column(info: MetricInfo, rows: Sequence[Row]) -> Column:
    """Return the column of one number; what produced it stands in the heading where all rows agree on it."""
    shared = re.sub(r" [0-9a-f]+$", "", shared_value(rows, info.source))  # without the weights' digest
    named = info.source if info.source_in_cells and not shared else ""  # names it in the cells

    def text(row: Row) -> str:
        """Return the value with its spread, and with its own N where that is not the row's."""
        value, spread = row.metrics.get(info.name), row.metrics.get(info.spread)
        if info.name in row.withheld:
            return "–"
        if value is None:
            return ""
        words = [f"{value:.{info.digits}f}"]
        words += [f"± {spread:.{info.digits}f}"] if spread is not None else []
        words += [f"(N={row.scored})"] if row.scored != row.n else []
        words += [f"({row.metrics[named]})"] if named in row.metrics else []
        return " ".join(words)

    heading = " ".join(filter(None, (info.title, shared and f"({shared})", _arrow(info))))
    return Column(heading, text, info.name, detail=info.detail)


def _group_column(infos: Sequence[MetricInfo]) -> Column:
    """Return the one column of the numbers of a group."""

    def text(row: Row) -> str:
        found = [_number(row.metrics.get(info.name), info.digits) for info in infos]
        return " / ".join(cell or "–" for cell in found) if any(found) else ""

    titles = ", ".join(info.title for info in infos)
    return Column(" ".join(filter(None, (f"{infos[0].group}: {titles}", _arrow(infos[0])))), text)


def _arrow(info: MetricInfo) -> str:
    return {True: "↑", False: "↓", None: ""}[info.higher_is_better]


# ---- tables


def title(run: Run) -> str:
    """Return what the runs of a table have in common, as a heading."""
    model, prompts = run.config["model"], run.config.get("prompts") or {}
    sampling = {key: value for key, value in run.sampling if not (key == "top_k" and value == 0)}
    name = " ".join(str(model[key]) for key in ("name", "size") if model.get(key) is not None)
    name += "" if run.drawn else ", tokens only,"
    words = ", ".join(f"{key}={value}" for key, value in sampling.items())
    return f"{name} on {prompts.get('name', 'prompts')} ({words})"


def main_table(rows: Sequence[Row], machine: Machine | None, *, detail: bool = False) -> Table:
    """Return the table of one group; detail: with the columns of `columns=all`."""
    shown = columns(rows, detail=detail)
    cells = [[column.text(row) for column in shown] for row in rows]
    return Table(title(rows[0].run), [column.title for column in shown], cells, notes(rows, machine, detail=detail))


def difference_table(rows: Sequence[Row], *, detail: bool = False) -> Table | None:
    """Return the paired differences in scores to AR; None if no run has one. detail: of all scores."""
    known = declared(row.run.folder for row in rows)
    names = [n for n, i in known.items() if (detail or not i.detail) and any(n in row.differences for row in rows)]
    if not names:
        return None
    cells = []
    for row in rows:
        if row.differences:
            gaps = [row.differences.get(name) for name in names]
            texts = [_difference(gap) if gap else "" for gap in gaps]
            cells.append([row.run.label, str(row.reference_images), *texts])
    header = ["difference to AR (95 %)", "images in both", *names]
    return Table("", header, cells)


def published_table(runs: Sequence[Run]) -> Table | None:
    """Return the published numbers of this model and these decoders; None if there are none."""
    model = str(runs[0].config["model"]["name"])
    found = select(model, {run.decoder for run in runs})
    header = [
        "published",
        "model",
        "prompts",
        "passes",
        "step compression",
        "latency s",
        "speed-up",
        "FID",
        "CLIP",
        "GenEval",
    ]
    header += ["hardware", "source"]
    note = (
        "Hardware, FID libraries, captions and prompt sets differ from ours, and partly among the papers: context, not "
        "rows to subtract from. CLIP scores as printed, some divided by 100. Taken from the paper itself unless the "
        "source says note or uncertain."
    )
    return Table(f"{model}: published", header, [_published_row(row) for row in found], [note]) if found else None


def _published_row(row: Published) -> list[str]:
    def text(value: float | None) -> str:
        return "" if value is None else f"{value:g}"

    source = f"{row.arxiv or row.paper}, {row.table}" + ("" if row.confidence == "paper" else f" ({row.confidence})")
    speed = f"{row.latency_speedup:g}×" if row.latency_speedup is not None else ""
    costs = [text(row.steps), text(row.step_compression), text(row.latency_s), speed]
    scores = [text(row.fid), text(row.clip_score), text(row.geneval_overall)]
    return [row.method, row.model, row.dataset, *costs, *scores, row.hardware, source]


def csv_row(row: Row, machine: Machine | None) -> dict[str, Any]:
    """Return every number of a row under its own name, unrounded; what a run does not have is absent."""
    run, gap = row.run, row.nll_difference
    values: dict[str, Any] = {
        "table": title(run),
        "label": run.label,
        "status": "ok",
        "decoder": run.decoder,
        "lossless": run.lossless,
        "window": run.identity["decoder"].get("window"),
        "n": row.n,
        "batch_size": run.setting("batch_size"),
        "dtype": run.setting("dtype"),
        "forwards_mean": row.passes,
        "draft_forwards_mean": row.draft_passes,
        "step_compression": row.compression,
        "step_compression_se": row.compression_error,
        "hardware": machine[0] if machine and row.timed else None,
        "threads": machine[1] if machine and row.timed else None,
        "n_timed": row.timed,
        "n_timings": row.timings,
        "latency_s_median": row.latency_s,
        "latency_s_std": row.latency_error_s,
        "latency_s_p95": row.latency_percentiles.get(95),
        "latency_s_p99": row.latency_percentiles.get(99) if row.timed >= FEWEST[99] else None,
        "first_row_s_median": row.first_row_s,
        "images_per_s": row.images_per_s,
        "energy_j_mean": row.energy_j,
        "accept_rate": row.accept_rate,
        "accept_length": row.accept_length,
        **speedup_numbers(row.speedup),
        "diffusion_s_median": row.diffusion_s,
        "whole_latency_s_median": row.whole_s,
        **speedup_numbers(row.whole_speedup, "whole_"),
        "nll_per_token": row.nll_per_token,
    }
    differences = [("nll_per_token", gap)] if gap else []
    for name, difference in differences + list(row.differences.items()):
        ends = {f"{name}_low": difference.low, f"{name}_high": difference.high}
        values |= {f"{name}_difference": difference.mean, **ends}
    values |= {"n_compared": row.reference_images or None, "n_scored": row.scored}
    scores = {key: value for key, value in row.metrics.items() if isinstance(value, (int, float, str))}
    if machine is None or scores.get("hardware") != machine[0]:
        foreign = {info.name for info in declared([run.folder]).values() if info.of_machine}
        scores = {key: value for key, value in scores.items() if key not in foreign}
    values |= {key: value for key, value in scores.items() if key not in values}
    values |= {"id": run.identity["id"], "run_dir": run.path.name}
    return {key: value for key, value in values.items() if value is not None and key != "n_images"}


def speedup_numbers(speedup: SpeedUp | None, prefix: str = "") -> dict[str, Any]:
    """Return a speed-up, its 95 % interval and what it rests on under the names of the CSV; {} where there is none.

    prefix: before each name, "whole_" for the speed-up of whole images.
    """
    if speedup is None:
        return {}
    ends = {"speedup_low": speedup.low, "speedup_high": speedup.high}
    counts = {"speedup_images": speedup.images, "speedup_timings": speedup.timings}
    found = {"speedup": speedup.ratio, **ends, **counts, "speedup_in_turns": speedup.paired}
    return {f"{prefix}{name}": value for name, value in found.items()}


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV with the union of their columns, in the order of their first appearance."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


# ---- failed jobs


def failed_row(job: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name of a failed job, in the form of a run's label, and its reason."""
    overrides = [str(text).lstrip("+") for text in job.get("overrides") or ()]
    decoder = [text.partition("=")[2] for text in overrides if text.startswith("decoder=")]
    others = [text.removeprefix("decoder.") for text in overrides if not text.startswith("decoder=")]
    return " ".join([*decoder, *others]) or "job", " ".join(str(job.get("reason") or "unknown reason").split())


def make_tables(
    run_dirs: Sequence[Path],
    out: Path,
    failed: Sequence[Mapping[str, Any]] = (),
    *,
    published: bool = False,
    paper: str | None = None,
    parts: Mapping[Path, Part] | None = None,
    detail: bool = False,
) -> str:
    """Write table.md, .tex, .csv, .json and the plots of these runs into `out`; return the Markdown.

    failed: status.json of jobs without a run; they, and unreadable folders, become rows with their reason.
    published: add the published numbers of the same model. paper: also write this table of the SJD2 paper beside ours.
    parts: of run folders of which the table shows some images only. detail: all columns, and all tables of the report.
    Raises UserError if there is neither a run nor a failed job.
    """
    from sweeps.tables.figures import draw_plots

    runs, unreadable = read_runs(run_dirs)
    known = {path.resolve(): part for path, part in (parts or {}).items()}
    runs = [only(run, *known[run.path]) if run.path in known else run for run in runs]
    jobs = [failed_row(job) for job in failed] + unreadable
    if not runs and not jobs:
        raise UserError("no run folder here has an image; make a run with: python run.py")
    out.mkdir(parents=True, exist_ok=True)
    tables: list[Table] = []
    lines: dict[str, list[dict[str, Any]]] = {"table": [], "depths": [], "breakdown": []}  # by the name of their CSV
    members = groups(runs, swept(failed))
    for index, group in enumerate(members):
        machine = table_machine(group)
        rows = make_rows(group, machine)
        table = main_table(rows, machine, detail=detail)
        plots = draw_plots(rows, out, suffix="" if index == 0 else f"-{index + 1}", title=table.title)
        table.plots, table.notes = plots.files, table.notes + plots.notes
        beside = published_table(group) if published else None
        if published and beside is None and paper is None:
            table.notes.append("sweeps/tables/published.csv has no numbers for this model with these decoders.")
        found = (table, batch_table(rows), difference_table(rows, detail=detail), beside)
        tables += [one for one in found if one is not None]
        tables += breakdown_tables(rows) if detail else []
        lines["table"] += [csv_row(row, machine) for row in rows]
        lines["depths"] += depth_lines(rows, table.title)
        lines["breakdown"] += breakdown_lines(rows, table.title)
    if jobs and len(members) == 1:
        tables[0].failed = jobs
    elif jobs:
        tables.append(Table("Failed", ["job", "reason"], [], failed=jobs))
    lines["table"] += [{"label": label, "status": "failed", "reason": reason} for label, reason in jobs]
    text = "\n".join(markdown(table) for table in tables)
    numbers = json.dumps(lines["table"], indent=1, ensure_ascii=False) + "\n"
    written = {"table.md": text, "table.tex": "\n".join(map(latex, tables)), "table.json": numbers}
    for name, content in (written | {f"{name}.csv": to_csv(rows) for name, rows in lines.items()}).items():
        write_atomically(out / name, content.encode())
    return text if paper is None else f"{text}\n{make_paper_table(paper, runs, out)}"


def stage(cfg: DictConfig) -> Path:
    """Run stage=table on every run folder of runs_dir, or on run_dir and its AR run; return the folder written to."""
    out = Path(cfg.runs_dir) / "tables" / (Path(cfg.run_dir).resolve().name if cfg.run_dir else "all")
    settings = {"published": True, "paper": cfg.paper, "detail": cfg.get("columns") == "all"}
    text = make_tables(chosen_folders(cfg.runs_dir, cfg.run_dir), out, **settings)
    show(text, out / "table.md", cfg.output)
    return out
