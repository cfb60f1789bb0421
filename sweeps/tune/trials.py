"""The runs that a search makes: ordinary run folders below its own, of one model, alone or in turns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from omegaconf import DictConfig

from evaluation.metrics.speed import Speed
from evaluation.run_folder import RunFolder
from evaluation.score import Metric
from harness import job
from harness.console import sentence
from harness.plan import make_plan
from harness.recompose import OWN, recompose
from sjd2.errors import UserError

TURNS = 4  # in which runs to be compared are made


class TuneSettings(Protocol):
    """What every search has. fixed: further overrides of all its runs."""

    @property
    def name(self) -> str: ...

    @property
    def fixed(self) -> list[str]: ...


class TrialRuns:
    """Makes the runs of one search; the model is loaded once."""

    def __init__(self, cfg: DictConfig, tune: TuneSettings, metrics: Mapping[str, Metric], out: Path) -> None:
        self.cfg, self.tune, self.out = cfg, tune, out
        self.metrics = {"speed": Speed(), **metrics}
        self.models = job.Models()

    def compose(self, *overrides: str, decoder: str | None = None, own: bool = False) -> DictConfig:
        """Compose the command again with further settings.

        decoder: replaces the command's decoder and its settings. own: the decoder as the command has it, without the
        settings that tune.fixed gives it.
        """
        fixed = [word for word in self.tune.fixed if (decoder is None and not own) or not OWN.match(word)]
        cfg = recompose([*fixed, "baseline=null", "run_dir=null", *overrides], decoder=decoder)
        cfg.runs_dir = str(self.out / "runs")
        return cfg

    def make(self, cfg: DictConfig, limit: int, metrics: Mapping[str, Metric]) -> RunFolder:
        """Make and score the first `limit` images of a run; existing ones are kept."""
        cfg = cfg.copy()
        cfg.limit = limit
        nodes = cfg.evaluation.get("metrics") or {}
        cfg.evaluation = {"metrics": {name: node for name, node in nodes.items() if name in metrics}}
        plan = make_plan(cfg)
        ids, known = plan.prompts.ids(limit), plan.run.metrics
        scored = known.get("n_images", 0) >= len(ids) and metrics.keys() <= set(known.get("protocol", {}))
        if plan.run.missing(ids) or not scored:
            job.make_run(job.Entry(cfg=cfg, plan=plan), metrics=metrics, models=self.models, wait=True)
        return plan.run

    def in_turns(self, cfgs: Sequence[DictConfig], images: int) -> list[RunFolder | str]:
        """Make runs a part at a time, in turns, so that a machine that is slow for a while is slow for all.

        Returns the runs, or the reason for one that could not be made.
        """
        runs: list[RunFolder | str] = [""] * len(cfgs)
        batch = self.cfg.batch_size  # whole batches: half of one costs as much
        parts = (math.ceil(images * part / TURNS / batch) * batch for part in range(1, TURNS + 1))
        for limit in sorted({min(images, part) for part in parts}):
            for place, cfg in enumerate(cfgs):
                if isinstance(runs[place], str) and runs[place]:
                    continue
                try:
                    runs[place] = self.make(cfg, limit, {"speed": Speed()})
                except (UserError, torch.OutOfMemoryError) as error:
                    runs[place] = sentence(error)
        return runs
