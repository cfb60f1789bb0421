"""Latencies of a run beyond their median: percentiles, and the time to the first row of the image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from evaluation.run_folder import Id
from sjd2.config import instantiate
from sjd2.errors import UserError
from sweeps.runs import ImageCost, Run

PERCENTILES = (95, 99)
FEWEST = {95: 20, 99: 100}  # timed images below which the percentile is the slowest image, or nearly


def percentiles(images: Mapping[Id, ImageCost]) -> dict[int, float]:
    """Return {percentile: seconds} of the latencies of images; {} without one."""
    latencies = [image.latency for image in images.values()]
    return {share: float(np.percentile(latencies, share)) for share in PERCENTILES} if latencies else {}


def first_row(run: Run, images: Mapping[Id, ImageCost]) -> float | None:
    """Return the median seconds until the first row of an image is complete; None where rows do not come in order.

    The passes of a batch have one shape and so cost the same: a row is complete after its share of the passes of the
    batch's slowest image. Nothing waits for the device for it; `trace=` measures it, and slows what it measures.
    """
    tokens = tokens_of_first_row(run)
    if tokens is None or not images:
        return None
    passes: dict[tuple[int, int], int] = {}
    for image in images.values():
        passes[image.batch] = max(passes.get(image.batch, 0), image.forwards)
    return float(np.median([_seconds(image, passes[image.batch], tokens) for image in images.values()]))


def _seconds(image: ImageCost, passes: int, tokens: int) -> float:
    """Return when an image has `tokens` tokens, in a batch of so many passes, the prefill among them."""
    done = int(np.searchsorted(np.cumsum(image.accepted), tokens)) + 1
    if not image.prefill:  # with refill a row's prefill is part of its time, as one of its passes
        return image.latency * done / image.forwards
    return image.prefill + (image.latency - image.prefill) * (done - 1) / max(1, passes - 1)


def tokens_of_first_row(run: Run) -> int | None:
    """Return how many tokens complete the first row; None if it is unknown, or tokens are not committed row by row."""
    try:
        decoder, layout = run.folder.config["decoder"], run.layout
        engine = instantiate(decoder).engine if "_target_" in decoder else None
        tokens = (
            int(np.flatnonzero(np.asarray(layout.shown))[layout.columns - 1]) + 1
        )  # a header or preview comes first
    except (UserError, AttributeError, LookupError, FileNotFoundError):
        return None
    return tokens if engine is None or engine.raster else None
