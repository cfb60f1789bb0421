"""Make the report: one HTML page of run folders that needs no network and no other file.

Its numbers are those of table.csv, which is written beside it; images are data URIs, plots are SVG, and the race
(race.py) is replayed by race.js from the traces. What cannot be drawn is listed on the page with the reason.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from omegaconf import DictConfig

from harness.console import say
from sjd2.errors import UserError, first_line
from sjd2.files import write_atomically
from sweeps.comparable import groups, table_machine
from sweeps.labels import swept
from sweeps.multirun.jobs import is_sweep, statuses
from sweeps.report.ablation import Ablation, make_ablations
from sweeps.report.cells import Grid, main_grid, plain_grid
from sweeps.report.charts import COLOURS, Dot, lines, scatter
from sweeps.report.encode import chart_uri, image_uri
from sweeps.report.gif import pace, write_gif
from sweeps.report.race import LANES, Race, in_a_row, make_race, race_json
from sweeps.report.trajectories import Trajectory, make_trajectories
from sweeps.runs import Machine, Run, chosen_folders, read_runs, with_baselines
from sweeps.tables.breakdown import breakdown_lines, breakdown_tables
from sweeps.tables.by_batch import batch_series, batch_table
from sweeps.tables.depths import depth_lines, depth_series
from sweeps.tables.figures import (
    GRID_ROWS,
    LIKELIHOOD,
    accepted_counts,
    pareto_line,
    quality_panels,
    same_seeds,
    waiting_maps,
)
from sweeps.tables.formats import failure, split_bold
from sweeps.tables.notes import notes
from sweeps.tables.paper import paper_tables
from sweeps.tables.plots import COLUMNS_MAX, pareto_front
from sweeps.tables.rows import Row, make_rows
from sweeps.tables.table import csv_row, difference_table, failed_row, published_table, title, to_csv

log = logging.getLogger(__name__)

LIMIT = 12_000_000  # bytes of the page
SIDES = (320, 224, 160, 112)  # pixels of an image; the first that keeps the page below LIMIT
LATENCY = "latency of an image, median (s)"
SHOWN = 4  # images per decoder in the suggested command for a race


@dataclass
class Section:
    """Everything the page shows of the runs of one table."""

    title: str
    rows: list[Row]
    machine: Machine | None
    main: Grid
    notes: list[str]
    tiles: list[tuple[str, str, str]] = field(default_factory=list)  # (number, meaning, run)
    differences: Grid | None = None
    published: Grid | None = None
    breakdowns: list[Grid] = field(default_factory=list)
    batches: Grid | None = None
    batch_plots: list[Markup] = field(default_factory=list)
    race: Race | None = None
    race_command: str = ""
    quality: list[Markup] = field(default_factory=list)
    quality_note: str = ""
    accepted: Markup | None = None
    depths: Markup | None = None
    ablations: list[Ablation] = field(default_factory=list)
    prompts: list[tuple[str, list[np.ndarray]]] = field(default_factory=list)  # (prompt, an image per decoder)
    grid_runs: list[tuple[int, Run]] = field(default_factory=list)
    maps: list[tuple[int, str, str, float]] = field(default_factory=list)  # (colour, label, data URI, mean)
    maps_top: float = 0.0
    trajectories: list[Trajectory] = field(default_factory=list)
    trajectory_prompt: str = ""

    @property
    def legend(self) -> list[tuple[int, str, bool]]:
        """The colour, name and losslessness of every run."""
        return [(index, row.run.label, row.run.lossless) for index, row in enumerate(self.rows)]

    @property
    def warnings(self) -> list[str]:
        return [text.removeprefix("Warning: ") for text in self.notes if text.startswith("Warning: ")]

    @property
    def explanations(self) -> list[str]:
        return [text for text in self.notes if not text.startswith("Warning: ")]


def make_report(
    run_dirs: Sequence[Path], out: Path, failed: Sequence[Mapping[str, Any]] = (), *, paper: str | None = None
) -> Path:
    """Write report.html, table.csv and, where there are traces, race.gif of these runs into `out`; return the page.

    failed: status.json of jobs without a run; they, and unreadable folders, become rows with their reason.
    paper: a table of the SJD2 paper to show beside ours.
    Raises UserError if there is neither a run nor a failed job.
    """
    runs, unreadable = read_runs(run_dirs)
    jobs = [failed_row(job) for job in failed] + unreadable
    if not runs and not jobs:
        raise UserError("no run folder here has an image; make a run with: python run.py")
    members = groups(runs, swept(failed))
    sections = [make_section(group, jobs if len(members) == 1 else []) for group in members]
    papers = [] if paper is None else [(table.title, plain_grid(table)) for table in paper_tables(paper, runs)]
    out.mkdir(parents=True, exist_ok=True)
    text, side = _fitting(sections, jobs if len(members) != 1 else [], papers)
    if len(text.encode()) > LIMIT:
        say(
            f"the page has {len(text.encode()) / 1e6:.0f} MB even with images of {side} px; report fewer runs at a time."
        )
    write_atomically(out / "report.html", text.encode())
    numbers = [csv_row(row, section.machine) for section in sections for row in section.rows]
    numbers += [{"label": label, "status": "failed", "reason": reason} for label, reason in jobs]
    write_atomically(out / "table.csv", to_csv(numbers).encode())
    for name, make in (("depths", depth_lines), ("breakdown", breakdown_lines)):
        found = [line for section in sections for line in make(section.rows, section.title)]
        write_atomically(out / f"{name}.csv", to_csv(found).encode())
    (out / "race.gif").unlink(missing_ok=True)  # left by earlier runs
    if race := next((section.race for section in sections if section.race is not None), None):
        try:
            write_gif(race, out / "race.gif")
        except Exception as error:  # the page is complete without it
            log.debug("race.gif", exc_info=True)
            say(f"skipped race.gif: {first_line(error)}")
    return out / "report.html"


# ---- the parts of one table


def make_section(group: Sequence[Run], failed: Sequence[tuple[str, str]] = ()) -> Section:
    """Collect everything the page shows of the runs of one table."""
    machine = table_machine(group)
    rows = make_rows(group, machine)
    section = Section(
        title(group[0]), rows, machine, main_grid(rows, machine, failed), notes(rows, machine, detail=True)
    )
    section.tiles = tiles(rows)
    if (differences := difference_table(rows, detail=True)) is not None:
        section.differences = plain_grid(differences)
    if (published := published_table(group)) is not None:
        section.published = plain_grid(published)
    section.ablations = make_ablations(rows)
    section.breakdowns = [plain_grid(table) for table in breakdown_tables(rows)]
    for name, part in PARTS.items():
        try:
            part(section)
        except Exception as error:  # the numbers do not wait for a part that cannot be drawn
            log.debug("%s", name, exc_info=True)
            section.notes.append(f"Warning: skipped {name}: {first_line(error)}")
    return section


def tiles(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return the headline numbers of a section, of lossless decoders only: (number, meaning, run)."""
    fair = [row for row in rows if row.run.lossless and not row.run.is_ar]
    found = []
    if fair:
        best = max(fair, key=lambda row: row.compression_all)
        error = best.compression_all_error
        ends = "" if error is None else f" [{best.compression_all - error:.2f}, {best.compression_all + error:.2f}]"
        what = "tokens per pass, passes of a draft network counted too, the most of any lossless decoder here"
        found.append((f"{best.compression_all:.2f}{ends}", what, best))
    if faster := [(row.speedup, row) for row in fair if row.speedup is not None]:
        speedup, best = max(faster, key=lambda pair: pair[0].ratio)
        stage = "" if best.whole_speedup is None else f" (AR stage; whole image {best.whole_speedup.text()})"
        found.append(
            (speedup.text(), f"the speed of AR, by the fastest lossless decoder on this hardware{stage}", best)
        )
    images = sum(row.n for row in rows)
    whole = [(f"{images:,}", f"image{'s' * (images != 1)} in {len(rows)} run{'s' * (len(rows) != 1)}", "")]
    return [(value, what, row.run.label) for value, what, row in found] + whole


