"""Draft tokens that favour what has become more likely from pass to pass, with the record that makes it exact.

# B samples, S slots of a pass, V image vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sjd2.decoding.interfaces import Draft, Refiner, State
from sjd2.decoding.noise import Purpose
from sjd2.decoding.refine import redrawn
from sjd2.decoding.verify import EXACT, Verification
from sjd2.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Rising(Refiner):
    """Redraw draft tokens from r = norm(p + strength max(0, p - q)) (after SJD-VP, arXiv 2603.27115).

    q: the distribution that a draft token had. strength: how much a rise counts; 0 is SJD, or SCD if coupled. coupled: keep
    old tokens as far as r allows. The paper's formula could not be read; this is the plainest one that does what its abstract
    says. r is recorded, so it is exact.
    """

    strength: float = 1.0
    coupled: bool = False
    after_joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise UserError(f"decoder.refiner.strength must be 0 or more, got {self.strength}; 0 prefers nothing.")

    def __call__(self, draft: Draft, test: Verification, state: State) -> Draft:
        if draft.probs is None:
            raise UserError(
                "refiner rising needs the distributions of the draft tokens; choose a drafter that records them."
            )
        p, sampler = test.p, state.sampler
        r = p + self.strength * (p - draft.probs).clamp(min=0)
        r = r / r.sum(-1, keepdim=True)
        if not self.coupled:
            return redrawn(draft, sampler.draw(r, test.positions, Purpose.FRESH, state.iteration), r)
        exact, old = test.exact(), draft.codes(p.shape[-1])
        q = exact.draft.probs
        accepted = exact.coin < sampler.accept_prob(EXACT, r, q, old, test.positions)
        tokens = sampler.recover(r, q, old, accepted, test.positions, Purpose.COUPLE, state.iteration)
        return redrawn(draft, tokens, r)
