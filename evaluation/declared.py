"""What is known of the numbers in metrics.json: declared by the metrics that ship, and by those that scored the runs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from evaluation.run_folder import RunFolder
from evaluation.score import Metric, MetricInfo, read_info


@cache
def shipped() -> tuple[type[Metric], ...]:
    """Return the metrics of this package in the order of their columns; imports torch."""
    from evaluation.metrics.alignment import Alignment
    from evaluation.metrics.clip import ClipScore
    from evaluation.metrics.fid import FeatureDistance
    from evaluation.metrics.geneval import GenEval
    from evaluation.metrics.rewards import HpsV2, ImageReward
    from evaluation.metrics.speed import Speed

    return Speed, FeatureDistance, ClipScore, Alignment, GenEval, HpsV2, ImageReward


def declared(runs: Iterable[RunFolder]) -> dict[str, MetricInfo]:
    """Return {name: declaration} of every number that the runs may hold: the shipped ones, then others as first met.

    Runs scored before there was a metrics_info.json hold none but shipped ones.
    """
    found = {info.name: info for metric in shipped() for info in metric.numbers}
    for run in runs:
        for name, (_, info) in read_info(run).items():
            found.setdefault(name, info)
    return found
