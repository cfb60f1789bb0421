"""The only decoding loop: draft, one forward, verify, commit, refine, shift; every row moves by its own accepted run.

# B samples, R model rows (2B with guidance, else B), S slots of a pass, V image vocabulary, D width, N image-phase tokens
Slot 0 of a pass is the last committed token, slots 1..S-1 are guesses; the output at slot s is the law of slot s + 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sjd2.errors import UserError
from sjd2.models.base import Condition, ImageModel
from sjd2.noise import Noise, Purpose
from sjd2.parts import Draft, Drafter, Refiner, State, Verifier
from sjd2.sampling import Sampling, draw_tokens

CHECK_EVERY = 8  # passes between two looks at the device for finished rows; a CPU looks after every pass


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder is its parts and a window; the loop is `Decoding`, the same for all.

    window: model inputs per pass, the last committed token included (AR is 1, drafts = window - 1).
    rule: `exact` commits only behind clean inputs (decoders.md 3.4, rule E), `paper` commits any accepted slot.
    refeed: with rule=paper, committed tokens whose keys came from a noisy input pass once more, clean (else they stay).
    """

    name: str
    window: int
    lossless: bool
    drafter: Drafter | None = None
    verifier: Verifier | None = None
    refiner: Refiner | None = None
    rule: str = "exact"
    refeed: bool = True

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"decoder.window must be 1 or more, got {self.window}; 1 is plain AR.")
        if self.window > 1 and None in (self.drafter, self.verifier, self.refiner):
            raise UserError(
                f"decoder '{self.name}' with window {self.window} needs a drafter, a verifier and a refiner."
            )
        if self.rule not in ("exact", "paper"):
            raise UserError(f"decoder.rule must be exact or paper, got '{self.rule}'.")
        if self.lossless and self.rule == "paper":
            raise UserError("rule=paper commits tokens behind noisy inputs, so the decoder cannot be called lossless.")
        for part in (self.drafter, self.verifier, self.refiner):
            if self.lossless and part is not None and not part.exact:
                raise UserError(
                    f"decoder '{self.name}' claims to be lossless, but its part {type(part).__name__} is not exact; "
                    "set decoder.lossless=false."
                )

    @property
    def extra(self) -> int:
        return self.drafter.extra if self.drafter is not None else 0

    def check(self, spec: object) -> None:
        """Raise `UserError` if this decoder cannot run on the model that `spec` describes."""
        for part in (self.drafter, self.verifier, self.refiner):
            if hasattr(part, "check"):
                part.check(spec, self.window)

    def prepare(self, model: ImageModel) -> None:
        """Let the parts build their tables, once per model."""
        for part in (self.drafter, self.verifier, self.refiner):
            if part is not None:
                part.prepare(model)


@dataclass
class Sample:
    """One decoded image: tokens [N] local ids, target-model passes, draft passes, tokens committed at each pass."""

    tokens: np.ndarray
    forwards: int
    draft_forwards: int
    accepted: list[int]


@dataclass
class DecodeResult:
    """The samples of one batch in the order of its seeds, and seconds {prefill, decode} of the whole batch."""

    samples: list[Sample]
    seconds: dict[str, float]

    @property
    def tokens(self) -> Tensor:
        """All tokens as one tensor [B, N]."""
        return torch.from_numpy(np.stack([sample.tokens for sample in self.samples]))


@dataclass
class StepInfo:
    """What a per-step callback sees: tensors on the model's device, nothing is synchronised for it."""

    pass_index: int
    committed: Tensor  # [B]
    accepted: Tensor  # [B] tokens committed in this pass
    tokens: Tensor  # [B, N + S] the live buffer: clone what you keep


