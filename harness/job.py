"""One run from settings to metrics.json, and its baseline in turns: lock, sample, score, mirror to the tracker."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from evaluation.declared import declared, shown
from evaluation.metrics.speed import Speed
from evaluation.part_names import KEPT, part_names
from evaluation.prompts import ImageIds
from evaluation.run_folder import RunFolder, Snapshot, record_id
from evaluation.score import NOTE, Metric, score
from evaluation.timings import unfinished_retiming, untimed
from harness.console import say
from harness.grids import draw_grids
from harness.plan import Plan
from harness.ranks import ALONE, Ranks
from harness.sample import Job, Retiming
from harness.tracking import About, NoTracker, Tracker
from harness.turns import make_images
from sjd2.compiler import Compiler
from sjd2.decoding.cuda_graph import Graphs, usual_graphs
from sjd2.errors import UserError
from sjd2.files import write_atomically
from sjd2.models.base import ImageModel

GRID = 64  # images at most in grid.png
SHOWN = 32  # images shown one by one in the tracker


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
            self._loaded[key] = loaded = plan.spec.load(plan.device, plan.dtype)
            if loaded.adapter is not None and not loaded.adapter.settings.gated:
                say(
                    "the fine-tuning changes the weights themselves, for AR and for lossless decoders too: the original's AR "
                    "is decoder=ar model.adapter=null."
                )
        model = self._loaded[key]
        fuse_loudly(model, plan.fused)
        model.compiler = (model.compiler or Compiler()) if plan.compiled else None
        return model


def fuse_loudly(model: ImageModel, wanted: bool) -> None:
    """Fuse what the model computes on a GPU, or not; say why where it cannot, and what took long."""
    from sjd2.models.fusion import fuse  # imports half of transformers

    begin = time.perf_counter()
    left_out = fuse(model, wanted)
    if (seconds := time.perf_counter() - begin) > 2:
        say(f"the kernels were compiled and compared with torch's in {seconds:.0f} s.")
    for sentence in left_out:
        say(f"{sentence}.")


def recorder(cfg: DictConfig, plan: Plan) -> Graphs | None:
    """Return what records passes as CUDA graphs: by default on a GPU, and it says why where that is not done.

    runtime.graph=true records whatever can be tried, runtime.graph=false nothing.
    """
    graphs, left_out = usual_graphs(plan.device, plan.spec, plan.decoder, cfg.runtime.graph)
    if left_out is not None:
        say(f"{left_out}.")
    return graphs


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run of a command: its settings, its plan, and where it is shown."""

    cfg: DictConfig
    plan: Plan
    tracker: Tracker = field(default_factory=NoTracker)

    def lacks(self) -> bool:
        """Return whether images or metrics are missing."""
        return bool(self.plan.run.missing(self.wanted) or not self.plan.run.metrics)

    @property
    def wanted(self) -> ImageIds:
        """Return the ids that the command asks for."""
        return self.plan.prompts.wanted(self.cfg.limit)

    def check_retime(self) -> None:
        """Raise UserError for `retime=true` where images are missing."""
        if self.cfg.retime and (missing := len(self.plan.run.missing(self.wanted))):
            raise UserError(
                f"retime=true times a finished run again, but {self.plan.run.path.name} lacks {missing} of "
                f"{len(self.wanted)} images; run the same command without it first."
            )


