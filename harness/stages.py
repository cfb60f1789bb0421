"""The stages that work on one run folder: sample, score, finetune."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from evaluation.declared import declared, shown, withheld
from evaluation.prompts import Prompts
from evaluation.run_folder import Snapshot
from harness import job
from harness import ranks as parallel
from harness.console import say
from harness.finetune import train, usage
from harness.parts import Parts, keep_parts, parts_of
from harness.plan import Plan, build_metrics, build_tracker, draws, make_plan, scored_run
from harness.recompose import baseline_settings
from harness.settings import resolve
from harness.tracking import NoTracker


def sample(cfg: DictConfig) -> Path:
    """Make a run and its AR baseline, score both and print their table; returns the run folder."""
    ranks = parallel.join()
    metrics, plan = build_metrics(cfg, images=draws(cfg)), make_plan(cfg, ranks)
    tracker = build_tracker(cfg) if ranks.main else NoTracker()
    base = baseline_settings(cfg) if cfg.baseline and plan.decoder.name != cfg.baseline else None
    base_plan = make_plan(base, ranks) if base is not None else None
    wanted = [plan.prompts.metadata[prompt] for prompt, _ in plan.prompts.wanted(cfg.limit)]
    for metric in metrics.values():
        metric.check_prompts(wanted)
    models, failed = job.Models(), True
    _report_cut(plan.prompts, cfg.limit)
    try:
        single = job.sweep_name() is None
        run = job.Entry(cfg=cfg, plan=plan, tracker=tracker)
        baseline = None if base is None or base_plan is None else job.Entry(cfg=base, plan=base_plan)
        job.make_run(run, metrics=metrics, models=models, baseline=baseline, wait=not single, ranks=ranks)
        if ranks.main:
            plans = [plan] if base_plan is None else [base_plan, plan]
            parts = parts_of(plans, cfg.limit, metrics)
            if single:
                _print_table(cfg, plans, parts)
            else:
                keep_parts(Path(HydraConfig.get().runtime.output_dir), parts)
        failed = False
    finally:
        tracker.finish(failed=failed)
    if plan.pixels:
        say(f"images: {plan.run.path / 'grid.png'}")
    say(f"run folder: {plan.run.path}")
    return plan.run.path


def _print_table(cfg: DictConfig, plans: list[Plan], parts: Parts) -> None:
    """Print the table of the images that this command asked for, also where a run has more of an earlier one."""
    make_tables, show = resolve("sweeps.tables.table.make_tables"), resolve("sweeps.tables.table.show")
    for path in parts:
        say(f"{path.name} has more images than limit={cfg.limit}; the table leaves them out.")
    out = Path(cfg.runs_dir) / "tables" / plans[-1].run.path.name
    text = make_tables(
        [plan.run.path for plan in plans], out, paper=cfg.paper, parts=parts, detail=cfg.columns == "all"
    )
    show(text, out / "table.md", cfg.output)


def _report_cut(prompts: Prompts, limit: int | None) -> None:
    """Print how many images of the user's own prompts `limit` leaves out."""
    total = len(prompts.texts) * prompts.repeats
    if prompts.path is not None and limit is not None and limit < total:
        say(f"limit={limit} leaves out {total - limit} of {total} images; limit=null makes them all.")


def score(cfg: DictConfig) -> Path:
    """Score an existing run folder; needs no generator model."""
    run = scored_run(cfg)
    metrics, tracker = build_metrics(cfg, images=Snapshot(run).drawn), build_tracker(cfg)
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
    if command := usage(cfg, out / "final"):
        say(f"to use it: {command}")
    return out
