"""The jobs of a multirun: how each ended, also where it could not say so itself.

    <sweep>/multirun.yaml         what Hydra was asked for: the jobs follow from it
    <sweep>/<job>/status.json     {"status": "running", "ok", "failed" or "stopped", "reason", "run_dir", "overrides", ...}
    <sweep>/<job>/traceback.txt   of a job that failed by a bug

Hydra skips the end of a multirun as soon as one job raises, so a job never does; one that was killed has left "running".
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
AGAIN = "the same command goes on where it ended."
WAITING = "has not started: it waits for its turn, or the sweep was cut before; the same command makes it."
RUNNING = "is still running"
SHARED = ("BasicLauncher", "JoblibLauncher")  # launchers that run several jobs in one process


# ---- one job, from within


def run_job(work: Callable[[DictConfig], Path], cfg: DictConfig) -> None:
    """Run one job of a multirun and write its status.json; never raises but to end the sweep."""
    hydra = HydraConfig.get()
    out = Path(hydra.runtime.output_dir)
    overrides = list(hydra.overrides.task)
    status: dict[str, Any] = {"status": "running", "reason": None, "run_dir": None, "overrides": overrides}
    status |= {"pid": os.getpid(), "host": socket.gethostname(), "slurm": slurm.own_job()}
    _write(out, status)
    say(f"job {hydra.job.num}: {' '.join(overrides)}")
    if not (cfg.runtime.isolate and can_isolate() and str(hydra.launcher.get("_target_")).endswith(SHARED)):
        _do(work, cfg, status, out)
        return
    _import_parts(cfg)
    code = in_child(lambda: _do(work, cfg, status, out))
    if code < 0:
        _write(out, status | {"status": "failed", "reason": died(-code)})
    elif code and _status(out).get("status") == "running":
        _write(out, status | {"status": "failed", "reason": f"ended with exit code {code}; {AGAIN}"})
    if code:
        print(f"error: job {hydra.job.num} {_status(out)['reason']}", file=sys.stderr, flush=True)


def _import_parts(cfg: DictConfig) -> None:
    """Import what a job needs into this process, once for all jobs to come; importing uses no GPU."""
    modules = ["harness.job", "matplotlib.pyplot"]
    modules += [target.rpartition(".")[0] for target in _targets(OmegaConf.to_container(cfg))]
    for module in dict.fromkeys(filter(None, modules)):
        with contextlib.suppress(Exception):  # the job itself says what is wrong with it
            importlib.import_module(module)


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for value in node.values():
            yield from _targets(value)


def _do(work: Callable[[DictConfig], Path], cfg: DictConfig, status: dict[str, Any], out: Path) -> None:
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
    except OSError as error:  # the job's own work does not depend on it
        print(f"error: no status.json: {sentence(error)}", file=sys.stderr, flush=True)


def died(number: int) -> str:
    """Return the sentence for a job that a signal ended."""
    name = next((known.name for known in signal.Signals if known == number), "a signal without a name")
    cause = ": killed from outside, or out of memory" if name == "SIGKILL" else f", {name}"
    return f"died (signal {number}{cause}); {AGAIN}"


# ---- all jobs, from outside


def is_sweep(folder: Path) -> bool:
    """Say whether this is the folder of a multirun."""
    return (folder / "multirun.yaml").is_file() or any(folder.glob("[0-9]*/status.json"))


def statuses(sweep: Path) -> list[dict[str, Any]]:
    """Return the status of every job of a multirun, in the order of the jobs; all but "ok" have a reason.

    Overrides that all jobs share are left out.
    """
    planned = dict(enumerate(planned_jobs(sweep)))
    there = {int(path.name) for path in sweep.glob("*/") if path.name.isdigit()}
    found = [_job(sweep / str(number), planned.get(number)) for number in sorted(planned or there)]
    told = [set(job["overrides"]) for job in found if not job.get("unnamed")]
    if len(told) > 1:  # what all jobs say tells none apart
        shared = {text for text in set.intersection(*told) if not text.startswith("decoder=")}
        for job in found:
            job["overrides"] = [text for text in job["overrides"] if text not in shared]
    return found


def planned_jobs(sweep: Path) -> list[list[str]]:
    """Return the overrides of each job that this multirun was asked for; [] where Hydra's file does not tell."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    try:
        hydra = OmegaConf.load(sweep / "multirun.yaml").hydra
        if not str(hydra.sweeper._target_).endswith("BasicSweeper"):
            return []
        words = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()] + list(hydra.overrides.task)
        (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
        return batch
    except (OSError, AttributeError, OmegaConfBaseException, HydraException):  # glob() needs the folders of the command
        return []


def _job(folder: Path, planned: list[str] | None) -> dict[str, Any]:
    status = _status(folder)
    if not status:
        named = {"overrides": [f"job {folder.name}"], "unnamed": True} if planned is None else {"overrides": planned}
        reason = KILLED if planned is None or folder.is_dir() else WAITING
        return {"status": "failed", "reason": reason, "run_dir": None, **named}
    if status["status"] == "running":
        status |= {"reason": _fate(status)}
    elif status["status"] == "stopped" and status.get("slurm") is not None:  # Slurm may have put it back into its queue
        told = slurm.outcome(status["slurm"])
        if told is not None and told.running:
            status |= {"status": "running", "reason": f"{RUNNING} ({told.state.lower()})."}
    return status


def _status(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def _fate(status: dict[str, Any]) -> str:
    """Return what became of a job that has not written its end."""
    if status.get("slurm") is not None and (told := slurm.outcome(status["slurm"])) is not None:
        if told.running:
            return f"{RUNNING} ({told.state.lower()})."
        if told.state in slurm.ENDED:
            return f"{slurm.ENDED[told.state]} in Slurm; {AGAIN}"
        return died(told.number) if told.number else f"ended without a word ({told.state.lower()} in Slurm); {AGAIN}"
    if status.get("host") != socket.gethostname():
        return KILLED
    return f"{RUNNING}." if alive(status["pid"]) else f"died without a word: killed or out of memory; {AGAIN}"
