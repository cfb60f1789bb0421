"""Compose the running command once more: with its decoder's own parts, with other settings, as its AR baseline."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sjd2.config import compose, expand_home
from sjd2.part_choices import choose_parts

OWN = re.compile(r"[+~]*decoder([./=@]|$)")  # overrides that belong to one decoder


def settled(cfg: DictConfig) -> DictConfig:
    """Return the settings of this command: parts without the values of others, paths without `~`."""
    if HydraConfig.initialized():
        hydra = HydraConfig.get()
        if choose_parts(hydra.overrides.task, hydra.runtime.choices):
            return recompose([])
    expand_home(cfg)
    return cfg


def baseline_settings(cfg: DictConfig) -> DictConfig:
    """Compose this command once more with `decoder=<baseline>`, without the settings of its own decoder."""
    return recompose([], decoder=cfg.baseline)


def recompose(overrides: Sequence[str], *, decoder: str | None = None) -> DictConfig:
    """Compose this command once more with further overrides.

    decoder: take this decoder with its defaults on the model, and no run_dir, in place of whatever the command line or an
    experiment says of its own one. An experiment may override a part that this decoder does not have, so the command is
    composed with its own decoder first.
    """
    hydra = HydraConfig.get()
    cfg = _compose([*hydra.overrides.task, *overrides])
    if decoder is not None:
        cfg.decoder = _compose([f"model={hydra.runtime.choices['model']}", f"decoder={decoder}"]).decoder
        cfg.run_dir = None
    return cfg


def _compose(overrides: Sequence[str]) -> DictConfig:
    """Compose with the folders of this command, from within it."""
    hydra = HydraConfig.get()
    folder = next(source.path for source in hydra.runtime.config_sources if source.provider == "main")
    search = [source.path for source in hydra.runtime.config_sources if "command-line" in source.provider]
    return compose(overrides, search=search, folder=folder, name=hydra.job.config_name or "config")
