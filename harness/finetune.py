"""Stage finetune: give a recipe its folder, its device and the tracker's curves, in one process or under torchrun."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from evaluation.identity import by_content, identity
from evaluation.run_folder import RunFolder
from harness.console import CONF
from harness.job import about
from harness.plan import build_tracker, model_settings, resolve_device
from harness.settings import check_writable
from harness.tracking import NoTracker
from sjd2.config import instantiate
from sjd2.errors import UserError
from sjd2.finetune import distributed


def train(cfg: DictConfig) -> Path:
    """Run the recipe of `finetune=` in <runs_dir>/finetune-<name>/ and return that folder; its result is in final/.

    Raises UserError if no recipe is named or the folder holds a training of other settings.
    """
    if cfg.get("finetune") is None:
        recipes = ", ".join(sorted(path.stem for path in (CONF / "finetune").glob("*.yaml")))
        raise UserError(f"stage=finetune needs finetune=RECIPE. Valid: {recipes}.")
    with _one_voice(), distributed.processes(resolve_device(cfg.device)) as device:
        return _train(cfg, device)


def _train(cfg: DictConfig, device: str) -> Path:
    name, first = HydraConfig.get().runtime.choices["finetune"], distributed.first()
    recipe, tracker = instantiate(cfg.finetune), build_tracker(cfg) if first else NoTracker()
    if distributed.size() > 1 and not getattr(recipe, "parallel", False):
        raise UserError(f"finetune={name} trains in one process; start it without torchrun.")
    folder = RunFolder(cfg.run_dir or Path(cfg.runs_dir) / f"finetune-{name}")
    check_writable(folder.path, "runs_dir")
    chosen = OmegaConf.to_container(cfg.finetune, resolve=True)
    chosen.pop("machine", None)  # how the machine is used: a training may go on with other values
    parts, extra = {"recipe": by_content(chosen), "seed": cfg.seed}, {}
    if getattr(recipe, "needs_model", False):
        dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
        spec = _spec(cfg, recipe)
        settings = {key: value for key, value in model_settings(cfg).items() if key != "adapter"}
        weights = distributed.from_first(spec.digest)  # fetches them: once, not once per process
        parts |= {"model": settings, "digest": weights} | ({"dtype": dtype} if dtype != "float32" else {})
    settings = identity(**parts)
    failed = True
    try:
        with folder.lock() if first else contextlib.nullcontext():
            if first:
                resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
                resolved.identity = settings
                folder.claim(resolved, settings)
                tracker.start(about(folder, "finetune"))
            distributed.barrier()
            if getattr(recipe, "needs_model", False):
                extra["model"] = spec.load(device, dtype)
            figures = recipe.run(out=folder.path, log=tracker.log, device=device, seed=cfg.seed, **extra)
            distributed.barrier()
        tracker.summary({key: value for key, value in figures.items() if isinstance(value, (int, float, str))})
        failed = False
    finally:
        tracker.finish(failed=failed)
    return folder.path


def _spec(cfg: DictConfig, recipe: Any) -> Any:
    """Return the model to start from, its own weights without an adapter, once recipe and model are checked."""
    spec = replace(instantiate(cfg.model), adapter=None)
    if distributed.size() > 1 and getattr(spec, "device_map", None) is not None:
        raise UserError(
            "model.device_map spreads one model over all GPUs and torchrun loads one on each; leave one of the two out."
        )
    if (check := getattr(recipe, "check", None)) is not None:
        check(spec)
    spec.check()
    return spec


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Let the first process of a torchrun command speak for all: what it says and the errors of the user are the same."""
    rank, local = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if rank != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  open to the end of the process
        for package in ("sjd2", "baselines", "evaluation"):
            logging.getLogger(package).setLevel(logging.WARNING)
    try:
        yield
    except UserError:
        if local != "0":  # each machine says it once: a file may be missing on one of them
            raise SystemExit(1) from None
        raise