class Decoding:
    """B rows in flight. `admit` starts rows, `step` is one pass, `collect` hands out a finished row."""

    @torch.inference_mode()
    def __init__(self, model: ImageModel, decoder: Decoder, rows: int, prompt: int, law: Sampling) -> None:
        decoder.prepare(model)
        device, size = model.device, decoder.window
        wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        self.model, self.decoder, self.law = model, decoder, law
        self.branches = 2 if law.guided else 1
        self.total = model.layout.length
        self.prompt = prompt
        self.cache = model.cache(self.branches * rows, prompt + self.total + size + decoder.extra)
        forced = torch.cat([model.layout.forced(), torch.zeros(size, dtype=torch.long)]).to(device)
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        self.state = State(
            tokens=torch.zeros(rows, self.total + size, dtype=torch.long, device=device),
            committed=zeros + self.total,  # empty rows look finished
            cached=zeros + self.total - 1,
            iteration=zeros.clone(),
            forced=forced,
            noise=Noise(zeros.clone(), wide),
            sampling=law,
        )
        vocabulary = model.layout.vocabulary
        recorded = size > 1 and getattr(decoder.refiner, "record", True)
        probs = torch.zeros(rows, size - 1, vocabulary, dtype=wide, device=device) if recorded else None
        self.draft = Draft(torch.zeros(rows, size, dtype=torch.long, device=device), probs)
        self.fresh = torch.zeros(rows, size, dtype=torch.bool, device=device)
        self.prompt_lengths = zeros.repeat(self.branches)  # [R]
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
            self.cache.reserve(self.cache.capacity + longest - self.prompt)
            self.prompt = longest
        index = torch.tensor(rows, device=device)
        state.noise.seeds[index] = torch.tensor(seeds, device=device)
        hidden = [self._prefill(condition.embeds, condition.lengths, index)]
        if self.branches == 2:
            shared = self._prefill(condition.uncond_embeds, condition.uncond_lengths, index + len(state.committed))
            hidden.append(shared.expand(count, -1))
        target = self.law.law(self.model.logits(torch.cat(hidden)[:, None]))  # [b, 1, V]
        first = torch.zeros(count, 1, dtype=torch.long, device=device)
        noise = Noise(state.noise.seeds[index], state.noise.dtype)
        drawn = draw_tokens(target, noise, first, Purpose.SAMPLE, 0, self.law.sampler)[:, 0]
        token = torch.where(state.forced[0] < 0, drawn, state.forced[0])
        state.tokens[index], state.tokens[index, 0] = 0, token
        state.committed[index], state.cached[index], state.iteration[index] = 1, 0, 0
        self.prompt_lengths[index] = condition.lengths
        if self.branches == 2:
            self.prompt_lengths[index + len(state.committed)] = condition.uncond_lengths
        self.draft.tokens[index], self.draft.tokens[index, 0] = 0, token
        for field in (self.draft.level, self.draft.latent):
            if field is not None:
                field[index] = 0
        self.fresh[index], self.fresh[index, 0] = True, False
        for row in rows:
            self.started[row] = self.dropped + len(self.history)
        oldest = min(self.started) - self.dropped
        self.dropped, self.history = self.dropped + oldest, self.history[oldest:]
        self.cache.bound = max(self.cache.bound, self.prompt)
        self.seconds["prefill"] += self.now() - begin

    def _prefill(self, embeds: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """Run prompts [b, P, D] (or one shared prompt [1, P, D]) and return the last hidden state of each [b, D]."""
        count, width = embeds.shape[:2]
        scratch = self.model.cache(count, width)
        positions = torch.arange(width, device=embeds.device).expand(count, -1)
        hidden = self.model.forward(embeds, positions, scratch)
        scratch.lengths = lengths
        sources = torch.arange(count, device=embeds.device) if count > 1 else torch.zeros_like(rows)
        self.cache.take_rows(rows, scratch, sources)
        return hidden[torch.arange(count, device=embeds.device), lengths - 1]

    @torch.inference_mode()
    def step(self) -> None:
        """One pass over all rows: fill -> forward -> target law -> verify -> commit -> refine -> shift."""
        state, decoder, size = self.state, self.decoder, self.decoder.window
        if decoder.drafter is not None:
            self.draft = decoder.drafter.fill(self.draft, self.fresh, state)
        draft = self.draft
        target = self._forward(draft)  # [B, S, V]
        begin = state.cached + 1  # image position of slot 1
        pending = state.committed - begin  # slots 1..pending are committed already; 0 except under rule=paper
        if size == 1:
            accepted, stop = torch.zeros_like(begin), torch.zeros_like(begin)
            reach = torch.ones_like(begin)
        else:
            guesses = state.positions(size)[:, 1:]
            forced = state.at(guesses)
            slot = torch.arange(size - 1, device=begin.device)
            given = (forced >= 0) | (slot < pending[:, None])
            chance = decoder.verifier.accept(draft, target, state).masked_fill(given, 1.0)
            u = state.noise.uniform(guesses, Purpose.ACCEPT, state.iteration)
            keep = u < chance  # [B, S-1], strict: chance 0 never passes, chance 1 always
            accepted = keep.cumprod(1).sum(1)
            stop = accepted
            reach = torch.full_like(begin, size)
            if draft.level is not None and decoder.rule == "exact":
                # behind the first noisy input every law is computed on something that is not committed: stop there
                reach = 1 + (draft.level[:, 1:] == 0).cumprod(1).sum(1)
        drawn = self._recover(draft, target, stop, begin)
        # counted from slot 1, committed slots included; finished rows stay where they are
        moved = torch.minimum(torch.minimum(accepted + 1, reach), self.total - begin).clamp(min=0)
        moved = torch.where(state.committed < self.total, moved, pending)
        self._commit(draft, moved, accepted, drawn, begin, pending)
        if size > 1:
            draft = decoder.refiner(draft, target, chance, keep, state)
        self._shift(draft, self._advance(draft, moved), moved)

    def _forward(self, draft: Draft) -> Tensor:
        size, state = self.decoder.window, self.state
        x = self.model.embed(draft.tokens) if draft.embeds is None else draft.embeds
        positions = self.prompt_lengths[:, None] + state.positions(size).repeat(self.branches, 1)
        gate = None if draft.level is None else (draft.level > 0).repeat(self.branches, 1)
        visible = None
        if self.decoder.extra:
            x, positions, visible, gate = self.decoder.drafter.append(
                x, positions, draft.level, gate, self.prompt_lengths, self.branches
            )
        hidden = self.model.forward(x.repeat(self.branches, 1, 1), positions, self.cache, visible, gate)
        return self.law.law(self.model.logits(hidden[:, :size]))

    def _recover(self, draft: Draft, target: Tensor, stop: Tensor, begin: Tensor) -> Tensor:
        """Draw the token behind the accepted run: recovered from the residual, or a bonus token: [B]."""
        state, size = self.state, self.decoder.window
        position = (begin + stop)[:, None]
        law = target[:, 0] if size == 1 else self.decoder.verifier.law(draft, target, stop, state)
        bonus = draw_tokens(law[:, None], state.noise, position, Purpose.SAMPLE, 0, self.law.sampler)
        if size > 1 and self.law.sampler == "cdf":
            residual = draw_tokens(law[:, None], state.noise, position, Purpose.RESIDUAL, state.iteration, "cdf")
            bonus = torch.where(stop[:, None] == size - 1, bonus, residual)
        forced = state.at(position)
        return torch.where(forced < 0, bonus, forced)[:, 0]

    def _commit(
        self, draft: Draft, moved: Tensor, accepted: Tensor, drawn: Tensor, begin: Tensor, pending: Tensor
    ) -> None:
        """Write slots 1..moved of the pass into the committed tokens: accepted drafts, then the drawn token."""
        state, size = self.state, self.decoder.window
        slot = torch.arange(size, device=moved.device)  # slot s + 1 of the pass
        guess = torch.cat([draft.tokens[:, 1:], drawn[:, None]], 1)
        # a drawn token stands right behind the accepted run
        token = torch.where(slot == accepted[:, None], drawn[:, None], guess)
        where = (begin[:, None] + slot).clamp(max=state.tokens.shape[1] - 1)
        old = state.tokens.gather(1, where)
        state.tokens.scatter_(1, where, torch.where(slot < moved[:, None], token, old))
        state.committed = begin + moved
        self.history.append(moved - pending)

    def _advance(self, draft: Draft, moved: Tensor) -> Tensor:
        """Return how many slots' keys and values are final: [B]. Under rule=paper only those with clean inputs."""
        if draft.level is None or self.decoder.rule == "exact" or not self.decoder.refeed:
            return moved
        return torch.minimum(moved, (draft.level == 0).cumprod(1).sum(1))

    def _shift(self, draft: Draft, advance: Tensor, moved: Tensor) -> None:
        """Move every row's window by its own count; slots that enter are `fresh` and get filled in the next pass."""
        state, size = self.state, self.decoder.window
        state.iteration = state.iteration + 1
        state.cached = state.cached + advance
        self.cache.lengths = self.cache.lengths + advance.repeat(self.branches)
        self.cache.bound = min(self.cache.bound + size, self.prompt + self.total)
        source = torch.arange(size, device=advance.device) + advance[:, None]  # [B, S]
        self.fresh = source >= size
        source = source.clamp(max=size - 1)
        tokens = draft.tokens.gather(1, source)
        # committed tokens replace guesses: slot 0, and under rule=paper those that wait for a clean pass
        settled = state.positions(size)
        known = settled < state.committed[:, None]
        tokens = torch.where(known, state.tokens.gather(1, settled.clamp(max=state.tokens.shape[1] - 1)), tokens)
        self.fresh &= ~known
        self.draft = replace(
            draft,
            tokens=tokens,
            probs=None if draft.probs is None else _take(draft.probs, source[:, 1:] - 1),
            level=None if draft.level is None else draft.level.gather(1, source).masked_fill(known, 0),
            latent=None if draft.latent is None else _take(draft.latent, source),
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

    def collect(self, row: int) -> Sample:
        """Return the finished row's sample."""
        passes = self.history[self.started[row] - self.dropped :]
        moves = torch.stack(passes)[:, row].cpu().tolist() if passes else []
        accepted = [1, *(move for move in moves if move > 0)]
        tokens = self.state.tokens[row, : self.total].cpu().numpy().copy()
        return Sample(tokens, len(accepted), 0, accepted)

    def now(self) -> float:
        """Return the time in seconds, after the device has finished what was asked of it."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def _take(field: Tensor, index: Tensor) -> Tensor:
    return field.gather(1, index[..., None].expand(*index.shape, field.shape[-1]))


def _done(decoding: Decoding, passes: int) -> list[int]:
    look = decoding.model.device.type == "cpu" or passes % CHECK_EVERY == 0
    return decoding.finished() if look else []


def _report(decoding: Decoding, on_step: Callable[[StepInfo], None] | None, passes: int) -> None:
    if on_step is not None:
        state = decoding.state
        on_step(StepInfo(passes, state.committed, decoding.history[-1], state.tokens))


def generate(
    model: ImageModel,
    decoder: Decoder,
    condition: Condition,
    seeds: list[int],
    *,
    law: Sampling,
    on_step: Callable[[StepInfo], None] | None = None,
) -> DecodeResult:
    """Decode one image per prompt of `condition`, all rows started together.

    seeds: one integer per prompt (`noise.sample_seed`). on_step is called after every pass.
    Raises `UserError` if seeds and prompts differ in number.
    """
    rows = len(condition)
    if len(seeds) != rows:
        raise UserError(f"generate needs one seed per prompt, got {len(seeds)} seeds for {rows} prompts.")
    prompt = max(condition.embeds.shape[1], condition.uncond_embeds.shape[1])
    decoding = Decoding(model, decoder, rows, prompt, law)
    decoding.admit(list(range(rows)), condition, seeds)
    begin, passes = decoding.now(), 0
    while len(_done(decoding, passes)) < rows:
        decoding.step()
        passes += 1
        _report(decoding, on_step, passes)
    decoding.seconds["decode"] = decoding.now() - begin
    return DecodeResult([decoding.collect(row) for row in range(rows)], decoding.seconds)


def stream(
    model: ImageModel,
    decoder: Decoder,
    requests: Iterable[tuple[str, int]],
    *,
    rows: int,
    law: Sampling,
    on_step: Callable[[StepInfo], None] | None = None,
) -> Iterator[tuple[int, Sample]]:
    """Decode (prompt, seed) requests with `rows` in flight; a finished row takes the next request at once.

    Yields (index of the request, sample) in the order of finishing.
    """
    waiting = enumerate(requests)
    decoding = Decoding(model, decoder, rows, 1, law)
    owner: dict[int, int] = {}
    passes, empty = 0, list(range(rows))
    while True:
        taken = [entry for _, entry in zip(empty, waiting, strict=False)]
        if taken:
            places = empty[: len(taken)]
            decoding.admit(places, model.encode([prompt for _, (prompt, _) in taken]), [seed for _, (_, seed) in taken])
            owner.update(zip(places, (index for index, _ in taken), strict=True))
        if not owner:
            return
        decoding.step()
        passes += 1
        _report(decoding, on_step, passes)
        empty = [row for row in _done(decoding, passes) if row in owner]
        for row in empty:
            yield owner.pop(row), decoding.collect(row)
        empty = [row for row in range(rows) if row not in owner]
