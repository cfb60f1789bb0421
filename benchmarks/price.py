"""Measure what a pass of SJD2 costs beside SCD's of the same width: python -m benchmarks.price.

    python -m benchmarks.price                       # the embedded model, windows of 32 and 64, one thread
    python -m benchmarks.price --device cuda --model lumina --adapter FOLDER --dtype bfloat16

The decoders take turns pass by pass, each in the middle of an image, so that a drift of the machine cancels in the ratio.
On a CPU the clock is the process's own: other programs on the machine lengthen a pass, not its CPU time.

# B samples
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.result_file import write_result
from evaluation.bootstrap import median_of_ratios
from harness.provenance import start_entry
from harness.sample import synchronize
from sjd2 import api
from sjd2.decoding.cuda_graph import Graphs
from sjd2.decoding.decoder import BaseDecoder
from sjd2.decoding.dispatch import start_engine
from sjd2.decoding.engine import Engine
from sjd2.decoding.interfaces import State
from sjd2.decoding.sampling import SamplingParams
from sjd2.models.base import ImageModel

WARM = 8  # passes that are not timed: enough to have one recorded


def price(
    model: ImageModel, decoders: dict[str, BaseDecoder], sampling: SamplingParams, batch: int, passes: int
) -> Iterator[dict[str, Any]]:
    """Yield a row per decoder: median milliseconds of a pass, and its ratio to the first one's with a 95 % interval."""
    runs = {name: _start(model, decoder, sampling, batch) for name, decoder in decoders.items()}
    spans: dict[str, list[float]] = {name: [] for name in decoders}
    for count in range(passes + WARM):
        for name, (engine, prompt) in runs.items():
            _stand(engine, prompt)
            begin = _now(model.device)
            engine.step()
            if count >= WARM:
                spans[name].append(_now(model.device) - begin)
    first = next(iter(spans.values()))
    for name, times in spans.items():
        ratio = median_of_ratios([(above, below, 1) for above, below in zip(times, first, strict=True)])
        yield {
            "decoder": name,
            "window": decoders[name].window,
            "batch": batch,
            "pass_ms": 1e3 * statistics.median(times),
            "to_scd": ratio,
        }


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def _start(
    model: ImageModel, decoder: BaseDecoder, sampling: SamplingParams, batch: int
) -> tuple[Engine, torch.Tensor]:
    with torch.inference_mode():
        condition = model.encode(["a small red circle"] * batch)
    width = max(condition.embeds.shape[1], condition.uncond_embeds.shape[1])
    start = Graphs().start if model.device.type == "cuda" else start_engine
    engine = start(model, decoder, batch, width, sampling)
    engine.admit(list(range(batch)), condition, list(range(batch)))
    return engine, engine.cache.lengths.clone()


@torch.inference_mode()
def _stand(engine: Engine, prompt: torch.Tensor) -> None:
    """Put every row into the middle of its image; prompt [R]: tokens before it."""
    half = engine.total // 2
    engine.state.committed.fill_(half)
    if isinstance(engine.state, State):
        engine.state.cached.fill_(half - 1)
    engine.cache.lengths.copy_(prompt + half - 1)
    engine.cache.bound = engine.prompt + half - 1
    engine.history.clear()


def main(arguments: list[str] | None = None) -> Path:
    """Run the command and return the file written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.price", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="tiny", choices=api.list_models(), help="its weights must be there")
    parser.add_argument("--adapter", help="the folder of an SJD2 fine-tuning; default: the model's own")
    parser.add_argument("--windows", default="32,64", help="model inputs per pass, comma-separated")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps under rule=paper")
    parser.add_argument("--batch", type=int, default=1, help="images in flight")
    parser.add_argument("--passes", type=int, default=200, help="timed per decoder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float16", "float32", "float64"))
    parser.add_argument("--out", type=Path, help="the JSON file; default benchmarks/results/")
    options = parser.parse_args(arguments)
    given = {} if options.adapter is None else {"adapter": options.adapter}
    model = api.load(options.model, device=options.device, dtype=options.dtype, **given)
    if model.adapter is None:
        parser.error(f"--model {options.model} has no SJD2 fine-tuning of its own: give one with --adapter FOLDER.")
    settings: dict[str, Any] = {} if model.spec is None else dict(model.spec.sampling)
    sampling = SamplingParams(**settings)
    result: dict[str, Any] = start_entry(model.device, dtype=options.dtype, model=options.model)
    result |= {"law": sampling.settings(), "passes": options.passes, "rows": []}
    print("| decoder | window | ms of a pass | to SCD |\n| :--- | ---: | ---: | ---: |")
    for window in map(int, options.windows.split(",")):
        paper = {"rule": "paper", "steps": options.steps, "lossless": False}
        decoders = {
            "scd": api.decoder("scd", window=window),
            "sjd2 exact": api.decoder("sjd2", window=window),
            "sjd2 paper": api.decoder("sjd2", window=window, **paper),
        }
        for row in price(model, decoders, sampling, options.batch, options.passes):
            result["rows"].append(row)
            ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*row["to_scd"])
            print(f"| {row['decoder']} | {window} | {row['pass_ms']:.2f} | {ratio} |", flush=True)
    return write_result(result, options.out, options.model, "price", options.dtype)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
