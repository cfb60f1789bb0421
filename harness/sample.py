"""Make the images of one batch, or of a stream of requests, timed part by part; turns.py has the loop around it.

# B rows of a batch, N image-phase tokens
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from evaluation.prompts import ImageIds
from evaluation.run_folder import TIMED, Id, Record, RunFolder, digest_of, record_id
from evaluation.run_folder import name as file_name
from evaluation.timings import untimed
from harness.meter import EnergyMeter
from harness.signals import Stopping
from harness.tracking import NoTracker, Tracker
from sjd2.decoding.cuda_graph import Graphs
from sjd2.decoding.decoder import BaseDecoder
from sjd2.decoding.engine import Sample
from sjd2.decoding.generate import StepInfo, generate, stream
from sjd2.decoding.generate import warm_up as warm_up_passes
from sjd2.decoding.likelihood import nll
from sjd2.decoding.noise import sample_seed
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError
from sjd2.models.base import Condition, ImageModel


@dataclass(frozen=True, kw_only=True)
class Retiming:
    """A session of `retime=true`, and the `tokens_sha256` that each image has and must have again."""

    session: str
    digests: Mapping[Id, str]


@dataclass(kw_only=True)
class Job:
    """What one run samples, or times again. `load` brings the model in only when there is something to do.

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
    pixels: bool = True  # turn tokens into images; False with model.pixels=none
    launch: dict[str, Any] = field(default_factory=dict)  # entries of provenance.jsonl besides the machine
    tracker: Tracker = field(default_factory=NoTracker)
    retiming: Retiming | None = None  # time finished images again instead of making missing ones

    @property
    def wanted(self) -> list[Id]:
        """Return the ids this command asks for."""
        return self.ids[: self.limit]

    def batch(self, number: int) -> list[Id]:
        """Return one batch of the fixed partition of all ids."""
        return self.ids[number * self.batch_size : (number + 1) * self.batch_size]

    def numbers(self, missing: Iterable[Id]) -> list[int]:
        """Return the numbers of the batches that hold an id of `missing`, in order."""
        return sorted({self.ids.place(key) // self.batch_size for key in missing})

    def missing(self, records: list[Record]) -> list[Id]:
        """Return the wanted ids that have no record yet, or no timing of this session."""
        if self.retiming is not None:
            return untimed(self.run, self.wanted, self.retiming.session)
        return self.run.missing(self.wanted, records)

    def keep(self, records: list[Record], rank: int | None) -> None:
        """Write records, or the times of those that came out as they were before; raises UserError if others did not."""
        if self.retiming is None:
            self.run.append(*records, rank=rank)
            return
        for record in records:
            if record["tokens_sha256"] != self.retiming.digests[record_id(record)]:
                raise UserError(
                    f"retime=true: image {file_name(record_id(record))} of {self.run.path.name} came out with other tokens "
                    "than its record has, as on other hardware or library versions; nothing of this retiming is used. "
                    "For new tokens use a new runs_dir."
                )
        timed = ({key: record[key] for key in (*TIMED, "energy_j") if key in record} for record in records)
        self.run.append_timings(*timed, rank=rank)


# ---- batches


def make_batch(
    job: Job, model: ImageModel, number: int, missing: Collection[Id], launch: int, stop: Stopping
) -> list[Record]:
    """Make one batch and return the missing records; one with a single missing image runs whole, for the same tokens."""
    batch = job.batch(number)
    energy, clock = EnergyMeter(model.device), _Clock(model.device)
    prompts, seeds = [job.prompts[p] for p, _ in batch], [sample_seed(job.seed, *key) for key in batch]
    cond = _encode(model, prompts)
    seconds = {"encode": clock.lap()}
    tracer = _Tracer(model.device) if any(key in batch for key in job.ids[: job.trace]) else None
    watch = _watch(stop, tracer)
    result = generate(model, job.decoder, cond, seeds, sampling=job.sampling, on_step=watch, graphs=job.graphs)
    seconds |= {"prefill": result.seconds["prefill"], "decode": result.seconds["decode"]}
    images, losses, pixel_seconds = _finish(job, model, cond, prompts, seeds, result.samples, energy)
    seconds |= pixel_seconds
    drawn = {} if energy.joules is None else {"energy_j": round(energy.joules / len(batch), 3)}
    records = []
    for row, (key, sampled) in enumerate(zip(batch, result.samples, strict=True)):
        if key not in missing:
            continue
        if tracer is not None:
            job.run.write_trace(key, *tracer.of(row, sampled, guesses=key == job.ids[0]))
        head = {"batch": number, "batch_rows": len(batch), "launch": launch, "seed": seeds[row], "nll": losses[row]}
        head |= drawn
        image = None if images is None else images[row]
        records.append(_record(job, key, sampled, image, seconds, head))
    return records


def _watch(stop: Stopping, tracer: _Tracer | None) -> Callable[[StepInfo], None]:
    """Return the callback for every pass."""

    def step(info: StepInfo) -> None:
        if tracer is not None:
            tracer(info)
        stop.check()

    return step


def refilled(job: Job, model: ImageModel, missing: list[Id], launch: int, stop: Stopping) -> Iterator[list[Record]]:
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
        prompts, seed = [job.prompts[key[0]]], sample_seed(job.seed, *key)
        images, losses, pixel_seconds = _finish(job, model, _encode(model, prompts), prompts, [seed], [sampled])
        # a batch of its own each, also among ranks
        head = {"batch": job.ids.place(key), "batch_rows": rows, "launch": launch, "seed": seed, "nll": losses[0]}
        yield [_record(job, key, sampled, None if images is None else images[0], seconds | pixel_seconds, head)]
        waited = time.perf_counter() - ended
        for other in taken:  # pixels and likelihood of this image are no part of the others' decoding
            taken[other] += waited


def _record(
    job: Job, key: Id, sampled: Sample, image: np.ndarray | None, seconds: dict[str, float], head: dict[str, Any]
) -> Record:
    """Write image and tokens, and return the line that names them; a retiming writes neither."""
    again = job.retiming is not None
    files = {"tokens_sha256": digest_of(sampled.tokens)} if again else job.run.write_image(key, image, sampled.tokens)
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
        **({} if sampled.drafts is None else {"drafts": asdict(sampled.drafts)}),
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
        **files,
    }


@torch.inference_mode()
def _encode(model: ImageModel, prompts: list[str]) -> Condition:
    return model.encode(prompts)


@torch.inference_mode()
def _finish(
    job: Job,
    model: ImageModel,
    cond: Condition,
    prompts: list[str],
    seeds: list[int],
    samples: list[Sample],
    energy: EnergyMeter | None = None,
) -> tuple[np.ndarray | None, list[float], dict[str, float]]:
    """Turn tokens into pixels, if the job wants any; returns images uint8 [B, H, W, 3], -log p [B], the pixels' seconds.

    energy: stopped before the likelihood, which is no part of making an image.
    """
    tokens = torch.from_numpy(np.stack([sampled.tokens for sampled in samples])).to(model.device)
    images, seconds, clock = None, {}, _Clock(model.device)
    if job.pixels:
        images = model.draw(tokens, prompts, seeds)
        seconds = {model.pixel_part: clock.lap()}
    if energy is not None:
        energy.stop()
    if images is not None:
        images = images.permute(0, 2, 3, 1).cpu().numpy()
    known = job.retiming is not None  # the likelihood was measured when the image was made
    losses = [math.nan] * len(samples) if known else nll(model, cond, tokens, job.sampling).tolist()
    return images, losses, seconds


def report(records: list[Record], done: int, tracker: Tracker) -> None:
    """Show what finished records say in the tracker."""
    tokens, forwards = sum(r["tokens"] for r in records), sum(r["forwards"] for r in records)
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


def warm_up(job: Job, model: ImageModel) -> None:
    """Run a few passes of the first batch and one decoding to pixels, unrecorded: first calls are slow."""
    batch = job.ids[: job.batch_size]
    cond = _encode(model, [job.prompts[p] for p, _ in batch])
    warm_up_passes(model, job.decoder, cond, sampling=job.sampling, graphs=job.graphs)
    if job.pixels:
        with torch.inference_mode():
            model.warm_up_pixels(len(batch))
    synchronize(model.device)


def compile_other_rows(job: Job, model: ImageModel, share: list[Id]) -> None:
    """Warm up the numbers of rows that the missing images `share` take beside a whole batch's.

    Compiled pieces are made for a number of rows: a last, smaller batch would compile its own while it is timed.
    """
    if model.compiler is None:
        return
    few = {min(job.batch_size, len(share))} if job.refill else {len(job.batch(number)) for number in job.numbers(share)}
    for rows in sorted(few - {0, min(job.batch_size, len(job.ids))}):
        cond = _encode(model, [job.prompts[p] for p, _ in job.ids[:rows]])
        warm_up_passes(model, job.decoder, cond, sampling=job.sampling, graphs=job.graphs)
