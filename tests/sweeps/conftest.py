"""The feature distance that comparisons of runs are tested with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.compared_runs import D
from tests.helpers.runs import gaussian


@pytest.fixture
def metric(tmp_path: Path) -> dict[str, Any]:
    """Settings of a feature distance as config.yaml holds them."""
    np.savez(tmp_path / "reference.npz", features=gaussian(200, D, 77), digest="six")
    extractor = {"_target_": "tests.helpers.extractors.SixNumbers"}
    return {
        "_target_": "evaluation.metrics.fid.FeatureDistance",
        "extractor": extractor,
        "reference": str(tmp_path / "reference.npz"),
    }
