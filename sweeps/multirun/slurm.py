"""Ask Slurm for the state of jobs, and wait for those of a sweep.

submitit waits for a job's result file; if a job died without one it asks `sacct`, which needs a cluster with accounting.
So a sweep looks into the queue itself.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sjd2.files import split_lines

ENDED = {
    "TIMEOUT": "ran into its time limit",
    "OUT_OF_MEMORY": "ran out of memory",
    "NODE_FAIL": "lost its node",
    "BOOT_FAIL": "lost its node",
    "PREEMPTED": "was pre-empted",
    "CANCELLED": "was cancelled",
    "DEADLINE": "ran into its deadline",
}
OVER = (*ENDED, "FAILED", "COMPLETED")  # in every other state a job waits, runs or is requeued


@dataclass(frozen=True)
class JobState:
    """The state of a job in Slurm. signal: the number of the signal that ended it, 0 for none."""

    name: str
    signal: int = 0

    @property
    def running(self) -> bool:
        return self.name not in OVER


def own_job() -> str | None:
    """Return the Slurm job that submitit started for this process; None elsewhere, e.g. in an interactive Slurm shell.

    A job of an array is named 12_0: its plain number may also be that of the whole array.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def job_state(job: str) -> JobState | None:
    """Return the state of a job; None if Slurm does not know it, or does not answer."""
    text = _ask("scontrol", "--oneliner", "show", "job", job) or ""  # knows a job for minutes after its end
    states, codes = re.findall(r"\bJobState=(\w+)", text), re.findall(r"\bExitCode=(\d+:\d+)", text)
    if not states or states[0] == "FAILED":  # its steps may show the signal
        lines = _ask("sacct", "--noheader", "--parsable2", "--format=State,ExitCode", "--jobs", job) or ""
        rows = [line.split("|") for line in split_lines(lines) if "|" in line]
        states = states or [state.split()[0] for state, _ in rows]
        codes = [code for _, code in rows] + codes
    return JobState(states[0], _signal(codes)) if states else None


def _signal(codes: Iterable[str]) -> int:
    """Return the signal in Slurm's exit codes 'code:signal'; a shell reports it as 128 + signal."""
    pairs = [tuple(map(int, code.split(":"))) for code in codes]
    found = [number for _, number in pairs] + [code - 128 for code, _ in pairs]
    return next((number for number in found if number in signal.valid_signals()), 0)


def submitted(sweep: Path) -> list[str]:
    """Return the jobs that submitit has sent to Slurm for a sweep, as Slurm names them."""
    return [path.name for path in (sweep / ".submitit").glob("[0-9]*")]


def queued(jobs: Sequence[str]) -> list[str] | None:
    """Return the states of those of `jobs` that wait or run; None if the controller does not answer."""
    if not jobs:
        return []
    try:
        command = ["squeue", "--noheader", "--array", "--format=%T", f"--jobs={','.join(jobs)}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return [] if "Invalid job id" in done.stderr else None  # no longer known, so they have ended
    return done.stdout.split()


def wait_for_queue(sweep: Path, poll_s: float = 5.0) -> None:
    """Wait until no job of the sweep is in the queue."""
    jobs = submitted(sweep)
    while queued(jobs) != []:
        time.sleep(poll_s)


def has_accounting() -> bool:
    """Return whether sacct works here."""
    return _ask("sacct", "--noheader", "--allocations", "--jobs=1") is not None


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout
