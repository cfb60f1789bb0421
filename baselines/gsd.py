"""GSD, grouped speculative decoding: a draft token is tested with the mass of codes about as likely and as close; lossy.

# V image vocabulary, D width, G members of a group
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sjd2.decoding.interfaces import Verifier
from sjd2.decoding.sampling import residual
from sjd2.errors import UserError
from sjd2.models.base import ImageModel


@dataclass(frozen=True, kw_only=True)
class Grouped(Verifier):
    """Accept draft token x with min(1, sum_C p / sum_C q) for a group C of codes around it (GSD, arXiv 2508.07747).

    group: G codes by rank of p, x itself, the G // 2 next less likely and the (G - 1) // 2 next more likely ones (released
    code: 14); cut off where the ranks end; 1 is exact verification. probability: members differ from p(x) by less.
    distance: members' input embeddings differ from x's by a squared distance below it; None takes all.
    On rejection the ordinary residual max(0, p - q). The groups overlap and depend on x, so no setting bounds the error.
    """

    group: int = 14
    probability: float = 0.15
    distance: float | None = 0.5
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        name = "decoder.verifier"
        if self.group < 1:
            raise UserError(f"{name}.group must be 1 (the draft token alone) or more, got {self.group}.")
        if not self.probability > 0:
            raise UserError(f"{name}.probability must be above 0, got {self.probability}; 1 switches it off.")
        if self.distance is not None and not self.distance > 0:
            raise UserError(f"{name}.distance must be above 0, got {self.distance}; null switches it off.")

    def bind(self, model: ImageModel, window: int) -> GroupedVerifier:
        return GroupedVerifier(self, model)


class GroupedVerifier(Verifier):
    """`Grouped` on a model, whose input embeddings it compares."""

    exact = False

    def __init__(self, settings: Grouped, model: ImageModel) -> None:
        self.settings, self.model = settings, model

    def accept_prob(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return min(1, sum_C p / sum_C q) of each draft token; q None is one-hot: p, q [..., V], token [...] -> [...]."""
        members, inside = self._groups(p, token)
        mass = (p.gather(-1, members) * inside).sum(-1)
        if q is None:
            return mass.clamp(max=1)
        other = (q.gather(-1, members) * inside).sum(-1)
        # no mass of q: the token is no draw from q (rule=paper), as in `sampling.accept_prob`
        return torch.where(other > 0, mass / other, (mass > 0).to(mass)).clamp(max=1)

    def residual(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return max(0, p - q)."""
        return residual(p, q, token)

    def _groups(self, p: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes of each group and which of them count: [..., V], [...] -> [..., G], [..., G]."""
        own = token[..., None]
        height = p.gather(-1, own)
        # two selections of a few codes cost an eighth of sorting V; equal probabilities rank by code
        index = torch.arange(p.shape[-1], device=p.device)
        below = (p < height) | ((p == height) & (index < own))
        lower = p.masked_fill(~below, -1.0).topk(min(self.settings.group // 2, p.shape[-1]))
        above = p.masked_fill(below, 2.0).scatter(-1, own, 2.0)
        upper = above.topk(min((self.settings.group - 1) // 2, p.shape[-1]), largest=False)
        members = torch.cat([own, lower.indices, upper.indices], -1)
        level = torch.cat([height, lower.values, upper.values], -1)
        # -1 and 2 stand where a side has fewer codes than asked for
        inside = (level >= 0) & (level < 2) & ((level - height).abs() < self.settings.probability)
        if self.settings.distance is not None and self.settings.group > 1:
            inside &= self._near(members)
        return members, inside

    def _near(self, members: Tensor) -> Tensor:
        """Return which codes lie near the first of each group: [..., G] -> [..., G]."""
        embeds = self.model.embed(members.flatten(0, -2)).float()  # [n, G, D]
        apart = embeds - embeds[:, :1]
        return (torch.linalg.vecdot(apart, apart) < self.settings.distance).view_as(members)
