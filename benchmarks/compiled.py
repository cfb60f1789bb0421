"""Time passes with their pieces compiled and plain, in turns: python -m benchmarks.compiled.

    python -m benchmarks.compiled                                      # the embedded model on a CPU, one thread
    python -m benchmarks.compiled --decoders scd --images 40 --device cuda

Each image is drawn twice from the same seed, compiled and plain, the first of the two in turn, so that a drift of the machine
meets both. The ratio is that of the seconds per pass, its interval 95 % over images.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.result_file import write_result
from harness.provenance import start_entry
from sjd2 import api
from sjd2.compiler import Compiler, why_not
from sjd2.decoding.decoder import BaseDecoder
from sjd2.decoding.generate import generate
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError, choose
from sjd2.models.base import ImageModel

PROMPT = "a small red circle"
USUAL = ("ar", "sjd", "scd", "sjd2", "sjd-pac")


def measure(model: ImageModel, decoder: BaseDecoder, sampling: SamplingParams, images: int) -> dict[str, Any]:
    """Return a row: milliseconds per pass both ways, the ratio compiled / plain with its interval, seconds to compile."""
    compiler = Compiler()
    with torch.inference_mode():
        condition = model.encode([PROMPT])

    def per_pass(seed: int, compiled: bool) -> float:
        model.compiler = compiler if compiled else None
        found = generate(model, decoder, condition, [seed], sampling=sampling)
        return found.seconds["decode"] / (found.samples[0].forwards - 1)

    for compiled in (True, False):
        per_pass(0, compiled)
    times: dict[bool, list[float]] = {True: [], False: []}
    for image in range(images):
        for compiled in (image % 2 == 0, image % 2 == 1):
            times[compiled].append(per_pass(1 + image, compiled))
    model.compiler = None
    logs = [math.log(here / there) for here, there in zip(times[True], times[False], strict=True)]
    half = 1.96 * statistics.stdev(logs) / len(logs) ** 0.5
    mean = statistics.fmean(logs)
    return {
        "window": decoder.window, "images": images, "plain_ms": 1e3 * statistics.median(times[False]),
        "compiled_ms": 1e3 * statistics.median(times[True]), "ratio": math.exp(mean),
        "ratio_ci95": [math.exp(mean - half), math.exp(mean + half)],
        "compile_s": sum(compiler.seconds.values()), "left_out": compiler.left_out,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> Path:
    """Run the command and return the file written."""
    options = _parse(arguments)
    model = api.load(options.model, device=options.device, dtype=options.dtype)
    settings: dict[str, Any] = dict(model.spec.sampling) if model.spec is not None else {}
    result: dict[str, Any] = start_entry(model.device, dtype=options.dtype, model=options.model)
    result |= {"law": settings, "decoders": []}
    print(f"{result['hardware']}, {options.model}, {options.dtype}")
    for name in options.decoders:
        decoder = api.decoder(name, model=options.model)
        row = {"decoder": name} | measure(model, decoder, SamplingParams(**settings), options.images)
        result["decoders"].append(row)
        low, high = row["ratio_ci95"]
        print(
            f"{name} ({row['window']}): {row['plain_ms']:.2f} ms per pass, compiled {row['compiled_ms']:.2f}, ratio "
            f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}], n {row['images']}, compiled in {row['compile_s']:.0f} s",
            flush=True,
        )
    return write_result(result, options.out, options.model, "compiled", options.dtype)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="tiny", choices=api.list_models(), help="its weights must be there")
    parser.add_argument("--decoders", default=",".join(USUAL), help="names, comma-separated")
    parser.add_argument("--images", type=int, default=24, help="images per decoder, each drawn twice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--out", type=Path, help="the JSON file; default benchmarks/results/")
    options = parser.parse_args(arguments)
    if options.images < 4:
        parser.error("--images must be 4 or more, or the ratio has no interval")
    options.decoders = options.decoders.split(",")
    try:
        for name in options.decoders:
            choose("--decoders", name, api.list_decoders())
        if options.device == "cpu" and (why := why_not()) is not None:
            raise UserError(f"compiling for a CPU needs a C++ compiler: {why}.")
    except UserError as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
