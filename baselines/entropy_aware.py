"""Acceptance that depends on the entropy of the target: certain regions of an image are tested less strictly; lossy.

# V image vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sjd2.decoding.interfaces import Verifier
from sjd2.decoding.sampling import likelihood_ratio, residual
from sjd2.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EntropyAware(Verifier):
    """Accept draft token x if p(x) / q(x) > (H / scale) (1/2 + (u - 1/2) (1 - H / width)), u uniform (arXiv 2510.09012).

    H: entropy of p in nats. scale: e of the paper, 8; width: its lambda, 16; null leaves the second factor out, as the
    released code does (krennic999/ARsample 1a2dfb9: u H / 8 <= p / q; for Lumina u (H / 9 + 0.05)). Where H is small nearly
    all is accepted; where it is large the coin is drawn together around 1/2. On rejection the ordinary residual max(0, p - q).
    The formula is known from notes on the paper: that lambda divides is a guess.
    """

    scale: float = 8.0
    width: float | None = 16.0
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("scale", "width"):
            value = getattr(self, name)
            if not (name == "width" and value is None) and not value > 0:
                raise UserError(f"decoder.verifier.{name} must be above 0 (nats), got {value}.")

    def accept_prob(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return the probability over u that the ratio passes: p, q [..., V], token [...] -> [...]."""
        entropy = torch.special.entr(p).sum(-1)
        level = likelihood_ratio(p, q, token) * self.scale / entropy.clamp(min=torch.finfo(p.dtype).tiny)
        if self.width is None:
            return level.clamp(max=1)
        spread = 1 - entropy / self.width
        tiny = torch.finfo(p.dtype).eps
        magnitude = spread.abs().clamp(min=tiny)  # u and 1 - u are alike, so the sign does not matter
        prob = (0.5 + (level - 0.5) / magnitude).clamp(0, 1)
        return torch.where(p.gather(-1, token[..., None])[..., 0] > 0, prob, 0.0)

    def residual(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return max(0, p - q)."""
        return residual(p, q, token)
