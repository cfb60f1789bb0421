"""The loop of all decoders but ZipAR: draft, one forward, verify, commit, refine, shift; each row moves by its own run.

# B samples, R model rows (2B with guidance, else B), S slots of a pass, C slots carried from pass to pass, V image vocabulary
Slot 0 of a pass is the last committed token, the others are guesses; the output at a slot is the law of the slots behind it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sjd2.decoding.interfaces import Draft, Outcome, State
from sjd2.decoding.noise import Noise, Purpose
from sjd2.decoding.sampling import SamplingParams, draw, draw_tokens
from sjd2.decoding.shapes import Walk, walk
from sjd2.decoding.verify import Exact, after_siblings, chances, law_behind, laws, take
from sjd2.models.base import Condition, ImageModel

if TYPE_CHECKING:
    from sjd2.decoding.generate import Decoder


@dataclass
class Sample:
    """One decoded image: tokens [N] local ids, target-model passes, draft passes, tokens committed at each pass."""

    tokens: np.ndarray
    forwards: int
    draft_forwards: int
    accepted: list[int]


class Decoding:
    """B rows in flight. `admit` starts rows, `step` is one pass, `collect` hands out a finished row."""

    @torch.inference_mode()
    def __init__(self, model: ImageModel, decoder: Decoder, rows: int, prompt: int, sampling: SamplingParams) -> None:
        decoder.prepare(model)
        device, size, carried = model.device, decoder.window, decoder.carried
        wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        self.model, self.decoder, self.sampling = model, decoder, sampling
        self.branches = 2 if sampling.guided else 1
        self.total = model.layout.length
        self.prompt = prompt
        self.capacity = prompt + self.total + size + decoder.extra
        self.cache = model.cache(self.branches * rows, self.capacity)
        forced = torch.cat([model.layout.forced(), torch.zeros(size, dtype=torch.long)]).to(device)
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        self.state = State(
            tokens=torch.zeros(rows, self.total + size, dtype=torch.long, device=device),
            committed=zeros + self.total,  # empty rows look finished
            cached=zeros + self.total - 1,
            iteration=zeros.clone(),
            forced=forced,
            noise=Noise(zeros.clone(), wide),
            sampling=sampling,
            window=size,
            starts=zeros.repeat(self.branches),
            memory=decoder.drafter.open(model, rows, self.capacity, sampling) if decoder.drafter is not None else None,
        )
        recorded = carried > 1 and getattr(decoder.refiner, "record", True)
        vocabulary = model.layout.vocabulary
        probs = torch.zeros(rows, carried - 1, vocabulary, dtype=wide, device=device) if recorded else None
        self.draft = Draft(torch.zeros(rows, carried, dtype=torch.long, device=device), probs)
        self.fresh = torch.zeros(rows, carried, dtype=torch.bool, device=device)
        self.history: list[Tensor] = []  # per pass [B]: tokens committed
        self.started = [0] * rows  # pass at which the row was admitted
        self.dropped = 0  # passes at the front of the history that no row needs any more
        self.seconds = {"prefill": 0.0, "decode": 0.0}

    @torch.inference_mode()
    def admit(self, rows: list[int], condition: Condition, seeds: list[int]) -> None:
        """Prefill prompts into these rows and commit their first token (the prefill counts as a pass)."""
        begin = self.now()
        state, count, device = self.state, len(rows), self.model.device
        longest = max(condition.embeds.shape[1], condition.uncond_embeds.shape[1])
        if longest > self.prompt:
            self.capacity, self.prompt = self.capacity + longest - self.prompt, longest
            self.cache.reserve(self.capacity)
            if self.decoder.drafter is not None:
                self.decoder.drafter.reserve(state.memory, self.capacity)
        index = torch.tensor(rows, device=device)
        state.noise.put(index, torch.tensor(seeds, device=device))
        prompts = [(condition.embeds, condition.lengths), (condition.uncond_embeds, condition.uncond_lengths)]
        hidden = []
        for branch, (embeds, lengths) in enumerate(prompts[: self.branches]):
            place = index + branch * len(state.committed)
            hidden.append(self._prefill(embeds, lengths, place))
            state.starts[place] = self.model.image_start(lengths)
        ends = [
            h[torch.arange(len(h), device=device), lengths - 1]
            for h, (_, lengths) in zip(hidden, prompts, strict=False)
        ]
        # an unconditional prompt may be one for all
        target = self.sampling.probs(
            self.model.logits(torch.cat([end.expand(count, -1) for end in ends])[:, None])
        )  # [b, 1, V]
        first = torch.zeros(count, 1, dtype=torch.long, device=device)
        noise = Noise(state.noise.seeds[index], state.noise.dtype)
        drawn = draw_tokens(target, noise, first, Purpose.SAMPLE, 0, self.sampling.sampler)[:, 0]
        token = torch.where(state.forced[0] < 0, drawn, state.forced[0])
        state.tokens[index], state.tokens[index, 0] = 0, token
        state.committed[index], state.cached[index], state.iteration[index] = 1, 0, 0
        self.draft.tokens[index], self.draft.tokens[index, 0] = 0, token
        for field in (self.draft.level, self.draft.latent):
            if field is not None:
                field[index] = 0
        self.fresh[index], self.fresh[index, 0] = True, False
        if self.decoder.drafter is not None:
            for branch, (embeds, lengths) in enumerate(prompts[: self.branches]):
                self.decoder.drafter.admit(state.memory, index, branch, embeds, hidden[branch], lengths, token)
        for row in rows:
            self.started[row] = self.dropped + len(self.history)
        oldest = min(self.started) - self.dropped
        self.dropped, self.history = self.dropped + oldest, self.history[oldest:]
        self.cache.bound = max(self.cache.bound, self.prompt)
        self.seconds["prefill"] += self.now() - begin

    def _prefill(self, embeds: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """Run prompts [b, P, D] (or one shared prompt [1, P, D]) into model rows and return their states [b, P, D]."""
        count, width = embeds.shape[:2]
        scratch = self.model.cache(count, width)
        positions = torch.arange(width, device=embeds.device).expand(count, -1)
        hidden = self.model.forward(embeds, positions, scratch)
        scratch.lengths = lengths
        sources = torch.arange(count, device=embeds.device) if count > 1 else torch.zeros_like(rows)
        self.cache.take_rows(rows, scratch, sources)
        return hidden

    @torch.inference_mode()
    def step(self) -> None:
        """One pass over all rows: fill -> forward -> target law -> verify -> commit -> refine -> shift."""
        state, decoder, size = self.state, self.decoder, self.decoder.window
        state.bound = self.cache.bound
        if size > 1:  # a single draw is cheaper by itself
            state.noise.roll(state.cached, size + 1, state.iteration)
        draft = self.draft if size == 1 else decoder.drafter.fill(self.draft, self.fresh, state)
        fed = draft
        hidden, target = self._forward(fed)  # [R, S, D], [B, S, V]
        begin = state.cached + 1  # image position behind slot 0
        pending = state.committed - begin  # depths 1..pending are committed already; 0 except under rule=paper
        if size == 1:
            alone = torch.zeros_like(begin)
            drawn = self._draw(target[:, 0], begin, None)
            moved = torch.where(state.committed < self.total, 1, 0)
            self._commit(draft, Walk(alone[:, None], alone, alone, alone == 0), drawn, moved, begin, pending)
        else:
            guesses = state.guesses(draft)
            tested = after_siblings(decoder.verifier, laws(target, draft.tree), draft)
            chance = chances(decoder.verifier, tested, target, draft, state)
            lane = None if draft.tree is None else draft.tree.rank[:, 1:]
            u = state.noise.uniform(guesses, Purpose.ACCEPT, state.iteration, lane)
            given = (state.at(guesses) >= 0) | (guesses - begin[:, None] < pending[:, None])
            keep = given | (u < chance)  # [B, S-1], strict: chance 0 never passes, chance 1 always
            exact = draft.level is not None and decoder.rule == "exact"
            way = walk(draft.tree, keep, draft.level == 0 if exact else None)
            law, bonus = law_behind(decoder.verifier, tested, target, draft, way.end, state)
            drawn = self._draw(law, begin + way.accepted, bonus)
            # counted from depth 1, committed ones included; finished rows stay where they are
            moved = torch.minimum(way.accepted + way.open, self.total - begin).clamp(min=0)
            moved = torch.where(state.committed < self.total, moved, pending)
            self._commit(draft, way, drawn, moved, begin, pending)
            if decoder.carried > 1:
                draft = self._refine(draft, target, chance.masked_fill(given, 1.0), keep, u)
            if draft.tree is not None:
                self.cache.compact(way.path[:, 1 : draft.tree.crooked + 1].repeat(self.branches, 1))
        self._shift(draft, fed, hidden, way if size > 1 else None, moved)

    def _forward(self, draft: Draft) -> tuple[Tensor, Tensor]:
        """Return the hidden states [R, S, D] and the target law behind each slot [B, S, V]."""
        size, state = self.decoder.window, self.state
        x = self.model.embed(draft.tokens) if draft.embeds is None else draft.embeds
        positions = state.starts[:, None] + state.positions(size, draft.tree).repeat(self.branches, 1)
        gate = None if draft.level is None else (draft.level > 0).repeat(self.branches, 1)
        visible = None if draft.tree is None else draft.tree.seen.expand(len(x), -1, -1).repeat(self.branches, 1, 1)
        if self.decoder.extra:
            x, positions, visible, gate = self.decoder.drafter.append(
                x, positions, draft.level, gate, state.starts, visible
            )
        hidden = self.model.forward(x.repeat(self.branches, 1, 1), positions, self.cache, visible, gate)[:, :size]
        return hidden, self.sampling.probs(self.model.logits(hidden))

    def _draw(self, law: Tensor, position: Tensor, bonus: Tensor | None) -> Tensor:
        """Draw the token behind the accepted run, recovered from the residual or a bonus token: [B, V], [B] -> [B]."""
        state, position = self.state, position[:, None]
        if self.sampling.sampler == "gumbel":
            drawn = draw_tokens(law[:, None], state.noise, position, Purpose.SAMPLE, 0, "gumbel")
        else:
            u = state.noise.uniform(position, Purpose.SAMPLE)
            if bonus is not None:
                u = torch.where(bonus[:, None], u, state.noise.uniform(position, Purpose.RESIDUAL, state.iteration))
            drawn = draw(law[:, None], u)
        forced = state.at(position)
        return torch.where(forced < 0, drawn, forced)[:, 0]

    def _commit(self, draft: Draft, way: Walk, drawn: Tensor, moved: Tensor, begin: Tensor, pending: Tensor) -> None:
        """Write the first `moved` of (accepted guesses, the drawn token) behind the committed tokens."""
        state = self.state
        depth = torch.arange(way.path.shape[1], device=moved.device)  # depth + 1
        guess = torch.cat([draft.tokens.gather(1, way.path[:, 1:]), drawn[:, None]], 1)
        # a drawn token stands right behind the accepted run
        token = torch.where(depth == way.accepted[:, None], drawn[:, None], guess)
        where = (begin[:, None] + depth).clamp(max=state.tokens.shape[1] - 1)
        old = state.tokens.gather(1, where)
        state.tokens.scatter_(1, where, torch.where(depth < moved[:, None], token, old))
        state.committed = begin + moved
        self.history.append(moved - pending)

    def _refine(self, draft: Draft, target: Tensor, chance: Tensor, keep: Tensor, u: Tensor) -> Draft:
        """Let the refiner redraw the guesses; it wants the exact chance, whatever the verifier accepts by."""
        law = laws(target, draft.tree)
        if not self.decoder.verifier.exact:
            chance = chances(Exact(), law, target, draft, self.state)
            keep = u < chance
        return self.decoder.refiner(draft, law, chance, keep, self.state)

    def _advance(self, draft: Draft, moved: Tensor) -> Tensor:
        """Return how many slots' keys and values are final: [B]. Under rule=paper only those with clean inputs."""
        if draft.level is None or self.decoder.rule == "exact" or not self.decoder.refeed:
            return moved
        return torch.minimum(moved, (draft.level == 0).cumprod(1).sum(1))

    def _shift(self, draft: Draft, fed: Draft, hidden: Tensor, way: Walk | None, moved: Tensor) -> None:
        """Move every row's window by its own count; slots that enter are `fresh` and get filled in the next pass.

        draft: the refined guesses; fed: those that the pass has seen.
        """
        state, decoder, carried = self.state, self.decoder, self.decoder.carried
        advance = self._advance(draft, moved)
        state.noise.forget()
        state.iteration = state.iteration + 1
        state.cached = state.cached + advance
        self.cache.lengths = self.cache.lengths + advance.repeat(self.branches)
        self.cache.bound = min(self.cache.bound + decoder.window, self.prompt + self.total)
        source = torch.arange(carried, device=advance.device) + advance[:, None]  # [B, C] depth in the last pass
        fresh = source >= carried
        source = source.clamp(max=carried - 1)
        if draft.tree is not None and carried > 1:
            source = draft.tree.follow[way.end].gather(1, source)  # depth -> slot
        # committed tokens replace guesses: slot 0, and under rule=paper those that wait for a clean pass
        settled = state.positions(carried)
        known = settled < state.committed[:, None]
        tokens = draft.tokens.gather(1, source)
        tokens = torch.where(known, state.tokens.gather(1, settled.clamp(max=state.tokens.shape[1] - 1)), tokens)
        self.fresh = fresh & ~known
        if way is not None:
            decoder.drafter.observe(Outcome(hidden, fed, moved, way.path, way.end, source, self.fresh), state)
        alone = carried == 1
        self.draft = replace(
            draft,
            tokens=tokens,
            probs=None if draft.probs is None or alone else take(draft.probs, (source[:, 1:] - 1).clamp(min=0)),
            embeds=None,
            level=None if draft.level is None else draft.level.gather(1, source).masked_fill(known, 0),
            latent=None if draft.latent is None else take(draft.latent, source),
            tree=None,
        )

    def finished(self) -> list[int]:
        """Return the rows that have all their tokens (waits for the device), and learn how long the rows really are."""
        committed, longest = (
            torch.cat([self.state.committed, self.cache.lengths.amax()[None]])
            .cpu()
            .split([len(self.state.committed), 1])
        )
        self.cache.bound = int(longest)  # the host's own bound grows by a whole window per pass
        return (committed >= self.total).nonzero()[:, 0].tolist()

    def look(self) -> dict[str, Tensor]:
        """Return `guesses` [B, C - 1], what the coming pass tests behind the committed tokens; -1 where nothing stands yet."""
        draft, state, carried = self.draft, self.state, self.decoder.carried
        ahead = torch.arange(carried - 1, device=state.committed.device)
        position = state.committed[:, None] + ahead
        slot = position - state.cached[:, None]
        nothing = (slot >= carried) | (position >= self.total)
        slot = slot.clamp(max=carried - 1)
        nothing |= self.fresh.gather(1, slot)
        return {"guesses": draft.tokens.gather(1, slot).masked_fill(nothing, -1)}

    def collect(self, row: int) -> Sample:
        """Return the finished row's sample."""
        passes = self.history[self.started[row] - self.dropped :]
        moves = torch.stack(passes)[:, row].cpu().tolist() if passes else []
        accepted = [1, *(move for move in moves if move > 0)]
        tokens = self.state.tokens[row, : self.total].cpu().numpy().copy()
        drafted = (len(accepted) - 1) * self.decoder.forwards
        return Sample(tokens, len(accepted), drafted, accepted)

    def now(self) -> float:
        """Return the time in seconds, after the device has finished what was asked of it."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()
