"""What happens to the drafts that were not committed: drawn afresh, coupled to their old value, or kept.

A refiner sees all guesses of a pass, on trees too, and must record the law its tokens were truly drawn from (push-forward),
else the decoder is biased (docs/exactness.md, 2).
# B samples, S slots of a pass, V image vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sjd2.decoding.interfaces import Draft, State
from sjd2.decoding.noise import Purpose
from sjd2.decoding.sampling import draw, draw_gumbel, draw_tokens
from sjd2.decoding.verify import residual
from sjd2.errors import choose
from sjd2.models.base import ImageModel


def couple(draft: Draft, law: Tensor, keep: Tensor, u: Tensor) -> Tensor:
    """Return guesses of law [B, S-1, V] that change as little as can be: kept, or drawn from the residual by u [B, S-1]."""
    old = draft.tokens[:, 1:].clamp(max=law.shape[-1] - 1)
    return torch.where(keep, old, draw(residual(law, draft.probs, old), u))


def _set(draft: Draft, tokens: Tensor, probs: Tensor | None) -> Draft:
    return replace(draft, tokens=torch.cat([draft.tokens[:, :1], tokens], 1), probs=probs)


@dataclass(frozen=True, kw_only=True)
class Resample:
    """Draw every draft afresh from its new law (SJD, arXiv 2410.01699).

    record: keep the law beside the token; false treats it as deterministic (Jacobi's exact-match acceptance).
    """

    record: bool = True
    exact: ClassVar[bool] = True

    def prepare(self, model: ImageModel) -> None:
        """Nothing to prepare."""

    def __call__(self, draft: Draft, law: Tensor, chance: Tensor, keep: Tensor, state: State) -> Draft:
        guesses = state.guesses(draft)
        tokens = draw_tokens(law, state.noise, guesses, Purpose.FRESH, state.iteration, state.sampling.sampler)
        return _set(draft, tokens, law if self.record else None)


@dataclass(frozen=True, kw_only=True)
class Coupled:
    """Redraw drafts so that they change as little as their laws do (SCD / MC-SJD, arXiv 2510.24211).

    coupling=maximal: a kept draft stays, a rejected one moves to the residual; the pair is a maximal coupling of old and new
    law. coupling=gumbel: argmax(log p + G) with G fixed per position. Either way the token's law is the new p, recorded.
    """

    coupling: str = "maximal"
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choose("decoder.refiner.coupling", self.coupling, ("maximal", "gumbel"))

    def prepare(self, model: ImageModel) -> None:
        """Nothing to prepare."""

    def __call__(self, draft: Draft, law: Tensor, chance: Tensor, keep: Tensor, state: State) -> Draft:
        guesses = state.guesses(draft)
        if self.coupling == "gumbel" or state.sampling.sampler == "gumbel":
            return _set(draft, draw_gumbel(law, state.noise.gumbel(guesses, law.shape[-1])), law)
        coin = state.noise.uniform(guesses, Purpose.COUPLE, state.iteration)
        # `keep` is per slot, not masked by the run: masking it would bias the drafts behind a rejection
        return _set(draft, couple(draft, law, keep, coin), law)


@dataclass(frozen=True, kw_only=True)
class Keep:
    """SJD2's refinement of clean drafts (arXiv 2510.08994, section 4): those with a ratio below `threshold` are redrawn.

    The others stay although the recorded law is the new one, so this breaks rule 1 (docs/exactness.md, 2): lossy.
    """

    threshold: float = 0.5
    exact: ClassVar[bool] = False

    def prepare(self, model: ImageModel) -> None:
        """Nothing to prepare."""

    def __call__(self, draft: Draft, law: Tensor, chance: Tensor, keep: Tensor, state: State) -> Draft:
        fresh = Resample()(draft, law, chance, keep, state)
        stays = chance >= self.threshold
        if draft.level is not None:
            stays &= draft.level[:, 1:] == 0
        return _set(draft, torch.where(stays, draft.tokens[:, 1:], fresh.tokens[:, 1:]), fresh.probs)
