"""Run folders with noise of their own around shared difficulties of the prompts, for tests of comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from evaluation.metrics.features import save_npz
from tests.helpers.runs import MODEL, a_run, gaussian

N, D, TOKENS = 24, 6, 16
SCORED = 100  # images of a run with features: as many as a KID takes
SPEC = MODEL | {"rows": 4, "columns": 4, "vocabulary": 8, "adapter": None}
PAPER = {"rule": "paper", "lossless": False}


def make(
    tmp_path: Path,
    decoder: str,
    *,
    seed: int,
    shift: float = 0.0,
    forwards: int = 8,
    ids: range | None = None,
    metric: dict[str, Any] | None = None,
    digest: str = "base",
    adapter: str | None = None,
    refilled: int | None = None,
    **parts: Any,
) -> str:
    """Write a run with noise of its own around shared difficulties of the prompts; returns the folder's name.

    shift: nats per token added, and a quarter of the shift of the features; forwards: passes of an image, one more at
    odd prompts. refilled: batch size of a run with refill.
    """
    ids = ids or range(SCORED if metric else N)
    rng = np.random.default_rng(seed)
    prompts = np.random.default_rng(7).normal(30, 5, 200)[list(ids)]
    nll = prompts + rng.normal(0, 1, len(ids)) + shift * TOKENS
    passes = [TOKENS if decoder == "ar" else forwards + i % 2 for i in ids]
    path = tmp_path / "runs" / f"{decoder}-{seed}"
    model = SPEC | {"adapter": adapter}
    identity = {"id": f"{seed:010d}", "digest": digest, "model": model, "law": {"temperature": 1.0, "sampler": "cdf"}}
    identity |= {"decoder": {"name": decoder, "lossless": True} | parts, "prompts": {"digest": "p", "repeats": 1}}
    identity |= {"batch_size": refilled, "refill": True} if refilled else {}
    config = {"model": model, "prompts": {"name": "shapes"}, "identity": identity}
    if metric:
        config["evaluation"] = {"metrics": {"fid": metric}}
        features = gaussian(200, D, seed, 4 * shift)[list(ids)]
        arrays = {"ids": np.array([[i, 0] for i in ids]), "tokens": np.array(["-"] * len(ids)), "features": features}
        path.mkdir(parents=True)
        save_npz(path / "features-six.npz", arrays)
    a_run(path, [np.zeros((8, 8, 3), np.uint8)] * len(ids), config=config, id=[[i, 0] for i in ids], seed=0,
          tokens=TOKENS, forwards=passes, nll=nll.tolist())  # fmt: skip
    return path.name