def make_run(
    run: Entry,
    *,
    metrics: Mapping[str, Metric],
    models: Models,
    baseline: Entry | None = None,
    wait: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Sample what the run folder lacks and score it, and its baseline too; the trackers' runs stay open.

    Both are timed in turns if they can share the model in memory and no other process is making the baseline; else the
    baseline follows. wait: wait for a process that is making the same run. ranks: the processes that share the work.
    Raises UserError if the folder is in use or another run's.
    """
    for entry in filter(None, (run, baseline)):
        entry.check_retime()
    with contextlib.ExitStack() as held:
        held.enter_context(_inside(run.plan.run, ranks, wait=wait))
        together = baseline is not None and _join_baseline(run, baseline, held, ranks)
        made = _make([baseline, run] if baseline is not None and together else [run], metrics, models, ranks)
    if ranks.main:
        mirror(*made[-1])
    if baseline is not None and not together:
        make_baseline(baseline, metrics=metrics, models=models, ranks=ranks)


def make_baseline(base: Entry, *, metrics: Mapping[str, Metric], models: Models, ranks: Ranks = ALONE) -> None:
    """Make the AR run where runs_dir lacks it or part of it; another process that makes it is waited for."""

    def lacking() -> bool:
        with base.plan.run.lock(wait=True):
            return base.lacks()

    if base.cfg.retime or ranks.broadcast(lacking):
        make_run(base, metrics=metrics, models=models, wait=True, ranks=ranks)


def _join_baseline(run: Entry, base: Entry, held: contextlib.ExitStack, ranks: Ranks) -> bool:
    """Take the baseline's lock into `held` and return True if the two runs can be made in turns and something is to do."""
    if not _alike(run, base):
        return False

    def attempt() -> bool:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(base.plan.run.lock(wait=base.cfg.retime, shared=ranks.world > 1))
            except UserError:  # another process makes it, and is waited for when this run is done
                return False
            if not base.cfg.retime and not base.lacks():
                return False
            held.enter_context(stack.pop_all())
        return True

    together = bool(ranks.broadcast(attempt))
    if together and not ranks.main:
        held.enter_context(base.plan.run.join())
    return together


def _alike(run: Entry, base: Entry) -> bool:
    """Return whether two runs share model, images and batches."""
    keys = ("digest", "prompts", "batch_size", "refill", "dtype")
    sides = [(entry.plan.device, entry.plan.fused, entry.plan.compiled, entry.cfg.limit) for entry in (run, base)]
    return sides[0] == sides[1] and all(run.plan.identity[key] == base.plan.identity[key] for key in keys)


def _make(
    entries: Sequence[Entry], metrics: Mapping[str, Metric], models: Models, ranks: Ranks
) -> list[tuple[Snapshot, dict[str, Any], Tracker]]:
    """Sample and score runs whose locks are held; return what `mirror` shows of each on rank 0, [] elsewhere."""
    settings = [_claim(entry) if ranks.main else entry.cfg for entry in entries]
    if ranks.main:  # a finished run repeated is no new run in the tracker
        known = [_is_mirrored(entry, resolved.evaluation) for entry, resolved in zip(entries, settings, strict=True)]
        entries = [replace(e, tracker=NoTracker()) if old else e for e, old in zip(entries, known, strict=True)]
        for entry in entries:
            entry.tracker.start(about(entry.plan.run, "sample"))
    session = _session(entries, ranks) if entries[-1].cfg.retime else None
    made = make_images([_job(entry, models, session) for entry in entries], ranks)
    if not ranks.main:
        return []
    found = []
    for entry, resolved, new in zip(entries, settings, made, strict=True):
        run = Snapshot(entry.plan.run)
        if (new and session is None) or not (run.path / "acceptance.png").is_file():
            draw_grids(run, entry.plan.spec.layout, entry.plan.decoder, GRID)
        numbers = measure(run, metrics, resolved.evaluation, retimed=session is not None)
        found.append((run, numbers, entry.tracker))
    return found


def _claim(entry: Entry) -> DictConfig:
    """Write config.yaml and the prompts of a run; returns its resolved settings."""
    settings = DictConfig(OmegaConf.to_container(entry.cfg, resolve=True))
    settings.identity = entry.plan.identity
    settings[KEPT] = part_names(settings.decoder)
    settings.dtype = entry.plan.dtype  # what `auto` or a model's own came to
    entry.plan.run.claim(settings, entry.plan.identity)
    entry.plan.prompts.keep(entry.plan.run)
    return settings


def _session(entries: Sequence[Entry], ranks: Ranks) -> str:
    """Return the session of a retiming: one that was killed before its end is resumed."""

    def found() -> str:
        old = unfinished_retiming(entries[-1].plan.run)
        left = old and any(untimed(entry.plan.run, entry.wanted, old) for entry in entries)
        return old if old and left else uuid.uuid4().hex[:12]

    return str(ranks.broadcast(found))


def _job(entry: Entry, models: Models, session: str | None) -> Job:
    """Return what is to be sampled, or timed again in a session."""
    cfg, plan = entry.cfg, entry.plan
    digests = {record_id(record): record["tokens_sha256"] for record in plan.run.records()} if session else {}
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
        trace=0 if session else cfg.trace,
        grace_s=cfg.runtime.grace_s,
        flops=cfg.runtime.flops and session is None,
        graphs=recorder(cfg, plan),
        pixels=plan.pixels,
        launch={"dtype": plan.dtype, "weights": plan.identity["digest"], "run": plan.identity["id"]},
        tracker=entry.tracker,
        retiming=Retiming(session=session, digests=digests) if session else None,
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
    run: Snapshot, metrics: Mapping[str, Metric], settings: DictConfig, *, again: bool = False, retimed: bool = False
) -> dict[str, Any]:
    """Return the metrics of a run; it is scored unless these settings scored as many images before, or if `again`.

    retimed: only its times are new.
    """
    if not again and _is_scored(run, settings):
        if not retimed:
            return run.folder.metrics
        metrics = {name: metric for name, metric in metrics.items() if isinstance(metric, Speed)}
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


def _is_mirrored(entry: Entry, settings: DictConfig) -> bool:
    """Return whether W&B has this run as it is: nothing is to be made or scored, and an earlier launch was tracked."""
    tracked = (entry.plan.run.path / "wandb").is_dir() and not entry.cfg.retime
    return tracked and not entry.plan.run.missing(entry.wanted) and _is_scored(Snapshot(entry.plan.run), settings)


def mirror(run: Snapshot, numbers: Mapping[str, Any], tracker: Tracker) -> None:
    """Show images, a table of samples, the histogram of accepted tokens and the final metrics in the tracker."""
    numbers = shown(numbers, declared([run.folder]))
    tracker.summary({key: value for key, value in numbers.items() if isinstance(value, (int, float, str))})
    records = run.records
    step = len(records)
    for name in ("grid", "acceptance"):
        if (run.path / f"{name}.png").is_file():
            tracker.images(step, name, [(run.path / f"{name}.png", run.path.name)])
    shown_images = [(run.path / record["image"], record["prompt"]) for record in records[:SHOWN] if "image" in record]
    tracker.images(step, "images", shown_images)
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


def about(run: RunFolder, kind: str) -> About:
    """Return what a tracker has to know of a run that is on the disk."""
    config = run.settings
    name, group = run.path.name, sweep_name()
    return About(id=config["identity"]["id"], name=name, kind=kind, config=config, folder=run.path, group=group)
