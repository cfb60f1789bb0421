"""What a decoder is made of: drafts, the state that parts may read, and the protocols of the three parts.

# B samples, S slots of a pass, V image vocabulary, D width, N image-phase tokens
Slot 0 of a pass is the last committed token, slots 1..S-1 are guesses; the output at slot s is the law of slot s + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sjd2.models.base import ImageModel
from sjd2.noise import Noise
from sjd2.sampling import Sampling


@dataclass
class Draft:
    """The guesses of one pass.

    tokens [B, S]; probs [B, S-1, V]: the law each guess was drawn from (None: deterministic, one-hot);
    embeds [B, S, D]: model inputs where they are not embed(tokens); level [B, S]: noise level, 0 = clean;
    latent [B, S, D]: SJD2's noisy vectors in normalised space.
    """

    tokens: Tensor
    probs: Tensor | None
    embeds: Tensor | None = None
    level: Tensor | None = None
    latent: Tensor | None = None


@dataclass
class State:
    """What the parts may read of the rows in flight."""

    tokens: Tensor  # [B, N + S] the committed tokens; what lies beyond `committed` means nothing
    committed: Tensor  # [B] n, tokens committed
    cached: Tensor  # [B] tokens whose keys and values are final; n - 1 except under rule=paper
    iteration: Tensor  # [B] the row's own pass counter
    forced: Tensor  # [N + S] forced local id, -1 free; positions beyond N are forced dummies
    noise: Noise
    sampling: Sampling

    def positions(self, width: int) -> Tensor:
        """Return the image position of each slot of the coming pass: [B, width]."""
        return self.cached[:, None] + torch.arange(width, device=self.cached.device)

    def at(self, positions: Tensor) -> Tensor:
        """Return the forced id of each position, -1 where free: [B, S] -> [B, S]."""
        return self.forced[positions.clamp(max=len(self.forced) - 1)]

    def force(self, tokens: Tensor) -> Tensor:
        """Put the forced tokens into the guesses of the coming pass: [B, S] -> [B, S]."""
        forced = self.at(self.positions(tokens.shape[1]))
        forced = forced.index_fill(1, torch.zeros(1, dtype=torch.long, device=tokens.device), -1)  # slot 0 is committed
        return torch.where(forced < 0, tokens, forced)


class Part(Protocol):
    exact: bool  # whether the output law stays the model's own with this part

    def prepare(self, model: ImageModel) -> None: ...


class Drafter(Part, Protocol):
    extra: int  # slots it appends behind the window (SJD2's timestep codes); never committed, no logits

    def fill(self, draft: Draft, fresh: Tensor, state: State) -> Draft: ...


class Verifier(Part, Protocol):
    def accept(self, draft: Draft, target: Tensor, state: State) -> Tensor: ...
    def law(self, draft: Draft, target: Tensor, stop: Tensor, state: State) -> Tensor: ...


class Refiner(Part, Protocol):
    def __call__(self, draft: Draft, target: Tensor, chance: Tensor, keep: Tensor, state: State) -> Draft: ...
