"""Check names, types and ranges of the settings outside the groups; imports nothing heavy, so a typo costs no time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.console import GROUPS
from sjd2.config import describe, fits
from sjd2.errors import UserError, choose, unknown

STAGES = ("sample", "score", "table", "compare", "finetune", "bench", "tune", "report")
DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")

# every key of conf/config.yaml: its type, the smallest value, and how to say what it is
TYPES: dict[str, Any] = {
    "stage": str,
    "limit": int | None,
    "seed": int,
    "batch_size": int,
    "refill": bool,
    "baseline": str | None,
    "trace": int,
    "guidance_scale": float,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "sampler": str,
    "runs_dir": str,
    "run_dir": str | None,
    "against": str | None,
    "paper": str | None,
    "device": str,
    "dtype": str,
}
AT_LEAST = {"limit": 1, "seed": 0, "batch_size": 1, "trace": 0}


def check_settings(cfg: DictConfig) -> None:
    """Check names, types and ranges of everything outside the groups; raises UserError."""
    for key in cfg:
        if key not in TYPES and key not in GROUPS:
            raise unknown("setting", key, [*TYPES, *GROUPS])
    for key, kind in TYPES.items():
        if OmegaConf.is_missing(cfg, key):
            raise UserError(f"{key} is missing; it must be {describe(kind)}.")
        if not fits(cfg[key], kind):
            raise UserError(f"{key} must be {describe(kind)}, got {cfg[key]!r}.")
        if cfg[key] is not None and cfg[key] < AT_LEAST.get(key, cfg[key]):
            raise UserError(f"{key} must be {AT_LEAST[key]} or more, got {cfg[key]}.")
    choose("stage", cfg.stage, STAGES)
    choose("dtype", cfg.dtype, DTYPES)
    if cfg.baseline not in ("ar", None):
        raise unknown("baseline", cfg.baseline, ("ar", "null"))
    if cfg.against is not None and cfg.stage != "compare":
        raise UserError("against=FOLDER is the second run of stage=compare; it needs stage=compare run_dir=FOLDER.")
    if cfg.paper is not None:
        from sweeps.tables.paper import check

        check(cfg.paper)
    if cfg.trace and cfg.refill:
        raise UserError("trace= follows whole batches, so it needs refill=false.")
    threads = cfg.runtime.threads
    if not fits(threads, int | None) or (threads is not None and threads < 1):
        raise UserError(f"runtime.threads must be a whole number of 1 or more, or null, got {threads!r}.")
    grace = cfg.runtime.grace_s
    if not fits(grace, float) or grace < 0:
        raise UserError(f"runtime.grace_s must be 0 seconds or more, got {grace!r}.")
    for key in ("isolate", "flops", "graph"):
        if not fits(cfg.runtime[key], bool):
            raise UserError(f"runtime.{key} must be true or false, got {cfg.runtime[key]!r}.")
    check_writable(Path(cfg.runs_dir), "runs_dir")


def check_writable(path: Path, key: str) -> None:
    """Raise UserError if `path` cannot be made or written; nothing is created."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{key}={path} cannot be a folder, since {there} is a file; choose another {key}.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"no permission to write in {there}; choose another {key} or mend the folder's rights.")
