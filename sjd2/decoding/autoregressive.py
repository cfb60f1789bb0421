"""AR: feed the last token, draw the next one.

# B samples, R model rows (2B with guidance, else B)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sjd2.decoding.decoder import BaseDecoder
from sjd2.decoding.engine import Engine, Prompt
from sjd2.decoding.interfaces import Rows
from sjd2.decoding.noise import Purpose
from sjd2.decoding.sampling import SamplingParams
from sjd2.models.base import ImageModel


class AutoregressiveEngine(Engine):
    """One token per row and pass."""

    @torch.inference_mode()
    def __init__(
        self, model: ImageModel, decoder: BaseDecoder, rows: int, prompt: int, sampling: SamplingParams
    ) -> None:
        super().__init__(model, decoder, rows, prompt, sampling)
        self.capacity = prompt + self.total + 1
        self.cache = model.cache(self.branches * rows, self.capacity)
        self.state = Rows(**self.empty_rows(slack=1))
        self._settle = self.piece(AutoregressiveEngine.settle)

    def place(self, index: Tensor, prompts: list[Prompt], token: Tensor) -> None:
        self.state.tokens[index, 0], self.state.committed[index] = token, torch.ones_like(index)

    @torch.inference_mode()
    def step(self) -> None:
        """Run one pass over all rows: forward, draw, commit."""
        state, last = self.state, self.state.committed[:, None] - 1
        x = self.model.embed(state.tokens.gather(1, last))
        positions = state.image_start[:, None] + self.per_branch(last)
        hidden = self.model.forward(self.per_branch(x), positions, self.cache)
        num_new = self._settle(self, self.model.logits(hidden))
        self.history.append(num_new)
        self.cache.lengths = self.cache.lengths + self.per_branch(num_new)
        self.cache.bound = min(self.cache.bound + 1, self.prompt + self.total)

    def settle(self, logits: Tensor) -> Tensor:
        """Draw from logits [R, 1, V] and commit; return how many tokens each row got: [B]."""
        state, next_position = self.state, self.state.committed[:, None]
        p = self.probs(logits)  # [B, 1, V]
        token = state.impose(state.sampler.draw(p, next_position, Purpose.SAMPLE), next_position)
        state.tokens.scatter_(1, next_position, token)  # a finished row's goes to the slot after the image
        num_new = (state.committed < self.total).long()
        state.committed = state.committed + num_new
        return num_new

    def peek(self) -> dict[str, Tensor]:
        """Return `guesses` [B, 0]: nothing is drafted."""
        return {"guesses": self.state.tokens[:, :0]}
