"""Measure full-size architectures with random weights on one GPU, unattended: python -m benchmarks.gpu.

    python -m benchmarks.gpu                                # all architectures, at most 8 minutes
    python -m benchmarks.gpu --models lumina,janus-1b --seconds 120
    python -m benchmarks.gpu --device cpu --small           # the same path on narrow models: seconds on a laptop

Each model is measured in parts, the most important first; what the budget does not cover is listed with the reason. The JSON
file in benchmarks/results/ is written after each model. Times are medians; "graph" is the same work as one CUDA graph, without
launch overhead; "roof" is the least time that memory and matrix units allow, by the peaks measured on this device.

# B samples, R model rows (2B with guidance), S slots of a pass, P prompt tokens, V image vocabulary, N image-phase tokens
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.architectures import ARCHITECTURES, Architecture, entry_bytes, weight_bytes
from benchmarks.result_file import result_file
from benchmarks.roofline import Peaks, free_window, peaks
from benchmarks.sections import Bench, Row, reason
from benchmarks.timing import Budget
from harness.provenance import start_entry
from harness.sample import synchronize
from sjd2.compiler import Compiler
from sjd2.errors import UserError, choose
from sjd2.files import ROOT, split_lines
from sjd2.models.fusion import fuse

BATCHES, FEW_BATCHES = (1, 8), (1, 2)  # full size; --small
# by importance; the parts after sjd2 find its adapter in the model and must not use the transformer
PARTS = ("passes", "decoders", "sjd2", "sampling", "pixels", "attention")
FREE = 1.1  # a window is called free up to this multiple of the time of one slot
WHOLE = 120.0  # seconds for whole images of one model
LEAST = 20.0  # no model is built if fewer seconds are left


def measure_model(plan: Architecture, device: torch.device, peak: Peaks, budget: Budget, options: Any) -> Row:
    """Build one architecture and measure its parts until its share of the budget is spent."""
    row: Row = {"name": plan.name, "title": plan.title, "skipped": [], "seconds": {}}
    begin = time.perf_counter()
    model = plan.build(device, getattr(torch, options.dtype))
    row["left_out"] = fuse(model)
    row["fused"] = model.fused
    if device.type == "cuda":
        model.compiler = Compiler()
    synchronize(device)
    row["seconds"]["build"] = time.perf_counter() - begin
    graphs = device.type == "cuda" and "graph" in options.variants
    bench = Bench(plan, model, peak, graphs=graphs, small=options.small)
    weights = weight_bytes(model)
    row |= {
        "layout": asdict(plan.layout) | {"length": plan.layout.length}, "window": plan.window, "context": bench.context,
        "weight_gigabytes": {name: size / 1e9 for name, size in weights.items()}, "entry_bytes": entry_bytes(model),
        "law": bench.params.settings(),
    }  # fmt: skip
    batches = FEW_BATCHES if options.small else BATCHES
    row["free_window"] = [
        {"batch": batch, "slots": free_window(model, peak, bench.branches * batch, bench.context)} for batch in batches
    ]
    parts = [(name, batch) for name in PARTS for batch in batches]
    if "compile" in options.variants:
        parts.insert(2 * len(batches), ("compiled", 1))
    for name, batch in parts:
        begin = time.perf_counter()
        _reset_peak(device)
        row.setdefault(name, [])
        why = _run(getattr(bench, name)(batch), row[name], budget)
        if why is not None:
            row["skipped"].append({"part": name, "batch": batch, "after": len(row[name]), "reason": why})
        row["seconds"][f"{name} {batch}"] = time.perf_counter() - begin
        if model.compiler is not None:
            row["compiled"] = model.compiler.entry()
        if device.type == "cuda":
            row.setdefault("peak_memory_gb", {})[f"{name} {batch}"] = torch.cuda.max_memory_allocated(device) / 1e9
    return row


@torch.inference_mode()
def _run(part: Iterator[Row], rows: list[Row], budget: Budget) -> str | None:
    """Collect a part's rows and return why it ended early, if it did."""
    try:
        while budget.left > 0:
            found = next(part, None)
            if found is None:
                return None
            rows.append(found)
    except torch.OutOfMemoryError:
        return "out of memory"
    except (RuntimeError, UserError) as error:
        return reason(error)
    return "the model's share of the time was spent"


def _skipped(plan: Architecture, why: str) -> Row:
    return {"name": plan.name, "title": plan.title, "skipped": [{"part": "everything", "reason": why}]}


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# ---- the command


