"""sjd2: sample, score, compare. `python run.py` samples with the embedded model; --cfg job shows the settings.

This file composes the settings, validates them and calls the stage; every algorithm lives in the packages beside it.
They are imported inside the functions, so that shell completion and `--cfg` stay quick.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import sjd2.config  # noqa: F401  registers the resolvers of the yaml files
from harness.console import guarded, say, show_logs


def sample(cfg: DictConfig) -> Path:
    """Make a run and its AR baseline, score both and print their table; returns the run folder."""
    from harness import job
    from harness import ranks as parallel
    from harness.plan import build_metrics, build_tracker, make_plan
    from harness.tracking import NoTracker
    from sweeps.tables.table import make_tables, show

    ranks = parallel.join()
    metrics, plan = build_metrics(cfg), make_plan(cfg, ranks)
    tracker = build_tracker(cfg) if ranks.main else NoTracker()
    base = job.baseline_settings(cfg) if cfg.baseline and plan.decoder.name != cfg.baseline else None
    base_plan = make_plan(base, ranks) if base is not None else None
    models, failed = job.Models(), True
    try:
        single = job.sweep_name() is None
        job.make_run(cfg, plan, metrics=metrics, tracker=tracker, models=models, wait=not single, ranks=ranks)
        if base_plan is not None:
            job.make_baseline(base, base_plan, metrics=metrics, models=models, ranks=ranks)
        if single and ranks.main:
            runs = [plan.run.path] if base_plan is None else [base_plan.run.path, plan.run.path]
            show(make_tables(runs, Path(cfg.runs_dir) / "tables" / plan.run.path.name, paper=cfg.paper))
        failed = False
    finally:
        tracker.finish(failed=failed)
    say(f"run folder: {plan.run.path}")
    return plan.run.path


def score(cfg: DictConfig) -> Path:
    """Score a run folder that is there; needs no generator model."""
    from harness import job
    from harness.plan import build_metrics, build_tracker, scored_run

    run, metrics, tracker = scored_run(cfg), build_metrics(cfg), build_tracker(cfg)
    failed = True
    try:
        with run.lock():
            tracker.start(job.about(run, "score"))
            figures = job.measure(run, metrics, cfg.evaluation, again=True)
        job.mirror(run, figures, tracker)
        failed = False
    finally:
        tracker.finish(failed=failed)
    say("\n".join(f"{key:24} {value}" for key, value in figures.items() if isinstance(value, (int, float, str))))
    say(f"run folder: {run.path}")
    return run.path


def finetune(cfg: DictConfig) -> Path:
    """Train one recipe; a killed training goes on from its checkpoint."""
    from harness.finetune import train

    out = train(cfg)
    say(f"result: {out / 'final'}")
    return out


def elsewhere(module: str, name: str = "stage") -> Callable[[DictConfig], Path]:
    """Return the function of a module as a stage; the module is imported when the stage runs."""
    return lambda cfg: getattr(importlib.import_module(module), name)(cfg)


def dispatch(cfg: DictConfig) -> Path:
    """Validate what every stage shares, then call the stage."""
    from harness.ranks import takes_part
    from harness.settings import check_settings

    check_settings(cfg)  # before the next import, which brings torch in
    if not takes_part(cfg.stage):
        return Path(cfg.runs_dir)
    from harness.plan import set_threads

    show_logs()
    set_threads(cfg)
    return STAGES[cfg.stage](cfg)


STAGES = {
    **{stage.__name__: stage for stage in (sample, score, finetune)},
    "table": elsewhere(
        "sweeps.multirun.callback"
    ),  # all run folders, one and its baseline, or a multirun's: tables and plots
    "compare": elsewhere("sweeps.compare.group"),  # all runs pairwise: with AR in law, with each other in passes
    "bench": elsewhere("benchmarks.bench", "run"),  # speed of passes and of whole runs
    "tune": elsewhere("sweeps.tune.search"),  # a decoder's settings for least latency under a bound on quality
    "report": elsewhere("sweeps.report.page"),  # one self-contained page: table, plots, images, a race of the traces
}


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "conf"), config_name="config")
def main(cfg: DictConfig) -> None:
    """Run one command, or one job of a multirun."""
    if HydraConfig.get().mode.name == "MULTIRUN":
        from sweeps.multirun.jobs import run_job

        run_job(dispatch, cfg)
    elif code := guarded(lambda: dispatch(cfg)):
        sys.exit(code)  # Hydra adds nothing to a SystemExit


def launch() -> None:
    """Run Hydra; where a launcher gives up because jobs died, their rows in the sweep's table tell it, not its error."""
    try:
        main()
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        callback = sys.modules.get("sweeps.multirun.callback")
        if callback is None or not callback.close(error):
            raise


def cli() -> int:
    """Run the command line and return its exit code: 0, or not 0 if the command or a job of a multirun failed."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads: waiting threads sleep instead of spinning
    if "debug=trace" in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1":
        os.environ["SJD2_TRACE"] = "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them
    here = str(Path(__file__).resolve().parent)  # jobs on other machines import from the same checkout
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    code = guarded(launch)
    callback = sys.modules.get("sweeps.multirun.callback")
    return code or int(callback is not None and callback.Tables.failed > 0)


if __name__ == "__main__":
    sys.exit(cli())
