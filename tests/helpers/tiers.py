"""Which cases of a parametrised test run by default, and which only in the tier `full`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def by_default(cases: Iterable[Any], chosen: Iterable[Any]) -> list[Any]:
    """Return all cases; those that are not `chosen` are marked `full`. Raises ValueError if a chosen one does not exist."""
    cases, chosen = list(cases), list(chosen)
    if unknown := [case for case in chosen if case not in cases]:
        raise ValueError(f"no such case: {unknown}")
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.full) for case in cases]
