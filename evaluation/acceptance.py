"""How draft tokens fare, from what records hold of them (sjd2/decoding/draft_counter.py): by depth, and per pass.

# D depths: the first draft token after the committed ones, the second, ...
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def depth_counts(drafts: Iterable[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Add up how often each depth was tested and accepted: `drafts` of records -> [D], [D]."""
    drafts = list(drafts)
    deepest = max((len(image["tests"]) for image in drafts), default=0)
    counts = np.zeros((2, deepest), np.int64)
    for image in drafts:
        for row, key in enumerate(("tests", "accepts")):
            counts[row, : len(image[key])] += image[key]
    return counts[0], counts[1]


def accept_rate(drafts: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the share of the tested draft tokens, of all depths, that were accepted; None where none was tested."""
    tests, accepts = depth_counts(drafts)
    return float(accepts.sum() / tests.sum()) if tests.sum() else None


def accept_length(drafts: Sequence[Mapping[str, Any]], forwards: Sequence[int]) -> float | None:
    """Return 1 + accepted draft tokens / passes that draft, as EAGLE, vLLM and NeMo report it; None where none drafts.

    The prefill is left out, and so are the draft tokens that it may have had; the 1 is the recovered or bonus token.
    """
    passes = sum(forwards) - len(forwards)
    return 1 + sum(image["accepted"] for image in drafts) / passes if passes else None
