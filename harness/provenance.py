"""What a launch ran on: git commit, package versions, hardware, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sjd2 import __version__
from sjd2.config import CONF, INSTALLED
from sjd2.files import split_lines

PACKAGES = ("torch", "transformers", "hydra-core", "numpy", "torchmetrics", "clean-fid", "open-clip-torch", "wandb")


def start_entry(device: torch.device, **more: Any) -> dict[str, Any]:
    """Return the entry of provenance.jsonl for a launch that starts; `more`: dtype, weights, ... of the run."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command(),
        "git": git_commit(),
        "python": platform.python_version(),
        "packages": {"sjd2": __version__} | {name: found for name in PACKAGES if (found := _version(name))},
        "device": str(device),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        **more,
    }


def command() -> list[str]:
    """Return the command line, the script by its name only."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def git_commit() -> str | None:
    """Return the commit of this checkout, with '+changes' where files differ from it; None outside git.

    None for an installed package too: the repository around its environment is somebody else's.
    """
    if INSTALLED:
        return None
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=CONF.parent, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def hardware(device: torch.device) -> str:
    """Return the name of the accelerator, or of the CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads != 1)}"


def _processor() -> str:
    try:
        lines = split_lines(Path("/proc/cpuinfo").read_text())
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def physical_cores() -> int:
    """Return the number of physical cores this process may use."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    groups = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        groups.add(siblings.read_text() if siblings.is_file() else str(cpu))
    return max(1, len(groups))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
