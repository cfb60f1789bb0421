"""Jacobi drafting: the draft tokens of the last pass, and a first one for slots that have just entered the window.

# B samples, S slots of a pass, V image vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sjd2.decoding.interfaces import Draft, Drafter, State
from sjd2.errors import choose


@dataclass(frozen=True, kw_only=True)
class Jacobi(Drafter):
    """Keep the draft tokens; fill fresh slots by `init` (SJD, arXiv 2410.01699, section 4.3).

    random: uniform over the codes, recorded as 1/V. left, up: copy the token to the left or one row above, recorded one-hot.
    """

    init: str = "random"

    def __post_init__(self) -> None:
        choose("decoder.drafter.init", self.init, ("random", "left", "up"))

    def propose(self, carried: Draft, fresh: Tensor, state: State) -> Draft:
        vocabulary = state.model.layout.vocabulary
        positions = state.positions(carried.tokens.shape[1])
        tokens = torch.where(fresh, state.noise.codes(positions, vocabulary), carried.tokens)
        probs = carried.probs
        if probs is not None:
            probs = torch.where(fresh[:, 1:, None], 1.0 / vocabulary, probs)
        if self.init != "random":
            tokens, copied = self._copy(tokens, fresh, state, positions)
            if probs is not None:
                # a forced token may be copied where the raster wraps; clamped to a code it stays a valid draft token
                tokens = torch.where(copied, tokens.clamp(max=vocabulary - 1), tokens)
                code = tokens[:, 1:, None].clamp(max=vocabulary - 1)
                probs = torch.where(copied[:, 1:, None], torch.zeros_like(probs).scatter_(-1, code, 1.0), probs)
        return replace(carried, tokens=state.force(tokens), probs=probs)

    def _copy(self, tokens: Tensor, fresh: Tensor, state: State, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Copy known tokens into fresh slots; slots with no source keep their random code."""
        size = tokens.shape[1]
        # position -1, the end of a prompt that is followed by drafts: nothing is copied in that pass
        board = state.tokens.scatter(1, positions.clamp(0, state.tokens.shape[1] - 1), tokens)
        known = positions[:, :1] + (~fresh).sum(1, keepdim=True)  # [B, 1] first position without a token
        layout = state.model.layout
        step = 1 if self.init == "left" else layout.strides(positions)
        first = 0 if self.init == "left" else layout.tops(positions)
        # a source may itself be fresh: walk on by whole steps until it is a known token
        hops = torch.div(positions - known, step, rounding_mode="floor").clamp(min=0) + 1
        source = positions - hops * step
        copied = fresh & (source >= first) & (torch.arange(size, device=tokens.device) > 0)
        return torch.where(copied, board.gather(1, source.clamp(min=0)), tokens), copied
