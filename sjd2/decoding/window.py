"""The engine of all drafting decoders: draft, one forward pass, verify, commit, refine; each row moves by its own path.

# B samples, R model rows (2B with guidance, else B), S slots of a pass, C slots carried from pass to pass, V image vocabulary
Slot 0 of a pass is the last committed token, the others are draft tokens; the output at a slot is the distribution p of the
token after it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sjd2.decoding.decoder import Decoder
from sjd2.decoding.draft_counter import AcceptanceCounter
from sjd2.decoding.drafted_prefill import prefill_with_drafts
from sjd2.decoding.engine import Engine, Prompt
from sjd2.decoding.finite import FaultSource
from sjd2.decoding.interfaces import Draft, PassResult, State
from sjd2.decoding.sampling import SamplingParams
from sjd2.decoding.shapes import CHAIN, AcceptedPath, gather_slots
from sjd2.decoding.verify import Verification, verify
from sjd2.models.base import ImageModel
from sjd2.models.timesteps import Timesteps


class WindowEngine(Engine):
    """Speculative decoding with draft tokens that live on from pass to pass (SJD, SCD, SJD2), or are drawn anew (EAGLE)."""

    persistent: ClassVar[tuple[str, ...]] = ("state", "cache", "carried", "fresh", "counter")
    decoder: Decoder
    state: State
    counter: AcceptanceCounter

    @torch.inference_mode()
    def __init__(
        self,
        model: ImageModel,
        decoder: Decoder,
        rows: int,
        prompt: int,
        sampling: SamplingParams,
        *,
        prefill_only: bool = False,
    ) -> None:
        """Open `rows` empty rows for prompts of up to `prompt` tokens.

        prefill_only: for rows that another engine takes over after their first pass: nothing is precomputed or compiled.
        """
        super().__init__(model, decoder, rows, prompt, sampling)
        self.drafter, self.verifier, self.refiner = decoder.bind(model)
        self.rule, self.num_carried = decoder.commit_rule, decoder.num_carried
        self.drafted = self.num_carried - 1 if decoder.draft_in_prefill else 0
        appended = 0 if self.drafter.timesteps is None else len(self.drafter.timesteps)
        self.capacity = prompt + self.total + decoder.window + appended
        self.cache = model.cache(self.branches * rows, self.capacity)
        common = self.empty_rows(slack=decoder.window, tabled=not prefill_only)
        memory = self.drafter.init_state(rows, self.capacity, sampling)
        self.state = State(
            **common,
            cached=common["committed"] - 1,
            model=model,
            sampling=sampling,
            window=decoder.window,
            memory=memory,
        )
        device, vocabulary = model.device, model.layout.vocabulary
        # rows without a request draft too, and nothing can be drawn from no mass
        probs = torch.full((rows, self.num_carried - 1, vocabulary), 1 / vocabulary, dtype=self.dtype, device=device)
        tokens = torch.zeros(rows, self.num_carried, dtype=torch.long, device=device)
        self.carried = Draft(tokens, probs if self.refiner.records else None)
        self.fresh = torch.zeros_like(tokens, dtype=torch.bool)  # [B, C] slots that hold no draft token yet
        self.counter = AcceptanceCounter.of(rows, decoder.lookahead, device)
        self._propose, self._settle = WindowEngine.propose, WindowEngine.settle
        if not prefill_only:
            self._propose = self.piece(WindowEngine.propose) if self.drafter.traceable else WindowEngine.propose
            self._settle = self.piece(WindowEngine.settle)

    def grow(self) -> None:
        super().grow()
        self.drafter.grow(self.state.memory, self.capacity)

    @torch.inference_mode()
    def clear(self) -> None:
        super().clear()
        self.state.cached.fill_(self.total - 1)

    def enter(self, index: Tensor, prompts: list[Prompt]) -> None:
        if not self.drafted:
            super().enter(index, prompts)
            return
        newcomers = WindowEngine(self.model, self.decoder, len(index), 0, self.sampling, prefill_only=True)
        prefill_with_drafts(self, newcomers, index, prompts)

    def place(self, index: Tensor, prompts: list[Prompt], token: Tensor) -> None:
        state, carried = self.state, self.carried
        state.tokens[index], state.tokens[index, 0] = 0, token
        state.committed[index], state.cached[index], state.iteration[index] = 1, 0, 0
        carried.tokens[index], carried.tokens[index, 0] = 0, token
        for field in (carried.level, carried.latent):
            if field is not None:
                field[index] = 0
        self.fresh[index], self.fresh[index, 0] = True, False
        self.counter.clear(index)
        for branch, prompt in enumerate(prompts):
            self.drafter.admit(state.memory, index, branch, prompt.embeds, prompt.hidden, prompt.lengths, token)

    @torch.inference_mode()
    def step(self) -> None:
        """Run one pass over all rows: propose, forward, settle (verify, commit, refine, shift), advance."""
        self.state.bound = self.cache.bound
        draft = self._propose(self)  # tokens [B, S], q [B, S-1, V], shape
        hidden = self.forward(draft)  # [R, S, D]
        slots, num_final, num_new = self._settle(self, draft, hidden, self.model.logits(hidden))
        self.history.append(num_new)
        self._advance(slots, num_final)

    def propose(self) -> Draft:
        """Lay out the pass, mix its random numbers all at once, and let the drafter propose."""
        state = self.state
        state.noise.roll(state.begin(), state.iteration, self.drafter.repeated_draws)
        draft = self.drafter.propose(self.carried, self.fresh, state)
        if draft.probs is not None:
            state.watch(draft.probs, FaultSource.DRAFT)
        return draft

    def settle(self, draft: Draft, hidden: Tensor, logits: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Do all of a pass that follows the transformer: hidden [R, S, D], logits [R, S, V].

        Returns the slots [B, L] whose keys have to move to the front (None: they lie there), how many slots are final [B], and
        how many tokens were committed [B].
        """
        p, clean = self.probs(logits), self.rule.clean(draft)  # [B, S, V]: the next-token distribution at every slot
        test = self.test(draft, p, clean)
        path = draft.shape.accepted_path(test.accepted, clean)
        token, bonus = self.next_token(test, path)  # a recovered token, or the bonus token
        before = self.state.committed
        num_new = self.commit(draft, path, token, bonus)
        refined = self.refiner(draft, test, self.state)
        num_final = self.shift(refined, draft, hidden, path, num_new)
        reordered = draft.shape.reorder_depth
        return path.slots[:, 1 : reordered + 1] if reordered else None, num_final, self.state.committed - before

    def forward(self, draft: Draft) -> Tensor:
        """Run the transformer over a pass and return the hidden states: [R, S, D]."""
        state = self.state
        x = self.model.embed(draft.tokens) if draft.embeds is None else draft.embeds
        positions = self.per_branch(state.positions(x.shape[1], draft.shape)) + state.image_start[:, None]
        attn_mask = draft.shape.attn_mask(len(x))
        attn_mask = attn_mask if attn_mask is None else self.per_branch(attn_mask)
        gate = None if draft.level is None else self.per_branch(draft.level > 0)
        timesteps = None
        if draft.level is not None and self.drafter.timesteps is not None:
            timesteps = Timesteps(self.drafter.timesteps, self.per_branch(draft.level), state.image_start)
        return self.model.forward(self.per_branch(x), positions, self.cache, attn_mask, gate, timesteps)

    def test(self, draft: Draft, p: Tensor, clean: Tensor | None) -> Verification:
        """Test the draft tokens of the pass under its outputs [B, S, V]; clean [B, S]: inputs to commit after (None: all)."""
        return verify(self.verifier, draft, p, self.state, clean)

    def next_token(self, test: Verification, path: AcceptedPath) -> tuple[Tensor, Tensor]:
        """Draw the token after the accepted path; whether it is a bonus, with no draft token rejected: [B], [B]."""
        state = self.state
        position = (state.cached + 1 + path.length)[:, None]
        probs, bonus = test.next_probs(path.end)
        token = state.sampler.draw_next(probs[:, None], bonus[:, None], position, state.iteration)
        return state.impose(token, position)[:, 0], bonus

    def commit(self, draft: Draft, path: AcceptedPath, token: Tensor, bonus: Tensor) -> Tensor:
        """Write the accepted draft tokens and the drawn one after slot 0; return how many tokens follow it now: [B].

        Under rule=paper these include some that were committed before. Finished rows stay as they are.
        """
        state, first = self.state, self.state.cached + 1
        depth = torch.arange(path.slots.shape[1], device=first.device)  # of the parent
        tokens = torch.cat([draft.shape.on_path(draft.tokens, path), token[:, None]], 1)
        tokens = torch.where(depth == path.length[:, None], token[:, None], tokens)
        num_new = torch.minimum(
            path.length + (1 if path.can_extend is None else path.can_extend), self.total - first
        ).clamp(min=0)
        num_new = torch.where(state.committed < self.total, num_new, state.committed - first)
        positions = state.positions(1 + len(depth))[:, 1:]
        old = state.tokens.gather(1, positions)
        state.tokens.scatter_(1, positions, torch.where(depth < num_new[:, None], tokens, old))
        before, state.committed = state.committed, first + num_new
        self.count(path, before, num_new, bonus)
        return num_new

    def count(self, path: AcceptedPath, before: Tensor, num_new: Tensor, bonus: Tensor) -> None:
        """Count the draft tokens of a pass that were accepted, and the one that was rejected."""
        state, depths = self.state, self.counter.tests.shape[1]
        known = before - state.cached - 1  # slots that were committed before
        accepted = (torch.minimum(path.length, num_new) - known).clamp(min=0)
        rejected = ~bonus & (path.length < num_new) & (state.committed > before)
        free = state.forced_at(before[:, None] + torch.arange(depths, device=before.device)) < 0
        self.counter.add(accepted, rejected, free)

    def shift(self, refined: Draft, draft: Draft, hidden: Tensor, path: AcceptedPath, num_new: Tensor) -> Tensor:
        """Move every row's window by its own count and return it: [B]; slots that enter are `fresh` until the next pass."""
        state, size = self.state, self.num_carried
        num_final = self.rule.num_final(draft, num_new)
        state.advance(num_final)
        depth = torch.arange(size, device=num_new.device) + num_final[:, None]  # [B, C] in the pass that has run
        fresh = depth >= size
        source = draft.shape.continuation(path.end, depth.clamp(max=size - 1))
        # committed tokens replace draft tokens: at slot 0, and under rule=paper those that wait for a clean pass
        positions = state.positions(size)
        known = positions < state.committed[:, None]
        committed = state.tokens.gather(1, positions)
        self.fresh = fresh & ~known
        self.drafter.update(PassResult(draft, refined, hidden, path, num_new, source, self.fresh), state)
        probs, level, latent = refined.probs, refined.level, refined.latent
        self.carried = Draft(
            torch.where(known, committed, refined.tokens.gather(1, source)),
            probs=None if probs is None else gather_slots(probs, (source[:, 1:] - 1).clamp(min=0)),
            level=None if level is None else level.gather(1, source).masked_fill(known, 0),
            latent=None if latent is None else gather_slots(latent, source),
            shape=CHAIN,  # given, as torch.compile does not know an object that is a default
        )
        return num_final

    def _advance(self, slots: Tensor | None, num_final: Tensor) -> None:
        """Keep the keys and values of the first `num_final` [B] slots of the path."""
        cache = self.cache
        if slots is not None:
            cache.compact(self.per_branch(slots))
        cache.lengths = cache.lengths + self.per_branch(num_final)
        cache.bound = min(cache.bound + self.decoder.window, self.prompt + self.total)

    def peek(self) -> dict[str, Tensor]:
        """Return `guesses` [B, C - 1], what the coming pass tests after the committed tokens; -1 where there is none yet."""
        state, carried, size = self.state, self.carried, self.num_carried
        position = state.committed[:, None] + torch.arange(size - 1, device=state.committed.device)
        slot = position - state.cached[:, None]
        missing = (slot >= size) | (position >= self.total)
        slot = slot.clamp(max=size - 1)
        missing |= self.fresh.gather(1, slot)
        return {"guesses": carried.tokens.gather(1, slot).masked_fill(missing, -1)}
