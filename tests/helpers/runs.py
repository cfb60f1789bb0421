"""Run folders written by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from evaluation.run_folder import RunFolder

RNG = np.random.default_rng(0)
MODEL = {"_target_": "sjd2.models.chameleon.ChameleonSpec", "name": "m", "weights": "-", "vq_weights": "-"}


def gaussian(n: int, d: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Correlated features [n, d] that differ between seeds by noise and by `shift` in distribution."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(d, d)) / np.sqrt(d)
    return (rng.normal(size=(n, d)) @ mix * (1 + shift) + shift).astype(np.float32)


def a_run(
    folder: Path,
    images: Iterable[np.ndarray] = (),
    prompts: Iterable[str] = (),
    model: dict | None = None,
    launches: Iterable[dict] = ({"hardware": "x", "threads": 1},),
    *,
    config: dict[str, Any] | None = None,
    **record: object,
) -> RunFolder:
    """Write a run folder with one record per image; `record` overrides fields, a list gives one value per image.

    config: what config.yaml holds; by default settings of a 2 x 2 grid of 8 codes, or of `model`. An image's tokens are
    its number, as often as its record says.
    """
    run = RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config or {"refill": False, "model": model or MODEL | {"rows": 2, "columns": 2, "vocabulary": 8}}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    for launch in launches:
        run.launch(dict(launch))
    images = list(images)
    for i, (image, prompt) in enumerate(zip(images, prompts or ["p"] * len(images), strict=True)):
        seconds = {"encode": 0.1, "prefill": 0.2, "decode": 0.7, "image": 1.0}
        fields = {"id": [i, 0], "prompt": prompt, "launch": 0, "batch": 0, "batch_rows": 2, "tokens": 4, "forwards": 4}
        fields |= {"draft_forwards": 0, "accepted": [1, 1, 1, 1], "nll": 8.0, "seconds": seconds}
        fields |= {key: value[i] if isinstance(value, list) else value for key, value in record.items()}
        run.append(fields | run.write_image(tuple(fields["id"]), image, np.full(fields["tokens"], i)))
    return run


def forget_likelihood(run: RunFolder, index: int) -> None:
    """Leave out the likelihood of one record, as sampling does where it is not finite."""
    lines = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    del lines[index]["nll"]
    (run.path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def pixels(n: int, side: int = 8) -> list[np.ndarray]:
    return list(RNG.integers(0, 256, (n, side, side, 3), dtype=np.uint8))
