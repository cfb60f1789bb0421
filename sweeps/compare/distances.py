"""Compare the KID and FID of two runs from the features in their folders; no network is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from evaluation.declared import images_needed
from evaluation.metrics.fid import FeatureDistance
from evaluation.statistics import Difference, paired_distance
from sjd2.config import instantiate
from sjd2.errors import UserError
from sweeps.comparable import common_prompts
from sweeps.runs import Run

FEW = 10  # prompts below which bootstrapping a distance is meaningless
WIDE = 256  # features above which the 400 Frechet distances of one interval take too long


class DistanceGaps:
    """Differences in KID or FID between runs; a metric and its reference features are read once for all pairs."""

    def __init__(self, settings: Mapping[str, Any] | None) -> None:
        self.settings = settings
        self._built: dict[str, FeatureDistance | UserError] = {}  # settings as JSON -> metric, or why there is none

    def gap(self, kind: str, reference: Run, run: Run, level: float, comparisons: int) -> tuple[Difference | None, str]:
        """Return run's distance (kind: kid or fid) minus reference's, and the extractor; or None and the reason."""
        if (common := common_prompts(reference, run)) < FEW:
            return None, f"{common} common prompts are too few"
        images = len(reference.images.keys() & run.images.keys())
        nodes = [self.settings, *(fid_settings(r.config) for r in (run, reference))]
        reason = "neither run was evaluated with features"
        for node in filter(None, nodes):
            try:
                metric = self._metric(node)
                if images < (need := _images_needed(metric, kind)):
                    reason = f"{images} common images are too few, a {kind.upper()} takes {need}"
                    continue
                if kind == "fid" and metric.extractor.width > WIDE:
                    reason = f"an interval on {metric.extractor.width} features takes too long; see KID"
                    continue
                with np.errstate(divide="ignore", invalid="ignore"):  # a replicate of a single image has no pairs
                    found = paired_distance(
                        reference.folder, run.folder, metric, kind, level=level, comparisons=comparisons
                    )
            except UserError as error:
                reason = str(error).rstrip(".")
                continue
            if np.isfinite([found.low, found.high]).all():
                return found, metric.extractor.name
            reason = "too few images have features in both runs"
        return None, reason

    def _metric(self, node: Mapping[str, Any]) -> FeatureDistance:
        key = json.dumps(node, sort_keys=True, default=str)
        if key not in self._built:
            try:
                metric = instantiate(OmegaConf.create(dict(node)))
                metric.check()
                self._built[key] = metric
            except UserError as error:
                self._built[key] = error
        if isinstance(metric := self._built[key], UserError):
            raise metric
        return metric


def _images_needed(metric: FeatureDistance, kind: str) -> int:
    """Return how many images this distance takes, as in a table."""
    info = next(info for info in metric.numbers if info.name == kind)
    return images_needed(info, metric.protocol)


def fid_settings(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings of the feature distance under `evaluation.metrics.fid`; None if it is another metric."""
    node = ((config.get("evaluation") or {}).get("metrics") or {}).get("fid")
    return node if node and str(node.get("_target_")).endswith("FeatureDistance") else None
