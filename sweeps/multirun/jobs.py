"""The jobs of a multirun: how each ended, even if it could not report so itself.

    <sweep>/multirun.yaml         the command as Hydra keeps it: the jobs follow from it
    <sweep>/<job>/status.json     {"status": "running", "ok", "failed" or "stopped", "reason", "run_dir", "overrides", ...}
    <sweep>/<job>/traceback.txt   of a job that failed by a bug

Hydra skips the end of a multirun as soon as one job raises, so a job never does; a killed one leaves "running".
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.console import say, sentence
from sjd2.errors import UserError
from sjd2.files import write_atomically
from sjd2.locks import alive
from sweeps.multirun import slurm
from sweeps.multirun.child import can_isolate, in_child

KILLED = "ended without a status: killed, out of memory or still running"
AGAIN = "the same command resumes it."
WAITING = "has not started: it waits for its turn, or the sweep was interrupted; the same command runs it."
RUNNING = "is still running"
SHARED = ("BasicLauncher", "JoblibLauncher")  # launchers that run several jobs in one process


# ---- inside a job


def run_job(work: Callable[[DictConfig], Path], cfg: DictConfig) -> None:
    """Run one job of a multirun and write its status.json; raises only to end the sweep."""
    hydra = HydraConfig.get()
    out = Path(hydra.runtime.output_dir)
    overrides = list(hydra.overrides.task)
    status: dict[str, Any] = {"status": "running", "reason": None, "run_dir": None, "overrides": overrides}
    status |= {"pid": os.getpid(), "host": socket.gethostname(), "slurm": slurm.own_job()}
    _write(out, status)
    say(f"job {hydra.job.num}: {' '.join(overrides)}")
    if not (cfg.runtime.isolate and can_isolate() and str(hydra.launcher.get("_target_")).endswith(SHARED)):
        _work(work, cfg, status, out)
        return
    _import_parts(cfg)
    code = in_child(lambda: _work(work, cfg, status, out))
    if code < 0:
        _write(out, status | {"status": "failed", "reason": death_reason(-code)})
    elif code and _status(out).get("status") == "running":
        _write(out, status | {"status": "failed", "reason": f"ended with exit code {code}; {AGAIN}"})
    if code:
        print(f"error: job {hydra.job.num} {_status(out)['reason']}", file=sys.stderr, flush=True)


def _import_parts(cfg: DictConfig) -> None:
    """Import what a job needs into this process, once for all jobs; importing does not use a GPU."""
    modules = ["harness.job", "matplotlib.pyplot"]
    modules += [target.rpartition(".")[0] for target in _targets(OmegaConf.to_container(cfg))]
    for module in dict.fromkeys(filter(None, modules)):
        with contextlib.suppress(Exception):  # the job itself reports what is wrong
            importlib.import_module(module)


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for value in node.values():
            yield from _targets(value)


def _work(work: Callable[[DictConfig], Path], cfg: DictConfig, status: dict[str, Any], out: Path) -> None:
    try:
        status |= {"status": "ok", "run_dir": str(work(cfg).absolute())}
    except (KeyboardInterrupt, SystemExit):
        _write(out, status | {"status": "stopped", "reason": f"was stopped; {AGAIN}"})
        raise
    except Exception as error:
        status |= {"status": "failed", "reason": sentence(error)}
        print(f"error: {sentence(error)}", file=sys.stderr, flush=True)
        if not isinstance(error, UserError):
            with contextlib.suppress(OSError):
                (out / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
    _write(out, status)


def _write(out: Path, status: dict[str, Any]) -> None:
    try:
        write_atomically(out / "status.json", json.dumps(status).encode())
    except OSError as error:  # the job's work does not depend on it
        print(f"error: no status.json: {sentence(error)}", file=sys.stderr, flush=True)


def death_reason(number: int) -> str:
    """Return why a job ended by a signal has no run."""
    name = next((known.name for known in signal.Signals if known == number), "unknown signal")
    cause = ": killed from outside, or out of memory" if name == "SIGKILL" else f", {name}"
    return f"died (signal {number}{cause}); {AGAIN}"


# ---- all jobs of a multirun


def is_sweep(folder: Path) -> bool:
    """Return whether this is the folder of a multirun."""
    return (folder / "multirun.yaml").is_file() or any(folder.glob("[0-9]*/status.json"))


def statuses(sweep: Path) -> list[dict[str, Any]]:
    """Return the status of every job of a multirun, in order; all but "ok" have a reason.

    Overrides shared by all jobs are omitted.
    """
    planned = dict(enumerate(planned_jobs(sweep)))
    existing = {int(path.name) for path in sweep.glob("*/") if path.name.isdigit()}
    found = [_job(sweep / str(number), planned.get(number)) for number in sorted(planned or existing)]
    named = [set(job["overrides"]) for job in found if not job.get("unnamed")]
    if len(named) > 1:  # what all jobs share distinguishes none
        shared = {text for text in set.intersection(*named) if not text.startswith("decoder=")}
        for job in found:
            job["overrides"] = [text for text in job["overrides"] if text not in shared]
    return found


def planned_jobs(sweep: Path) -> list[list[str]]:
    """Return the overrides of each job of the command; [] if Hydra's file does not determine them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    try:
        hydra = OmegaConf.load(sweep / "multirun.yaml").hydra
        if not str(hydra.sweeper._target_).endswith("BasicSweeper"):
            return []
        words = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()] + list(hydra.overrides.task)
        (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
        return batch
    except (
        OSError,
        AttributeError,
        OmegaConfBaseException,
        HydraException,
    ):  # glob() needs the folders of that machine
        return []


def _job(folder: Path, planned: list[str] | None) -> dict[str, Any]:
    status = _status(folder)
    if not status:
        named = {"overrides": [f"job {folder.name}"], "unnamed": True} if planned is None else {"overrides": planned}
        reason = KILLED if planned is None or folder.is_dir() else WAITING
        return {"status": "failed", "reason": reason, "run_dir": None, **named}
    if status["status"] == "running":
        status |= {"reason": _fate(status)}
    elif status["status"] == "stopped" and status.get("slurm") is not None:  # Slurm may have requeued it
        state = slurm.job_state(status["slurm"])
        if state is not None and state.running:
            status |= {"status": "running", "reason": f"{RUNNING} ({state.name.lower()})."}
    return status


def _status(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def _fate(status: dict[str, Any]) -> str:
    """Return what happened to a job that did not write how it ended."""
    if status.get("slurm") is not None and (state := slurm.job_state(status["slurm"])) is not None:
        if state.running:
            return f"{RUNNING} ({state.name.lower()})."
        if state.name in slurm.ENDED:
            return f"{slurm.ENDED[state.name]} in Slurm; {AGAIN}"
        if state.signal:
            return death_reason(state.signal)
        return f"ended without a status ({state.name.lower()} in Slurm); {AGAIN}"
    if status.get("host") != socket.gethostname():
        return KILLED
    return f"{RUNNING}." if alive(status["pid"]) else f"died: killed or out of memory; {AGAIN}"
