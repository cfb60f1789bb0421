"""Block verification: one joint decision for all draft tokens of a pass, a chain (Sun et al., arXiv 2403.10444) or a tree.

# B samples, S slots of a pass, V image vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sjd2.decoding.interfaces import DraftRun, Judgement
from sjd2.decoding.sampling import TINY_MASS, likelihood_ratio, residual
from sjd2.decoding.shapes import Tree
from sjd2.decoding.verify import Exact, after_siblings
from sjd2.errors import choose


@dataclass(frozen=True, kw_only=True)
class Block(Exact):
    """Accept the longest run of draft tokens that a joint test passes; the output distribution is the target's.

    With w_0 = 1 and w_k = min(1, w_{k-1} p(x_k) / q(x_k)), the prefix of k tokens passes with h_k = e / (e + 1 - w_k), where
    e = sum_x max(0, w_k p(x) - q(x)) at the next slot; the whole run with its w (algorithm 2). The accepted prefix is the
    longest that passes, with probability w_k at least k tokens; the recovered token is one of norm(max(0, w_k p - q)). In
    expectation never shorter than token by token, since w_k is at least the product of min(1, p / q).

    On trees a draft token is decided on after all its children, these in their order: when a child was rejected with all below
    it, its parent has weight e / (e + 1 - w) left, w its own before, and its next child is weighed on norm(max(0, w p - q)).

    siblings: on trees. jointly: as above; no draft token may be a copy of another. by_token: siblings are tested one after
    the other as by `Exact`, and only runs of draft tokens without siblings are judged jointly; copies are allowed.
    """

    siblings: str = "jointly"

    joint: ClassVar[bool] = True
    joint_trees: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choose("decoder.verifier.siblings", self.siblings, ("jointly", "by_token"))

    @property
    def apart(self) -> bool:
        """Return whether branches must draw tokens of their own."""
        return self.siblings == "jointly"

    def judge(self, run: DraftRun) -> Judgement:
        """Decide for all draft tokens of a pass at once."""
        if isinstance(run.shape, Tree):
            return self.judge_tree(run, run.shape) if self.apart else self.judge_tails(run, run.shape)
        return self.judge_chain(run)

    def judge_tails(self, run: DraftRun, tree: Tree) -> Judgement:
        """Test siblings token by token, and each run of draft tokens without siblings jointly, once its parent is accepted."""
        tails = tree.tails
        assert tails is not None  # of static trees
        run = replace(run, p=after_siblings(self, run.p, run.q, run.token, tree))
        inside = torch.ones_like(run.certain) if run.inside is None else run.inside
        prob = self.accept_prob(run.p, run.q, run.token).masked_fill(run.certain, 1.0) * inside
        weight, at = torch.ones_like(prob), tails.slots - 1
        survival = joint_weights(self.log_ratio(run)[:, at])  # [B, T, L]
        weight[:, tails.flat - 1] = pad(survival[..., :-1], (1, 0), value=1.0).flatten(1)[:, tails.place]
        excess = pad(self.excess(run, weight)[:, at][..., 1:], (0, 1))
        real = inside[:, at] & tails.real
        joint = torch.where(survival < 1, excess / (excess + 1 - survival), 1.0)
        joint = torch.where(pad(real[..., 1:], (0, 1)), joint, survival) * real
        passed = (run.coin[:, at] < joint).flip(2).cumsum(2).flip(2) > 0
        accepted = run.coin < prob
        accepted[:, tails.flat - 1] = passed.flatten(1)[:, tails.place]
        prob[:, tails.flat - 1] = joint.flatten(1)[:, tails.place]
        return Judgement(accepted, prob, self.decided(accepted & inside, weight * inside, tree), run.p)

    @staticmethod
    def decided(accepted: Tensor, weight: Tensor, tree: Tree) -> Tensor:
        """Return the weights where the decision was about the draft token, else 0: accepted, weight [B, S-1] -> [B, S-1].

        They are the children of the path's end, and the run that follows an accepted slot; of all others nothing was asked.
        """
        tails, end = tree.tails, tree.accepted_path(accepted, None).end
        assert tails is not None
        asked = tree.parents[:, 1:] == end[:, None]
        entered = tree.seen[0][end][:, tails.parents, None].expand(-1, -1, tails.slots.shape[1])
        asked[:, tails.flat - 1] = entered.flatten(1)[:, tails.place]
        return weight * asked

    def judge_chain(self, run: DraftRun) -> Judgement:
        """Accept the longest prefix of a chain that passes."""
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

    def judge_tree(self, run: DraftRun, tree: Tree) -> Judgement:
        """Accept the path to the first slot that passes, every slot after its children."""
        inside = torch.ones_like(run.certain) if run.inside is None else run.inside
        weight, tested, survival = self.tree_weights(run, tree)
        weight = weight * inside
        excess = self.excess(replace(run, p=tested), weight)
        # what is left of a slot after its last child
        child = tree.last[0, 1:] - 1
        last = child.clamp(min=0)
        left = torch.where(weight < 1, excess / (excess + 1 - weight), 1.0)[:, last]
        prob = torch.where((child >= 0) & inside[:, last], left, survival) * inside
        assert tree.order is not None  # of static trees
        never = torch.full_like(tree.order, len(tree.order))
        place = torch.where(pad(run.coin < prob, (1, 0), value=True), tree.order, never)
        return Judgement(tree.seen[0][place.argmin(1)][:, 1:], prob, weight, tested)

    def tree_weights(self, run: DraftRun, tree: Tree) -> tuple[Tensor, Tensor, Tensor]:
        """Weigh each draft token on what its parent has left after its earlier children.

        Returns the parent's weight [B, S-1], its distribution [B, S-1, V], and the draft token's own weight [B, S-1].
        """
        assert tree.spine is not None  # of static trees
        log_ratio, spine = self.log_ratio(run), tree.spine[1:] - 1
        weight, survival, tested = torch.zeros_like(log_ratio), torch.zeros_like(log_ratio), run.p.clone()
        survival[:, spine] = joint_weights(log_ratio[:, spine])
        weight[:, spine] = pad(survival[:, spine[:-1]], (1, 0), value=1.0)
        for wave in tree.waves:
            slots, given = wave.slots - 1, wave.given - 1
            if wave.first:
                weight[:, slots] = survival[:, given]
                survival[:, slots] = (weight[:, slots] * log_ratio[:, slots].exp()).clamp(max=1)
                continue
            before, w = run.at(given), weight[:, given]
            p = tested[:, given]
            excess = self.excess(replace(before, p=p), w)
            left = residual(w[..., None] * p, before.q, before.token) / excess[..., None]
            tested[:, slots] = p = torch.where(excess[..., None] > TINY_MASS, left, p)
            weight[:, slots] = w = torch.where(w < 1, excess / (excess + 1 - w), 1.0)
            survival[:, slots] = (w * self.log_ratio(replace(run.at(slots), p=p)).exp()).clamp(max=1)
        return weight, tested, survival

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
    total = log_ratio.cumsum(-1)
    return (total - total.cummax(-1).values.clamp(min=0)).exp()
