"""When a tested difference counts, and how it is written."""

from __future__ import annotations

from evaluation.statistics import Difference

ALPHA = 0.01  # of all tests of one table together


def differs(difference: Difference) -> bool:
    """Say whether the corrected p-value of a difference is below 1 %."""
    return difference.p < ALPHA


def with_interval(gap: Difference, digits: int) -> str:
    """Write a difference with its interval."""
    return f"{gap.mean:+.{digits}f} [{gap.low:+.{digits}f}, {gap.high:+.{digits}f}]"


def p_value(gap: Difference) -> str:
    """Write a p-value."""
    return "<0.001" if gap.p < 0.001 else f"{gap.p:.3f}"
