"""The space the noise lives in: embeddings normalised per dimension (arXiv 2510.08994, section 4.1), and timestep codes.

# V image vocabulary, D width
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sjd2.models.base import ImageModel


class EmbeddingSpace:
    """e* = (m - mu) / sd with mean and standard deviation of the image codes' embeddings, per dimension, in float32.

    `normalised=False` keeps raw embeddings times one common scale, the paper's ablation (figure 5).
    """

    def __init__(self, model: ImageModel, *, normalised: bool = True) -> None:
        codes = torch.arange(model.layout.vocabulary, device=model.device)
        table = model.embed(codes[None])[0]
        table = table if table.dtype == torch.float64 else table.float()
        self.mean = table.mean(0) if normalised else torch.zeros_like(table[0])
        self.std = table.std(0) if normalised else table.std().expand_as(table[0])
        self.table = (table - self.mean) / self.std  # [V, D]
        self.unit = nn.functional.normalize(self.table, dim=-1)

    def normal(self, tokens: Tensor) -> Tensor:
        """Return the normalised embedding of codes [...] -> [..., D]; forced ids get the last code's, unused."""
        return self.table[tokens.clamp(max=len(self.table) - 1)]

    def model_input(self, e: Tensor) -> Tensor:
        """Undo the normalisation: [..., D] -> [..., D]."""
        return e * self.std + self.mean

    def nearest(self, e: Tensor) -> Tensor:
        """Return the code of largest cosine similarity: [..., D] -> [...]."""
        return (e @ self.unit.T).argmax(-1)  # the length of e does not change the order


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
        self.net = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)

    def forward(self, t: Tensor) -> Tensor:
        """Return the code in normalised space: [...] -> [..., D]."""
        return self.net(sinusoid(t, self.width).to(self.net[0].weight.dtype))
