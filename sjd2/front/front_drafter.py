"""Drafting at the front: further draft tokens where passes stop, and distributions corrected for a changed left token.

Half of all passes of a coupled Jacobi window stop at the first draft token, because its distribution was computed with a left
token that has just been replaced. Two remedies, both exact (docs/sjd-fc.md): siblings, tested one after the other on what the
others have left; and a corrector, which moves the recorded distribution towards the true one before a draft token is tested.
# B samples, R model rows, S slots of a pass, C slots of the main chain, F families, T depths, V image vocabulary, D width
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sjd2.decoding.interfaces import Draft, Drafter, PassResult, State
from sjd2.decoding.noise import Purpose, sibling_marks
from sjd2.decoding.sampling import SamplingParams, without
from sjd2.decoding.shapes import gather_slots
from sjd2.decoding.verify import EXACT
from sjd2.errors import UserError
from sjd2.front.corrector import SETTINGS, WEIGHTS, Corrector, read_settings
from sjd2.front.front_shape import Level, chain_slots, front_shape
from sjd2.models.base import ImageModel
from sjd2.models.hub import WeightSource, check_part, locate_part
from sjd2.models.spec import ModelSpec

logger = logging.getLogger(__name__)


@dataclass
class FrontMemory:
    """What the last pass knew of the coming front: its states, and which left tokens they were computed with.

    stale [R, T, D]: the state that gave the distribution of each depth; old [B, T]: the left token it saw; valid [B, T]:
    whether there is one; source [R, D]: the state that predicted the last committed token.
    """

    stale: Tensor
    old: Tensor
    valid: Tensor
    source: Tensor


class Stale(NamedTuple):
    """What the corrector is given of slots.

    states [R, F, D]; source [R, F, D]: those on their left; old, new [B, F]: the token that each state was computed with, and
    the one that stands there now; valid [B, F]: whether there are both, and the slot's own token is not forced.
    """

    states: Tensor
    source: Tensor
    old: Tensor
    new: Tensor
    valid: Tensor


@dataclass(frozen=True, kw_only=True)
class Front(Drafter):
    """A chain drafter with branches at its front, optionally corrected.

    chain: drafts the main chain. siblings: further draft tokens at depths 1, 2, ..., drawn without replacement.
    sibling_temperature: T of the distribution that they are drawn from, q^(1/T): siblings matter where q is wrong, and a
    flatter one covers more alternatives. copies: the depth to which each branch copies the main chain's tokens; or one for
    each sibling, in order. full: siblings at every node, not only on the main chain (SJD-PAC's K-ary tree). weights: folder
    or hub id of a corrector, None for none. corrected: depths that it corrects one after the other. rest: correct the main
    chain below them as well, all slots at once. apart: each branch token is a draw of its own instead of a copy, as joint
    decisions need (`separated`).
    """

    chain: Drafter
    siblings: Sequence[int] = ()
    sibling_temperature: float = 1.0
    copies: int | Sequence[int] = 1
    full: bool = False
    weights: str | None = None
    corrected: int = 0
    rest: bool = False
    apart: bool = False

    needs_records = True

    def __post_init__(self) -> None:
        if any(count < 0 for count in self.siblings):
            raise UserError(f"decoder.drafter.siblings must be 0 or more at each depth, got {list(self.siblings)}.")
        if not 0 < self.sibling_temperature < math.inf:
            raise UserError(f"decoder.drafter.sibling_temperature must be above 0, got {self.sibling_temperature}.")
        if min(self.depths) < 0 or self.corrected < 0:
            raise UserError("decoder.drafter.copies and decoder.drafter.corrected must be 0 or more.")
        if (self.weights is None) != (self.corrected == 0 and not self.rest):
            raise UserError(
                "decoder.drafter.weights (a front corrector) is needed where decoder.drafter.corrected is above 0 or "
                "decoder.drafter.rest is true, and only there; make one with stage=finetune finetune=front. "
                "In Python sjd2.decoder(name, model=...) finds the one that ships for a model."
            )
        if self.chain is None or isinstance(self.chain, Front) or self.chain.num_carried(9) != 9:
            raise UserError(
                "decoder.drafter.chain must keep its draft tokens from pass to pass; use "
                "decoder/drafter@decoder.drafter.chain=jacobi or denoise."
            )

    @property
    def exact(self) -> bool:
        return self.chain.exact

    @property
    def is_tree(self) -> bool:
        return any(self.siblings)

    def separated(self) -> Front:
        return replace(self, apart=True)

    def check(self, spec: ModelSpec, window: int) -> None:
        """Raise `UserError` if the window is too small or the corrector's folder holds none."""
        carried = self.num_carried(window)
        if self.corrected > carried - 1:
            raise UserError(
                f"decoder.drafter.corrected={self.corrected} exceeds the main chain of {carried - 1} draft tokens."
            )
        self.chain.check(spec, carried)
        if self.weights is not None:
            check_part(self.source(), read_settings)

    def source(self) -> WeightSource:
        """Return where the corrector lies."""
        return WeightSource(str(self.weights), "decoder.drafter.weights", required=(SETTINGS, WEIGHTS))

    @property
    def depths(self) -> Sequence[int]:
        """Return `copies` of each sibling's branch; the last one holds for all further."""
        return [self.copies] if isinstance(self.copies, int) else list(self.copies) or [0]

    def num_carried(self, window: int) -> int:
        return chain_slots(window, self.siblings, self.depths, self.full)

    def num_forwards(self, window: int) -> int:
        return self.corrected + self.rest

    def bind(self, model: ImageModel, window: int) -> FrontDrafter:
        return FrontDrafter(self, model, window)


class FrontDrafter(Drafter):
    """`Front` on a model: its bound chain, its shape and the corrector."""

    def __init__(self, settings: Front, model: ImageModel, window: int) -> None:
        self.settings, self.model = settings, model
        size = settings.num_carried(window)
        self.chain = settings.chain.bind(model, size)
        self.timesteps = self.chain.timesteps
        self.front = front_shape(
            size,
            siblings=settings.siblings,
            copies=settings.depths,
            full=settings.full,
            corrected=settings.corrected,
            device=model.device,
        )
        if self.front.chain < self.front.side:
            logger.warning(
                "decoder.drafter.siblings take %d of %d slots and leave %d to the main chain, so a pass accepts little; "
                "take fewer siblings or a larger decoder.window.",
                self.front.side, window, size,
            )  # fmt: skip
        count = 1 + max((len(level.siblings) for level in self.front.levels), default=0)
        self.repeated_draws = (Purpose.SIBLING, sibling_marks(count, model.device)) if count > 1 else None
        self.corrector = None if settings.weights is None else Corrector.load(locate_part(settings.source()), model)

    @property
    def num_remembered(self) -> int:
        """Return T, the depths that the corrector may correct."""
        return self.front.chain - 1 if self.settings.rest else self.settings.corrected

    def init_state(self, rows: int, capacity: int, sampling: SamplingParams) -> FrontMemory | None:
        if self.corrector is None:
            return None
        device, depths = self.model.device, self.num_remembered
        width, branches = self.corrector.depth, 2 if sampling.guided else 1
        zeros = torch.zeros(rows, depths, dtype=torch.long, device=device)
        stale = torch.zeros(branches * rows, depths, width, dtype=self.model.dtype, device=device)
        return FrontMemory(stale, zeros, zeros.bool(), stale[:, 0].clone())

    def admit(
        self,
        memory: FrontMemory | None,
        rows: Tensor,
        branch: int,
        embeds: Tensor,
        hidden: Tensor,
        lengths: Tensor,
        token: Tensor,
    ) -> None:
        if memory is not None:
            memory.valid[rows] = False

    def propose(self, carried: Draft, fresh: Tensor, state: State) -> Draft:
        """Return the pass: the main chain with corrected distributions, and branches."""
        chain, front = self.chain.propose(carried, fresh, state), self.front
        draft = Draft(pad(chain.tokens, (0, front.side)), pad(chain.probs, (0, 0, 0, front.side)), shape=front.shape)
        tokens, probs = draft.tokens, draft.probs
        assert probs is not None  # a chain of the front draws from distributions
        hidden = None if state.memory is None else state.memory.source[:, None]  # [R, F, D] of the families above
        if hidden is not None and self.settings.rest and self.settings.corrected == 0:
            self.correct_rest(tokens, probs, hidden[:, 0], state)
        for depth, level in enumerate(front.levels, 1):
            q = probs[:, depth - 1 : depth].repeat(1, len(level.parents), 1)
            token = tokens[:, depth : depth + 1].repeat(1, len(level.parents))
            if depth <= self.settings.corrected:
                assert hidden is not None  # the corrector's memory has it
                token, q, hidden = self.correct(level, depth, tokens, token, q, hidden[:, level.home], state)
            if self.settings.apart:
                token = self.draw_first(level, depth, token, q, state)
            tokens[:, level.first], probs[:, level.first - 1] = token, q
            self.draw_siblings(level, depth, draft, token, q, state)
            if depth == self.settings.corrected < self.num_remembered:  # branches copy what is below as corrected
                assert hidden is not None
                self.correct_rest(tokens, probs, hidden[:, 0], state)
        draft.tokens = state.force(tokens, front.shape)
        if chain.level is not None:  # branches are clean
            draft.level = pad(chain.level, (0, front.side))
            draft.latent = None if chain.latent is None else pad(chain.latent, (0, 0, 0, front.side))
            noisy = pad(chain.embeds, (0, 0, 0, front.side))
            draft.embeds = torch.where((draft.level > 0)[..., None], noisy, self.model.embed(draft.tokens))
        return draft

    def propose_first(self, carried: Draft, fresh: Tensor, state: State) -> Draft:
        return self.chain.propose(carried, fresh, state)  # nothing is known yet that could be corrected

    def draw_first(self, level: Level, depth: int, token: Tensor, q: Tensor, state: State) -> Tensor:
        """Draw the first token of each branch anew, all but the main chain's: q [B, F, V] -> [B, F]."""
        slots = level.first[1:]
        place = (state.cached + depth)[:, None].expand(-1, len(slots))
        drawn = state.sampler.draw(q[:, 1:], place, Purpose.SIBLING, state.iteration, slots[None])
        return torch.cat([token[:, :1], drawn], 1)

    def draw_siblings(self, level: Level, depth: int, draft: Draft, token: Tensor, q: Tensor, state: State) -> None:
        """Draw further children without replacement, from q without the earlier ones, renormalised and recorded."""
        position, probs = state.at_depth(depth)[0], draft.probs
        assert probs is not None
        if level.siblings and (temperature := self.settings.sibling_temperature) != 1:
            q = q[:, : len(level.siblings[0])]
            q = (q / q.amax(-1, keepdim=True)) ** (1 / temperature)
            q = q / q.sum(-1, keepdim=True)
        for rank, slots in enumerate(level.siblings, 1):
            codes = token[:, : len(slots)].clamp(max=q.shape[-1] - 1)
            q = without(q[:, : len(slots)], codes)
            place = position.expand(-1, len(slots))
            number = slots[None] if self.settings.apart else rank
            token = state.sampler.draw(q, place, Purpose.SIBLING, state.iteration, number)
            draft.tokens[:, slots], probs[:, slots - 1] = token, q

    def correct(
        self,
        level: Level,
        depth: int,
        tokens: Tensor,
        token: Tensor,
        q: Tensor,
        source: Tensor,
        state: State,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Correct the distribution q [B, F, V] of each family for its left token, and couple the carried token to it."""
        memory, families = state.memory, len(level.parents)
        position, forced = state.at_depth(depth)
        stale = Stale(
            memory.stale[:, depth - 1, None].expand(-1, families, -1),
            source,
            memory.old[:, depth - 1, None].expand(-1, families),
            tokens[:, level.parents],
            (memory.valid[:, depth - 1, None] & (forced < 0)).expand(-1, families),
        )
        return self.couple(stale, token, q, position.expand(-1, families), state)

    def correct_rest(self, tokens: Tensor, probs: Tensor, source: Tensor, state: State) -> None:
        """Correct the main chain below the front at once, each slot for the token that stands on its left now.

        source [R, D]: the state at the last depth of the front; below it, that of the last pass. A token on the left may move
        in the same step; the distribution was computed from earlier positions nonetheless, so the pair stays exact.
        """
        memory, first, size = state.memory, self.settings.corrected, self.front.chain
        stale, place = memory.stale[:, first:], state.positions(size)[:, first + 1 :]
        parts = Stale(
            stale,
            torch.cat([source[:, None], stale[:, :-1]], 1),
            memory.old[:, first:],
            tokens[:, first : size - 1],
            memory.valid[:, first:] & (state.forced_slots(size)[:, first + 1 :] < 0),
        )
        token, q = tokens[:, first + 1 : size], probs[:, first : size - 1]
        token, q, _ = self.couple(parts, token, q, place, state)
        tokens[:, first + 1 : size], probs[:, first : size - 1] = token, q

    def couple(
        self, stale: Stale, token: Tensor, q: Tensor, place: Tensor, state: State
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Correct distributions q [B, F, V] of tokens [B, F] at positions `place` -> tokens, distributions, states [R, F, D].

        A token x of q stays with min(1, q'(x) / q(x)), else moves to norm(max(0, q' - q)): it is one of q', recorded.
        """
        assert self.corrector is not None  # nothing is corrected without
        branches, families = len(stale.states) // len(token), token.shape[1]
        changed = stale.valid & (stale.old != stale.new)
        embed = self.model.embed(torch.cat([stale.old, stale.new], 1)).repeat(branches, 1, 1)
        hidden = self.corrector(stale.states, stale.source, embed[:, :families], embed[:, families:])
        hidden = torch.where(changed.repeat(branches, 1)[..., None], hidden, stale.states)
        corrected = torch.where(changed[..., None], state.sampling.probs(self.model.logits(hidden)).to(q), q)
        code, sampler = token.clamp(max=q.shape[-1] - 1), state.sampler
        accept_prob = sampler.accept_prob(EXACT, corrected, q, code, place)
        accepted = state.noise.uniform(place, Purpose.CORRECT, state.iteration) < accept_prob
        moved = sampler.recover(corrected, q, code, accepted, place, Purpose.MOVE, state.iteration)
        return torch.where(changed, moved, token), corrected, hidden

    def update(self, result: PassResult, state: State) -> None:
        """Keep the states that give the distributions of the coming front."""
        memory, draft = state.memory, result.draft
        if memory is None:
            return
        branches = len(result.hidden) // len(result.num_new)
        last = result.path.slots.gather(1, (result.num_new - 1).clamp(min=0)[:, None])  # its output drew the last token
        coming = slice(1, self.num_remembered + 1)
        parent = draft.shape.parent_slots(result.source[:, coming])
        memory.stale = gather_slots(result.hidden, parent.repeat(branches, 1))
        memory.source = gather_slots(result.hidden, last.repeat(branches, 1))[:, 0]
        memory.old = draft.tokens.gather(1, parent)
        memory.valid = ~result.fresh[:, coming]
        if draft.level is not None:  # a distribution computed on noise has no left token that was replaced
            memory.valid &= draft.level.gather(1, parent) == 0