def _race(section: Section) -> None:
    runs = [row.run for row in section.rows]
    section.race = make_race(runs)
    if section.race is None:
        names = list(dict.fromkeys(run.decoder for run in runs))[:LANES]
        several = len(names) > 1
        section.race_command = (
            f"python run.py {'-m ' if several else ''}model={runs[0].config['model']['name']} decoder={','.join(names)} "
            f"limit={SHOWN} trace={SHOWN} baseline=null runs_dir=runs/race\npython run.py stage=report runs_dir=runs/race"
        )


def _quality(section: Section) -> None:
    """Plot every comparable score against latency, or against passes if fewer than two runs have times."""
    costs, title = {row.run.label: row.latency_s for row in section.rows if row.latency_s is not None}, LATENCY
    timed = len(costs) > 1
    if not timed:
        costs, title = {row.run.label: row.passes for row in section.rows}, "passes per image"
    place = {row.run.label: index for index, row in enumerate(section.rows)}
    panels = quality_panels([row for row in section.rows if row.run.label in costs])
    for name, (points, lower) in panels.items():
        dots = {
            p.label: Dot(p.label, costs[p.label], p.quality, place[p.label], not p.lossless, p.error) for p in points
        }
        best = []
        if lower is not None and timed:
            best = [dots[point.label] for point in pareto_front(points, lower_is_better=lower)]
        arrow = {True: " (lower is better)", False: " (higher is better)", None: ""}[lower]
        section.quality.append(
            scatter(list(dots.values()), title, name + arrow, front=best, level=0.0 if lower is None else None)
        )
    if LIKELIHOOD in panels:
        section.quality_note = "A lossless decoder's interval should include zero; neither side of zero is better."
    elif panels and timed:
        line = pareto_line(panels)
        section.quality_note = f"{line[0].upper()}{line[1:]}."


