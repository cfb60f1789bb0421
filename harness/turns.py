"""Make what run folders lack; two runs of one command, AR and a decoder, in turns: A B A B, batch by batch.

The speed of a machine drifts by tens of percent within minutes. Timings taken in turns share the drift, and their ratio is
free of it. Refilled runs keep all rows busy to their end, so they follow one another.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evaluation.run_folder import Id, Record
from harness.console import Progress, patience, say
from harness.flops import gflops_per_token
from harness.meter import GpuWatch, Meter
from harness.provenance import start_entry
from harness.ranks import ALONE, Ranks
from harness.sample import Job, compile_other_rows, make_batch, refilled, report, warm_up
from harness.signals import Dropped, Stopping, listening
from sjd2.errors import UserError
from sjd2.models.base import ImageModel


@dataclass(kw_only=True)
class Side:
    """One run at work: the ids that this rank makes for it, and how far it is."""

    job: Job
    share: list[Id]
    launch: int
    done: int
    total: int
    meter: Meter | None = None  # None where this rank makes nothing
    warm_up_s: float = 0.0  # seconds before its first image: kernels compiled, passes recorded

    def keep(self, records: list[Record], rank: int | None) -> None:
        """Write what a turn made."""
        self.job.keep(records, rank)
        self.done += len(records)


def make_images(jobs: Sequence[Job], ranks: Ranks = ALONE) -> list[bool]:
    """Make the images that the run folders lack and return for each job whether there were any.

    Complete runs load no model. Several jobs have the same model, ids and batches. Each rank makes its share; rank 0
    returns when all have theirs. Raises Interrupted after a signal.
    """
    lacking = [_lacking(job, ranks) for job in jobs]
    work = [(job, records, missing) for job, (records, missing) in zip(jobs, lacking, strict=True) if missing]
    if work:
        _work(work, ranks)
    return [bool(missing) for _, missing in lacking]


def _lacking(job: Job, ranks: Ranks) -> tuple[list[Record], list[Id]]:
    """Return the records that are there and the ids that are not, and print so."""
    records = job.run.records() if ranks.main else []
    missing = [(p, r) for p, r in ranks.broadcast(lambda: job.missing(records))]
    if job.run.damaged:
        say(f"{job.run.path}: {job.run.damaged} line(s) cut by a kill are left out; their images are made again.")
    total, done = len(job.wanted), len(job.wanted) - len(missing)
    what = "there" if job.retiming is None else "timed again"
    if not missing:
        say(f"{job.run.path.name}: all {total} images are {what}.")
        if ranks.main and job.retiming is not None:  # a kill met the other run after the last image of this one
            launches = [e["launch"] for e in job.run.provenance() if e.get("retime") == job.retiming.session]
            job.run.close_launch(launches[-1], {"retimed": True})
        if ranks.main and job.flops and not any("gflops_per_token" in entry for entry in job.run.provenance()):
            job.run.launch(_entry(job, job.load(), ranks), records)  # counted late: a launch without images
    elif done:
        say(f"{job.run.path.name}: {done} of {total} images are {what}, resuming.")
    return records, missing


def _work(work: Sequence[tuple[Job, list[Record], list[Id]]], ranks: Ranks) -> None:
    turns = {"turns": ranks.broadcast(lambda: uuid.uuid4().hex[:12])} if len(work) > 1 and not work[0][0].refill else {}
    shares = _shares([job for job, _, _ in work], [missing for _, _, missing in work], ranks)
    needed = any(shares)
    model = work[0][0].load() if needed else None  # more ranks than batches: the last ones have nothing to do
    sides = []
    for (job, records, missing), share in zip(work, shares, strict=True):

        def start(job: Job = job, records: list[Record] = records) -> int:
            return job.run.launch(_entry(job, model or job.load(), ranks, turns), records)

        launch = ranks.broadcast(start)
        alone = ranks.world == 1
        total, done = (len(job.wanted), len(job.wanted) - len(missing)) if alone else (len(share), 0)
        sides.append(Side(job=job, share=share, launch=launch, done=done, total=total))
    if model is not None and needed:
        _make(sides, model, ranks)
    _gather(sides, ranks)


def _gather(sides: Sequence[Side], ranks: Ranks) -> None:
    """Wait for all ranks, and note what only the whole launch knows."""
    for side in sides:
        with listening(side.job.grace_s) as stop:
            peak = side.meter.peak_gb if side.meter is not None else None
            peaks = ranks.gather(peak, check=lambda stop=stop: stop.leave() if stop.asked else None)
        end: dict[str, Any] = {"retimed": True} if side.job.retiming is not None else {}
        if ranks.world > 1 and any(peaks):
            end["peak_memory_gb"] = max(filter(None, peaks))
        if ranks.main and end:
            side.job.run.close_launch(side.launch, end)
        if ranks.main and side.job.retiming is not None:
            say(
                f"{side.job.run.path.name}: {len(side.job.wanted)} images timed again, with the tokens of their records."
            )


def _entry(job: Job, model: ImageModel, ranks: Ranks, more: dict[str, Any] | None = None) -> dict[str, Any]:
    entry = start_entry(model.device, **job.launch, **(more or {}))
    if job.retiming is not None:
        entry["retime"] = job.retiming.session
    if job.flops:
        entry["gflops_per_token"] = gflops_per_token(model, job.decoder, job.prompts[0], job.sampling, job.seed)
    if job.graphs is not None:  # times with and without are those of two machines
        entry["hardware"] += " with CUDA graphs"
    if model.fused:
        entry["hardware"] += " and fused attention" if job.graphs is not None else " with fused attention"
    if model.compiler is not None:
        entry["hardware"] += ", compiled"
    if ranks.world > 1:
        entry["ranks"] = ranks.world
        if model.device.type == "cpu":  # they share its cores, so their times are those of another machine
            entry["hardware"] += f" in each of {ranks.world} processes"
    return entry


def _shares(jobs: Sequence[Job], missing: Sequence[list[Id]], ranks: Ranks) -> list[list[Id]]:
    """Return the missing ids of this rank for each job: whole batches, dealt out in turn, both runs' to the same rank."""
    if jobs[0].refill:
        return [ranks.share(ids) for ids in missing]
    numbers = sorted({number for job, ids in zip(jobs, missing, strict=True) for number in job.numbers(ids)})
    mine = {key for number in ranks.share(numbers) for key in jobs[0].batch(number)}
    return [[key for key in ids if key in mine] for ids in missing]


