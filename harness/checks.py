"""Check what a command asks for against its files, before anything heavy is imported."""

from __future__ import annotations

import shlex
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from evaluation.run_folder import RunFolder
from harness.settings import resolve
from sjd2.config import instantiate
from sjd2.errors import UserError


def check_command(cfg: DictConfig) -> None:
    """Raise UserError for a forgotten stage, for prompts that cannot be read and for a run folder that is none."""
    for group in ("finetune", "tune"):
        if cfg.get(group) is not None and cfg.stage != group:
            words = [word for word in HydraConfig.get().overrides.task if not word.lstrip("+").startswith("stage=")]
            meant = shlex.join(["python", "run.py", f"stage={group}", *words])
            raise UserError(f"{group}= is read by stage={group} only, and this is stage={cfg.stage}: {meant}")
    if cfg.stage in ("sample", "tune"):
        _ = instantiate(cfg.prompts).texts
    for key in ("run_dir", "against"):
        if key == "against" and cfg.against is not None and not Path(cfg.against).is_dir():
            resolve("sweeps.compare.saved.read_baseline")(Path(cfg.against))
        elif cfg[key] is not None and cfg.stage in ("score", "compare"):
            RunFolder.open(cfg[key])
        elif cfg[key] is not None and cfg.stage in ("table", "report") and not Path(cfg[key]).is_dir():
            raise UserError(f"{key}={cfg[key]} does not exist; give the folder that a run or a sweep printed.")
