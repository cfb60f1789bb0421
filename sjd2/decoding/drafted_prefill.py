"""A prefill that is the window's first pass as well: draft tokens follow each prompt (`decoder.draft_in_prefill`).

After a prefill of the prompt alone, the next pass sees all slots of the window for the first time and accepts next to nothing.
Here they stand after the prompt in the same forward pass, which is then a pass like any other: its slot 0 is the last token of
the prompt, at position -1 of the image, and no token has been committed yet.
# b admitted rows, R their model rows (2b with guidance, else b), P prompt tokens, C carried slots, D width
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sjd2.decoding.finite import FaultSource
from sjd2.decoding.interfaces import Draft
from sjd2.decoding.shapes import CHAIN, gather_slots
from sjd2.errors import UserError
from sjd2.models.timesteps import Timesteps

if TYPE_CHECKING:
    from sjd2.decoding.engine import Prompt
    from sjd2.decoding.window import WindowEngine


def prefill_with_drafts(engine: WindowEngine, newcomers: WindowEngine, index: Tensor, prompts: list[Prompt]) -> None:
    """Run prompts, one for each guidance branch, and draft tokens after them, into rows `index` [b] of `engine`.

    newcomers: an engine of b rows, which runs this pass, as the rows in flight have no part in it. Raises `UserError` if the
    drafter returns anything but a chain of all C carried slots. Exact as every pass is: docs/exactness.md.
    """
    _open(newcomers, engine.state.noise.seeds[index], prompts)
    state, drafter = newcomers.state, newcomers.drafter
    state.noise.roll(state.begin(), state.iteration)
    draft = drafter.propose_first(newcomers.carried, newcomers.fresh, state)
    if draft.shape is not CHAIN or draft.tokens.shape != newcomers.carried.tokens.shape:
        raise UserError(
            f"{type(drafter).__name__} must return a chain of all carried slots from propose_first; set "
            "decoder.draft_in_prefill=false."
        )
    if draft.probs is not None:
        state.watch(draft.probs, FaultSource.DRAFT)
    lengths = torch.cat([prompt.lengths.expand(len(index)) for prompt in prompts])
    embeds, positions, gate, slots = _lay_out(newcomers, draft, prompts, lengths)
    timesteps = None
    if draft.level is not None and drafter.timesteps is not None:
        level = torch.zeros_like(positions).scatter_(1, slots[:, 1:], newcomers.per_branch(draft.level[:, 1:]))
        timesteps = Timesteps(drafter.timesteps, level, state.image_start)
    hidden, cache = engine.run_prompts(embeds, positions, gate, timesteps)
    hidden = gather_slots(hidden, slots)
    _, num_final, _ = newcomers.settle(draft, hidden, engine.model.logits(hidden))
    cache.lengths = lengths - 1 + newcomers.per_branch(num_final)
    rows = torch.cat([index + branch * engine.num_rows for branch in range(engine.branches)])
    engine.cache.take_rows(rows, cache, torch.arange(len(rows), device=rows.device))
    engine.counter.clear(index)  # accept rates are those of the passes after the prefill
    own = engine.state
    for name in ("tokens", "committed", "iteration", "cached"):
        getattr(own, name)[index] = getattr(state, name)
    own.image_start[rows], own.finite[:, index] = state.image_start, state.finite
    engine.fresh[index] = newcomers.fresh
    _put(engine.carried, newcomers.carried, index, rows)
    if state.memory is not None:
        _put(own.memory, state.memory, index, rows)


def _open(newcomers: WindowEngine, seeds: Tensor, prompts: list[Prompt]) -> None:
    """Start all rows before their first token."""
    state, count = newcomers.state, len(seeds)
    state.noise.put(torch.arange(count, device=seeds.device), seeds)
    state.committed.fill_(0)
    state.cached.fill_(-1)
    newcomers.fresh[:, 1:] = True
    for prompt in prompts:
        state.finite[FaultSource.PROMPT] &= prompt.embeds.isfinite().flatten(1).all(1)
    starts = [newcomers.model.image_start(prompt.lengths - newcomers.first).expand(count) for prompt in prompts]
    state.image_start.copy_(torch.cat(starts))


def _lay_out(
    newcomers: WindowEngine, draft: Draft, prompts: list[Prompt], lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Put draft tokens after the prompts, whose lengths are [R].

    Returns inputs [R, P + C - 1, D], position ids and gates [R, P + C - 1], and where each slot lies [R, C]. An unconditional
    prompt may be empty; its slot 0 then lies on the first draft token, which is forced (`Condition`).
    """
    state, size = newcomers.state, draft.tokens.shape[1]
    longest = max(prompt.embeds.shape[1] for prompt in prompts)
    embeds = torch.cat(
        [
            pad(prompt.embeds, (0, 0, 0, longest - prompt.embeds.shape[1] + size - 1)).expand(len(draft.tokens), -1, -1)
            for prompt in prompts
        ]
    )
    drafted = newcomers.model.embed(draft.tokens) if draft.embeds is None else draft.embeds
    slots = lengths[:, None] - 1 + torch.arange(size, device=lengths.device)
    place = slots[:, 1:]
    embeds = embeds.scatter(
        1, place[..., None].expand(-1, -1, embeds.shape[2]), newcomers.per_branch(drafted[:, 1:]).to(embeds.dtype)
    )
    positions = torch.arange(embeds.shape[1], device=lengths.device).repeat(len(lengths), 1)
    positions.scatter_(1, place, state.image_start[:, None] + torch.arange(size - 1, device=lengths.device))
    gate = None
    if draft.level is not None:
        gate = torch.zeros_like(positions, dtype=torch.bool)
        gate.scatter_(1, place, newcomers.per_branch(draft.level[:, 1:] > 0))
    return embeds, positions, gate, slots.clamp(min=0)


def _put(mine: Any, theirs: Any, index: Tensor, rows: Tensor) -> None:
    """Copy the tensors of a dataclass to rows `index` [b] of an equal one, or `rows` [R] where they have model rows."""
    for field in fields(theirs):
        value = getattr(theirs, field.name)
        if not isinstance(value, Tensor):
            continue
        if getattr(mine, field.name) is None:  # noise of a draft, before the engine's first pass
            setattr(mine, field.name, value.new_zeros(len(mine.tokens), *value.shape[1:]))
        getattr(mine, field.name)[index if len(value) == len(index) else rows] = value
