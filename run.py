"""sjd2: sample, score, compare. `python run.py` samples with the embedded model; --cfg job shows the settings.

This file composes the settings, validates them and calls the stage; every algorithm lives in the packages beside it.
They are imported inside the functions, so that shell completion and `--cfg` stay quick.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import sjd2.instantiate  # noqa: F401  registers the resolvers of the yaml files
from evaluation.console import guarded, say, sentence, show_logs
from sjd2.errors import UserError


def sample(cfg: DictConfig) -> Path:
    """Make a run and its AR baseline, score both and print their table; returns the run folder."""
    from evaluation import job, validate
    from sweeps.table import make_tables, show

    metrics, tracker, plan = validate.metrics(cfg), validate.tracker(cfg), validate.plan(cfg)
    base = job.baseline_settings(cfg) if cfg.baseline and plan.decoder.name != cfg.baseline else None
    base_plan = validate.plan(base) if base is not None else None
    models, failed = job.Models(), True
    try:
        single = job.sweep_name() is None
        job.make_run(cfg, plan, metrics=metrics, tracker=tracker, models=models, wait=not single)
        if base_plan is not None:
            job.make_baseline(base, base_plan, metrics=metrics, models=models)
        if single:
            runs = [plan.run.path] if base_plan is None else [base_plan.run.path, plan.run.path]
            show(make_tables(runs, Path(cfg.runs_dir) / "tables" / plan.run.path.name))
        failed = False
    finally:
        tracker.finish(failed=failed)
    say(f"run folder: {plan.run.path}")
    return plan.run.path


def score(cfg: DictConfig) -> Path:
    """Score a run folder that is there; needs no generator model."""
    from evaluation import job, validate
    from evaluation.score import score as measure

    run, metrics, tracker = validate.scored_run(cfg), validate.metrics(cfg), validate.tracker(cfg)
    failed = True
    try:
        with run.lock():
            tracker.start(job.about(run, "score"))
            figures = measure(run, metrics)
        job.mirror(run, figures, tracker)
        failed = False
    finally:
        tracker.finish(failed=failed)
    say("\n".join(f"{key:24} {value}" for key, value in figures.items() if isinstance(value, (int, float, str))))
    say(f"run folder: {run.path}")
    return run.path


def table(cfg: DictConfig) -> Path:
    """Turn every run folder of runs_dir, or run_dir and its baseline, into tables and plots."""
    from sweeps.table import stage

    return stage(cfg)


def compare(cfg: DictConfig) -> Path:
    """Compare all runs pairwise: with AR in likelihood and KID, with each other in passes."""
    from sweeps.compare import stage

    return stage(cfg)


def finetune(cfg: DictConfig) -> Path:
    """Train one recipe; a killed training goes on from its checkpoint."""
    from evaluation.training import train

    out = train(cfg)
    say(f"result: {out / 'final'}")
    return out


def bench(cfg: DictConfig) -> Path:
    """Measure the speed of passes and whole runs."""
    from benchmarks.bench import run

    return run(cfg)


def dispatch(cfg: DictConfig) -> Path:
    """Validate what every stage shares, then call the stage."""
    from evaluation.settings import check_settings

    check_settings(cfg)  # before the next import, which brings torch in
    from evaluation.validate import set_threads

    show_logs()
    set_threads(cfg)
    return STAGES[cfg.stage](cfg)


STAGES = {"sample": sample, "score": score, "table": table, "compare": compare, "finetune": finetune, "bench": bench}


def record_status(cfg: DictConfig) -> None:
    """Run one job of a multirun and write status.json; never raises, else Hydra would leave out the sweep's table."""
    overrides = list(HydraConfig.get().overrides.task)
    status = {"status": "ok", "reason": None, "run_dir": None, "overrides": overrides}
    out = Path(HydraConfig.get().runtime.output_dir)
    say(f"job {HydraConfig.get().job.num}: {' '.join(overrides)}")
    try:
        status["run_dir"] = str(dispatch(cfg).absolute())
    except Exception as error:
        status |= {"status": "failed", "reason": sentence(error)}
        print(f"error: {sentence(error)}", file=sys.stderr, flush=True)
        if not isinstance(error, UserError):
            (out / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
    (out / "status.json").write_text(json.dumps(status), encoding="utf-8")


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "conf"), config_name="config")
def main(cfg: DictConfig) -> None:
    """Run one command, or one job of a multirun."""
    if HydraConfig.get().mode.name == "MULTIRUN":
        record_status(cfg)
    elif code := guarded(lambda: dispatch(cfg)):
        sys.exit(code)  # Hydra adds nothing to a SystemExit


def cli() -> int:
    """Run the command line and return its exit code: 0, or not 0 if the command or a job of a multirun failed."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads: waiting threads sleep instead of spinning
    if "debug=trace" in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1":
        os.environ["SJD2_TRACE"] = "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them
    code = guarded(main)
    callback = sys.modules.get("sweeps.callback")
    return code or int(callback is not None and callback.Tables.failed > 0)


if __name__ == "__main__":
    sys.exit(cli())
