"""stage=tune: which search a command asks for."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from harness.plan import build_metrics, draws
from sjd2.config import choices, instantiate
from sjd2.errors import UserError
from sweeps.tune.search import Search
from sweeps.tune.space import Tune
from sweeps.tune.window_prediction import TuneWindow
from sweeps.tune.window_search import WindowSearch


def stage(cfg: DictConfig) -> Path:
    """Run stage=tune: search the settings of decoder= as tune= defines."""
    if cfg.get("tune") is None:
        valid = choices("tune")
        raise UserError(f"stage=tune needs a search: tune={' or tune='.join(valid) or 'NAME'}.")
    tune: Tune | TuneWindow = instantiate(cfg.tune)
    out = Path(cfg.runs_dir) / f"tune-{tune.name}"
    if isinstance(tune, TuneWindow):
        return WindowSearch(cfg, tune, out).run()
    metrics = build_metrics(cfg, images=draws(cfg))
    tune.check()
    return Search(cfg, tune, metrics, out).run()
