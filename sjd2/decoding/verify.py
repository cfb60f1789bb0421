"""Verification: which draft tokens are accepted, and the distribution of the token after them.

# B samples, S slots of a pass, V image vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sjd2.decoding.interfaces import Draft, DraftRun, Judgement, State, Verifier
from sjd2.decoding.noise import Purpose
from sjd2.decoding.sampling import Sampler, accept_prob, residual
from sjd2.decoding.shapes import Shape, Tree, gather_slots
from sjd2.errors import UserError


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
    tested [B, S-1, V]: what its earlier siblings, all rejected, have left of it; accept_prob, coin, accepted [B, S-1];
    weight, fresh_coin [B, S-1]: of a joint decision (`Judgement`), else None; certain [B, S-1]: forced or committed already;
    positions [B, S-1].
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
    weight: Tensor | None
    fresh_coin: Tensor | None
    certain: Tensor
    positions: Tensor

    def draft_probs(self) -> Tensor | None:
        """Return the distribution of each draft token that was not accepted, given the decision: [B, S-1, V]; None: one-hot.

        It is the recorded one, unless the decision was a joint one (docs/exactness.md, block verification).
        """
        q = self.draft.probs
        if q is None or self.weight is None:
            return q
        left = residual(q, self.weight[..., None] * self.tested, self.draft.codes(q.shape[-1]))
        return left / left.sum(-1, keepdim=True)

    def exact(self) -> Verification:
        """Return this test by the exact rule, token by token: refiners need it whatever the verifier relaxes.

        With the same coins, or after a joint decision, which has used them up, with fresh ones.
        """
        if self.verifier.exact and self.weight is None:
            return self
        draft = replace(self.draft, probs=self.draft_probs())
        token, coin = draft.codes(self.p.shape[-1]), self.coin if self.fresh_coin is None else self.fresh_coin
        prob = self.sampler.accept_prob(EXACT, self.p, draft.probs, token, self.positions)
        return replace(
            self,
            verifier=EXACT,
            draft=draft,
            tested=self.p,
            accept_prob=prob,
            coin=coin,
            accepted=coin < prob,
            weight=None,
        )

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
        tested = self.tested[rows, last]
        if self.weight is not None:
            tested = self.weight[rows, last, None] * tested
        left = self.verifier.residual(tested, q, draft.codes(p.shape[-1])[rows, last])
        return torch.where(bonus[:, None], p, left), bonus


def verify(verifier: Verifier, draft: Draft, target: Tensor, state: State, clean: Tensor | None = None) -> Verification:
    """Test the draft tokens of a pass with outputs `target` [B, S, V]; clean [B, S]: inputs to commit after (None: all).

    Under sampler=gumbel a draft token passes if it equals argmax(log p + G), the token that AR draws (Gumbel matching).
    """
    sampler, positions, noise = state.sampler, state.draft_positions(draft), state.noise
    p, token = draft.shape.parent_probs(target), draft.codes(target.shape[-1])
    if verifier.joint and draft.shape.ranks > 1 and not verifier.joint_trees:
        raise UserError(f"{type(verifier).__name__} judges a chain of draft tokens, but this drafter returned a tree.")
    tested = p
    if sampler.residuals and not verifier.joint:
        tested = after_siblings(verifier, p, draft.probs, token, draft.shape)
    forced = state.forced_slots(draft.tokens.shape[1], draft.shape)[:, 1:]
    certain = (forced >= 0) | (positions < state.committed[:, None])
    number = draft.shape.number if verifier.joint else draft.shape.sibling
    coin = noise.uniform(positions, Purpose.ACCEPT, state.iteration, number)
    if sampler.residuals:
        depth = draft.shape.depths(draft.tokens.shape[1], p.device)[..., 1:]
        run = DraftRun(
            p=tested,
            q=draft.probs,
            token=token,
            depth=depth,
            certain=certain,
            inside=draft.shape.inside(clean),
            coin=coin,
            shape=draft.shape,
        )
        judged = verifier.judge(run)
        tested = tested if judged.tested is None else judged.tested
    else:
        prob = sampler.accept_prob(verifier, p, draft.probs, token, positions).masked_fill(certain, 1.0)
        judged = Judgement(coin < prob, prob)
    fresh = None if judged.weight is None else noise.uniform(positions, Purpose.RETEST, state.iteration)
    return Verification(
        verifier=verifier,
        sampler=sampler,
        draft=draft,
        target=target,
        p=p,
        tested=tested,
        accept_prob=judged.accept_prob,
        coin=coin,
        accepted=judged.accepted,
        weight=judged.weight,
        fresh_coin=fresh,
        certain=certain,
        positions=positions,
    )


def after_siblings(verifier: Verifier, p: Tensor, q: Tensor | None, token: Tensor, tree: Shape) -> Tensor:
    """Return what the earlier siblings of each draft token, all rejected, have left of p: [B, S-1, V] -> [B, S-1, V].

    Multi-round speculative sampling: P' = norm(residual(P, Q, x)) from sibling to sibling (docs/exactness.md).
    """
    if not isinstance(tree, Tree) or tree.ranks < 2:
        return p
    p = p.clone() if tree.groups else p
    for rank in range(1, tree.ranks):
        if tree.groups:  # the host knows the few slots of this rank
            before = tree.earlier_groups[rank]
            drawn = None if q is None else q[:, before]
            left = verifier.residual(p[:, before], drawn, token[:, before])
            p[:, tree.groups[rank]] = left / left.sum(-1, keepdim=True)
            continue
        before = (tree.before[:, 1:] - 1).clamp(min=0).expand(len(p), -1)
        drawn = None if q is None else gather_slots(q, before)
        left = verifier.residual(gather_slots(p, before), drawn, token.gather(1, before))
        p = torch.where((tree.sibling == rank)[..., None], left / left.sum(-1, keepdim=True), p)
    return p
