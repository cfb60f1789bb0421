"""Relaxed acceptance that cools with depth: generous at the first draft token of a pass, nearly exact at the last; lossy.

# B samples, S slots of a pass, V image vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sjd2.decoding.interfaces import DraftRun, Judgement, Verifier
from sjd2.decoding.sampling import likelihood_ratio, residual
from sjd2.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Annealed(Verifier):
    """Accept draft token x at depth d with min(1, w_d p(x) / q(x)) (Cool-SD, arXiv 2601.09212).

    w_d = 1 + (delta - 1) decay^(d - 1). delta: relaxation of the first draft token; 1 is exact verification. decay: from depth
    to depth. The paper anneals exponentially; its formula could not be read, so this schedule is ours. On rejection
    norm(max(0, p - min(q, w p))), what the accepted mass has left of p; as w >= 1 that is max(0, p - q), and no other residual
    brings the token nearer to p in total variation.
    """

    delta: float = 1.1
    decay: float = 0.8
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.delta < float("inf"):
            raise UserError(f"decoder.verifier.delta must be a number from 1 (exact) up, got {self.delta}.")
        if not 0 <= self.decay <= 1:
            raise UserError(f"decoder.verifier.decay must lie in [0, 1], got {self.decay}; 1 relaxes all depths alike.")

    def judge(self, run: DraftRun) -> Judgement:
        """Accept by depth: the relaxation w of a draft token depends on how far it is from the last committed one."""
        relaxation = 1 + (self.delta - 1) * self.decay ** (run.depth - 1).to(run.coin)
        prob = (likelihood_ratio(run.p, run.q, run.token) * relaxation).clamp(max=1).masked_fill(run.certain, 1.0)
        return Judgement(run.coin < prob, prob)

    def residual(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return max(0, p - q)."""
        return residual(p, q, token)