def _make(sides: Sequence[Side], model: ImageModel, ranks: Ranks) -> None:
    """Make the images of this rank and write their records batch by batch."""
    known = {} if model.compiler is None else dict(model.compiler.seconds)
    crowded = _warm_up(sides, model)
    for side in sides:
        side.meter = Meter(model.device)
    watch = GpuWatch(model.device)
    try:
        with listening(sides[0].job.grace_s) as stop, watch, _progress(sides, ranks) as progress:
            with contextlib.suppress(Dropped):
                _take_turns(sides, model, stop, progress, ranks, crowded=crowded)
            if stop.asked:
                say(f"stopped by {stop.name}: {_so_far(sides)} images are there, the same command resumes.")
                stop.leave()
    finally:
        for side in sides:
            if ranks.main and side.meter is not None:
                spent = {"warm_up_s": round(side.warm_up_s, 3)}
                spent |= {} if model.compiler is None else {"compiled": model.compiler.entry(known)}
                side.job.run.close_launch(side.launch, side.meter.entry() | watch.entry() | spent)


def _warm_up(sides: Sequence[Side], model: ImageModel) -> bool:
    """Warm up all runs; return whether their replayed passes keep too much memory to stay there beside each other."""
    for side in sides:
        try:
            _prepare(side, model)
        except torch.OutOfMemoryError:
            if not _others_hold(side, sides):
                raise
        else:
            continue
        say("the keys and values of both runs do not fit beside each other: each turn makes its own anew, untimed.")
        _make_room(sides)
        _prepare(side, model)
        return True
    return False


