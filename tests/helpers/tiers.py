"""Which cases of a parametrised test run by default, and which only in the tiers `full` and `slow`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def by_default(cases: Iterable[Any], chosen: Iterable[Any], slow: Iterable[Any] = ()) -> list[Any]:
    """Return all cases; those that are not `chosen` are marked `full`, or `slow`. Raises ValueError for an unknown one."""
    cases, chosen, slow = list(cases), list(chosen), list(slow)
    if unknown := [case for case in (*chosen, *slow) if case not in cases]:
        raise ValueError(f"no such case: {unknown}")

    def mark(case: Any) -> Any:
        return pytest.param(case, marks=pytest.mark.slow if case in slow else pytest.mark.full)

    return [case if case in chosen else mark(case) for case in cases]
