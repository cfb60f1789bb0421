"""Prompt lookup adapted to images: draft the tokens that followed where the last ones were committed before.

# B samples, S slots of a pass, N image-phase tokens
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sjd2.decoding.interfaces import Draft, Drafter, State
from sjd2.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Lookup(Drafter):
    """Find the last `context` tokens in what is committed and copy on from there (prompt lookup, an n-gram decoder for text).

    The longest match wins; then the nearest column, best the position right above; then the latest row. Without a match
    the row above is copied. Copies are deterministic, one-hot drafts: exact, and accepted with probability p(x).
    """

    context: int = 2

    def __post_init__(self) -> None:
        if self.context < 1:
            raise UserError(f"decoder.drafter.context must be 1 or more, got {self.context}.")

    def num_carried(self, window: int) -> int:
        return 1

    def propose(self, carried: Draft, fresh: Tensor, state: State) -> Draft:
        """Copy on after the best match: [B, 1] the last committed token -> [B, S]."""
        last = state.committed[:, None] - 1
        depth = torch.arange(1, state.window, device=last.device)
        back = self._match(state, last)
        # the copy may run into what it is about to write: it then repeats with the period `back`
        source = last - back + 1 + (depth - 1) % back
        # a forced token copied to a free place is no code
        copies = state.tokens.gather(1, source).clamp(max=state.model.layout.vocabulary - 1)
        return Draft(state.force(torch.cat([carried.tokens, copies], 1)), shape=carried.shape)

    def _match(self, state: State, last: Tensor) -> Tensor:
        """Return how many positions before the last token [B, 1] the best match ends: [B, 1], at least 1."""
        layout = state.model.layout
        total, stride = layout.length, layout.strides(last)
        place = torch.arange(total, device=last.device)
        back = last - place  # [B, N]
        run = torch.ones_like(back, dtype=torch.bool)
        length = torch.zeros_like(back)
        for shift in range(self.context):
            own, there = last - shift, place - shift
            same = state.tokens.gather(1, own.clamp(min=0)) == state.tokens[:, there.clamp(min=0)]
            run &= same & (there >= 0)
            length = length + run
        rows = torch.div(back + stride // 2, stride, rounding_mode="floor")
        column = (back - rows * stride).abs()
        score = ((length + 1) * stride - column) * total + place  # in that order: length, column, row
        best = torch.where(back > 0, score, -1).argmax(1, keepdim=True)
        return (last - best).clamp(min=1)  # nothing can match an image's first token
