"""Exact verification: which drafts may stay so that the output law is the model's own.

# B samples, S slots of a pass, V image vocabulary
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sjd2.models.base import ImageModel
from sjd2.noise import Purpose
from sjd2.parts import Draft, State
from sjd2.sampling import draw_tokens

TINY_MASS = 1e-12  # a residual below this is rounding: p and q are equal, and a rejection has chance 0


def residual(p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
    """Return max(0, p - q), unnormalised; q None stands for the one-hot law of `token`: [..., V], [...] -> [..., V]."""
    rest = p.scatter(-1, token[..., None], 0.0) if q is None else (p - q).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > TINY_MASS, rest, p)


class Exact:
    """Speculative sampling (Leviathan et al. 2023; SJD, arXiv 2410.01699, eq. 7): the output law is the target's.

    Accept draft x with min(1, p(x) / q(x)), else recover from norm(max(0, p - q)). Under `sampler=gumbel` the rule is Gumbel
    matching: the token is argmax(log p + G), a draft stays if it equals it, and all decoders return AR's tokens.
    """

    exact: ClassVar[bool] = True

    def prepare(self, model: ImageModel) -> None:
        """Nothing to prepare."""

    def accept(self, draft: Draft, target: Tensor, state: State) -> Tensor:
        """Return the chance to accept each draft: target [B, S, V] -> [B, S-1]."""
        token = draft.tokens[:, 1:]
        if state.sampling.sampler == "gumbel":
            guesses = state.positions(draft.tokens.shape[1])[:, 1:]
            return (token == draw_tokens(target[:, :-1], state.noise, guesses, Purpose.SAMPLE, 0, "gumbel")).to(target)
        # forced ids lie beyond the vocabulary; their slots are accepted by the loop whatever stands here
        index = token.clamp(max=target.shape[-1] - 1)[..., None]
        p = target[:, :-1].gather(-1, index)[..., 0]
        if draft.probs is None:
            return p
        q = draft.probs.gather(-1, index)[..., 0]
        # q = 0 happens only for drafts that are no draws from q (rule=paper): min(1, p / 0) is 1, and 0 where p is 0 too
        return torch.where(q > 0, p / q, (p > 0).to(p)).clamp(max=1)

    def law(self, draft: Draft, target: Tensor, stop: Tensor, state: State) -> Tensor:
        """Return the law of the token behind the run, unnormalised: stop [B] (accepted drafts) -> [B, V].

        The residual where a draft was rejected, the target where none was left (bonus token).
        """
        rows = torch.arange(len(stop), device=stop.device)
        p = target[rows, stop]
        if state.sampling.sampler == "gumbel":
            return p
        last = stop == target.shape[1] - 1
        slot = stop.clamp(max=target.shape[1] - 2)
        token = draft.tokens[rows, slot + 1].clamp(max=p.shape[-1] - 1)
        q = None if draft.probs is None else draft.probs[rows, slot]
        return torch.where(last[:, None], p, residual(p, q, token))
