"""Stage finetune: run a recipe in its folder, on its device, tracked, in one process or under torchrun."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from evaluation.identity import by_content, difference, identity, same
from evaluation.run_folder import RunFolder
from harness.job import about
from harness.plan import build_tracker, model_settings
from harness.settings import check_writable
from harness.tracking import NoTracker
from sjd2.config import choices, instantiate
from sjd2.devices import resolve_device, resolve_dtype
from sjd2.errors import UserError
from sjd2.finetune import distributed
from sjd2.finetune.recipe import Recipe
from sjd2.models.spec import ModelSpec

OWN = re.compile(r"(model|device|dtype)[.=]")  # settings of a training that the use of its result needs too


def train(cfg: DictConfig) -> Path:
    """Run the recipe of `finetune=` in <runs_dir>/finetune-<name>/ and return that folder; its result is in final/.

    Raises UserError if no recipe is named or the folder holds a training of other settings.
    """
    if cfg.get("finetune") is None:
        recipes = ", ".join(choices("finetune"))
        raise UserError(f"stage=finetune needs finetune=RECIPE. Valid: {recipes}.")
    with _one_voice(), distributed.processes(resolve_device(cfg.device)) as device:
        return _train(cfg, device)


def usage(cfg: DictConfig, result: Path) -> str:
    """Return the command that uses the result of a training, with the model settings of this one; '' if none does."""
    settings = instantiate(cfg.finetune).usage(result)
    kept = [
        word for word in HydraConfig.get().overrides.task if OWN.match(word) and not word.startswith("model.adapter")
    ]
    shell = [shlex.quote(word) for word in kept if word.partition("=")[0] not in settings]
    return " ".join(["python run.py", *shell, settings]) if settings else ""


def _train(cfg: DictConfig, device: str) -> Path:
    name, first = HydraConfig.get().runtime.choices["finetune"], distributed.first()
    recipe: Recipe = instantiate(cfg.finetune)
    tracker = build_tracker(cfg) if first else NoTracker()
    if distributed.size() > 1 and not recipe.parallel:
        raise UserError(f"finetune={name} trains in one process; start it without torchrun.")
    folder = RunFolder(cfg.run_dir or Path(cfg.runs_dir) / f"finetune-{name}")
    check_writable(folder.path, "runs_dir")
    spec = _spec(cfg, recipe) if recipe.needs_model else None
    dtype = resolve_dtype(cfg.dtype or "float32", device)
    settings = _identity(cfg, spec, dtype)
    failed = True
    try:
        with folder.lock() if first else contextlib.nullcontext():
            if first:
                resolved: Any = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
                resolved.identity = settings
                _check_same(folder, settings)
                folder.claim(resolved, settings)
                tracker.start(about(folder, "finetune"))
            distributed.barrier()
            model = spec.load(device, dtype) if spec is not None else None
            metrics = recipe.run(model=model, out=folder.path, log=tracker.log, device=device, seed=cfg.seed)
            distributed.barrier()
        tracker.summary({key: value for key, value in metrics.items() if isinstance(value, (int, float, str))})
        failed = False
    finally:
        tracker.finish(failed=failed)
    return folder.path


def _check_same(folder: RunFolder, settings: dict[str, Any]) -> None:
    """Raise UserError where the folder holds a training of other settings: its learning rate fell along its own steps."""
    if folder.identity and not same(folder.identity, settings):
        raise UserError(
            f"{folder.path} holds another training ({difference(folder.identity, settings)}), which cannot be continued as "
            f"this one; give run_dir={folder.path}-2, or delete the old one: rm -r {shlex.quote(str(folder.path))}"
        )


def _identity(cfg: DictConfig, spec: ModelSpec | None, dtype: str) -> dict[str, Any]:
    """Return what decides the training's result; how the machine is used may change when it is resumed."""
    chosen: Any = OmegaConf.to_container(cfg.finetune, resolve=True)
    chosen.pop("machine", None)
    parts = {"recipe": by_content(chosen), "seed": cfg.seed}
    if spec is not None:
        settings = {key: value for key, value in model_settings(cfg).items() if key != "adapter"}
        weights = distributed.from_first(spec.digest)  # fetches them: once, not once per process
        parts |= {"model": settings, "digest": weights} | ({"dtype": dtype} if dtype != "float32" else {})
    return identity(**parts)


def _spec(cfg: DictConfig, recipe: Recipe) -> ModelSpec:
    """Return the model to start from, its own weights without an adapter, once recipe and model are checked."""
    # a training reads and draws tokens: a diffusion stage that makes pixels of them is neither looked for nor loaded
    spec: ModelSpec = replace(instantiate(cfg.model), adapter=None, pixels="none")
    if distributed.size() > 1 and spec.device_map is not None:
        raise UserError(
            "model.device_map spreads one model over all GPUs and torchrun loads one on each; leave one of the two out."
        )
    recipe.check(spec)
    spec.check()
    return spec


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Let the first process of a torchrun command speak for all: messages and user errors are the same in each."""
    rank, local = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if rank != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  open to the end of the process
        for package in ("sjd2", "baselines", "evaluation"):
            logging.getLogger(package).setLevel(logging.WARNING)
    try:
        yield
    except UserError:
        if local != "0":  # once per machine: a file may be missing on one of them
            raise SystemExit(1) from None
        raise
