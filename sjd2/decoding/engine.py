"""What all engines share: rows that requests enter and leave, the prefill, and the account of every pass.

# B samples, R model rows (2B with guidance, else B), b admitted rows, P prompt tokens, D width, N image-phase tokens
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sjd2.decoding.decoder import BaseDecoder
from sjd2.decoding.draft_counter import AcceptanceCounter, DraftCounts
from sjd2.decoding.finite import FaultSource, finite_rows, not_finite
from sjd2.decoding.interfaces import Rows
from sjd2.decoding.noise import Noise, Purpose
from sjd2.decoding.sampling import SAMPLERS, SamplingParams
from sjd2.models.base import Condition, ImageModel
from sjd2.models.kv_cache import RowCache
from sjd2.models.timesteps import Timesteps


@dataclass
class Sample:
    """One decoded image: tokens [N] local ids, target-model passes, draft passes, tokens committed at each pass.

    drafts: what became of its draft tokens; None where nothing is drafted.
    """

    tokens: np.ndarray
    forwards: int
    draft_forwards: int
    accepted: list[int]
    drafts: DraftCounts | None = None


@dataclass
class Prompt:
    """One guidance branch of the prompts that are admitted, with what its prefill computes.

    embeds, hidden [b, P, D] ([1, P, D] where all rows share the prompt), lengths [b].
    """

    embeds: Tensor
    lengths: Tensor
    hidden: Tensor = field(init=False)  # set by the prefill


class Engine:
    """B rows in flight: `admit` starts rows, `step` is one pass, `collect` hands out a finished row.

    replayable: whether passes read nothing on the host, so that they can be recorded. raster: whether tokens are committed
    in raster order. persistent: attributes whose tensors outlive a pass. first: the image position of the token that the
    prefill draws. drafted: draft tokens that follow each prompt in the prefill.
    """

    replayable: ClassVar[bool] = True
    raster: ClassVar[bool] = True
    persistent: ClassVar[tuple[str, ...]] = ("state", "cache")
    state: Rows
    cache: RowCache
    counter: AcceptanceCounter | None = None  # of engines that draft

    def __init__(
        self, model: ImageModel, decoder: BaseDecoder, rows: int, prompt: int, sampling: SamplingParams
    ) -> None:
        self.model, self.decoder, self.sampling = model, decoder, sampling
        self.num_rows, self.prompt = rows, prompt
        self.branches = 2 if sampling.guided else 1
        self.total, self.first, self.drafted = model.layout.length, 0, 0
        self.dtype = torch.float64 if model.dtype == torch.float64 else torch.float32  # of probabilities
        self.history: list[Tensor] = []  # per pass [B]: tokens committed
        self.started = [0] * rows  # pass at which the row was admitted
        self.dropped = 0  # passes at the front of the history that no row needs any more
        self.seconds = {"prefill": 0.0, "decode": 0.0}

    def step(self) -> None:
        """Run one pass over all rows."""
        raise NotImplementedError

    def peek(self) -> dict[str, Tensor]:
        """Return what a trace keeps of the last pass beside the committed tokens."""
        raise NotImplementedError

    def place(self, index: Tensor, prompts: list[Prompt], token: Tensor) -> None:
        """Let rows `index` [b] begin with their first token [b]."""
        raise NotImplementedError

    def piece(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of this engine, compiled if the model's passes are: one for all engines of the same decoder.

        Not a bound method: an engine that refers to itself would keep its keys and values until Python looks for cycles.
        """
        compiler = self.model.compiler
        if compiler is None or self.dtype == torch.float64:
            return function
        return compiler.piece(function, (type(self), self.decoder, self.num_rows, self.sampling, self.model.adapter))

    def grow(self) -> None:
        """Make room for rows of `capacity` tokens."""
        self.cache.reserve(self.capacity)

    @torch.inference_mode()
    def clear(self) -> None:
        """Forget all rows, as if the engine had just been opened."""
        self.state.committed.fill_(self.total)
        self.state.finite.fill_(True)
        self.cache.lengths.fill_(0)
        self.cache.bound = 0
        self.history, self.dropped, self.started = [], 0, [0] * self.num_rows
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    def empty_rows(self, slack: int, tabled: bool = True) -> dict[str, Any]:
        """Return the fields of `Rows` without samples, which look finished, with `slack` forced dummies after the image.

        tabled: whether random numbers are mixed once for all passes (`Noise`).
        """
        device = self.model.device
        zeros = torch.zeros(self.num_rows, dtype=torch.long, device=device)
        noise = Noise(zeros.clone(), self.dtype, length=self.total + slack + 1 if tabled else 0)
        return {
            "length": self.total,
            "tokens": torch.zeros(self.num_rows, self.total + slack, dtype=torch.long, device=device),
            "committed": zeros + self.total,
            "iteration": zeros.clone(),
            "forced": torch.nn.functional.pad(self.model.layout.forced(), (0, slack)).to(device),
            "image_start": zeros.repeat(self.branches),
            "noise": noise,
            "sampler": SAMPLERS[self.sampling.sampler](noise),
            "finite": torch.ones(len(FaultSource), self.num_rows, dtype=torch.bool, device=device),
        }

    def per_branch(self, x: Tensor) -> Tensor:
        """Repeat rows for each guidance branch: [B, ...] -> [R, ...]."""
        return x.repeat(self.branches, *[1] * (x.dim() - 1))

    def probs(self, logits: Tensor) -> Tensor:
        """Return the target distribution of a pass, and note rows where it is not finite: [R, S, V] -> [B, S, V]."""
        p = self.sampling.probs(logits)
        self.state.watch(p, FaultSource.MODEL)
        return p

    # ---- rows enter

    @torch.inference_mode()
    def admit(self, rows: list[int], condition: Condition, seeds: list[int]) -> None:
        """Prefill prompts into these rows and commit their first token (the prefill counts as a pass)."""
        begin = self.now()
        index = torch.tensor(rows, device=self.model.device)
        self.state.noise.put(index, torch.tensor(seeds, device=index.device))
        prompts = self.prompts(condition)
        longest = max(prompt.embeds.shape[1] for prompt in prompts)
        if longest > self.prompt:
            self.capacity, self.prompt = self.capacity + longest - self.prompt, longest
            self.grow()
        self.state.finite.index_fill_(1, index, True)
        self.enter(index, prompts[: self.branches])
        for row in rows:
            self.started[row] = self.dropped + len(self.history)
        oldest = min(self.started) - self.dropped
        self.dropped, self.history = self.dropped + oldest, self.history[oldest:]
        self.cache.bound = max(self.cache.bound, self.prompt + self.drafted)
        self.seconds["prefill"] += self.now() - begin

    def enter(self, index: Tensor, prompts: list[Prompt]) -> None:
        """Prefill these prompts, one for each guidance branch, into rows `index` [b], and let them begin."""
        for branch, prompt in enumerate(prompts):
            self._prefill(prompt, index + branch * self.num_rows)
        self.place(index, prompts, self._first_token(index, prompts))

    def prompts(self, condition: Condition) -> list[Prompt]:
        """Return what is prefilled of each guidance branch."""
        return [
            Prompt(condition.embeds, condition.lengths),
            Prompt(condition.uncond_embeds, condition.uncond_lengths),
        ]

    def run_prompts(
        self,
        embeds: Tensor,
        positions: Tensor | None = None,
        gate: Tensor | None = None,
        timesteps: Timesteps | None = None,
    ) -> tuple[Tensor, RowCache]:
        """Return the last hidden states of prompts, and a cache with their keys and values: [b, P, D] -> [b, P, D].

        positions [b, P]: their ids (None: 0 .. P - 1); gate, timesteps: as in `ImageModel.forward`, where a prompt is
        followed by draft tokens.
        """
        count, width = embeds.shape[:2]
        scratch = self.model.cache(count, width + (0 if timesteps is None else len(timesteps.tokens)))
        if positions is None:
            positions = torch.arange(width, device=embeds.device).expand(count, -1)
        return self.model.forward(embeds, positions, scratch, gate=gate, timesteps=timesteps), scratch

    def _prefill(self, prompt: Prompt, rows: Tensor) -> None:
        """Run a prompt into model rows [b]."""
        count = len(prompt.embeds)
        self.state.finite[FaultSource.PROMPT, rows % self.num_rows] &= prompt.embeds.isfinite().flatten(1).all(1)
        prompt.hidden, scratch = self.run_prompts(prompt.embeds)
        scratch.lengths = prompt.lengths
        sources = torch.arange(count, device=rows.device) if count > 1 else torch.zeros_like(rows)
        self.cache.take_rows(rows, scratch, sources)
        self.state.image_start[rows] = self.model.image_start(prompt.lengths - self.first)

    def _first_token(self, index: Tensor, prompts: list[Prompt]) -> Tensor:
        """Draw the token after each prompt: [b]."""
        state, count = self.state, len(index)
        ends = [
            prompt.hidden[torch.arange(len(prompt.hidden), device=index.device), prompt.lengths - 1].expand(count, -1)
            for prompt in prompts
        ]
        p = self.sampling.probs(self.model.logits(torch.cat(ends)[:, None]))  # [b, 1, V]
        state.finite[FaultSource.MODEL, index] = finite_rows(p)
        position = torch.full((count, 1), self.first, device=index.device)
        sampler = type(state.sampler)(Noise(state.noise.seeds[index], state.noise.dtype))
        return state.impose(sampler.draw(p, position, Purpose.SAMPLE), position)[:, 0]

    # ---- rows leave

    def finished(self) -> list[int]:
        """Return the rows that have all their tokens (waits for the device), and learn how long the rows really are.

        Raises `UserError` if a row was drawn from a distribution that is not finite.
        """
        state = self.state
        found = torch.cat([state.committed, self.cache.lengths.amax()[None], state.finite.flatten().long()]).cpu()
        committed, longest, finite = found.split([self.num_rows, 1, state.finite.numel()])
        if not finite.all():
            raise not_finite(finite.view(state.finite.shape) > 0, self.model, self.sampling)
        self.cache.bound = int(longest)  # the host's own bound grows by a whole window per pass
        return (committed >= self.total).nonzero()[:, 0].tolist()

    def collect(self, row: int) -> Sample:
        """Return the finished row's sample; the prefill's tokens are those that no other pass has committed."""
        passes = self.history[self.started[row] - self.dropped :]
        counts = torch.stack(passes)[:, row].cpu().tolist() if passes else []
        accepted = [self.total - sum(counts), *(count for count in counts if count > 0)]
        tokens = self.state.tokens[row, : self.total].cpu().numpy().copy()
        drafts = None if self.counter is None else self.counter.collect(row)
        return Sample(tokens, len(accepted), (len(accepted) - 1) * self.decoder.num_forwards, accepted, drafts)

    def now(self) -> float:
        """Return the time in seconds, after the device has finished what was asked of it."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()