def _accepted(section: Section) -> None:
    series = {}
    for index, row in enumerate(section.rows):
        counts = accepted_counts(row.run)
        if row.run.is_ar or not counts:  # only a prefill: nothing to count
            continue
        total = sum(counts.values())
        shares = [(float(k), sum(counts[j] for j in counts if j >= k) / total) for k in sorted(counts)]
        series[row.run.label] = (index, shares)
    if series:
        section.accepted = lines(series, "tokens committed by a pass, at least", "share of passes", log=True)


def _depths(section: Section) -> None:
    place = {row.run.label: index for index, row in enumerate(section.rows)}
    series = {label: (place[label], rates) for label, rates in depth_series(section.rows).items()}
    if series:
        section.depths = lines(series, "depth of the draft token in its pass", "acceptance probability")


def _batches(section: Section) -> None:
    if (table := batch_table(section.rows)) is not None:
        section.batches = plain_grid(table)
        for series, x, y in batch_series(section.rows):
            section.batch_plots.append(lines({n: (i, p) for i, (n, p) in enumerate(series.items())}, x, y))


def _images(section: Section) -> None:
    place = {id(row.run): index for index, row in enumerate(section.rows)}
    runs, ids = same_seeds([row.run for row in section.rows])
    runs, ids = runs[:COLUMNS_MAX], ids[:GRID_ROWS]
    if not runs:  # tokens without images
        return
    columns = [list(run.folder.images(ids)) for run in runs]
    section.grid_runs = [(place[id(run)], run) for run in runs]
    section.prompts = [
        (runs[0].images[key].prompt, list(line)) for key, line in zip(ids, zip(*columns, strict=True), strict=True)
    ]


