"""SJD++'s reuse of confident guesses, with the law that makes it exact.

# B samples, S slots of a pass, V image vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sjd2.decoding.interfaces import Draft, State
from sjd2.decoding.noise import Purpose
from sjd2.decoding.sampling import draw_tokens
from sjd2.errors import UserError
from sjd2.models.base import ImageModel


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """Keep a guess that its new law p finds likely, p(x) > threshold, and draw the others afresh (SJD++, arXiv 2512.07503).

    threshold: ours (more likely than not), the paper's value is not published; 1 is SJD.
    With S = {x: p(x) > threshold} a guess of law q becomes one of law q 1_S + q(S^c) p. That law is recorded: with the old q
    or with p the decoder would be biased (docs/exactness.md). It is q(S) TV(q(.|S), p) away from p, where SJD's guesses are
    not at all; what reuse has to offer is steadier inputs for the guesses behind.
    """

    threshold: float = 0.5
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"decoder.refiner.threshold must lie in [0, 1], got {self.threshold}; 1 keeps no guess.")

    def prepare(self, model: ImageModel) -> None:
        """Nothing to prepare."""

    def __call__(self, draft: Draft, law: Tensor, chance: Tensor, keep: Tensor, state: State) -> Draft:
        """Return the drafts of the next pass: law [B, S-1, V] is each guess's new law."""
        if draft.probs is None:
            raise UserError("refiner reuse needs the laws of the guesses; choose a drafter that records them.")
        old = draft.tokens[:, 1:].clamp(max=law.shape[-1] - 1)
        likely = law > self.threshold
        fresh = draw_tokens(
            law, state.noise, state.guesses(draft), Purpose.FRESH, state.iteration, state.sampling.sampler
        )
        tokens = torch.where(likely.gather(-1, old[..., None])[..., 0], old, fresh)
        kept = draft.probs.masked_fill(~likely, 0.0)
        redrawn = draft.probs.masked_fill(likely, 0.0).sum(-1, keepdim=True)
        return replace(draft, tokens=torch.cat([draft.tokens[:, :1], tokens], 1), probs=kept + redrawn * law)