def _prepare(side: Side, model: ImageModel) -> None:
    """Warm up a run, before its time is measured; what takes long says so, and stands in provenance.jsonl."""
    begin = time.perf_counter()
    with patience(f"{side.job.run.path.name}: first passes, which load, compile and record, are not timed"):
        warm_up(side.job, model)
        compile_other_rows(side.job, model, side.share)
    side.warm_up_s += time.perf_counter() - begin


def _others_hold(side: Side, sides: Sequence[Side]) -> bool:
    """Return whether other runs keep keys, values and recorded passes."""
    return any(one is not side and one.job.graphs is not None and one.job.graphs.kept is not None for one in sides)


def _make_room(sides: Sequence[Side]) -> None:
    """Free what all runs keep on the GPU."""
    for one in sides:
        if one.job.graphs is not None:
            one.job.graphs.release()
    torch.cuda.empty_cache()


def _take_turns(
    sides: Sequence[Side],
    model: ImageModel,
    stop: Stopping,
    progress: Sequence[Progress],
    ranks: Ranks,
    *,
    crowded: bool,
) -> None:
    began = time.monotonic()
    for place, records in _turns(sides, model, stop, crowded=crowded):
        side = sides[place]
        try:
            side.keep(records, ranks.number)
        except UserError:
            for one in sides if side.job.retiming is not None else ():
                one.job.run.close_launch(one.launch, {"void": True})
            raise
        stop.end()
        counts = {key: sum(record[key] for record in records) for key in ("tokens", "forwards")}
        progress[place].advance(images=len(records), seconds=time.monotonic() - began, **counts)
        if side.job.retiming is None:
            report(records, side.done, side.job.tracker)
        if stop.asked and not side.job.refill:
            return
        began = time.monotonic()


def _turns(
    sides: Sequence[Side], model: ImageModel, stop: Stopping, *, crowded: bool
) -> Iterator[tuple[int, list[Record]]]:
    """Yield (place of the side, its records): a batch of each side in turn; refilled runs one after the other.

    crowded: the memory has room for the keys and values of one run, so the other's are freed before each turn.
    """
    if sides[0].job.refill:
        for place, side in enumerate(sides):
            assert side.meter is not None
            _ready(side, sides, model, crowded=crowded)
            with side.meter:
                for records in refilled(side.job, model, side.share, side.launch, stop):
                    yield place, records
        return
    missing = [set(side.share) for side in sides]
    for number, place in sorted((n, place) for place, side in enumerate(sides) for n in side.job.numbers(side.share)):
        side = sides[place]
        assert side.meter is not None
        _ready(side, sides, model, crowded=crowded)
        stop.begin()
        with side.meter:
            records = make_batch(side.job, model, number, missing[place], side.launch, stop)
        yield place, records


def _ready(side: Side, sides: Sequence[Side], model: ImageModel, *, crowded: bool) -> None:
    """Where memory is short, free what the other runs keep and record this run's passes anew, before its time runs."""
    if crowded and _others_hold(side, sides):
        _make_room(sides)
        _prepare(side, model)


@contextlib.contextmanager
def _progress(sides: Sequence[Side], ranks: Ranks) -> Iterator[list[Progress]]:
    shown: list[Progress] = []
    with contextlib.ExitStack() as stack:
        for side in sides:
            title = side.job.run.path.name + (f" (rank 0 of {ranks.world})" if ranks.world > 1 else "")
            first = shown[0] if shown else None
            shown.append(stack.enter_context(Progress(title, side.done, side.total, shown=ranks.main, beside=first)))
        yield shown


def _so_far(sides: Sequence[Side]) -> str:
    if len(sides) == 1:
        return f"{sides[0].done} of {sides[0].total}"
    return ", ".join(f"{side.done} of {side.total} of {side.job.run.path.name}" for side in sides)
