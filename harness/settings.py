"""Check names, types and ranges of the settings outside the groups; imports nothing heavy, so a typo is reported at once."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from harness.console import GROUPS
from sjd2.config import describe, fits
from sjd2.errors import UserError, choose, unknown
from sjd2.ranges import check_sampling_ranges


class Stage(NamedTuple):
    """function: dotted path, imported when the stage runs. does: one line of `--help`. tables: whether it shows some."""

    function: str
    does: str
    tables: bool = False


STAGES = {
    "sample": Stage(
        "harness.stages.sample", "make a run and its AR baseline, score both, print their table (default)", tables=True
    ),
    "score": Stage("harness.stages.score", "score an existing run folder again: run_dir=FOLDER"),
    "table": Stage("sweeps.multirun.callback.stage", "tables and plots of all run folders, or of one", tables=True),
    "compare": Stage(
        "sweeps.compare.group.stage",
        "all runs pairwise: with AR in distribution, with each other in passes",
        tables=True,
    ),
    "report": Stage("sweeps.report.page.stage", "one self-contained page: table, plots, images, a race of the traces"),
    "tune": Stage(
        "sweeps.tune.stage.stage",
        "a decoder's settings for least latency under a bound on quality: tune=NAME",
        tables=True,
    ),
    "finetune": Stage("harness.stages.finetune", "train one recipe: finetune=RECIPE"),
    "bench": Stage("benchmarks.bench.run", "speed of passes and of whole runs"),
}

# every key of conf/config.yaml outside the groups, and of conf/runtime: its type
TYPES: dict[str, Any] = {
    "stage": str,
    "limit": int | None,
    "seed": int,
    "batch_size": int,
    "refill": bool,
    "baseline": str | None,
    "retime": bool,
    "trace": int,
    "guidance_scale": float,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "sampler": str,
    "runs_dir": str,
    "run_dir": str | None,
    "against": str | None,
    "save_baseline": str | None,
    "paper": str | None,
    "device": str,
    "dtype": str | None,
    "output": str,
    "columns": str,
}
RUNTIME: dict[str, Any] = {"threads": int | None, "grace_s": float, "isolate": bool, "flops": bool}
RUNTIME |= {"graph": bool | None, "fused": bool, "compile": bool | None}
BOUNDS: dict[str, Any] = dict.fromkeys(
    ("tokens", "passes", "nll", "scores", "distances", "speedup", "latency"), float | None
)
SAMPLERS = ("cdf", "gumbel")  # sjd2.decoding imports torch; a test compares
OUTPUTS = ("auto", "text", "markdown", "json")
COLUMNS = ("usual", "all")
AT_LEAST = {"limit": 1, "seed": 0, "batch_size": 1, "trace": 0, "runtime.threads": 1, "runtime.grace_s": 0}
AT_LEAST |= {f"bounds.{key}": 0 for key in BOUNDS}


def check_settings(cfg: DictConfig) -> None:
    """Check names, types and ranges of everything outside the groups; raises UserError."""
    if isinstance(cfg.device, int):
        raise UserError(f"a GPU is named with its kind: device=cuda:{cfg.device}.")
    _check_values(cfg, TYPES, groups=GROUPS)
    _check_values(cfg.runtime, RUNTIME, prefix="runtime.")
    _check_values(cfg.bounds, BOUNDS, prefix="bounds.")
    if endless := [key for key, bound in cfg.bounds.items() if bound == float("inf")]:
        raise UserError(f"bounds.{endless[0]}=inf holds nothing; write bounds.{endless[0]}=null.")
    choose("stage", cfg.stage, STAGES)
    if cfg.dtype is not None:
        choose("dtype", cfg.dtype, ("float32", "bfloat16", "float16", "float64", "auto"))  # sjd2.devices imports torch
    choose("device", cfg.device.partition(":")[0], ("auto", "cpu", "cuda", "mps"))  # likewise
    choose("sampler", cfg.sampler, SAMPLERS)
    check_sampling_ranges(**{key: cfg[key] for key in ("guidance_scale", "temperature", "top_k", "top_p", "min_p")})
    choose("output", cfg.output, OUTPUTS)
    choose("columns", cfg.columns, COLUMNS)
    if cfg.baseline not in ("ar", None):
        raise unknown("baseline", cfg.baseline, ("ar", "null"))
    if cfg.against is not None and cfg.stage != "compare":
        raise UserError("against= is the other side of stage=compare; it needs stage=compare run_dir=FOLDER.")
    if cfg.save_baseline is not None and (cfg.stage != "compare" or cfg.against is not None):
        raise UserError("save_baseline=FILE saves one run: stage=compare run_dir=FOLDER save_baseline=FILE.")
    if cfg.retime and (cfg.stage != "sample" or cfg.trace):
        wrong = (
            "leave trace= out, which slows what it follows"
            if cfg.trace
            else f"it works with stage=sample, not {cfg.stage}"
        )
        raise UserError(f"retime=true times a finished run again; {wrong}.")
    if cfg.trace and cfg.refill:
        raise UserError("trace= follows whole batches, so it needs refill=false.")
    if not cfg.runs_dir.strip():
        raise UserError("runs_dir is empty; name a folder, or leave it out for runs.")
    check_writable(Path(cfg.runs_dir), "runs_dir")


def _check_values(
    node: DictConfig, kinds: Mapping[str, Any], *, prefix: str = "", groups: Collection[str] = ()
) -> None:
    for key in node:
        if key not in kinds and key not in groups:
            raise unknown("setting", f"{prefix}{key}", [*kinds, *groups])
    for key, kind in kinds.items():
        name = f"{prefix}{key}"
        if OmegaConf.is_missing(node, key):
            raise UserError(f"{name} is missing; it must be {describe(kind)}.")
        if not fits(node[key], kind):
            raise UserError(f"{name} must be {describe(kind)}, got {node[key]!r}.")
        if node[key] is not None and name in AT_LEAST and not node[key] >= AT_LEAST[name]:  # nan is not
            raise UserError(f"{name} must be {AT_LEAST[name]} or more, got {node[key]}.")


def resolve(path: str) -> Callable[..., Any]:
    """Return the function with this dotted path; its module is imported now."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def check_writable(path: Path, key: str) -> None:
    """Raise UserError if `path` cannot be made or written; nothing is created."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{key}={path} cannot be a folder, since {existing} is a file; choose another {key}.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"no permission to write in {existing}; choose another {key} or change the folder's permissions."
        )
    try:
        tempfile.TemporaryFile(dir=existing).close()  # what no permission bit says: /proc, a full or read-only disk
    except OSError as error:
        raise UserError(
            f"{key}={path} cannot be written in {existing} ({error.strerror}); choose another {key}."
        ) from error
