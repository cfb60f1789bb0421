"""No verification at all: every guess that was fed clean is committed (SJD2's "denoising only", arXiv 2510.08994, appendix B).

# V image vocabulary
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sjd2.models.base import ImageModel


class AcceptAll:
    """Accept every guess. With `rule=exact` a pass still stops behind the first noisy input, so clean guesses commit."""

    exact: ClassVar[bool] = False

    def prepare(self, model: ImageModel) -> None:
        """Nothing to prepare."""

    def chance(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return 1 for each token: p, q [..., V], token [...] -> [...]."""
        return torch.ones_like(p[..., 0])

    def rest(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return p itself: nothing is ever rejected, so no law is left over."""
        return p
