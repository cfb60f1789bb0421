"""Stage finetune: give a recipe its folder, its device and the tracker's curves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from evaluation import validate
from evaluation.console import CONF
from evaluation.job import about
from evaluation.records import RunFolder, by_content, identity
from evaluation.settings import check_writable
from sjd2.errors import UserError
from sjd2.instantiate import instantiate


def train(cfg: DictConfig) -> Path:
    """Run the recipe of `finetune=` in <runs_dir>/finetune-<name>/ and return that folder; its result is in final/.

    Raises UserError if no recipe is named or the folder holds a training of other settings.
    """
    if cfg.get("finetune") is None:
        recipes = ", ".join(sorted(path.stem for path in (CONF / "finetune").glob("*.yaml")))
        raise UserError(f"stage=finetune needs finetune=RECIPE. Valid: {recipes}.")
    name = HydraConfig.get().runtime.choices["finetune"]
    recipe, tracker = instantiate(cfg.finetune), validate.tracker(cfg)
    device = validate.resolve_device(cfg.device)
    folder = RunFolder(cfg.run_dir or Path(cfg.runs_dir) / f"finetune-{name}")
    check_writable(folder.path, "runs_dir")
    parts = {"recipe": by_content(OmegaConf.to_container(cfg.finetune, resolve=True)), "seed": cfg.seed}
    needs_model, extra = getattr(recipe, "needs_model", False), {}
    if needs_model:
        spec = replace(instantiate(cfg.model), adapter=None)  # a recipe starts from the model's own weights
        spec.check()
        settings = {key: value for key, value in validate.model_settings(cfg).items() if key != "adapter"}
        parts |= {"model": settings, "digest": spec.digest()}
    settings = identity(**parts)
    failed = True
    try:
        with folder.lock():
            resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
            resolved.identity = settings
            folder.claim(resolved, settings)
            tracker.start(about(folder, "finetune"))
            if needs_model:
                extra["model"] = spec.load(device, "float32")
            figures = recipe.run(out=folder.path, log=tracker.log, device=device, seed=cfg.seed, **extra)
        tracker.summary({key: value for key, value in figures.items() if isinstance(value, (int, float, str))})
        failed = False
    finally:
        tracker.finish(failed=failed)
    return folder.path
