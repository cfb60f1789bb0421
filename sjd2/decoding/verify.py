"""Verification: which draft tokens are accepted, and the distribution of the token after them.

# B samples, S slots of a pass, V image vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sjd2.decoding.interfaces import Draft, State, Verifier
from sjd2.decoding.noise import Purpose
from sjd2.decoding.sampling import Sampler, accept_prob, residual
from sjd2.decoding.shapes import Tree, gather_slots


@dataclass(frozen=True)
class Exact(Verifier):
    """Speculative sampling (Leviathan et al. 2023; SJD, arXiv 2410.01699, eq. 7): the output distribution is the target's.

    Accept draft token x with min(1, p(x) / q(x)), else recover from norm(max(0, p - q)).
    """

    def accept_prob(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        return accept_prob(p, q, token)

    def residual(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        return residual(p, q, token)


EXACT = Exact()


@dataclass
class Verification:
    """The test of the draft tokens of one pass.

    target [B, S, V]: p at every slot; p [B, S-1, V]: each draft token's own distribution, that of its parent's output;
    tested [B, S-1, V]: what its earlier siblings, all rejected, have left of it; accept_prob, coin, accepted [B, S-1]:
    accepted where coin < accept_prob; certain [B, S-1]: forced or committed already; positions [B, S-1].
    """

    verifier: Verifier
    sampler: Sampler
    draft: Draft
    target: Tensor
    p: Tensor
    tested: Tensor
    accept_prob: Tensor
    coin: Tensor
    accepted: Tensor
    certain: Tensor
    positions: Tensor

    def exact(self) -> Verification:
        """Return this test by the exact rule, with the same coins: refiners need it whatever the verifier relaxes."""
        if self.verifier.exact:
            return self
        token = self.draft.codes(self.p.shape[-1])
        prob = self.sampler.accept_prob(EXACT, self.p, self.draft.probs, token, self.positions)
        return replace(self, verifier=EXACT, tested=self.p, accept_prob=prob, accepted=self.coin < prob)

    def next_probs(self, end: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distribution of the token drawn after slot `end` [B], unnormalised: [B, V]; whether it is a bonus [B].

        It is what the rejected draft tokens there have left of p, or p itself where there was none.
        """
        rows, draft = torch.arange(len(end), device=end.device), self.draft
        p = self.target[rows, end]
        child = draft.shape.last_child(end, draft.tokens.shape[1])
        bonus = child == 0
        if not self.sampler.residuals:
            return p, bonus
        last = (child - 1).clamp(min=0)
        q = None if draft.probs is None else draft.probs[rows, last]
        left = self.verifier.residual(self.tested[rows, last], q, draft.codes(p.shape[-1])[rows, last])
        return torch.where(bonus[:, None], p, left), bonus


def verify(verifier: Verifier, draft: Draft, target: Tensor, state: State) -> Verification:
    """Test the draft tokens of a pass with outputs `target` [B, S, V].

    Under sampler=gumbel a draft token passes if it equals argmax(log p + G), the token that AR draws (Gumbel matching).
    """
    sampler, positions = state.sampler, state.draft_positions(draft)
    p = draft.shape.parent_probs(target)
    tested = after_siblings(verifier, p, draft) if sampler.residuals else p
    prob = sampler.accept_prob(verifier, tested, draft.probs, draft.codes(p.shape[-1]), positions)
    certain = (state.forced_at(positions) >= 0) | (positions < state.committed[:, None])
    prob = prob.masked_fill(certain, 1.0)
    coin = state.noise.uniform(positions, Purpose.ACCEPT, state.iteration, draft.shape.sibling)
    accepted = coin < prob  # strict: probability 0 never passes, 1 always
    return Verification(verifier, sampler, draft, target, p, tested, prob, coin, accepted, certain, positions)


def after_siblings(verifier: Verifier, p: Tensor, draft: Draft) -> Tensor:
    """Return what the earlier siblings of each draft token, all rejected, have left of p: [B, S-1, V] -> [B, S-1, V].

    Multi-round speculative sampling: P' = norm(residual(P, Q, x)) from sibling to sibling (docs/exactness.md).
    """
    tree = draft.shape
    if not isinstance(tree, Tree) or tree.ranks < 2:
        return p
    token, p = draft.codes(p.shape[-1]), p.clone()
    every = torch.arange(1, draft.tokens.shape[1], device=p.device)
    for rank in range(1, tree.ranks):
        slots = tree.groups[rank] if tree.groups else every
        before = (tree.before[:, slots] - 1).clamp(min=0).expand(len(p), -1)
        q = None if draft.probs is None else gather_slots(draft.probs, before)
        left = verifier.residual(gather_slots(p, before), q, token.gather(1, before))
        left = left / left.sum(-1, keepdim=True)
        if tree.groups:
            p[:, slots - 1] = left
        else:
            p = torch.where((tree.sibling == rank)[..., None], left, p)
    return p
