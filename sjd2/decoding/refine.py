"""What happens to the draft tokens that were not committed: drawn afresh, coupled to their old value, or kept.

A refiner sees all draft tokens of a pass, on trees too, and must record the distributions that its tokens were truly drawn
from, else the decoder is biased (docs/exactness.md, 2).
# B samples, S slots of a pass, V image vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sjd2.decoding.interfaces import Draft, Refiner, State
from sjd2.decoding.noise import Purpose
from sjd2.decoding.sampling import GumbelSampler
from sjd2.decoding.verify import Verification
from sjd2.errors import choose


def redrawn(draft: Draft, tokens: Tensor, probs: Tensor | None) -> Draft:
    """Return `draft` with draft tokens [B, S-1] of distributions [B, S-1, V]."""
    return replace(draft, tokens=torch.cat([draft.tokens[:, :1], tokens], 1), probs=probs)


@dataclass(frozen=True, kw_only=True)
class Resample(Refiner):
    """Draw every draft token afresh from its new distribution (SJD, arXiv 2410.01699).

    record: keep the distribution beside the token; false treats it as deterministic (Jacobi's exact-match acceptance).
    """

    record: bool = True
    after_joint: ClassVar[bool] = True
    by_lane: ClassVar[bool] = True

    @property
    def records(self) -> bool:
        return self.record

    def __call__(self, draft: Draft, test: Verification, state: State) -> Draft:
        tokens = state.sampler.draw(test.p, test.positions, Purpose.FRESH, state.iteration, draft.shape.lane)
        return redrawn(draft, tokens, test.p if self.record else None)


@dataclass(frozen=True, kw_only=True)
class Coupled(Refiner):
    """Redraw draft tokens so that they change as little as their distributions do (SCD / MC-SJD, arXiv 2510.24211).

    coupling=maximal: an accepted token stays, a rejected one moves to the residual; the pair is a maximal coupling of old and
    new distribution. coupling=gumbel: argmax(log p + G) with G fixed per position. Either way the token is one of the new p.
    """

    coupling: str = "maximal"

    def __post_init__(self) -> None:
        choose("decoder.refiner.coupling", self.coupling, ("maximal", "gumbel"))

    @property
    def after_joint(self) -> bool:
        """Return whether the noise of a rejected token is free of the decision; G of coupling=gumbel is not."""
        return self.coupling == "maximal"

    @property
    def by_lane(self) -> bool:
        """Return whether lanes stay independent; G of coupling=gumbel is one per position."""
        return self.coupling == "maximal"

    def __call__(self, draft: Draft, test: Verification, state: State) -> Draft:
        sampler = GumbelSampler(state.noise) if self.coupling == "gumbel" else state.sampler
        old, purpose = draft.codes(test.p.shape[-1]), Purpose.COUPLE
        # accepted is per slot, not cut at the first rejection: that would bias the draft tokens after it
        exact = test.exact()
        q, accepted, lane = exact.draft.probs, exact.accepted, draft.shape.lane
        tokens = sampler.recover(test.p, q, old, accepted, test.positions, purpose, state.iteration, lane)
        return redrawn(draft, tokens, test.p)


@dataclass(frozen=True, kw_only=True)
class Keep(Refiner):
    """SJD2's refinement of clean draft tokens (arXiv 2510.08994, section 4): ratios below `threshold` are redrawn.

    The others stay although the recorded distribution is the new one, so this breaks rule 1 (docs/exactness.md, 2): lossy.
    """

    threshold: float = 0.5
    exact: ClassVar[bool] = False
    by_lane: ClassVar[bool] = True

    def __call__(self, draft: Draft, test: Verification, state: State) -> Draft:
        fresh = Resample()(draft, test, state)
        stays = test.exact().accept_prob >= self.threshold
        if draft.level is not None:
            stays &= draft.level[:, 1:] == 0
        return redrawn(draft, torch.where(stays, draft.tokens[:, 1:], fresh.tokens[:, 1:]), fresh.probs)
