"""The stages that work on one run folder: sample, score, finetune."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from evaluation.declared import declared, shown, withheld
from evaluation.run_folder import Snapshot
from harness import job
from harness import ranks as parallel
from harness.console import say
from harness.finetune import train
from harness.plan import build_metrics, build_tracker, make_plan, scored_run
from harness.settings import resolve
from harness.tracking import NoTracker


def sample(cfg: DictConfig) -> Path:
    """Make a run and its AR baseline, score both and print their table; returns the run folder."""
    ranks = parallel.join()
    metrics, plan = build_metrics(cfg), make_plan(cfg, ranks)
    tracker = build_tracker(cfg) if ranks.main else NoTracker()
    base = job.baseline_settings(cfg) if cfg.baseline and plan.decoder.name != cfg.baseline else None
    base_plan = make_plan(base, ranks) if base is not None else None
    models, failed = job.Models(), True
    try:
        single = job.sweep_name() is None
        job.make_run(cfg, plan, metrics=metrics, tracker=tracker, models=models, wait=not single, ranks=ranks)
        if base is not None and base_plan is not None:
            job.make_baseline(base, base_plan, metrics=metrics, models=models, ranks=ranks)
        if single and ranks.main:
            runs = [plan.run.path] if base_plan is None else [base_plan.run.path, plan.run.path]
            _print_table(runs, Path(cfg.runs_dir) / "tables" / plan.run.path.name, cfg)
        failed = False
    finally:
        tracker.finish(failed=failed)
    say(f"images: {plan.run.path / 'grid.png'}")
    say(f"run folder: {plan.run.path}")
    return plan.run.path


def _print_table(runs: list[Path], out: Path, cfg: DictConfig) -> None:
    make_tables, show = resolve("sweeps.tables.table.make_tables"), resolve("sweeps.tables.table.show")
    show(make_tables(runs, out, paper=cfg.paper), out / "table.md", cfg.output)


def score(cfg: DictConfig) -> Path:
    """Score an existing run folder; needs no generator model."""
    run, metrics, tracker = scored_run(cfg), build_metrics(cfg), build_tracker(cfg)
    failed = True
    try:
        with run.lock():
            tracker.start(job.about(run, "score"))
            snapshot = Snapshot(run)
            values = job.measure(snapshot, metrics, cfg.evaluation, again=True)
        job.mirror(snapshot, values, tracker)
        failed = False
    finally:
        tracker.finish(failed=failed)
    known = declared([run])
    lines = {key: value for key, value in shown(values, known).items() if isinstance(value, (int, float, str))}
    lines |= {key: f"– ({why})" for key, why in withheld(values, known).items()}
    say("\n".join(f"{key:24} {value}" for key, value in lines.items()))
    say(f"run folder: {run.path}")
    return run.path


def finetune(cfg: DictConfig) -> Path:
    """Train one recipe; a training that was killed resumes from its checkpoint."""
    out = train(cfg)
    say(f"result: {out / 'final'}")
    return out
