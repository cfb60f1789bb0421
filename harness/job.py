"""One run from settings to metrics.json: lock, sample, score, mirror to the tracker; and its baseline."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from evaluation.declared import declared, shown
from evaluation.part_names import KEPT, part_names
from evaluation.run_folder import RunFolder, Snapshot
from evaluation.score import NOTE, Metric, score
from harness.console import GROUPS, say
from harness.grids import draw_grids
from harness.plan import Plan
from harness.ranks import ALONE, Ranks
from harness.sample import Job, sample
from harness.tracking import About, NoTracker, Tracker
from sjd2.config import compose
from sjd2.decoding.cuda_graph import Graphs, obstacle
from sjd2.files import write_atomically
from sjd2.models.base import ImageModel

GRID = 64  # images at most in grid.png
SHOWN = 32  # images shown one by one in the tracker
OWN = re.compile(r"[+~]*(decoder|run_dir)([./=@]|$)")  # overrides that belong to one decoder's run, not to its baseline


class Models:
    """Load weights once for the runs of one command that share them."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, ...], ImageModel] = {}  # one at most

    def load(self, plan: Plan) -> ImageModel:
        """Return the model of `plan`, the one in memory if it is the same."""
        key = (plan.spec.name, plan.identity["digest"], plan.device, plan.dtype)
        if key not in self._loaded:
            self._loaded.clear()  # free the old weights first: two 7B models rarely fit
            if plan.device.startswith("cuda:"):
                torch.cuda.set_device(plan.device)  # what a library puts on "cuda" lands there too
            self._loaded[key] = plan.spec.load(plan.device, plan.dtype)
        fuse_loudly(self._loaded[key], plan.fused)
        return self._loaded[key]


def fuse_loudly(model: ImageModel, wanted: bool) -> None:
    """Fuse what the model computes on a GPU, or not; say why where it cannot, and what took long."""
    from sjd2.models.fusion import fuse  # imports half of transformers

    begin = time.perf_counter()
    left_out = fuse(model, wanted)
    if (seconds := time.perf_counter() - begin) > 2:
        say(f"the attention kernel was compiled and compared with SDPA in {seconds:.0f} s.")
    for sentence in left_out:
        say(f"{sentence}.")


def recorder(cfg: DictConfig, plan: Plan) -> Graphs | None:
    """Return what records passes as CUDA graphs: by default on a GPU, and it says why where that is not done.

    runtime.graph=true records whatever can be tried, runtime.graph=false nothing.
    """
    if cfg.runtime.graph is False or not plan.device.startswith("cuda"):
        return None
    why = None if cfg.runtime.graph else obstacle(plan.spec, plan.decoder)
    if why is not None:
        say(f"passes run as they are, not as CUDA graphs: {why}.")
    return Graphs() if why is None else None


def make_run(
    cfg: DictConfig,
    plan: Plan,
    *,
    metrics: Mapping[str, Metric],
    tracker: Tracker,
    models: Models,
    wait: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Sample what the run folder lacks, score it, and return its metrics; the tracker's run stays open.

    wait: wait for a process that is making the same run. ranks: the processes that share the work; all but the first
    return {} when their share is made. Raises UserError if the folder is in use or another run's.
    """
    settings = DictConfig(OmegaConf.to_container(cfg, resolve=True))
    settings.identity = plan.identity
    settings[KEPT] = part_names(settings.decoder)
    with _inside(plan.run, ranks, wait=wait):
        if ranks.main:
            plan.run.claim(settings, plan.identity)
            plan.prompts.keep(plan.run)
            if _is_mirrored(cfg, plan, settings.evaluation):
                tracker = NoTracker()  # a finished run repeated is no new run there
            tracker.start(about(plan.run, "sample"))
        made = sample(_job(cfg, plan, models), tracker, ranks)
        if not ranks.main:
            return {}
        run = Snapshot(plan.run)
        if made or not (run.path / "acceptance.png").is_file():
            draw_grids(run, plan.spec.layout, plan.decoder.lookahead + 1, GRID)
        numbers = measure(run, metrics, settings.evaluation)
    mirror(run, numbers, tracker)
    return numbers


def _job(cfg: DictConfig, plan: Plan, models: Models) -> Job:
    """Return what is to be sampled."""
    return Job(
        run=plan.run,
        load=lambda: models.load(plan),
        decoder=plan.decoder,
        sampling=plan.sampling,
        prompts=plan.prompts.texts,
        ids=plan.prompts.ids(),
        limit=cfg.limit,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        refill=cfg.refill,
        trace=cfg.trace,
        grace_s=cfg.runtime.grace_s,
        flops=cfg.runtime.flops,
        graphs=recorder(cfg, plan),
        launch={"dtype": plan.dtype, "weights": plan.identity["digest"], "run": plan.identity["id"]},
    )


@contextlib.contextmanager
def _inside(run: RunFolder, ranks: Ranks, *, wait: bool) -> Iterator[None]:
    """Hold the run's lock: rank 0 takes it, the others join it."""
    if ranks.main:
        with run.lock(wait=wait, shared=ranks.world > 1):
            ranks.broadcast(lambda: True)
            yield
    else:
        ranks.broadcast(lambda: True)
        with run.join():
            yield


def measure(
    run: Snapshot, metrics: Mapping[str, Metric], settings: DictConfig, *, again: bool = False
) -> dict[str, Any]:
    """Return the metrics of a run; it is scored unless these settings scored as many images before, or if `again`."""
    if not again and _is_scored(run, settings):
        return run.folder.metrics
    numbers = score(run, metrics)  # removes the note: after a kill in between there is none
    write_atomically(run.path / NOTE, json.dumps(_state(run, settings)).encode())
    return numbers


def _is_scored(run: Snapshot, settings: DictConfig) -> bool:
    """Return whether these settings scored as many images before."""
    with contextlib.suppress(OSError, ValueError):
        known = json.loads((run.path / NOTE).read_text(encoding="utf-8")) == _state(run, settings)
        return known and run.folder.metrics.get("n_images") == len(run.records)
    return False


def _state(run: Snapshot, settings: DictConfig) -> dict[str, Any]:
    return {"n_images": len(run.records), "settings": OmegaConf.to_container(settings, resolve=True)}


def _is_mirrored(cfg: DictConfig, plan: Plan, settings: DictConfig) -> bool:
    """Return whether W&B has this run as it is: nothing is to be made or scored, and an earlier launch was tracked."""
    tracked = (plan.run.path / "wandb").is_dir()
    return tracked and not plan.run.missing(plan.prompts.ids(cfg.limit)) and _is_scored(Snapshot(plan.run), settings)


def make_baseline(
    cfg: DictConfig, plan: Plan, *, metrics: Mapping[str, Metric], models: Models, ranks: Ranks = ALONE
) -> None:
    """Make the AR run where runs_dir lacks it or part of it; another process that makes it is waited for."""

    def lacking() -> bool:
        with plan.run.lock(wait=True):
            return bool(plan.run.missing(plan.prompts.wanted(cfg.limit)) or not plan.run.metrics)

    if ranks.broadcast(lacking):
        make_run(cfg, plan, metrics=metrics, tracker=NoTracker(), models=models, wait=True, ranks=ranks)


def mirror(run: Snapshot, numbers: Mapping[str, Any], tracker: Tracker) -> None:
    """Show images, a table of samples, the histogram of accepted tokens and the final metrics in the tracker."""
    numbers = shown(numbers, declared([run.folder]))
    tracker.summary({key: value for key, value in numbers.items() if isinstance(value, (int, float, str))})
    records = run.records
    step = len(records)
    for name in ("grid", "acceptance"):
        if (run.path / f"{name}.png").is_file():
            tracker.images(step, name, [(run.path / f"{name}.png", run.path.name)])
    tracker.images(step, "images", [(run.path / record["image"], record["prompt"]) for record in records[:SHOWN]])
    columns = ("prompt", "seed", "tokens", "forwards", "step_compression", "nll_per_token")
    rows = [
        (
            record["prompt"],
            str(record["seed"]),
            record["tokens"],
            record["forwards"],
            record["tokens"] / record["forwards"],
            record["nll"] / record["tokens"] if "nll" in record else None,
        )
        for record in records
    ]
    tracker.table(step, "samples", columns, rows)
    tracker.histogram(step, "accepted_per_forward", [n for record in records for n in record["accepted"]])


def sweep_name() -> str | None:
    """Return the name of the multirun this job belongs to, None for a single run."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().sweep.dir).name


def baseline_settings(cfg: DictConfig) -> DictConfig:
    """Compose this command once more with `decoder=<baseline>`, without the settings of its own decoder.

    Tuned defaults follow the new decoder; an experiment's values under `decoder:` do not reach it.
    """
    return recompose([], decoder=cfg.baseline)


def recompose(overrides: Sequence[str], *, decoder: str | None = None) -> DictConfig:
    """Compose this command once more with further overrides; with `decoder`, without the settings of its own one."""
    hydra = HydraConfig.get()
    if decoder is None:
        return _compose([*hydra.overrides.task, *overrides])
    chosen = f"decoder={decoder}"
    base = _compose([*(word for word in hydra.overrides.task if not OWN.match(word)), *overrides, chosen])
    # an experiment may say something under `decoder:`, which is not meant for this one
    choices = {group: hydra.runtime.choices.get(group) for group in GROUPS if group != "decoder"}
    base.decoder = _compose([*(f"{group}={choice}" for group, choice in choices.items() if choice), chosen]).decoder
    return base


def _compose(overrides: Sequence[str]) -> DictConfig:
    """Compose with the folders of this command, from within it."""
    hydra = HydraConfig.get()
    folder = next(source.path for source in hydra.runtime.config_sources if source.provider == "main")
    search = [source.path for source in hydra.runtime.config_sources if "command-line" in source.provider]
    return compose(overrides, search=search, folder=folder, name=hydra.job.config_name or "config")


def about(run: RunFolder, kind: str) -> About:
    """Return what a tracker has to know of a run that is on the disk."""
    config = run.settings
    name, group = run.path.name, sweep_name()
    return About(id=config["identity"]["id"], name=name, kind=kind, config=config, folder=run.path, group=group)
