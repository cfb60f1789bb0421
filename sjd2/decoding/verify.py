"""Verification: which drafts may stay, and the law of the token behind them.

# B samples, S slots of a pass, V image vocabulary
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sjd2.decoding.interfaces import Draft, State, Verifier
from sjd2.decoding.noise import Purpose
from sjd2.decoding.sampling import draw_tokens
from sjd2.decoding.shapes import Tree
from sjd2.models.base import ImageModel

TINY_MASS = 1e-12  # a residual below this is rounding: p and q are equal, and a rejection has chance 0


def residual(p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
    """Return max(0, p - q), unnormalised; q None stands for the one-hot law of `token`: [..., V], [...] -> [..., V]."""
    rest = p.scatter(-1, token[..., None], 0.0) if q is None else (p - q).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > TINY_MASS, rest, p)


class Exact:
    """Speculative sampling (Leviathan et al. 2023; SJD, arXiv 2410.01699, eq. 7): the output law is the target's.

    Accept draft x with min(1, p(x) / q(x)), else recover from norm(max(0, p - q)).
    """

    exact: ClassVar[bool] = True

    def prepare(self, model: ImageModel) -> None:
        """Nothing to prepare."""

    def chance(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return min(1, p / q) of each token: p, q [..., V], token [...] -> [...]."""
        p = p.gather(-1, token[..., None])[..., 0]
        if q is None:
            return p
        q = q.gather(-1, token[..., None])[..., 0]
        # q = 0 happens only for drafts that are no draws from q (rule=paper): min(1, p / 0) is 1, and 0 where p is 0 too
        return torch.where(q > 0, p / q, (p > 0).to(p)).clamp(max=1)

    def rest(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return max(0, p - q)."""
        return residual(p, q, token)


def guessed(draft: Draft, vocabulary: int) -> Tensor:
    """Return the guesses as codes [B, S-1]; forced ids become the last code, their slots are accepted whatever it says."""
    return draft.tokens[:, 1:].clamp(max=vocabulary - 1)


def laws(target: Tensor, tree: Tree | None) -> Tensor:
    """Return the law of each guess, that of its parent's output: target [B, S, V] -> [B, S-1, V]."""
    if tree is None:
        return target[:, :-1]
    if len(tree.parents) == 1:
        return target[:, tree.parents[0, 1:]]
    return take(target, tree.parents[:, 1:])


def after_siblings(verifier: Verifier, law: Tensor, draft: Draft) -> Tensor:
    """Return the law each guess is tested against: what its earlier siblings, all rejected, have left: [B, S-1, V].

    Multi-round speculative sampling: P' = norm(rest(P, Q, x)) from sibling to sibling (docs/exactness.md).
    """
    tree = draft.tree
    if tree is None or tree.ranks < 2:
        return law
    token = guessed(draft, law.shape[-1])
    law = law.clone()
    every = torch.arange(1, draft.tokens.shape[1], device=law.device)
    for rank in range(1, tree.ranks):
        slots = tree.groups[rank] if tree.groups else every
        before = (tree.before[:, slots] - 1).clamp(min=0).expand(len(law), -1)
        q = None if draft.probs is None else take(draft.probs, before)
        rest = verifier.rest(take(law, before), q, token.gather(1, before))
        rest = rest / rest.sum(-1, keepdim=True)
        if tree.groups:
            law[:, slots - 1] = rest
        else:
            law = torch.where((tree.rank[:, 1:] == rank)[..., None], rest, law)
    return law


def chances(verifier: Verifier, tested: Tensor, target: Tensor, draft: Draft, state: State) -> Tensor:
    """Return the chance to accept each guess: tested [B, S-1, V] from `after_siblings`, target [B, S, V] -> [B, S-1].

    Under sampler=gumbel a guess stays if it equals argmax(log p + G), the token that AR draws (Gumbel matching).
    """
    token = guessed(draft, target.shape[-1])
    if state.sampling.sampler == "gumbel":
        own = laws(target, draft.tree)
        drawn = draw_tokens(own, state.noise, state.guesses(draft), Purpose.SAMPLE, 0, "gumbel")
        return (draft.tokens[:, 1:] == drawn).to(target)
    return verifier.chance(tested, draft.probs, token)


def law_behind(
    verifier: Verifier, tested: Tensor, target: Tensor, draft: Draft, end: Tensor, state: State
) -> tuple[Tensor, Tensor]:
    """Return the law of the token drawn behind slot `end` [B], unnormalised [B, V], and whether it is a bonus token [B].

    What the rejected guesses there have left; the target itself where there was none.
    """
    rows = torch.arange(len(end), device=end.device)
    p, size = target[rows, end], draft.tokens.shape[1]
    if draft.tree is None:
        child = torch.where(end < size - 1, end + 1, 0)
    else:
        child = draft.tree.last.expand(len(end), -1).gather(1, end[:, None])[:, 0]
    bonus = child == 0
    if state.sampling.sampler == "gumbel":
        return p, bonus
    guess = (child - 1).clamp(min=0)
    q = None if draft.probs is None else draft.probs[rows, guess]
    rest = verifier.rest(tested[rows, guess], q, guessed(draft, p.shape[-1])[rows, guess])
    return torch.where(bonus[:, None], p, rest), bonus


def take(field: Tensor, index: Tensor) -> Tensor:
    """Pick slots of a field: [B, S, X], [B, T] -> [B, T, X]."""
    return field.gather(1, index[..., None].expand(*index.shape, field.shape[-1]))
