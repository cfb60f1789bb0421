"""The ranges of the sampling parameters, apart from what computes with them: checking a value imports no torch."""

from __future__ import annotations

import math
from numbers import Integral, Real

from sjd2.errors import UserError

LEAST, MOST = 1e-30, 1e30  # of a factor of logits, which are float32: its largest number is 3e38


def check_sampling_ranges(*, guidance_scale: float, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raise `UserError` for a sampling parameter outside its range."""
    numbers = {"guidance_scale": guidance_scale, "temperature": temperature, "top_p": top_p, "min_p": min_p}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, got {value!r}.")
        if value > MOST:
            raise UserError(f"{name} must be {MOST:g} at most, got {value:g}.")
    if guidance_scale < 0:
        raise UserError(f"guidance_scale must be 0 or more, got {guidance_scale}; 1 switches guidance off.")
    if temperature < 0:
        raise UserError(f"temperature must be 0 (greedy) or more, got {temperature}.")
    if 0 < temperature < LEAST:
        raise UserError(
            f"temperature={temperature} makes logits overflow; use 0 for greedy decoding, or {LEAST} or more."
        )
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must lie in (0, 1], got {top_p}; 1 switches it off.")
    if not 0 <= min_p <= 1:
        raise UserError(f"min_p must lie in [0, 1], got {min_p}; 0 switches it off.")
    if isinstance(top_k, bool) or not isinstance(top_k, Integral):
        raise UserError(f"top_k must be a whole number, got {top_k!r}.")
    if top_k < 0:
        raise UserError(f"top_k must be 0 (off) or more, got {top_k}.")
