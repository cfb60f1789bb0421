"""Run folders of made-up numbers for tests of tables, and readers of the tables made of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.identity import identity
from sweeps.tables.table import make_tables
from tests.helpers.runs import a_run

TOKENS = 16
CPU = "Some CPU, 2 threads"
SPEC = {
    "_target_": "tests.helpers.toy_spec.ToySpec",
    "name": "toy",
    "rows": 4,
    "columns": 4,
    "vocabulary": 12,
    "adapter": None,
}
LAW = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "sampler": "cdf"}


def make(
    runs_dir: Path,
    decoder: str,
    *,
    n: int = 4,
    accepted: tuple[int, ...] = (1, 3, 4, 8),
    latency: float | Sequence[float] = 1.0,
    nll: float = 32.0,
    lossless: bool = True,
    metrics: dict[str, Any] | None = None,
    hardware: str = CPU,
    threads: int = 2,
    drafts: int = 0,
    launch: dict[str, Any] | None = None,
    pixels: dict[str, float] | None = None,
    **changes: Any,
) -> Path:
    """Write a run folder of n prompts in batches of 2; batch b takes latency + b seconds, image i has nll + i nats.

    latency: of the first batch, or one per batch. launch: more of what the launch reports of itself. pixels: seconds from
    tokens to pixels; {} for tokens alone.
    """
    took = latency if isinstance(latency, Sequence) else [latency + b for b in range(n)]
    settings = {"name": decoder, "lossless": lossless, "window": 1 if decoder == "ar" else 9} | changes.pop("parts", {})
    spec = SPEC | changes.pop("model", {})
    law = LAW | changes.pop("law", {})
    digest = "base" if spec["adapter"] is None else "tuned"
    prompts = {"digest": changes.pop("prompts", "p1"), "repeats": 1}
    pixels = {"image": 0.5} if pixels is None else pixels
    rest = {"seed": 0, "batch_size": 2, "refill": False, "dtype": "float32"} | changes
    rest |= {} if pixels else {"pixels": "none"}
    known = identity(model=spec, digest=digest, decoder=settings, law=law, prompts=prompts, **rest)
    run = a_run(
        runs_dir / f"toy-{decoder}-{known['id']}",
        [np.full((8, 8, 3), 20 * i % 256, np.uint8) for i in range(n)],
        [f"a_shape {i} & <more>" for i in range(n)],
        launches=({"hardware": hardware, "threads": threads, "packages": {"torch": "2.15.0"}, **(launch or {})},),
        config={"model": spec, "decoder": settings, "prompts": {"name": "shapes"}, "identity": known},
        seed=[100 * rest["seed"] + i for i in range(n)],
        batch=[i // 2 for i in range(n)],
        tokens=TOKENS,
        forwards=len(accepted),
        draft_forwards=drafts,
        accepted=[list(accepted)] * n,
        nll=[nll + i for i in range(n)],
        seconds=[{"encode": 0.5, "prefill": 0.25, "decode": took[i // 2] - 0.25, **pixels} for i in range(n)],
    )
    if metrics is not None:
        (run.path / "metrics.json").write_text(json.dumps({"n_images": n, "protocol": {}} | metrics))
    return run.path


def ar(runs_dir: Path, **changes: Any) -> Path:
    return make(runs_dir, "ar", **{"accepted": (1,) * TOKENS, "latency": 4.0} | changes)


def table(
    tmp_path: Path, *runs: Path, failed: tuple[dict, ...] = (), **settings: Any
) -> tuple[str, list[dict[str, str]]]:
    """Return the Markdown and the rows of the CSV."""
    text = make_tables(list(runs), tmp_path / "out", failed, **settings)
    assert (tmp_path / "out" / "table.md").read_text() == text
    return text, list(csv.DictReader(io.StringIO((tmp_path / "out" / "table.csv").read_text())))


def cells(text: str, label: str) -> dict[str, str]:
    """Return one row of the first Markdown table that has it, by heading."""
    header: list[str] = []
    for before, line in zip(["", *text.split("\n")], text.split("\n"), strict=False):
        parts = [part.strip() for part in line.strip("|").split(" | ")] if line.startswith("|") else []
        if line.startswith("|") and not before.startswith("|"):
            header = parts
        elif parts and parts[0] == label:
            return dict(zip(header, parts, strict=False))
    raise AssertionError(f"no row '{label}' in\n{text}")
