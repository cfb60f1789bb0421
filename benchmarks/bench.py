"""Measure what a pass costs, where its time goes, and images per second; results go to benchmarks/results/.

# B samples, S slots of a pass
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from benchmarks.result_file import result_file
from evaluation.bootstrap import median_of_ratios
from harness.console import say
from harness.job import Models
from harness.plan import make_plan
from harness.provenance import start_entry
from harness.sample import synchronize
from sjd2.decoding.decoder import BaseDecoder, Decoder
from sjd2.decoding.dispatch import start_engine
from sjd2.decoding.engine import Engine
from sjd2.decoding.generate import generate, stream
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.noise import sample_seed
from sjd2.decoding.refine import Coupled
from sjd2.decoding.sampling import SamplingParams
from sjd2.decoding.verify import Exact
from sjd2.errors import UserError
from sjd2.models.base import ImageModel

BATCHES = (1, 8, 32)
SLOTS = (1, 8, 16, 32, 64)
PASSES = 16  # timed per setting, after 3 that are not
IMAGES = 96  # of each whole run: three generations of 32 rows


class _Timed:
    """A model that adds up the time of its forwards and heads; the rest of a pass belongs to the decoder."""

    def __init__(self, model: ImageModel) -> None:
        self._model, self.seconds = model, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _timed(self, call: Any, *arguments: Any) -> torch.Tensor:
        begin = _now(self._model)
        out = call(*arguments)
        self.seconds += _now(self._model) - begin
        return out

    def forward(self, *arguments: Any) -> torch.Tensor:
        return self._timed(self._model.forward, *arguments)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._timed(self._model.logits, hidden)


def _now(model: ImageModel) -> float:
    synchronize(model.device)
    return time.perf_counter()


def window_decoder(slots: int) -> Decoder:
    """Return SCD with a window of `slots`; AR for a single slot."""
    if slots == 1:
        return Decoder(name="ar", window=1, lossless=True)
    parts = {"drafter": Jacobi(), "verifier": Exact(), "refiner": Coupled()}
    return Decoder(name="scd", window=slots, lossless=True, **parts)


def pass_times(
    model: ImageModel, own: BaseDecoder, prompts: list[str], sampling: SamplingParams
) -> Iterator[dict[str, Any]]:
    """Yield a row per batch and window: median milliseconds of a pass, its ratio to one slot, share outside the forward.

    The windows of one batch size take turns pass by pass, so that a drift of the machine affects all. to_scd: the decoder's
    passes to SCD's of the same width, median over the turns and 95 % interval.
    """
    decoders = {(d.name, d.window): d for d in (*map(window_decoder, SLOTS), window_decoder(own.window), own)}
    for batch in BATCHES:
        timed = {key: _Timed(model) for key in decoders}
        runs = {key: _start(timed[key], decoder, prompts[:batch], sampling) for key, decoder in decoders.items()}
        spans: dict[tuple[str, int], list[float]] = {key: [] for key in decoders}
        for count in range(PASSES + 3):
            for key, decoder in decoders.items():
                if runs[key].finished():
                    runs[key] = _start(timed[key], decoder, prompts[:batch], sampling)
                if count == 3:
                    timed[key].seconds = 0.0
                begin = _now(model)
                runs[key].step()
                if count >= 3:
                    spans[key].append(_now(model) - begin)
        for key, times in spans.items():
            more = {} if key[0] != own.name else _to_scd(times, spans.get(("scd", key[1])))
            yield {
                "batch": batch,
                "decoder": key[0],
                "slots": key[1],
                "pass_ms": 1e3 * statistics.median(times),
                "ratio": statistics.median(times) / statistics.median(spans["ar", 1]),
                "outside_forward": 1 - timed[key].seconds / sum(times),
                **more,
            }


def _to_scd(times: list[float], scd: list[float] | None) -> dict[str, Any]:
    if scd is None or scd is times:
        return {}
    value, low, high = median_of_ratios([(above, below, 1) for above, below in zip(times, scd, strict=True)])
    return {"to_scd": value, "to_scd_low": low, "to_scd_high": high}


def _start(model: Any, decoder: BaseDecoder, prompts: list[str], sampling: SamplingParams) -> Engine:
    condition = model.encode(prompts)
    engine = start_engine(model, decoder, len(prompts), condition.embeds.shape[1], sampling)
    spent = model.seconds
    engine.admit(list(range(len(prompts))), condition, list(range(1, len(prompts) + 1)))
    model.seconds = spent  # a prefill is not a pass of the window
    return engine


def batch_rows(
    model: ImageModel, decoder: BaseDecoder, prompts: list[str], sampling: SamplingParams
) -> Iterator[dict[str, Any]]:
    """Yield tokens per forward and row for each batch size on the same 32 prompts; they must not fall with the batch."""
    for batch in BATCHES:
        forwards = 0
        for begin in range(0, max(BATCHES), batch):
            some = prompts[begin : begin + batch]
            seeds = [sample_seed(0, begin + row, 0) for row in range(len(some))]
            result = generate(model, decoder, model.encode(some), seeds, sampling=sampling)
            forwards += sum(sample.forwards for sample in result.samples)
        yield {"decoder": decoder.name, "batch": batch, "tokens_per_forward": 32 * model.layout.length / forwards}


def throughput(
    model: ImageModel, decoders: Sequence[BaseDecoder], prompts: list[str], sampling: SamplingParams
) -> Iterator[dict[str, Any]]:
    """Yield images per second of each decoder with 32 rows in flight, without and with refilling."""
    rows, base = max(BATCHES), None
    for decoder in decoders:
        for refill in (False, True):
            begin = _now(model)
            seeds = [sample_seed(0, index, 0) for index in range(len(prompts))]
            if refill:
                count = sum(
                    1 for _ in stream(model, decoder, zip(prompts, seeds, strict=True), rows=rows, sampling=sampling)
                )
            else:
                for first in range(0, len(prompts), rows):
                    some = slice(first, first + rows)
                    generate(model, decoder, model.encode(prompts[some]), seeds[some], sampling=sampling)
                count = len(prompts)
            speed = count / (_now(model) - begin)
            base = base or speed
            yield {"decoder": decoder.name, "refill": refill, "images_per_s": speed, "ratio_to_ar": speed / base}


def run(cfg: DictConfig) -> Path:
    """Run all three measurements with the model and the decoder of the command; return the JSON file written."""
    plan = make_plan(cfg)
    prompts = plan.prompts.texts[: max(IMAGES, cfg.limit or 0)]
    if len(prompts) < max(BATCHES):
        raise UserError(f"stage=bench needs at least {max(BATCHES)} prompts, but the list has {len(prompts)}.")
    model = Models().load(plan)
    sampling = replace(plan.sampling, sampler="cdf")
    ar, scd = window_decoder(1), window_decoder(32)
    result: dict[str, Any] = start_entry(model.device, dtype=plan.dtype, model=plan.spec.name)
    result |= {"protocol": {"passes": PASSES, "images": len(prompts), "law": plan.sampling.settings()}}
    sections = {
        "passes": pass_times(model, plan.decoder, prompts, sampling),
        "tokens_per_forward": batch_rows(model, plan.decoder, prompts, sampling),
        "throughput": throughput(model, list({d.name: d for d in (ar, scd, plan.decoder)}.values()), prompts, sampling),
    }
    say(f"hardware: {result['hardware']}, model {plan.spec.name}, {plan.dtype}")
    for name, rows in sections.items():
        result[name] = []
        for row in rows:
            result[name].append(row)
            say(
                "  ".join(
                    f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                )
            )
    out = result_file(result["hardware"], plan.spec.name, plan.decoder.name, plan.dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    say(f"written: {out}")
    return out
