"""Build the table of a multirun when its last job ends, also when a job failed.

Hydra skips `on_multirun_end` as soon as one job raises, so the harness' task never raises in a multirun: it writes
`status.json` ({"status": "ok" or "failed", "reason", "run_dir", "overrides"}) into its job's folder. `run.py` ends with

    sys.exit(1 if Tables.failed else 0)

A job killed from outside still skips the callback; then `python -m sweeps.callback FOLDER` builds the same table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from sjd2.errors import UserError
from sweeps.table import make_tables, show, with_baselines

KILLED = "ended without a status: killed, out of memory or still running"


def statuses(sweep: Path) -> list[dict]:
    """Return the status of every job of a multirun, in the order of the jobs; a job without one counts as failed."""
    jobs = (path for path in sweep.glob("*/") if path.name.isdigit())
    found = [_status(job) for job in sorted(jobs, key=lambda path: int(path.name))]
    told = [set(job["overrides"]) for job in found if job.get("reason") != KILLED]
    if len(told) > 1:  # what all jobs say tells none apart
        shared = {text for text in set.intersection(*told) if not text.startswith("decoder=")}
        for job in found:
            job["overrides"] = [text for text in job["overrides"] if text not in shared]
    return found


def _status(job: Path) -> dict:
    try:
        return json.loads((job / "status.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {"status": "failed", "reason": KILLED, "run_dir": None, "overrides": [f"job {job.name}"]}


def tabulate(sweep: Path, *, published: bool = False) -> int:
    """Write the table of one multirun into its folder, print it, and return the number of failed jobs."""
    jobs = statuses(sweep)
    failed = [job for job in jobs if job["status"] != "ok"]
    runs = with_baselines([Path(job["run_dir"]) for job in jobs if job["status"] == "ok" and job.get("run_dir")])
    if runs or failed:  # neither after e.g. stage=bench
        show(make_tables(runs, sweep, failed, published=published))
        print(f"table: {sweep / 'table.md'}")
    return len(failed)


class Tables(Callback):
    """Hydra callback: `hydra.callbacks.tables._target_: sweeps.callback.Tables`."""

    failed = 0  # jobs of this process' multirun that failed; run.py turns it into the exit code

    def __init__(self, *, published: bool = False) -> None:
        """Say whether the published figures of the same model are put below the table."""
        self.published = published

    def on_multirun_end(self, config: DictConfig, **_: object) -> None:
        """Build the table; one that cannot be built is reported and counted as a failure, never raised."""
        sweep = Path(config.hydra.sweep.dir)
        try:
            Tables.failed = tabulate(sweep, published=self.published)
        except UserError as error:
            Tables.failed += 1
            print(f"no table: {error}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the table of a finished or broken-off multirun: `python -m sweeps.callback runs/sweeps/FOLDER`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("give one multirun folder: python -m sweeps.callback FOLDER", file=sys.stderr)
        return 2
    try:
        return 1 if tabulate(Path(arguments[0])) else 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
