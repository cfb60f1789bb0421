"""Noise levels: level 0 is clean, level K pure Gaussian noise; e_t = alpha(t) e + sigma(t) eps.

# K denoising steps
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sjd2.errors import UserError, choose


def alpha_sigma(t: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """Return signal and noise shares of time t in [0, 1].

    flow: 1 - t and t (arXiv 2510.08994). vp: cos and sin, which keeps the variance of the embeddings at every t.
    """
    if path == "vp":
        return torch.cos(t * torch.pi / 2), torch.sin(t * torch.pi / 2)
    return 1 - t, t


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """K levels between clean and pure noise.

    spacing: karras (rho 7 over the noise-to-signal ratio, arXiv 2206.00364 eq. 5, as the paper suggests) or linear in t.
    lowest, highest: noise-to-signal ratios of the first and the last partly noisy level. A token of width 192 is still
    found by its nearest embedding at ratio 2 and lost at 8; the usual constants of images waste most levels.
    """

    spacing: str = "karras"
    lowest: float = 0.5
    highest: float = 8.0

    def __post_init__(self) -> None:
        choose("decoder.drafter.schedule.spacing", self.spacing, ("karras", "linear"))
        if not 0 < self.lowest < self.highest:
            raise UserError(f"schedule needs 0 < lowest < highest, got {self.lowest} and {self.highest}.")

    def times(self, steps: int) -> Tensor:
        """Return t of each level, rising from 0 (clean) to 1 (pure noise): [K + 1]."""
        if self.spacing == "linear":
            return torch.linspace(0, 1, steps + 1)
        rho = 7.0
        share = torch.linspace(0, 1, max(steps - 1, 1))
        ratio = (self.lowest ** (1 / rho) + share * (self.highest ** (1 / rho) - self.lowest ** (1 / rho))) ** rho
        inner = (ratio / (1 + ratio))[: steps - 1]
        return torch.cat([torch.zeros(1), inner, torch.ones(1)])
