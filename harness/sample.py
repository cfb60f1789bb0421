"""Sample images into a run folder: fixed batches, timed parts, records that survive a kill.

# B rows of a batch, N image-phase tokens
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from evaluation.prompts import ImageIds
from evaluation.run_folder import Id, RunFolder
from harness.console import Progress, say
from harness.flops import gflops_per_token
from harness.provenance import CpuShare, end_entry, start_entry
from harness.ranks import ALONE, Ranks
from harness.signals import Dropped, Stopping, listening
from harness.tracking import Tracker
from sjd2.decoding.cuda_graph import Graphs
from sjd2.decoding.decoder import BaseDecoder
from sjd2.decoding.engine import Sample
from sjd2.decoding.generate import StepInfo, generate, stream
from sjd2.decoding.likelihood import nll
from sjd2.decoding.noise import sample_seed
from sjd2.decoding.sampling import SamplingParams
from sjd2.models.base import Condition, ImageModel

WARM_UP_PASSES = 3


@dataclass(kw_only=True)
class Job:
    """What one run samples. `load` brings the model in only when there is something to do.

    ids: all ids of the prompt list; batches are a fixed partition of them, whatever `limit` is.
    """

    run: RunFolder
    load: Callable[[], ImageModel]
    decoder: BaseDecoder
    sampling: SamplingParams
    prompts: list[str]
    ids: ImageIds
    limit: int | None
    seed: int
    batch_size: int
    refill: bool
    trace: int
    grace_s: float = 25.0  # seconds that a signal leaves for the batch in hand
    flops: bool = False  # count what one image computes, before the first is made
    graphs: Graphs | None = None  # replays passes as CUDA graphs
    launch: dict[str, Any] = field(default_factory=dict)  # entries of provenance.jsonl besides the machine

    @property
    def wanted(self) -> list[Id]:
        """Return the ids this command asks for."""
        return self.ids[: self.limit]


def sample(job: Job, tracker: Tracker, ranks: Ranks = ALONE) -> bool:
    """Make the images that the run folder lacks and return whether there were any; a complete run loads no model.

    Each rank makes its share; rank 0 returns when all have theirs. Raises Interrupted after a signal.
    """
    records = job.run.records() if ranks.main else []
    missing = [(p, r) for p, r in ranks.broadcast(lambda: job.run.missing(job.wanted, records))]
    if job.run.damaged:
        say(f"{job.run.path}: {job.run.damaged} line(s) cut by a kill are left out; their images are made again.")
    total, done = len(job.wanted), len(job.wanted) - len(missing)
    if not missing:
        say(f"{job.run.path.name}: all {total} images are there.")
        if ranks.main and job.flops and not any("gflops_per_token" in entry for entry in job.run.provenance()):
            job.run.launch(_entry(job, job.load(), ranks), records)  # counted late: a launch without images
        return False
    if done:
        say(f"{job.run.path.name}: {done} of {total} images are there, resuming.")
    share = _share(job, missing, ranks)
    model = job.load() if share else None  # more ranks than batches: the last ones have nothing to do
    launch = ranks.broadcast(lambda: job.run.launch(_entry(job, model or job.load(), ranks), records))
    peak = _make(job, model, share, launch, tracker, ranks) if model is not None else None
    with listening(job.grace_s) as stop:
        peaks = ranks.gather(peak, check=lambda: stop.leave() if stop.asked else None)
    if ranks.world > 1 and ranks.main and any(peaks):
        job.run.close_launch(launch, {"peak_memory_gb": max(filter(None, peaks))})
    return True


def _entry(job: Job, model: ImageModel, ranks: Ranks) -> dict[str, Any]:
    entry = start_entry(model.device, **job.launch)
    if job.flops:
        entry["gflops_per_token"] = gflops_per_token(model, job.decoder, job.prompts[0], job.sampling, job.seed)
    if job.graphs is not None:  # times with and without are those of two machines
        entry["hardware"] += " with CUDA graphs"
    if model.fused:
        entry["hardware"] += " and fused attention" if job.graphs is not None else " with fused attention"
    if ranks.world > 1:
        entry["ranks"] = ranks.world
        if model.device.type == "cpu":  # they share its cores, so their times are those of another machine
            entry["hardware"] += f" in each of {ranks.world} processes"
    return entry


def _share(job: Job, missing: list[Id], ranks: Ranks) -> list[Id]:
    """Return the missing ids of this rank: whole batches, dealt out in turn."""
    if job.refill:
        return ranks.share(missing)
    lacking = set(missing)
    return [key for number in ranks.share(_numbers(job, missing)) for key in _ids(job, number) if key in lacking]


def _numbers(job: Job, missing: Iterable[Id]) -> list[int]:
    """Return the numbers of the batches that these ids are in."""
    return sorted({job.ids.place(key) // job.batch_size for key in missing})


def _ids(job: Job, number: int) -> list[Id]:
    return job.ids[number * job.batch_size : (number + 1) * job.batch_size]


def _make(job: Job, model: ImageModel, share: list[Id], launch: int, tracker: Tracker, ranks: Ranks) -> float | None:
    """Make the images of this rank and write their records batch by batch; returns the peak memory in GB."""
    warm_up(job, model)
    share_of_cpu = CpuShare()
    total, done = (len(share), 0) if ranks.world > 1 else (len(job.wanted), len(job.wanted) - len(share))
    title = job.run.path.name + (f" (rank 0 of {ranks.world})" if ranks.world > 1 else "")
    end: dict[str, Any] = {}
    try:
        with listening(job.grace_s) as stop, Progress(title, done, total, shown=ranks.main) as progress:
            make = _refilled if job.refill else _batches
            with contextlib.suppress(Dropped):
                for records in make(job, model, share, launch, stop):
                    job.run.append(*records, rank=ranks.number)
                    done += len(records)
                    stop.end()
                    _report(records, done, progress, tracker)
                    if stop.asked and not job.refill:
                        break
            if stop.asked:
                say(f"stopped by {stop.name}: {done} of {total} images are there, the same command resumes.")
                stop.leave()
    finally:
        end = end_entry(model.device) | share_of_cpu.entry(model.device)
        if ranks.main:
            job.run.close_launch(launch, end)
    return end.get("peak_memory_gb")


# ---- batches


def _batches(
    job: Job, model: ImageModel, share: list[Id], launch: int, stop: Stopping
) -> Iterator[list[dict[str, Any]]]:
    """Yield the missing records batch by batch; a batch with one missing image runs whole, for the same tokens."""
    missing = set(share)
    for number in _numbers(job, missing):
        batch = _ids(job, number)
        stop.begin()
        yield _batch(job, model, batch, [key in missing for key in batch], number, launch, stop)


def _batch(
    job: Job, model: ImageModel, batch: list[Id], wanted: list[bool], number: int, launch: int, stop: Stopping
) -> list[dict[str, Any]]:
    clock = _Clock(model.device)
    prompts, seeds = [job.prompts[p] for p, _ in batch], [sample_seed(job.seed, *key) for key in batch]
    cond = _encode(model, prompts)
    seconds = {"encode": clock.lap()}
    tracer = _Tracer(model.device) if any(key in batch for key in job.ids[: job.trace]) else None
    watch = _watch(stop, tracer)
    result = generate(model, job.decoder, cond, seeds, sampling=job.sampling, on_step=watch, graphs=job.graphs)
    seconds |= {"prefill": result.seconds["prefill"], "decode": result.seconds["decode"]}
    images, losses, seconds["image"] = _finish(job, model, cond, result.samples)
    records = []
    for row, (key, sampled) in enumerate(zip(batch, result.samples, strict=True)):
        if not wanted[row]:
            continue
        if tracer is not None:
            job.run.write_trace(key, *tracer.of(row, sampled, guesses=key == job.ids[0]))
        head = {"batch": number, "batch_rows": len(batch), "launch": launch, "seed": seeds[row], "nll": losses[row]}
        records.append(_record(job, key, sampled, images[row], seconds, head))
    return records


def _watch(stop: Stopping, tracer: _Tracer | None) -> Callable[[StepInfo], None]:
    """Return the callback for every pass."""

    def step(info: StepInfo) -> None:
        if tracer is not None:
            tracer(info)
        stop.check()

    return step


def _refilled(
    job: Job, model: ImageModel, missing: list[Id], launch: int, stop: Stopping
) -> Iterator[list[dict[str, Any]]]:
    """Yield records one by one as rows finish; a row's time runs from the moment its prompt was taken.

    After a signal no row takes a new prompt; those in flight finish.
    Every row is busy until the prompts run out, so images per second are batch_rows / mean latency (Little's law).
    """
    taken: dict[int, float] = {}
    rows = min(job.batch_size, len(missing))

    def requests() -> Iterator[tuple[str, int]]:
        for index, key in enumerate(missing):
            if stop.asked:
                return
            taken[index] = time.perf_counter()
            yield job.prompts[key[0]], sample_seed(job.seed, *key)

    watch = _watch(stop, None)
    for index, sampled in stream(
        model, job.decoder, requests(), rows=rows, sampling=job.sampling, on_step=watch, graphs=job.graphs
    ):
        key, ended = missing[index], _Clock(model.device).began
        seconds = {"encode": 0.0, "prefill": 0.0, "decode": ended - taken.pop(index)}  # the row's own, prompt included
        images, losses, seconds["image"] = _finish(job, model, _encode(model, [job.prompts[key[0]]]), [sampled])
        # a batch of its own each, also among ranks
        head = {"batch": job.ids.place(key), "batch_rows": rows, "launch": launch, "seed": sample_seed(job.seed, *key)}
        yield [_record(job, key, sampled, images[0], seconds, head | {"nll": losses[0]})]
        waited = time.perf_counter() - ended
        for other in taken:  # pixels and likelihood of this image are no part of the others' decoding
            taken[other] += waited


def _record(
    job: Job, key: Id, sampled: Sample, image: np.ndarray, seconds: dict[str, float], head: dict[str, Any]
) -> dict[str, Any]:
    """Write image and tokens, and return the line that names them."""
    files = job.run.write_image(key, image, sampled.tokens)
    if not np.isfinite(head["nll"]):  # JSON has no NaN; a float16 overflow is the usual cause
        head = {name: value for name, value in head.items() if name != "nll"}
    return {
        "id": list(key),
        "prompt": job.prompts[key[0]],
        **head,
        "tokens": len(sampled.tokens),
        "forwards": sampled.forwards,
        "draft_forwards": sampled.draft_forwards,
        "accepted": [int(n) for n in sampled.accepted],
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
        **files,
    }


@torch.inference_mode()
def _encode(model: ImageModel, prompts: list[str]) -> Condition:
    return model.encode(prompts)


@torch.inference_mode()
def _finish(
    job: Job, model: ImageModel, cond: Condition, samples: list[Sample]
) -> tuple[np.ndarray, list[float], float]:
    """Turn tokens into pixels; returns images uint8 [B, H, W, 3], -log p [B], and the seconds that the pixels took."""
    tokens = torch.from_numpy(np.stack([sampled.tokens for sampled in samples])).to(model.device)
    clock = _Clock(model.device)
    images = model.decode(tokens)
    seconds = clock.lap()
    return images.permute(0, 2, 3, 1).cpu().numpy(), nll(model, cond, tokens, job.sampling).tolist(), seconds


def _report(records: list[dict[str, Any]], done: int, progress: Progress, tracker: Tracker) -> None:
    tokens, forwards = sum(r["tokens"] for r in records), sum(r["forwards"] for r in records)
    progress.advance(images=len(records), tokens=tokens, forwards=forwards)
    seconds = records[0]["seconds"]
    values = {
        "sampling/tokens_per_forward": tokens / forwards,
        "sampling/forwards": forwards / len(records),
        "sampling/latency_s": seconds["prefill"] + seconds["decode"],
        "sampling/images_per_s": records[0]["batch_rows"] / sum(seconds.values()),
    }
    if all("nll" in r for r in records):
        values["sampling/nll_per_token"] = sum(r["nll"] for r in records) / tokens
    tracker.log(done, values)


# ---- timing


class _Clock:
    """Wall time between laps; waits for the device, so that queued work counts where it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began = self._now()

    def lap(self) -> float:
        before, self.began = self.began, self._now()
        return self.began - before

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class _Tracer:
    """Note when each row had committed how many tokens; waits for the device at each pass, so it slows the run."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.began = device, time.perf_counter()
        self.passes: list[tuple[float, list[int]]] = []
        self.details: list[dict[str, list[list[int]]]] = []

    def __call__(self, step: StepInfo) -> None:
        committed = step.committed.tolist()
        self.passes.append((time.perf_counter() - self.began, committed))
        self.details.append({key: values.tolist() for key, values in step.peek().items()})

    def of(
        self, row: int, sampled: Sample, *, guesses: bool
    ) -> tuple[list[tuple[float, int]], dict[str, list[list[int]]]]:
        """Return (seconds, tokens committed) per pass of one row, up to its last token, and the details of these passes.

        guesses: keep the draft tokens too; a large model's fill megabytes, so one image of a run has to do.
        """
        trace, details, last = [], {}, 0
        for (moment, committed), values in zip(self.passes, self.details, strict=True):
            if committed[row] <= last:
                continue
            last = min(committed[row], len(sampled.tokens))
            trace.append((round(moment, 6), last))
            for key, rows in values.items():
                if rows[row] and (guesses or key != "guesses"):
                    details.setdefault(key, []).append(rows[row])
        return trace, details


class _Warm(Exception):
    pass


def warm_up(job: Job, model: ImageModel) -> None:
    """Run a few passes of the first batch and one decoding to pixels, unrecorded: first calls are slow."""

    def few(step: StepInfo) -> None:
        if step.pass_index >= WARM_UP_PASSES:
            raise _Warm

    batch = job.ids[: job.batch_size]
    cond = _encode(model, [job.prompts[p] for p, _ in batch])
    with contextlib.suppress(_Warm):
        generate(model, job.decoder, cond, [0] * len(batch), sampling=job.sampling, on_step=few, graphs=job.graphs)
    with torch.inference_mode():
        model.decode(model.layout.forced().clamp(min=0).to(model.device).expand(len(batch), -1))
    synchronize(model.device)
