"""What is known of the numbers in metrics.json: declared by the metrics that ship, and by those that scored the runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from evaluation.run_folder import RunFolder
from evaluation.score import Metric, MetricInfo, read_info


@cache
def shipped() -> tuple[type[Metric], ...]:
    """Return the metrics of this package in the order of their columns; imports torch."""
    from evaluation.metrics.alignment import Alignment
    from evaluation.metrics.clip import ClipScore
    from evaluation.metrics.cmmd import Cmmd
    from evaluation.metrics.fid import FeatureDistance
    from evaluation.metrics.geneval import GenEval
    from evaluation.metrics.rewards import HpsV2, HpsV3, ImageReward, PickScore, VqaScore
    from evaluation.metrics.speed import Speed

    return (
        Speed, FeatureDistance, Cmmd, ClipScore, Alignment, GenEval, HpsV2, PickScore, HpsV3, ImageReward, VqaScore
    )  # fmt: skip


def declared(runs: Iterable[RunFolder]) -> dict[str, MetricInfo]:
    """Return {name: declaration} of every number that the runs may hold: the shipped ones, then others as first met.

    Runs scored before there was a metrics_info.json hold none but shipped ones.
    """
    found = {info.name: info for metric in shipped() for info in metric.numbers}
    for run in runs:
        for name, (_, info) in read_info(run).items():
            found.setdefault(name, info)
    return found


def withheld(metrics: Mapping[str, Any], known: Mapping[str, MetricInfo]) -> dict[str, str]:
    """Return {name: why not} of the numbers of a metrics.json that rest on too few images to be shown."""
    found = {}
    for name, info in known.items():
        need = images_needed(info, " ".join(metrics.get("protocol", {}).values()))
        if name in metrics and metrics.get("n_images", 0) < need:
            found[name] = f"fewer than {need} images, {info.fewest_why}"
    return found


def shown(metrics: Mapping[str, Any], known: Mapping[str, MetricInfo]) -> dict[str, Any]:
    """Return a metrics.json without the numbers that are withheld, and without their spreads and warnings."""
    names = withheld(metrics, known).keys()
    gone = names | {known[name].spread for name in names} | {f"{name}_warning" for name in names}
    return {key: value for key, value in metrics.items() if key not in gone}


def images_needed(info: MetricInfo, protocol: str) -> int:
    """Return how many images a number needs to be shown; protocol: of its metric, as in metrics.json."""
    count = re.search(rf"\b(\d+) {info.fewest_per}\b", protocol) if info.fewest_per else None
    return info.fewest * int(count[1] if count else 1)
