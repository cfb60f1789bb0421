"""Block verification: one joint decision for all draft tokens of a chain (Sun et al., arXiv 2403.10444).

# B samples, S slots of a pass, V image vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sjd2.decoding.interfaces import DraftRun, Judgement
from sjd2.decoding.sampling import likelihood_ratio
from sjd2.decoding.verify import Exact


@dataclass(frozen=True)
class Block(Exact):
    """Accept the longest run of draft tokens that a joint test passes; the output distribution is the target's.

    With w_0 = 1 and w_k = min(1, w_{k-1} p(x_k) / q(x_k)), the prefix of k tokens passes with h_k = e / (e + 1 - w_k), where
    e = sum_x max(0, w_k p(x) - q(x)) at the next slot; the whole run with its w (algorithm 2). The accepted prefix is the
    longest that passes, with probability w_k at least k tokens; the recovered token is one of norm(max(0, w_k p - q)). In
    expectation never shorter than token by token, since w_k is at least the product of min(1, p / q).
    """

    joint: ClassVar[bool] = True

    def judge(self, run: DraftRun) -> Judgement:
        """Decide for all draft tokens of a chain at once."""
        survival = joint_weights(self.log_ratio(run))  # [B, S-1] w_k after each draft token
        inside = torch.ones_like(run.certain) if run.inside is None else run.inside
        weight = pad(survival[:, :-1], (1, 0), value=1.0) * inside
        excess = pad(self.excess(run, weight)[:, 1:], (0, 1))
        last = inside & ~pad(inside[:, 1:], (0, 1))
        # where w = 1 the decision falls later: e / e is 1, and 0 / 0 is never the last to pass
        prob = torch.where(survival < 1, excess / (excess + 1 - survival), 1.0)
        prob = torch.where(last, survival, prob) * inside
        passed = run.coin < prob
        return Judgement(passed.flip(1).cumsum(1).flip(1) > 0, prob, weight)

    @staticmethod
    def log_ratio(run: DraftRun) -> Tensor:
        """Return log p(x) / q(x) of each draft token: [B, S-1]; 0 where it is certain."""
        return likelihood_ratio(run.p, run.q, run.token).log().masked_fill(run.certain, 0.0)

    @staticmethod
    def excess(run: DraftRun, weight: Tensor) -> Tensor:
        """Return the mass of max(0, weight p - q) at each slot: weight [B, S-1] -> [B, S-1]; 0 where it is certain."""
        if run.q is None:
            mass = weight * (1 - run.p.gather(-1, run.token[..., None])[..., 0])
        else:
            mass = (weight[..., None] * run.p - run.q).clamp(min=0).sum(-1)
        return mass.masked_fill(run.certain, 0.0)


def joint_weights(log_ratio: Tensor) -> Tensor:
    """Return w_k = min(1, w_{k-1} r_k) of all k without a loop over slots: log r [B, S-1] -> [B, S-1].

    A walk that is held below 0: log w_k = L_k - max(0, L_1, ..., L_k) with the sums L of log r.
    """
    total = log_ratio.cumsum(1)
    return (total - total.cummax(1).values.clamp(min=0)).exp()