def main(arguments: list[str] | None = None) -> Path:
    """Run the command and return the file written."""
    options = _parse(arguments)
    device = torch.device(options.device)
    budget = Budget(options.seconds)
    plans = [ARCHITECTURES[name] for name in options.models]
    settings = {
        "dtype": options.dtype,
        "variants": options.variants,
        "small": options.small,
        "budget_s": options.seconds,
    }
    result = start_entry(device, **settings)
    size, side = (2**30, 8192) if device.type == "cuda" else (2**24, 256)
    peak = peaks(device, getattr(torch, options.dtype), size=size, side=side)
    result |= {"peaks": asdict(peak), "models": []}
    out = options.out or result_file(result["hardware"], "gpu", options.dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    for index, full_size in enumerate(plans):
        budget.divide(len(plans) - index)
        plan = full_size.small() if options.small else full_size
        try:
            if budget.left <= (0 if options.small else LEAST):
                row = _skipped(plan, "the time was spent")
            else:
                row = measure_model(plan, device, peak, budget, options)
        except torch.OutOfMemoryError:
            row = _skipped(plan, "out of memory")
        gc.collect()
        _reset_peak(device)
        if full_size.name == "lumina" and budget.end - time.perf_counter() > (0 if options.small else WHOLE):
            row["images"], why = whole_images("lumina", small=options.small, device=options.device, seconds=WHOLE)
            if why is not None:
                row["skipped"].append({"part": "images", "reason": why})
        result["models"].append(row)
        result["seconds"] = budget.spent
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{plan.title}: done after {budget.spent:.0f} s", flush=True)
    print("\n" + table(result))
    print(f"\nwritten: {out}")
    return out


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=str(__doc__).partition("\n")[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--models", default=",".join(ARCHITECTURES), help="names, comma-separated; default all")
    parser.add_argument("--seconds", type=float, default=480.0, help="time budget; what does not fit is skipped")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--small", action="store_true", help="narrow models of the same families, to try the command")
    parser.add_argument("--variants", default="eager,graph", help="eager, graph, compile; comma-separated")
    parser.add_argument("--out", type=Path, default=None, help="JSON file; default benchmarks/results/")
    options = parser.parse_args(arguments)
    options.models, options.variants = options.models.split(","), options.variants.split(",")
    try:
        for name in options.models:
            choose("--models", name, tuple(ARCHITECTURES))
        for name in options.variants:
            choose("--variants", name, ("eager", "graph", "compile"))
    except UserError as error:
        parser.error(str(error))
    if torch.device(options.device).type != "cuda" and not options.small:
        parser.error("full-size models need a GPU; add --small, or --device cuda if there is one.")
    return options


def overview(model: Row) -> list[str]:
    """Return the milliseconds of a pass by batch and slots, eager, as a graph and fused, and the share of the roof."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    for row in model.get("passes", []):
        place, fused = (row["batch"], row["slots"]), row.get("attention") == "fused"
        ways = {"roof": row.get("roof_ms"), "fused" if fused else "graph": row.get("graph_ms")}
        for way, ms in (ways if fused else {"eager": row["ms"], **ways}).items():
            if ms is not None:
                found.setdefault(way, {})[place] = ms
    places = sorted(found.get("roof", {}))
    if not places:
        return []
    head = [f"batch {batch}: {slots}" for batch, slots in places]
    lines = ["", f"| {model['title']}: ms per pass, slots | " + " | ".join(head) + " |", "|" + "---|" * (1 + len(head))]
    for way in ("eager", "graph", "fused", "roof"):
        if way in found:
            cells = [f"{found[way][place]:.2f}" if place in found[way] else "" for place in places]
            lines.append(f"| {way} | " + " | ".join(cells) + " |")
    best = [min(found[way].get(place, float("inf")) for way in found if way != "roof") for place in places]
    shares = (f"{found['roof'][place] / ms:.0%}" for place, ms in zip(places, best, strict=True))
    return [*lines, "| share of the roof | " + " | ".join(shares) + " |"]


def ratios(model: Row) -> list[str]:
    """Return what SJD2's pass costs over SCD's of equal width, what pixels take, and whole images."""
    lines, rows = [], [*model.get("decoders", []), *model.get("sjd2", [])]
    best = {(row["batch"], row["decoder"], row["slots"]): row.get("graph_ms", row.get("ms")) for row in rows}
    for (batch, name, slots), ms in best.items():
        plain = best.get((batch, "scd", slots))
        if name.startswith("sjd2") and plain and ms:
            lines.append(
                f"\n{model['title']}, batch {batch}: {name} ({slots}) takes {ms / plain:.2f} times SCD's pass."
            )
    for row in model.get("pixels", []):
        first = f", the first after {row['first_s']:.0f} s" if "first_s" in row else ""
        lines.append(f"\n{model['title']}, batch {row['batch']}: pixels {row['way']} {row['ms']:.1f} ms{first}.")
    if seconds := model.get("compiled", {}).get("seconds"):
        parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
        lines.append(f"\n{model['title']}: seconds of compiling: {parts}.")
    for row in model.get("images", []):
        found = ", ".join(f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float))
        lines.append(f"\n{model['title']}, whole images by {row['decoder']}: {found}.")
    return lines


def whole_images(name: str, *, small: bool, device: str, seconds: float) -> tuple[list[Row], str | None]:
    """Make images of random weights through run.py, AR and SCD; return what their metrics.json say, and why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "run.py"),
            "--config-dir",
            str(ROOT / "benchmarks" / "conf"),
            "model=random",
        ]
        command += [f"model.architecture={name}", f"model.small={str(small).lower()}", f"device={device}", "limit=1"]
        command += ["decoder=scd", "evaluation=none", "logger=none", f"runs_dir={folder}"]
        plan = ARCHITECTURES[name]
        command += [f"decoder.window={8 if small else plan.window}", f"model.vocabulary={plan.layout.vocabulary}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return [], f"not done within {seconds:.0f} s"
        if done.returncode:
            return [], "\n".join(split_lines(done.stderr)[-1:])[:300]
        rows = []
        for file in sorted(Path(folder).glob("random-*/metrics.json")):
            found, launch = (
                json.loads(file.read_text()),
                json.loads(split_lines((file.parent / "provenance.jsonl").read_text())[-1]),
            )
            kept = ("forwards_mean", "latency_s_median", "seconds_prefill_mean", "seconds_image_mean", "images_per_s")
            row = {key: float(found[key]) for key in kept if key in found}
            rows.append(
                {"decoder": file.parent.name.split("-")[1], **row, "warm_up_s": float(launch.get("warm_up_s", 0))}
            )
        return rows, None


def table(result: Row) -> str:
    """Return the summary as Markdown: passes against their roof, and decoders."""
    peak, lines = result["peaks"], []
    known = peak["sheet_bandwidth"]
    data_sheet = (
        "" if known is None else f" (data sheet {known / 1e12:.2f} TB/s, {peak['sheet_flops'] / 1e12:.0f} TFLOP/s)"
    )
    lines.append(
        f"{result['hardware']}, {result['dtype']}: measured {peak['bandwidth'] / 1e12:.2f} TB/s and "
        f"{peak['flops'] / 1e12:.0f} TFLOP/s{data_sheet}; torch {result['packages']['torch']}, "
        f"transformers {result['packages']['transformers']}, {result['seconds']:.0f} s."
    )
    lines += [
        "",
        "| model | batch | slots | attention | eager ms | host ms | graph ms | roof ms | of the roof |",
        "|" + "---|" * 9,
    ]
    for model in result["models"]:
        for row in model.get("passes", []):
            best = row.get("graph_ms", row["ms"])
            times = " | ".join(_milliseconds(row, key) for key in ("ms", "host_ms", "graph_ms", "roof_ms"))
            lines.append(
                f"| {model['title']} | {row['batch']} | {row['slots']} | {row['attention']} | {times} | "
                f"{row['roof_ms'] / best:.0%} |"
            )
    lines += [
        "",
        "| model | batch | decoder | slots | prefill ms | recorded | pass ms | host ms | graph ms | to AR |",
        "|" + "---|" * 10,
    ]
    for model in result["models"]:
        base: dict[int, float] = {}
        for row in [*model.get("decoders", []), *model.get("sjd2", [])]:
            best = row.get("graph_ms", row.get("ms"))
            if best is None:
                continue
            base.setdefault(row["batch"], best)
            times = " | ".join(
                _milliseconds(row, key) for key in ("prefill_ms", "graph_prefill_ms", "ms", "host_ms", "graph_ms")
            )
            lines.append(
                f"| {model['title']} | {row['batch']} | {row['decoder']} | {row['slots']} | {times} | "
                f"{best / base[row['batch']]:.2f} |"
            )
    for model in result["models"]:
        lines += [*ratios(model), *_free(model), *overview(model)]
    for model in result["models"]:
        lines += [f"\n{model['title']}: {gap['part']} skipped: {gap['reason']}." for gap in model["skipped"]]
    return "\n".join(lines)


def _free(model: Row) -> list[str]:
    """Return per batch the window that the roofline predicts to be free, and the longest that was measured to be."""
    lines = []
    for batch, slots in map(dict.values, model.get("free_window", [])):
        times = {x["slots"]: x.get("graph_ms", x["ms"]) for x in model.get("passes", []) if x["batch"] == batch}
        free = [size for size, ms in times.items() if 1 in times and ms <= FREE * times[1]]
        measured = f"up to {max(free)} slots took at most {FREE - 1:.0%} longer than one" if free else "not measured"
        lines.append(f"\n{model['title']}, batch {batch}: predicted free window {slots} slots; {measured}.")
    return lines


def _milliseconds(row: Row, key: str) -> str:
    return f"{row[key]:.2f}" if key in row else ""


if __name__ == "__main__":
    main()
