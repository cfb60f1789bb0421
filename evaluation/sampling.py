"""Sample images into a run folder: fixed batches, timed parts, records that survive a kill.

# B rows of a batch, N image-phase tokens
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from evaluation.console import Progress, say
from evaluation.provenance import end_entry, start_entry
from evaluation.records import Id, RunFolder
from evaluation.tracking import Tracker
from sjd2.decoding import Decoder, Sample, generate, stream
from sjd2.likelihood import nll
from sjd2.models.base import Condition, ImageModel
from sjd2.noise import sample_seed
from sjd2.sampling import Sampling

WARM_UP_PASSES = 3


class Interrupted(SystemExit):
    """A run ended by SIGTERM after the batch in hand; the exit code is 128 + 15."""


@dataclass(kw_only=True)
class Job:
    """What one run samples. `load` brings the model in only when there is something to do.

    ids: all ids of the prompt list; batches are a fixed partition of them, whatever `limit` is.
    """

    run: RunFolder
    load: Callable[[], ImageModel]
    decoder: Decoder
    law: Sampling
    prompts: list[str]
    ids: list[Id]
    limit: int | None
    seed: int
    batch_size: int
    refill: bool
    trace: int
    launch: dict[str, Any] = field(default_factory=dict)  # what provenance.jsonl says besides the machine

    @property
    def wanted(self) -> list[Id]:
        """Return the ids this command asks for."""
        return self.ids[: self.limit]


def sample(job: Job, tracker: Tracker) -> bool:
    """Make the images that the run folder lacks and say whether there were any; a complete run costs no model."""
    missing = job.run.missing(job.wanted)
    if job.run.damaged:
        say(f"{job.run.path}: {job.run.damaged} line(s) cut by a kill are left out; their images are made again.")
    total, done = len(job.wanted), len(job.wanted) - len(missing)
    if not missing:
        say(f"{job.run.path.name}: all {total} images are there.")
        return False
    if done:
        say(f"{job.run.path.name}: {done} of {total} images are there, going on.")
    model = job.load()
    launch = job.run.launch(start_entry(model.device, **job.launch))
    warm_up(job, model)
    try:
        with _on_sigterm() as stopping, Progress(job.run.path.name, done, total) as progress:
            made = _refilled(job, model, missing, launch) if job.refill else _batches(job, model, set(missing), launch)
            for records in made:
                job.run.append(*records)
                done += len(records)
                _report(records, done, progress, tracker)
                if stopping() and done < total:
                    say(f"stopped by SIGTERM: {done} of {total} images are there, the same command goes on.")
                    raise Interrupted(128 + signal.SIGTERM)
    finally:
        job.run.close_launch(launch, end_entry(model.device))
    return True


# ---- batches


def _batches(job: Job, model: ImageModel, missing: set[Id], launch: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the missing records batch by batch; a batch with one missing image runs whole, for the same tokens."""
    for number in range(0, len(job.ids), job.batch_size):
        batch = job.ids[number : number + job.batch_size]
        if not missing.intersection(batch):
            continue
        yield _batch(job, model, batch, [key in missing for key in batch], number // job.batch_size, launch)


def _batch(
    job: Job, model: ImageModel, batch: list[Id], wanted: list[bool], number: int, launch: int
) -> list[dict[str, Any]]:
    clock = _Clock(model.device)
    prompts, seeds = [job.prompts[p] for p, _ in batch], [sample_seed(job.seed, *key) for key in batch]
    cond = _encode(model, prompts)
    seconds = {"encode": clock.lap()}
    tracer = _Tracer(model.device) if any(key in batch for key in job.ids[: job.trace]) else None
    result = generate(model, job.decoder, cond, seeds, law=job.law, on_step=tracer)
    seconds |= {"prefill": result.seconds["prefill"], "decode": result.seconds["decode"]}
    images, losses, seconds["image"] = _finish(job, model, cond, result.samples)
    records = []
    for row, (key, sampled) in enumerate(zip(batch, result.samples, strict=True)):
        if not wanted[row]:
            continue
        if tracer is not None:
            job.run.write_trace(key, tracer.of(row, sampled))
        head = {"batch": number, "batch_rows": len(batch), "launch": launch, "seed": seeds[row], "nll": losses[row]}
        records.append(_record(job, key, sampled, images[row], seconds, head))
    return records


def _refilled(job: Job, model: ImageModel, missing: list[Id], launch: int) -> Iterator[list[dict[str, Any]]]:
    """Yield records one by one as rows finish; a row's time runs from the moment its prompt was taken.

    Every row is busy until the prompts run out, so images per second are batch_rows / mean latency (Little's law).
    """
    taken: dict[int, float] = {}
    rows = min(job.batch_size, len(missing))

    def requests() -> Iterator[tuple[str, int]]:
        for index, key in enumerate(missing):
            taken[index] = time.perf_counter()
            yield job.prompts[key[0]], sample_seed(job.seed, *key)

    for index, sampled in stream(model, job.decoder, requests(), rows=rows, law=job.law):
        key, ended = missing[index], _Clock(model.device).began
        seconds = {"encode": 0.0, "prefill": 0.0, "decode": ended - taken.pop(index)}  # the row's own, prompt included
        images, losses, seconds["image"] = _finish(job, model, _encode(model, [job.prompts[key[0]]]), [sampled])
        head = {"batch": index, "batch_rows": rows, "launch": launch, "seed": sample_seed(job.seed, *key)}
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
    return images.permute(0, 2, 3, 1).cpu().numpy(), nll(model, cond, tokens, job.law).tolist(), seconds


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
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class _Tracer:
    """Note when each row had committed how many tokens; waits for the device at each pass, so it slows the run."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.began = device, time.perf_counter()
        self.passes: list[tuple[float, list[int]]] = []

    def __call__(self, step: Any) -> None:
        committed = step.committed.tolist()
        self.passes.append((time.perf_counter() - self.began, committed))

    def of(self, row: int, sampled: Sample) -> list[tuple[float, int]]:
        """Return (seconds, tokens committed) per pass of one row, up to its last token."""
        trace, last = [], 0
        for moment, committed in self.passes:
            if committed[row] > last:
                last = min(committed[row], len(sampled.tokens))
                trace.append((round(moment, 6), last))
        return trace


class _Warm(Exception):
    pass


def warm_up(job: Job, model: ImageModel) -> None:
    """Run a few passes of the first batch and one decoding to pixels, unrecorded: first calls are slow."""

    def stop(step: Any) -> None:
        if step.pass_index >= WARM_UP_PASSES:
            raise _Warm

    batch = job.ids[: job.batch_size]
    cond = _encode(model, [job.prompts[p] for p, _ in batch])
    with contextlib.suppress(_Warm):
        generate(model, job.decoder, cond, [0] * len(batch), law=job.law, on_step=stop)
    with torch.inference_mode():
        model.decode(model.layout.forced().clamp(min=0).to(model.device).expand(len(batch), -1))
    synchronize(model.device)


# ---- SIGTERM


@contextlib.contextmanager
def _on_sigterm() -> Iterator[Callable[[], bool]]:
    """Let the batch in hand finish after SIGTERM; a second one ends the process at once. Yields "was it sent?"."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    sent = []

    def note(number: int, _frame: Any) -> None:
        sent.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print("SIGTERM: finishing the batch in hand (a second SIGTERM ends at once)", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(sent)
    finally:
        signal.signal(signal.SIGTERM, before)
