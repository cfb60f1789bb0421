"""No verification at all: every draft token fed clean is committed (SJD2's "denoising only", arXiv 2510.08994, appendix B).

# V image vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sjd2.decoding.interfaces import Verifier


@dataclass(frozen=True)
class AcceptAll(Verifier):
    """Accept every draft token. With `rule=exact` a pass still stops after the first noisy input, so clean tokens commit."""

    exact: ClassVar[bool] = False

    def accept_prob(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return 1 for each token: p, q [..., V], token [...] -> [...]."""
        return torch.ones_like(p[..., 0])

    def residual(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return p itself: nothing is ever rejected, so no residual is left."""
        return p
