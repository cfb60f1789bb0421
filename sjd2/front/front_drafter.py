"""Drafting at the front: further guesses where passes stop, and laws corrected for the left token that has changed.

Half of all passes of a coupled Jacobi window stop at the first guess, because its law was computed with a left token that
has just been replaced. Two remedies, both exact (docs/sjd-fc.md): siblings, tested one after the other on what the others have
left; and a corrector, which moves the recorded law towards the true one before a guess is tested.
# B samples, R model rows, S slots of a pass, C slots of the main chain, F families, T depths, V image vocabulary, D width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sjd2.decoding.interfaces import Draft, Drafter, Outcome, State
from sjd2.decoding.noise import Purpose
from sjd2.decoding.sampling import SamplingParams, draw, draw_tokens
from sjd2.decoding.verify import Exact, residual, take
from sjd2.errors import UserError
from sjd2.front.corrector import SETTINGS, WEIGHTS, Corrector, read_settings
from sjd2.front.front_shape import Level, chain_slots, shape
from sjd2.models.base import ImageModel
from sjd2.models.hub import WeightSource, check_part, locate_part


@dataclass
class Memory:
    """What the last pass knew of the coming front: its states, and which left tokens they were computed with.

    stale [R, T, D]: the state that gave the law of each depth; old [B, T]: the left token it saw; valid [B, T]: whether
    there is one; source [R, D]: the state that predicted the last committed token.
    """

    stale: Tensor
    old: Tensor
    valid: Tensor
    source: Tensor


@dataclass(kw_only=True)
class Front(Drafter):
    """A chain drafter with branches at its front, optionally corrected.

    chain: drafts the main chain. siblings: further guesses at depths 1, 2, ..., drawn without replacement. copies: the depth
    to which each branch goes on with the main chain's guesses. full: siblings at every node, not only on the main chain
    (SJD-PAC's K-ary tree). weights: folder or hub id of a corrector, None for none. corrected: depths whose laws it corrects.
    """

    chain: Drafter
    siblings: tuple[int, ...] = ()
    copies: int = 1
    full: bool = False
    weights: str | None = None
    corrected: int = 0

    recorded = True

    def __post_init__(self) -> None:
        self.siblings = tuple(self.siblings)
        if any(count < 0 for count in self.siblings):
            raise UserError(f"decoder.drafter.siblings must be 0 or more at each depth, got {list(self.siblings)}.")
        if self.copies < 0 or self.corrected < 0:
            raise UserError("decoder.drafter.copies and decoder.drafter.corrected must be 0 or more.")
        if (self.weights is None) != (self.corrected == 0):
            raise UserError(
                "decoder.drafter.weights (a front corrector) and decoder.drafter.corrected (the depths it corrects) go "
                "together: set both, or weights=null and corrected=0; make one with stage=finetune finetune=front."
            )
        if self.chain is None or isinstance(self.chain, Front) or self.chain.carried(9) != 9 or self.chain.extra:
            raise UserError(
                "decoder.drafter.chain must keep its guesses from pass to pass; use "
                "decoder/drafter@decoder.drafter.chain=jacobi or denoise."
            )
        self.exact = self.chain.exact

    def check(self, spec: object, window: int) -> None:
        """Raise `UserError` if the window is too small or the corrector's folder holds none."""
        carried = self.carried(window)
        if self.corrected > carried - 1:
            raise UserError(
                f"decoder.drafter.corrected={self.corrected} exceeds the main chain of {carried - 1} guesses."
            )
        self.chain.check(spec, carried)
        if self.weights is not None:
            check_part(self._source(), read_settings)

    def _source(self) -> WeightSource:
        return WeightSource(str(self.weights), "decoder.drafter.weights", required=(SETTINGS, WEIGHTS))

    def carried(self, window: int) -> int:
        return chain_slots(window, self.siblings, self.copies, self.full)

    def forwards(self, window: int) -> int:
        return self.corrected

    def prepare(self, model: ImageModel) -> None:
        self.chain.prepare(model)
        if self.chain.extra:
            raise UserError("the front cannot be put before an adapter with appended timestep tokens.")
        self.model = model
        self.vocabulary = model.layout.vocabulary
        self.shape = None
        self.corrector = None if self.weights is None else Corrector.load(locate_part(self._source()), model)

    def open(self, model: ImageModel, rows: int, capacity: int, sampling: SamplingParams) -> Memory | None:
        if self.corrector is None:
            return None
        width, branches = self.corrector.depth, 2 if sampling.guided else 1
        zeros = torch.zeros(rows, self.corrected, dtype=torch.long, device=model.device)
        stale = torch.zeros(branches * rows, self.corrected, width, dtype=model.dtype, device=model.device)
        return Memory(stale, zeros, zeros.bool(), stale[:, 0].clone())

    def admit(
        self,
        memory: Memory | None,
        rows: Tensor,
        branch: int,
        embeds: Tensor,
        hidden: Tensor,
        lengths: Tensor,
        token: Tensor,
    ) -> None:
        if memory is not None:
            memory.valid[rows] = False

    def fill(self, draft: Draft, fresh: Tensor, state: State) -> Draft:
        """Return the pass: the main chain with corrected laws, and branches."""
        chain = self.chain.fill(draft, fresh, state)
        if self.shape is None or self.shape.chain != chain.tokens.shape[1]:
            self.shape = shape(
                chain.tokens.shape[1], siblings=self.siblings, copies=self.copies, full=self.full,
                corrected=self.corrected, device=chain.tokens.device,
            )  # fmt: skip
        front, count = self.shape, self.shape.side
        tokens = torch.nn.functional.pad(chain.tokens, (0, count))
        probs = torch.nn.functional.pad(chain.probs, (0, 0, 0, count))
        hidden = None if state.memory is None else state.memory.source[:, None]  # [R, F, D] of the families above
        for depth, level in enumerate(front.levels, 1):
            law = probs[:, depth - 1 : depth].repeat(1, len(level.parents), 1)
            token = tokens[:, depth : depth + 1].repeat(1, len(level.parents))
            if depth <= self.corrected:
                token, law, hidden = self._correct(level, depth, tokens, token, law, hidden[:, level.home], state)
            tokens[:, level.first], probs[:, level.first - 1] = token, law
            self._siblings(level, depth, tokens, probs, token, law, state)
        tokens = state.force(tokens, front.tree)
        level = chain.level if chain.level is None else torch.nn.functional.pad(chain.level, (0, count))
        embeds, latent = None, None
        if chain.embeds is not None:
            latent = torch.nn.functional.pad(chain.latent, (0, 0, 0, count))  # branches are clean
            noisy = torch.nn.functional.pad(chain.embeds, (0, 0, 0, count))
            embeds = torch.where((level > 0)[..., None], noisy, self.model.embed(tokens))
        return Draft(tokens, probs, embeds, level, latent, front.tree)

    def _siblings(
        self, level: Level, depth: int, tokens: Tensor, probs: Tensor, token: Tensor, law: Tensor, state: State
    ) -> None:
        """Draw further children without replacement, from the law without the earlier ones, renormalised and recorded."""
        position = (state.cached + depth)[:, None]
        for rank, slots in enumerate(level.siblings, 1):
            token, law = token[:, : len(slots)], law[:, : len(slots)]
            left = law.scatter(-1, token.clamp(max=law.shape[-1] - 1)[..., None], 0.0)
            mass = left.sum(-1, keepdim=True)
            law = torch.where(mass > 0, left / mass, law)  # a law of one token has no second
            place = position.expand(-1, len(slots))
            sampler, purpose = state.sampling.sampler, Purpose.SIBLING
            token = draw_tokens(law, state.noise, place, purpose, state.iteration, sampler, rank)
            tokens[:, slots], probs[:, slots - 1] = token, law

    def _correct(
        self, level: Level, depth: int, tokens: Tensor, token: Tensor, law: Tensor, source: Tensor, state: State
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Correct the law of each family [B, F, V] for its left token, and couple the stored guess to it.

        A guess x of law q stays with min(1, q'(x) / q(x)), else moves to norm(max(0, q' - q)): its law is q', recorded.
        """
        memory, rows, families = state.memory, len(tokens), len(level.parents)
        branches = len(memory.stale) // rows
        stale = memory.stale[:, depth - 1, None].expand(-1, families, -1)
        old, new = memory.old[:, depth - 1, None].expand(-1, families), tokens[:, level.parents]
        changed = memory.valid[:, depth - 1, None] & (old != new) & (state.at((state.cached + depth)[:, None]) < 0)
        embed = self.model.embed(torch.cat([old, new], 1)).repeat(branches, 1, 1)
        hidden = self.corrector(stale, source, embed[:, :families], embed[:, families:])
        hidden = torch.where(changed.repeat(branches, 1)[..., None], hidden, stale)
        mended = torch.where(changed[..., None], state.sampling.probs(self.model.logits(hidden)).to(law), law)
        place = (state.cached + depth)[:, None].expand(-1, families)
        if state.sampling.sampler == "gumbel":
            moved = draw_tokens(mended, state.noise, place, Purpose.SAMPLE, 0, "gumbel")
            return torch.where(changed, moved, token), mended, hidden
        code = token.clamp(max=law.shape[-1] - 1)
        coin = state.noise.uniform(place, Purpose.CORRECT, state.iteration)
        moved = draw(residual(mended, law, code), state.noise.uniform(place, Purpose.MOVE, state.iteration))
        keep = ~changed | (coin < Exact().chance(mended, law, code))
        return torch.where(keep, token, moved), mended, hidden

    def observe(self, outcome: Outcome, state: State) -> None:
        """Keep the states behind the coming front."""
        memory, draft = state.memory, outcome.draft
        if memory is None:
            return
        branches = len(outcome.hidden) // len(outcome.moved)
        last = outcome.path.gather(1, (outcome.moved - 1).clamp(min=0)[:, None])  # its output drew the last token
        source = outcome.source[:, 1 : self.corrected + 1]
        parent = source - 1 if draft.tree is None else draft.tree.parents[0][source]
        memory.stale = take(outcome.hidden, parent.repeat(branches, 1))
        memory.source = take(outcome.hidden, last.repeat(branches, 1))[:, 0]
        memory.old = draft.tokens.gather(1, parent)
        memory.valid = ~outcome.fresh[:, 1 : self.corrected + 1]
        if draft.level is not None:  # a law behind noise has no left token that was replaced
            memory.valid &= draft.level.gather(1, parent) == 0
