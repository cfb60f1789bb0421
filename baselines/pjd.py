"""Parallel Jacobi Decoding (PJD, arXiv 2606.05703): several rows of the image grow at once, each by its own Jacobi window.

# B samples, S grid rows in flight, W draft tokens of each, G grid rows, V image vocabulary, N image-phase tokens
ZipAR's engine with W slots for each row: slot 0 feeds the row's last committed token, the others its draft tokens but the
last, so that slot j's output is the distribution of draft token j. A slot sees what is committed before it in raster order and
the draft tokens before it in its own row, never those of other rows (row-causal mask).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from baselines.zipar import Board, PassPlan, RowsDecoder, ZipEngine
from sjd2.decoding.engine import Engine, Prompt
from sjd2.decoding.noise import Purpose
from sjd2.decoding.sampling import SamplingParams
from sjd2.decoding.verify import EXACT
from sjd2.errors import UserError
from sjd2.models.base import ImageModel


@dataclass(kw_only=True)
class DraftBoard(Board):
    """The rows in flight and their draft tokens, by place among these rows.

    drafts [B, S, W]: after each row's committed tokens; made [B, S]: how many of them there are, the first ones; probs
    [B, S, W, V]: the distributions they were drawn from.
    """

    drafts: Tensor
    made: Tensor
    probs: Tensor


@dataclass
class Trial:
    """The draft tokens under test: all [B, S, W] but length, accepted_count, num_new [B, S] and p, q [B, S, W, V]."""

    aim: Tensor  # position
    token: Tensor
    q: Tensor
    p: Tensor
    inside: Tensor  # it is tested in this pass
    length: Tensor  # how many of a row are
    accepted_count: Tensor
    num_new: Tensor  # tokens that the row commits


class ParallelJacobiEngine(ZipEngine):
    """Every pass tests the draft tokens of all rows in flight, and begins the next row where it may."""

    decoder: Any
    state: Any

    @torch.inference_mode()
    def __init__(
        self, model: ImageModel, decoder: ParallelJacobi, rows: int, prompt: int, sampling: SamplingParams
    ) -> None:
        super().__init__(model, decoder, rows, prompt, sampling)
        shape = (rows, self.size, decoder.drafts)
        drafts = torch.zeros(shape, dtype=torch.long, device=model.device)
        probs = torch.zeros(*shape, model.layout.vocabulary, dtype=self.dtype, device=model.device)
        self.state = DraftBoard(**vars(self.state), drafts=drafts, made=drafts[..., 0].clone(), probs=probs)

    def place(self, index: Tensor, prompts: list[Prompt], token: Tensor) -> None:
        super().place(index, prompts, token)
        self.state.made[index] = torch.zeros_like(self.state.made[index])

    @torch.inference_mode()
    def step(self) -> None:
        """Run one pass over all samples: plan its slots, fill drafts, forward, test, commit, redraw."""
        plan, low = self._plan(), self._low()
        trial = self._trial(plan)
        place = torch.arange(self.decoder.drafts, device=low.device)
        fed_before = torch.cat([plan.feed[..., None], trial.aim[..., :-1]], -1)  # [B, S, W]
        feed = torch.where((place == 0) | trial.inside, fed_before, -1)
        token = torch.cat([plan.token[..., None], trial.token[..., :-1]], -1)
        real = plan.real[..., None] & (place == 0)
        since = torch.where(place == 0, feed, trial.aim[..., :1])
        trial.p = self._forward(*(x.flatten(1) for x in (feed, token, real, since))).view_as(trial.q)
        self._judge(plan, trial)
        self._commit_rows(plan, trial)
        self._carry(trial, low)

    def _trial(self, plan: PassPlan) -> Trial:
        """Lay out the draft tokens of each row: it never gets longer than the row above was before the pass."""
        state, layout, width = self.state, self.model.layout, self.decoder.drafts
        drawn, above = state.drawn.gather(1, plan.row), state.drawn.gather(1, (plan.row - 1).clamp(min=0))
        room = torch.where(plan.row == 0, layout.columns, above) - drawn
        length = room.clamp(max=width) * (plan.grows | plan.opens)
        place = torch.arange(width, device=drawn.device)
        aim = (plan.aim[..., None] + place).clamp(max=self.total - 1)
        missing = place >= state.made[..., None]
        codes = state.noise.codes(aim.flatten(1), layout.vocabulary).view_as(aim)
        token = torch.where(missing, codes, state.drafts)
        q = torch.where(missing[..., None], 1.0 / layout.vocabulary, state.probs)
        inside = place < length[..., None]
        return Trial(aim, token, q, q, inside, length, length, length)

    def _judge(self, plan: PassPlan, trial: Trial) -> None:
        """Accept draft tokens from the left with min(1, p / q), row by row; the first row in flight gets a recovered token."""
        state = self.state
        flat = (trial.p.flatten(1, 2), trial.q.flatten(1, 2), trial.token.flatten(1), trial.aim.flatten(1))
        prob = state.sampler.accept_prob(EXACT, *flat).view_as(trial.aim)
        coin = state.noise.uniform(flat[3], Purpose.ACCEPT, state.iteration).view_as(prob)
        trial.accepted_count = ((coin < prob) & trial.inside).cumprod(2).sum(2)
        growing = plan.grows | plan.opens
        first = growing & (growing.cumsum(1) == 1)
        recovers = first & (trial.accepted_count < trial.length)
        trial.num_new = trial.accepted_count + recovers

    def _commit_rows(self, plan: PassPlan, trial: Trial) -> None:
        """Write what the rows commit; keys of accepted tokens are stored where the pass has fed them."""
        state, place = self.state, torch.arange(self.decoder.drafts, device=trial.aim.device)
        rows, end = len(trial.aim), (trial.num_new > trial.accepted_count).int().argmax(1, keepdim=True)  # [B, 1]
        slot = end * len(place) + trial.accepted_count.gather(1, end).clamp(max=len(place) - 1)
        p, q = (
            x.flatten(1, 2)[torch.arange(rows, device=slot.device), slot[:, 0]][:, None] for x in (trial.p, trial.q)
        )
        draft, at = trial.token.flatten(1).gather(1, slot), trial.aim.flatten(1).gather(1, slot)
        never = torch.zeros_like(draft, dtype=torch.bool)
        recovered = state.sampler.recover(p, q, draft, never, at, Purpose.RESIDUAL, state.iteration)
        tokens = torch.where(place == trial.accepted_count[..., None], recovered[..., None], trial.token)
        taken = place < trial.num_new[..., None]
        board = pad(state.tokens, (0, 1))  # a place for what is not taken
        to = torch.where(taken, trial.aim, self.total).flatten(1)
        state.tokens = board.scatter(1, to, tokens.flatten(1))[:, : self.total]
        stored = (place < trial.accepted_count[..., None]) & (place < trial.length[..., None] - 1)
        to = torch.where(stored, trial.aim, self.total).flatten(1)
        state.fed = pad(state.fed, (0, 1)).scatter(1, to, True)[:, : self.total]
        state.drawn = state.drawn.scatter_add(1, plan.row, trial.num_new)
        before, state.committed = state.committed, self._count()
        self.history.append(state.committed - before)

    def _carry(self, trial: Trial, low: Tensor) -> None:
        """Redraw tested draft tokens that were not committed from p, and move all to the rows of the coming pass."""
        state, width = self.state, self.decoder.drafts
        drawn = state.sampler.draw(trial.p.flatten(1, 2), trial.aim.flatten(1), Purpose.FRESH, state.iteration)
        token = torch.where(trial.inside, drawn.view_as(trial.token), trial.token)
        probs = torch.where(trial.inside[..., None], trial.p, trial.q)
        made = (torch.maximum(state.made, trial.length) - trial.num_new).clamp(min=0)
        row = torch.arange(self.size, device=low.device) + self._low() - low  # [B, S] where each row was
        here = row.clamp(max=self.size - 1)
        state.made = made.gather(1, here) * (row < self.size)
        move = trial.num_new.gather(1, here)[..., None] + torch.arange(width, device=low.device)
        source = (here[..., None] * width + move.clamp(max=width - 1)).flatten(1)
        state.drafts = token.flatten(1).gather(1, source).view_as(token)
        index = source[..., None].expand(-1, -1, probs.shape[-1])
        state.probs = probs.flatten(1, 2).gather(1, index).view_as(probs)
        state.iteration = state.iteration + 1


@dataclass(frozen=True, kw_only=True)
class ParallelJacobi(RowsDecoder):
    """The settings of PJD.

    context: tokens of a row that must be committed before the next row begins (c, T_ctx); from `columns` on it is exact.
    drafts: draft tokens of each row (W).
    """

    name: str
    lossless: bool
    context: int
    drafts: int
    engine: ClassVar[type[Engine]] = ParallelJacobiEngine

    def __post_init__(self) -> None:
        for name in ("context", "drafts"):
            if getattr(self, name) < 1:
                raise UserError(f"decoder.{name} must be 1 or more, got {getattr(self, name)}.")
        if self.lossless:
            raise UserError("PJD draws tokens before their context is complete; set decoder.lossless=false.")

    @property
    def delay(self) -> int:
        return self.context

    @property
    def slots(self) -> int:
        return self.drafts

    @property
    def window(self) -> int:
        """Return the draft tokens of a row: how many rows grow at once follows from `context`."""
        return self.drafts
