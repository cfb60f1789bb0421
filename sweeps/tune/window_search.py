"""stage=tune tune=window: predict tokens per second of each window on this machine and batch size, and check the best ones.

Nothing is made twice: the runs are ordinary run folders, and the costs of passes stand in passes.json with the machine.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from evaluation.bootstrap import Interval, median_of_ratios
from evaluation.metrics.speed import Speed
from evaluation.run_folder import Record, RunFolder, record_id
from evaluation.timings import disturbance
from harness import job
from harness.console import say, sentence
from harness.plan import Plan, make_plan
from harness.provenance import git_commit, hardware
from sjd2.config import instantiate
from sjd2.decoding.pass_cost import pass_seconds
from sjd2.errors import UserError
from sjd2.files import read_json, write_atomically
from sjd2.locks import lock
from sweeps.tables.formats import Table, markdown
from sweeps.tables.terminal import show
from sweeps.tune.study import write_decoder
from sweeps.tune.trials import TrialRuns
from sweeps.tune.window_prediction import (
    NARROW,
    Acceptance,
    Counts,
    TuneWindow,
    WindowRow,
    batch_overhead,
    predicted_passes,
)

COSTS = "passes.json"
LEVEL = 0.95  # of all intervals together


class WindowSearch(TrialRuns):
    """One search: the command's decoder at several widths, on the command's batch size."""

    tune: TuneWindow

    def __init__(self, cfg: DictConfig, tune: TuneWindow, out: Path) -> None:
        super().__init__(cfg, tune, {}, out)
        self.own = check_decoder(cfg)
        self.rows = cfg.batch_size
        self.images, self.finals = tune.whole_batches(self.rows)
        total = len(instantiate(cfg.prompts).texts)
        if self.images + self.finals > total:
            raise UserError(
                f"tune=window runs {self.images} + {self.finals} captions at batch_size={self.rows}, but prompts="
                f"{cfg.prompts.name} has {total}; take a longer list, or less of batch_size, tune.images or tune.finals."
            )
        last = cfg.prompts.get("skip", 0) + total - self.images
        self.captions, self.final_captions = [f"prompts.skip={last}"], [f"prompts.skip={last - self.finals}"]

    def run(self) -> Path:
        """Measure, predict, check, and write windows.csv, windows.md and the best window as a decoder yaml."""
        with lock(self.out / ".lock", what="search folder"):
            return self._run()

    def _run(self) -> Path:
        cfgs, plans = self.widths()
        wide, narrow = max(plans), min(plans, key=lambda width: (abs(width - NARROW), width))
        layout = plans[wide].spec.layout
        free = float(layout.free.double().mean())
        records = {width: self.short_run(cfgs[width], width) for width in (wide, narrow)}
        counts = [Counts.of(found, depth=plans[w].decoder.lookahead, free=free) for w, found in records.items()]
        found = Acceptance.fit(counts[0], counts[-1], length=layout.length, free=free)
        spread, prefill = batch_overhead(records[wide], refill=self.cfg.refill)
        plans = {1: make_plan(self.compose(*self.captions, decoder="ar")), **plans}
        rows = []
        for width, pass_s in self.costs(dict(plans)).items():
            depth = plans[width].decoder.lookahead
            passes = predicted_passes(found, depth, layout.length)
            seconds = prefill + passes * (spread if depth else 1) * pass_s  # AR's rows end together
            rows.append(WindowRow(width, depth, pass_s, passes, self.rows * layout.length / seconds))
        fastest = max(rows, key=lambda row: row.rate)
        say(f"tune: predicted to be fastest: window {fastest.width}, {fastest.rate:.4g} tokens per second")
        best = sorted((row for row in rows if row.width > 1), key=lambda row: -row.rate)[: self.tune.checked]
        self.check([row for row in rows if row in best or row.width == self.own], cfgs)
        self.report(rows, plans[wide])
        return self.recommend(rows, cfgs, plans)

    # ---- what is measured

    def short_run(self, cfg: DictConfig, width: int) -> list[Record]:
        """Return the records of the short run at a width."""
        say(f"tune: {self.images} images at window {width}, for how often draft tokens are accepted")
        run = self.make(cfg, self.images, {"speed": Speed()})
        wanted = make_plan(cfg).prompts.ids(self.images)
        return [record for record in run.records() if record_id(record) in wanted]

    def widths(self) -> tuple[dict[int, DictConfig], dict[int, Plan]]:
        """Return the settings and plans of the widths that fit decoder and image; the others are named."""
        cfgs, plans = {}, {}
        for width in sorted({*self.tune.widths, self.own}):
            cfg = self.compose(f"decoder.window={width}", *self.captions)
            try:
                plan = make_plan(cfg)
                plan.decoder.check_window(plan.spec.layout.length)
            except UserError as error:
                if width == self.own:
                    raise
                say(f"tune: window {width} is left out: {sentence(error)}")
                continue
            cfgs[width], plans[width] = cfg, plan
        if len({plan.decoder.lookahead for plan in plans.values()}) < 2:
            raise UserError(
                f"tune=window needs windows that differ in reach, but decoder={self.cfg.decoder.name} drafts "
                f"{plans[self.own].decoder.lookahead} positions ahead at any of tune.widths; take one that drafts a chain, "
                "e.g. decoder=scd, or other tune.widths."
            )
        return cfgs, plans

    def costs(self, plans: dict[int, Plan]) -> dict[int, float]:
        """Return the seconds of a pass of each width: the median over rounds, in which the widths take turns.

        A width that does not fit into the memory is left out.
        """
        file, known = self.out / COSTS, read_json(self.out / COSTS, {})
        condition: Any = None
        graphs = job.recorder(self.cfg, plans[max(plans)])
        for number in range(self.tune.rounds):
            for width, plan in list(plans.items()):
                key = f"{plan.identity['id']} {self.machine(plan)}"
                found = known.setdefault(key, [])
                if len(found) > number:
                    continue
                model = self.models.load(plan)
                if condition is None:
                    with torch.inference_mode():
                        condition = model.encode(plan.prompts.texts[: self.rows])
                try:
                    found.append(
                        pass_seconds(
                            model, plan.decoder, condition, sampling=plan.sampling, passes=self.tune.passes,
                            graphs=graphs,
                        )
                    )  # fmt: skip
                except torch.OutOfMemoryError as error:
                    say(f"tune: window {width} is left out: {sentence(error)}")
                    del plans[width]
                    continue
                write_atomically(file, json.dumps(known, indent=1).encode())
            say(f"tune: passes of {len(plans)} widths measured, round {number + 1} of {self.tune.rounds}")
        return {w: statistics.median(known[f"{p.identity['id']} {self.machine(p)}"]) for w, p in plans.items()}

    def machine(self, plan: Plan) -> str:
        """Return what a pass' seconds belong to, beside the run's settings."""
        runtime = self.cfg.runtime
        ways = f"graph={runtime.graph}, fused={runtime.fused}, compile={runtime.compile}"
        return f"{hardware(torch.device(plan.device))}, {ways}, torch {torch.__version__}, commit {git_commit()}"

    def check(self, rows: Sequence[WindowRow], cfgs: dict[int, DictConfig]) -> None:
        """Run widths in turns on captions that nothing was predicted from, and note what they measure."""
        say(f"tune: windows {', '.join(str(row.width) for row in rows)} in turns, {self.finals} other images each")
        made = self.in_turns(
            [self.compose(f"decoder.window={row.width}", *self.final_captions) for row in rows], self.finals
        )
        batches = {}
        for row, run in zip(rows, made, strict=True):
            if isinstance(run, str):
                say(f"tune: window {row.width} could not be run: {run}")
                continue
            batches[row.width] = self.latencies(run)
            seconds = statistics.median(batches[row.width].values())
            row.measured = self.rows * run.records()[0]["tokens"] / seconds
            row.disturbed = disturbance(run.provenance())
            row.measured_passes = statistics.fmean(record["forwards"] - 1 for record in run.records()[: self.finals])
        own, level = batches.get(self.own, {}), 1 - (1 - LEVEL) / max(1, len(batches) - 1)
        for row in rows if own else ():
            if row.width != self.own and row.width in batches:
                pairs = [(seconds, own[key], 1) for key, seconds in batches[row.width].items()]
                row.against_own = median_of_ratios(pairs, level=level)

    def latencies(self, run: RunFolder) -> dict[int, float]:
        """Return the seconds of each batch of a run; raises UserError where they are those of two machines."""
        machines = {(entry.get("hardware"), entry.get("threads")) for entry in run.provenance() if "hardware" in entry}
        if len(machines) > 1:
            raise UserError(f"{run.path} was timed on two machines; choose another tune.name.")
        records: list[Record] = run.records()[: self.finals]
        return {record["batch"]: record["seconds"]["prefill"] + record["seconds"]["decode"] for record in records}

    # ---- what is reported

    def report(self, rows: Sequence[WindowRow], plan: Plan) -> None:
        """Print the table of all widths and write it."""
        text = markdown(self.table(rows, plan))
        write_atomically(self.out / "windows.md", (text + "\n").encode())
        write_atomically(self.out / "windows.csv", _csv(rows).encode())
        show(text, self.out / "windows.md", self.cfg.output)

    def table(self, rows: Sequence[WindowRow], plan: Plan) -> Table:
        """Return predicted and measured tokens per second of all widths for readers."""
        header = (
            "window",
            "tokens per pass (measured)",
            "pass, ms",
            "tokens/s predicted",
            "tokens/s measured",
            "error",
            "time to own",
        )
        length = plan.spec.layout.length
        cells = []
        for row in rows:
            name = "1 (AR)" if row.width == 1 else f"{row.width} (own)" if row.width == self.own else str(row.width)
            measured = (
                ("–", "–") if row.measured is None else (f"{row.measured:.4g}", f"{100 * (row.error or 0):+.1f} %")
            )
            against = "–" if row.against_own is None else _interval(row.against_own)
            tokens = f"{(length - 1) / row.passes:.2f}"
            if row.measured_passes is not None:
                tokens += f" ({(length - 1) / row.measured_passes:.2f})"
            cells.append((name, tokens, f"{1e3 * row.pass_s:.2f}", f"{row.rate:.4g}", *measured, against))
        tune, batches, refilled = self.tune, self.finals // self.rows, ", refilled" if self.cfg.refill else ""
        where = f"{hardware(torch.device(plan.device))}, {plan.dtype}, batch size {self.rows}{refilled}"
        cost = f"cost of a pass: {tune.rounds} rounds of {tune.passes} passes in the middle of an image"
        accepted = f"acceptance: {self.images} images each at a wide and a narrow window"
        pairs = f"time to own: median of the ratios of {batches} pairs of batches, intervals of {LEVEL:.0%} together"
        notes = [f"{where}; {cost}; {accepted}.", f"Measured: {self.finals} other images, in turns; {pairs}."]
        notes += [
            f"Warning: timings of window {row.width} are inflated: the process {row.disturbed}."
            for row in rows
            if row.disturbed
        ]
        return Table(f"Windows of {self.cfg.decoder.name} on {plan.spec.name}", header, cells, notes)

    def recommend(self, rows: Sequence[WindowRow], cfgs: dict[int, DictConfig], plans: dict[int, Plan]) -> Path:
        """Write the fastest window that was run as a decoder, if on a quiet machine it beats the own one beyond noise."""
        run = [(row.against_own, row.width) for row in rows if row.against_own is not None]
        (value, low, high), width = min(run, default=((1.0, None, None), self.own))
        ar = next((row for row in rows if row.width == 1), None)
        if ar is not None and ar.rate > max(row.rate for row in rows if row.width > 1):
            say(f"AR is predicted to be faster than every window at batch size {self.rows}: decoder=ar.")
        if high is None or high >= 1:
            say(f"no better than your window: none is faster than {self.own} beyond noise.")
            return self.out
        if any(row.disturbed for row in rows):
            say(
                f"window {width} looks best, but timings are inflated: remove {self.out} and search on a quiet machine."
            )
            return self.out
        where, name = hardware(torch.device(plans[width].device)), f"{self.cfg.decoder.name}-b{self.rows}"
        words = f"window {width} for {where}, model {plans[width].spec.name}, batch_size={self.rows}"
        file = write_decoder(cfgs[width], self.out, name=name, found=words)
        say(f"best window: {width}, {_interval((value, low, high))} of the time with {self.own}")
        if not self.cfg.decoder.lossless:
            say("the decoder is lossy, and a window may change what it changes: compare with stage=compare.")
        say(f"as a decoder: python run.py --config-dir {self.out} decoder={file.stem} batch_size={self.rows}")
        return self.out


def check_decoder(cfg: DictConfig) -> int:
    """Return the decoder's own window; raises UserError for one whose draft a window does not lengthen."""
    decoder = cfg.decoder
    if "window" not in decoder or decoder.name == "ar":
        raise UserError(
            f"tune=window varies decoder.window, which decoder={decoder.name} does not have; take one that drafts a window, "
            "e.g. decoder=scd."
        )
    return int(decoder.window)


def _interval(found: Interval) -> str:
    value, low, high = found
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _csv(rows: Sequence[WindowRow]) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    predicted = ("window", "depth", "pass_s", "passes", "tokens_per_s_predicted")
    lines.writerow([*predicted, "passes_measured", "tokens_per_s_measured", "time_to_own", "low", "high"])
    for row in rows:
        measured = [row.measured_passes, row.measured, *(row.against_own or (None, None, None))]
        found = ["" if value is None else value for value in measured]
        lines.writerow([row.width, row.depth, row.pass_s, row.passes, row.rate, *found])
    return text.getvalue()
