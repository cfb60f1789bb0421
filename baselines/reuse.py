"""SJD++'s reuse of confident draft tokens, with the record that makes it exact.

# B samples, S slots of a pass, V image vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sjd2.decoding.interfaces import Draft, Refiner, State
from sjd2.decoding.noise import Purpose
from sjd2.decoding.refine import redrawn
from sjd2.decoding.verify import Verification
from sjd2.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Reuse(Refiner):
    """Keep a draft token that its new p finds likely, p(x) > threshold, and draw the others afresh (SJD++, arXiv 2512.07503).

    threshold: ours (more likely than not), the paper's value is not published; 1 is SJD.
    With S = {x: p(x) > threshold} a draft token of q becomes one of q 1_S + q(S^c) p. That distribution is recorded: with the
    old q or with p the decoder would be biased (docs/exactness.md). It is q(S) TV(q(.|S), p) away from p, where SJD's draft
    tokens are not at all; what reuse has to offer is steadier inputs for the tokens after it.
    """

    threshold: float = 0.5
    after_joint: ClassVar[bool] = True
    by_lane: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(
                f"decoder.refiner.threshold must lie in [0, 1], got {self.threshold}; 1 keeps no draft token."
            )

    def __call__(self, draft: Draft, test: Verification, state: State) -> Draft:
        if draft.probs is None:
            raise UserError(
                "refiner reuse needs the distributions of the draft tokens; choose a drafter that records them."
            )
        p, q, old = test.p, test.draft_probs(), draft.codes(test.p.shape[-1])
        assert q is not None
        likely = p > self.threshold
        fresh = state.sampler.draw(p, test.positions, Purpose.FRESH, state.iteration, draft.shape.lane)
        tokens = torch.where(likely.gather(-1, old[..., None])[..., 0], old, fresh)
        kept = q.masked_fill(~likely, 0.0)
        mass_redrawn = q.masked_fill(likely, 0.0).sum(-1, keepdim=True)
        return redrawn(draft, tokens, kept + mass_redrawn * p)
