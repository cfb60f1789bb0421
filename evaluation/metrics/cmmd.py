"""CMMD (Jayasumana et al. 2024, arXiv 2401.09603): a kernel distance of CLIP features, for few images.

# N images, M reference images, D feature width
"""

from __future__ import annotations

from typing import Any

import numpy as np

from evaluation.metrics.fid import FeatureDistance
from evaluation.run_folder import Snapshot
from evaluation.score import MetricInfo, Scores

SIGMA, SCALE = 10.0, 1000.0  # of the paper
BLOCK = 512  # rows of the kernel held at once
FEWEST = 50  # images below which it is not shown


def gaussian_kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return exp(-|a - b|^2 / (2 sigma^2)): [N, D], [M, D] -> [N, M], in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squares = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    return np.exp(-np.maximum(squares, 0) / (2 * SIGMA**2))


def cmmd(features: np.ndarray, reference: np.ndarray) -> float:
    """Compute 1000 times the unbiased squared MMD: [N, D], [M, D].

    The authors' code counts each image with itself, which adds about 5 / N at unit vectors: nothing at their 30,000
    images, more than the difference of two decoders at 50.
    """
    n, m = len(features), len(reference)
    # the kernel of a feature with itself is exactly 1
    within = sum((_total(x, x) - len(x)) / (len(x) * (len(x) - 1)) for x in (features, reference))
    return float(SCALE * (within - 2 * _total(features, reference) / (n * m)))


def _total(a: np.ndarray, b: np.ndarray) -> float:
    """Return the sum of the kernel over all pairs, in blocks: 40,000 references would fill 13 GB."""
    return sum(float(gaussian_kernel(a[start : start + BLOCK], b).sum()) for start in range(0, len(a), BLOCK))


class Cmmd(FeatureDistance):
    """CMMD of a run against a reference, an npz of features or a folder of images; settings as of FID."""

    numbers = (
        MetricInfo(
            name="cmmd", title="CMMD", digits=3, higher_is_better=False, source="cmmd_extractor", fewest=FEWEST,
            fewest_why="too few to tell decoders apart",
        ),
    )  # fmt: skip
    details = ("cmmd_extractor", "cmmd_reference", "cmmd_warning")
    key, title = "evaluation.metrics.cmmd", "CMMD"

    @property
    def protocol(self) -> str:
        """How the values come about."""
        return (
            f"cmmd: 1000 times the unbiased squared MMD with a Gaussian kernel of sigma 10 on features of "
            f"{self.extractor.name}."
        )

    def compute(self, run: Snapshot) -> Scores:
        """Compute the distance; a `cmmd_warning` alone where images or reference do not allow one."""
        if self._unfit:
            return Scores({"cmmd_warning": self._unfit})
        features, reference = self._features.finish(), self._reference
        if reference.features is None:
            return Scores(
                {"cmmd_warning": f"left out: reference {reference.name} holds moments only, CMMD needs features."}
            )
        out: dict[str, Any] = {"cmmd": cmmd(features, reference.features)}
        out |= {"cmmd_extractor": f"{self.extractor.name} {self.extractor.digest()}", "cmmd_reference": reference.name}
        return Scores(out)
