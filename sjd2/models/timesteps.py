"""How a fine-tuned model learns how noisy its inputs are: a code added to them, or timestep tokens appended to the pass.

# R model rows, S slots of a pass, K noise levels, D width
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Encode times in [0, 1] with unit variance: [...] -> [..., D]; the frequencies of transformers over 1000 t."""
    half = width // 2
    rates = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t[..., None].float() * 1000 * rates
    return torch.cat([angles.sin(), angles.cos()], -1) * 2**0.5


class AdditiveCode(nn.Module):
    """A learned code of the time, added to the noisy input; starts at zero and is never added to clean slots.

    Cheaper than the paper's appended tokens: no extra slots and no mask.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        first, last = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, t: Tensor) -> Tensor:
        """Return the code in normalised space: [...] -> [..., D]."""
        return self.net(sinusoid(t, self.width).to(next(self.parameters()).dtype))


@dataclass
class Timesteps:
    """The timestep tokens of a pass (SJD2, arXiv 2510.08994).

    tokens [K, D]: model inputs, one for each noise level 1..K; level [R, S]: of each slot, 0 is clean; image_start [R]: the
    position id where the tokens stand.
    """

    tokens: Tensor
    level: Tensor
    image_start: Tensor

    def append(
        self, x: Tensor, positions: Tensor, attn_mask: Tensor | None, gate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Put the tokens after the slots of a pass: x [R, S, D] -> [R, S + K, D], and so on.

        A noisy slot sees the token of its own level; the tokens see themselves only. attn_mask [R, S, T] or None: causal.
        """
        (rows, size), steps = positions.shape, len(self.tokens)
        x = torch.cat([x, self.tokens.expand(rows, -1, -1)], 1)
        positions = torch.cat([positions, self.image_start[:, None].expand(-1, steps)], 1)
        if attn_mask is None:
            attn_mask = torch.ones(size, size, dtype=torch.bool, device=x.device).tril().expand(rows, -1, -1)
        own = self.level[..., None] == torch.arange(1, steps + 1, device=x.device)
        itself = torch.eye(steps, dtype=torch.bool, device=x.device)
        below = torch.cat([own.new_zeros(steps, attn_mask.shape[2]), itself], 1).expand(rows, -1, -1)
        attn_mask = torch.cat([torch.cat([attn_mask, own], 2), below], 1)
        if gate is not None:
            gate = torch.cat([gate, gate.new_ones(rows, steps)], 1)
        return x, positions, attn_mask, gate