def _maps(section: Section) -> None:
    if (found := waiting_maps(section.rows)) is None:
        return
    maps, layout = found
    place = {row.run.label: index for index, row in enumerate(section.rows)}
    shown = np.asarray(layout.shown)
    section.maps_top = max(0.01, *(float(values[shown].max()) for values in maps.values()))
    for label, values in maps.items():
        shape = values[shown].reshape(layout.rows, layout.columns)
        colours = matplotlib.colormaps["viridis"](shape / section.maps_top, bytes=True)
        section.maps.append((place[label], label, chart_uri(colours), float(shape.mean())))


def _trajectories(section: Section) -> None:
    runs = [row.run for row in section.rows]
    section.trajectories, key = make_trajectories(runs)
    if key is not None:
        section.trajectory_prompt = section.trajectories[0].run.images[key].prompt


PARTS: dict[str, Callable[[Section], None]] = {
    "the race": _race,
    "quality": _quality,
    "committed tokens": _accepted,
    "acceptance by depth": _depths,
    "batch sizes": _batches,
    "images": _images,
    "acceptance maps": _maps,
    "token trajectories": _trajectories,
}


# ---- the page


def _fitting(
    sections: Sequence[Section], failed: Sequence[tuple[str, str]], papers: Sequence[tuple[str, Grid]]
) -> tuple[str, int]:
    """Render the page with images as large as LIMIT allows; return the text and the images' side."""
    for side in SIDES[:-1]:
        text = render_page(sections, failed, papers, side)
        if len(text.encode()) <= LIMIT:
            return text, side
    return render_page(sections, failed, papers, SIDES[-1]), SIDES[-1]


def render_page(
    sections: Sequence[Section], failed: Sequence[tuple[str, str]], papers: Sequence[tuple[str, Grid]], side: int
) -> str:
    """Return the page as text; prompts, labels and reasons are escaped by the template."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["image_uri"] = lambda image: image_uri(image, side)
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    environment.filters["bold"] = _bold
    environment.filters["failure"] = failure
    files = {
        name: Markup((Path(__file__).parent / name).read_text(encoding="utf-8"))
        for name in ("page.css", "race.js", "table.js")
    }
    return environment.get_template("page.html").render(
        sections=sections,
        races=[None if section.race is None else race_json(section.race, side) for section in sections],
        paces=[_pace(section.race) for section in sections],
        failed=failed,
        papers=papers,
        made=time.strftime("%Y-%m-%d %H:%M"),
        colours=COLOURS,
        across=in_a_row,
        style=files["page.css"],
        scripts=[files["race.js"], files["table.js"]],
    )


def _bold(text: str) -> Markup:
    """Return a note with the `**words**` at its beginning bold, all else escaped."""
    bold, rest = split_bold(text)
    return Markup("<b>{}</b>{}" if bold else "{}{}").format(bold, rest)


def _pace(race: Race | None) -> float:
    """Return the pace at which the race starts, within the range of the page's slider."""
    if race is None:
        return 1.0
    longest = max(heat.seconds[-1] for lane in race.lanes for heat in lane.heats.values())
    return min(max(pace(longest), 0.1), 10.0)


def stage(cfg: DictConfig) -> Path:
    """Run stage=report on every run folder of runs_dir, on run_dir and its AR run, or on the multirun run_dir names.

    Returns the folder of report.html.
    """
    if cfg.run_dir is not None and is_sweep(Path(cfg.run_dir)):
        out = Path(cfg.run_dir)
        jobs = statuses(out)
        failed = [job for job in jobs if job["status"] != "ok"]
        runs = with_baselines([Path(job["run_dir"]) for job in jobs if job["status"] == "ok" and job.get("run_dir")])
    else:
        out = Path(cfg.runs_dir) / "tables" / (Path(cfg.run_dir).resolve().name if cfg.run_dir else "all")
        runs, failed = chosen_folders(cfg.runs_dir, cfg.run_dir), []
    say(f"report: {make_report(runs, out, failed, paper=cfg.paper)}")
    return out
