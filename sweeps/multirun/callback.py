"""Build the table of a multirun when its last job ends, even if jobs failed or died.

Hydra skips `on_multirun_end` as soon as one job raises, so a job never raises in a multirun (jobs.py).
A job that is killed can still make its launcher give up; then `close` is called, which waits for the remaining jobs.
If the sweep's own process was killed, `python run.py stage=table run_dir=FOLDER` builds the same table later, and
repeating the command makes the missing runs. The command exits with a non-zero code if `Tables.failed`.
"""

from __future__ import annotations

import _thread
import contextlib
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from harness.console import say, sentence
from harness.parts import KEPT as PARTS
from harness.parts import read_parts
from harness.settings import check_writable
from sjd2.errors import UserError
from sjd2.locks import lock
from sweeps.multirun import slurm
from sweeps.multirun.jobs import KILLED, RUNNING, WAITING, is_sweep, statuses
from sweeps.tables import table
from sweeps.tables.table import make_tables, show, with_baselines

__all__ = ["KILLED", "Tables", "close", "statuses", "tabulate"]

LATER = "python run.py stage=table run_dir={folder}"
PATIENCE_S = 60.0  # the longest that Ray may take from one job to the next
QUIET_S = 20.0  # a result missing after the queue was empty for so long will not come; file systems take less


def tabulate(
    sweep: Path, *, published: bool = False, paper: str | None = None, output: str = "auto", columns: str = "usual"
) -> int:
    """Write the table of one multirun into its folder, print it, and return the number of failed jobs."""
    jobs = statuses(sweep)
    failed = [job for job in jobs if job["status"] != "ok"]
    runs = with_baselines([Path(job["run_dir"]) for job in jobs if job["status"] == "ok" and job.get("run_dir")])
    if runs or failed:  # neither, e.g. after stage=bench
        settings = {"published": published, "paper": paper or _paper(sweep), "parts": read_parts(sweep)}
        text = make_tables(runs, sweep, failed, **settings, detail=columns == "all")
        show(text, sweep / "table.md", output)
    return len(failed)


def _paper(sweep: Path) -> str | None:
    """Return the `paper=` that the sweep was started with."""
    command = sweep / "multirun.yaml"
    return OmegaConf.select(OmegaConf.load(command), "paper") if command.is_file() else None


class Tables(Callback):
    """Hydra callback: `hydra.callbacks.tables._target_: sweeps.multirun.callback.Tables`."""

    failed = 0  # jobs of this process' multirun that failed; becomes the exit code
    sweep: Path | None = None  # the folder of the multirun that this process drives, until its table is built
    launcher = ""
    gave_up = False  # whether the queue was empty while submitit still waited
    _held = contextlib.ExitStack()

    def __init__(self, *, published: bool = False) -> None:
        """Set whether the published numbers of the same model follow the table."""
        self.published = published

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        """Lock the sweep's folder and remove the job statuses of an earlier multirun there."""
        sweep = Path(config.hydra.sweep.dir)
        try:
            check_writable(Path(config.runs_dir), "runs_dir")
            Tables._held.enter_context(lock(sweep / ".lock", what="sweep folder"))
        except UserError as error:  # Hydra would only warn and continue
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(1) from error
        for kept in (*sweep.glob("[0-9]*/status.json"), *sweep.glob(f"[0-9]*/{PARTS}")):
            kept.unlink()
        Tables.sweep, Tables.gave_up, Tables.launcher = sweep, False, str(config.hydra.launcher.get("_target_"))
        say(f"sweep folder: {sweep}")
        if Tables.launcher.endswith("SlurmLauncher") and not slurm.has_accounting():
            say("this cluster has no accounting (sacct fails), so the queue is watched for jobs that die")
            threading.Thread(target=_watch, args=(sweep,), daemon=True).start()

    def on_multirun_end(self, config: DictConfig, **_: object) -> None:
        """Build the table; a failure to do so is reported and counted, never raised."""
        sweep, Tables.sweep = Path(config.hydra.sweep.dir), None
        try:
            wanted = {"paper": config.get("paper"), "output": config.get("output", "auto")}
            wanted |= {"columns": config.get("columns", "usual")}
            Tables.failed = tabulate(sweep, published=self.published, **wanted)
        except (UserError, OSError) as error:
            Tables.failed += 1
            print(f"no table: {sentence(error)}", file=sys.stderr)
        Tables._held.close()


# ---- sweeps that ended abnormally


def close(error: BaseException) -> bool:
    """Build the table of a multirun whose launcher gave up, once the other jobs have ended; False if none was running."""
    sweep, Tables.sweep = Tables.sweep, None
    if sweep is None or not (list(sweep.glob("[0-9]*/status.json")) or slurm.submitted(sweep)):
        Tables._held.close()
        return False  # nothing has started: the error itself is what to report
    if isinstance(error, (KeyboardInterrupt, SystemExit)) and not Tables.gave_up:
        Tables._held.close()
        say(f"table of the finished runs: {LATER.format(folder=sweep)}")
        return False
    first = (" ".join(str(error).split()) or type(error).__name__)[:160]
    print(f"the launcher gave up ({first}); waiting for the remaining jobs", file=sys.stderr, flush=True)
    wait_for_jobs(sweep)
    try:
        Tables.failed = max(1, tabulate(sweep))
    except (UserError, OSError) as problem:
        Tables.failed = 1
        print(f"no table: {sentence(problem)}", file=sys.stderr)
    Tables._held.close()
    return True


def wait_for_jobs(sweep: Path, poll_s: float = 1.0) -> None:
    """Wait until no job of a sweep runs or can still start."""
    if Tables.launcher.endswith("SlurmLauncher"):
        slurm.wait_for_queue(sweep)
        return
    quiet = time.monotonic()
    patience = PATIENCE_S if "ray" in Tables.launcher.lower() else 0.0  # it starts further jobs by itself
    while True:
        reasons = [job["reason"] or "" for job in statuses(sweep)]
        if any(reason.startswith(RUNNING) for reason in reasons):
            quiet = time.monotonic()
        elif WAITING not in reasons or time.monotonic() > quiet + patience:
            return
        time.sleep(poll_s)


def _watch(sweep: Path, poll_s: float = 5.0) -> None:
    """Interrupt a launcher that waits for jobs no longer in Slurm: without accounting submitit waits forever."""
    empty: float | None = None
    while Tables.sweep == sweep:
        states = slurm.queued(slurm.submitted(sweep)) if slurm.submitted(sweep) else None
        empty = None if states != [] else empty or time.monotonic()
        if empty is not None and time.monotonic() > empty + QUIET_S:
            Tables.gave_up = True
            _thread.interrupt_main()
            return
        time.sleep(poll_s)


def stage(cfg: DictConfig) -> Path:
    """Run stage=table on the multirun that run_dir names, or else on run folders; return the folder written to."""
    sweep = None if cfg.run_dir is None else Path(cfg.run_dir)
    if sweep is None or not is_sweep(sweep):
        return table.stage(cfg)
    tabulate(sweep, published=True, paper=cfg.paper, output=cfg.output, columns=cfg.get("columns", "usual"))
    return sweep


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the table of a finished or interrupted multirun: `python -m sweeps.multirun.callback runs/sweeps/FOLDER`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("give one multirun folder: python -m sweeps.multirun.callback FOLDER", file=sys.stderr)
        return 2
    try:
        return 1 if tabulate(Path(arguments[0])) else 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
