"""The space the noise lives in: embeddings normalised per dimension (arXiv 2510.08994, section 4.1).

# V image vocabulary, D width
"""

from __future__ import annotations

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
