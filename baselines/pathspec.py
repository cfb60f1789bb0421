"""PathSpec (arXiv 2606.10492): several Jacobi chains as one draft tree, kept from pass to pass; its relaxed test.

# B samples, S slots of a pass, K chains, L draft tokens of each, V image vocabulary
Slots: the last committed token, then chain by chain. Chain 0 is the main chain, which the engine carries; the drafter carries
the others. After a pass the chain that was accepted from is the main one, the others keep their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sjd2.decoding.interfaces import Draft, Drafter, DraftRun, Judgement, PassResult, State, Verifier
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.sampling import SamplingParams, accept_prob, residual
from sjd2.decoding.shapes import Tree, gather_slots
from sjd2.errors import UserError, choose
from sjd2.models.base import ImageModel


@dataclass
class SideChains:
    """The draft tokens of all chains but the main one, for the coming pass: tokens [B, (K-1) L], probs [B, (K-1) L, V]."""

    tokens: Tensor
    probs: Tensor


@dataclass(frozen=True, kw_only=True)
class JacobiPaths(Drafter):
    """K Jacobi chains as one tree: siblings at its root, then each chain by itself (PathExplore without relaxation).

    paths: K. init: how new slots of the main chain begin (`Jacobi`); those of the other chains are uniform over the codes.
    The first tokens of the chains are tested one after the other on what the earlier ones have left, and the pass goes on
    along the first that is accepted. A position's tokens in several chains are independent given the earlier positions, as
    each chain draws with numbers of its own, so that the tests are exact (docs/exactness.md, trees).
    """

    paths: int = 2
    init: str = "random"
    needs_records: ClassVar[bool] = True
    keeps_lanes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choose("decoder.drafter.init", self.init, ("random", "left", "up"))
        if self.paths < 2:
            raise UserError(f"decoder.drafter.paths must be 2 or more, got {self.paths}; one chain is decoder=sjd.")

    @property
    def is_tree(self) -> bool:
        return True

    def num_carried(self, window: int) -> int:
        """Return the slots of the main chain, the last committed token included."""
        length, left = divmod(window - 1, self.paths)
        if length == 0 or left:
            fits = " or ".join(str(1 + self.paths * n) for n in (length, length + 1) if n > 0)
            raise UserError(
                f"decoder.window={window} does not hold {self.paths} chains of equal length beside the last committed token; "
                f"give {fits}, or change decoder.drafter.paths."
            )
        return length + 1

    def bind(self, model: ImageModel, window: int) -> JacobiPathsDrafter:
        return JacobiPathsDrafter(self, model, window)


class JacobiPathsDrafter(Drafter):
    """`JacobiPaths` on a model: its shape, and the main chain's drafter."""

    def __init__(self, settings: JacobiPaths, model: ImageModel, window: int) -> None:
        self.model, self.chain = model, Jacobi(init=settings.init)
        self.length, self.paths = settings.num_carried(window) - 1, settings.paths
        first = range(1, window, self.length)
        parents = [0] + [parent for slot in first for parent in (0, *range(slot, slot + self.length - 1))]
        lanes = [0] + [lane for lane in range(self.paths) for _ in range(self.length)]
        self.shape = Tree.static(parents, chain=self.length + 1, device=model.device, lanes=lanes)

    def init_state(self, rows: int, capacity: int, sampling: SamplingParams) -> SideChains:
        size, vocabulary = (self.paths - 1) * self.length, self.model.layout.vocabulary
        dtype = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        tokens = torch.zeros(rows, size, dtype=torch.long, device=self.model.device)
        return SideChains(tokens, torch.zeros(rows, size, vocabulary, dtype=dtype, device=self.model.device))

    def propose(self, carried: Draft, fresh: Tensor, state: State) -> Draft:
        """Return the pass: all chains enter positions together, so that `fresh` of the main chain holds for the others."""
        main, side, vocabulary = self.chain.propose(carried, fresh, state), state.memory, self.model.layout.vocabulary
        assert main.probs is not None  # the refiner records
        fresh = fresh[:, 1:].repeat(1, self.paths - 1)
        positions = state.positions(1 + self.length)[:, 1:].repeat(1, self.paths - 1)
        codes = state.noise.codes(positions, vocabulary, self.shape.sibling[:, self.length :])
        tokens = torch.cat([main.tokens, torch.where(fresh, codes, side.tokens)], 1)
        probs = torch.cat([main.probs, torch.where(fresh[..., None], 1.0 / vocabulary, side.probs)], 1)
        return Draft(state.force(tokens, self.shape), probs, shape=self.shape)

    def update(self, result: PassResult, state: State) -> None:
        """Keep the other chains, moved by as many positions as the main one."""
        assert self.shape.lanes is not None
        assert result.refined.probs is not None  # the refiner records
        winner = self.shape.lanes[0, result.path.end][:, None]  # [B, 1]
        lane = torch.arange(1, self.paths, device=winner.device)
        lane = torch.where(lane <= winner, lane - 1, lane)  # [B, K-1] all but the winner, in their order
        depth = torch.arange(1, self.length + 1, device=winner.device) + result.num_new[:, None]
        source = (lane * self.length)[..., None] + depth.clamp(max=self.length)[:, None]
        source = source.flatten(1)
        state.memory.tokens = result.refined.tokens.gather(1, source)
        state.memory.probs = gather_slots(result.refined.probs, source - 1)


@dataclass(frozen=True, kw_only=True)
class CrossPath(Verifier):
    """Accept draft token x with min(1, (p(x) + delta mean p(x')) / q(x)), x' the other chains' tokens there (PathRelax).

    x' stand at the same depth; one that equals x counts. p is the draft token's own distribution, at the root what its earlier
    siblings have left (the released code does not test one after the other, so there it is p itself). On rejection the
    ordinary residual max(0, p - q). delta=0 is exact.
    """

    delta: float = 0.01
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.delta >= 0:
            raise UserError(f"decoder.verifier.delta must be 0 (exact verification) or more, got {self.delta}.")

    def judge(self, run: DraftRun) -> Judgement:
        slot = torch.arange(run.token.shape[1], device=run.token.device)
        beside = (run.depth[:, None] == run.depth[..., None]) & (slot != slot[:, None])  # [b, S-1, S-1]
        others = run.p.gather(-1, run.token[:, None].expand(-1, len(slot), -1))  # p of each slot at every slot's token
        mean = (others * beside).sum(-1) / beside.sum(-1).clamp(min=1)
        p = run.p.scatter_add(-1, run.token[..., None], self.delta * mean[..., None])
        prob = self.accept_prob(p, run.q, run.token).masked_fill(run.certain, 1.0)
        return Judgement(run.coin < prob, prob)

    def accept_prob(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        return accept_prob(p, q, token)

    def residual(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        return residual(p, q, token)
