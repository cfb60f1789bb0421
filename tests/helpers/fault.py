"""A model that breaks at a chosen pass."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sjd2.decoding.generate import StepInfo
from sjd2.models.base import ImageModel


class Fault:
    """Adds `value` to all logits of one sample; a tensor, so that recorded passes see it too."""

    def __init__(self, model: ImageModel, row: int = 1) -> None:
        self.value, self.row, self.logits = torch.zeros((), device=model.device), row, model.logits

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.logits(hidden)
        here = torch.arange(len(out), device=out.device) == self.row  # of the conditional branch
        return torch.where(here.view(-1, *[1] * (out.dim() - 1)), out + self.value.to(out), out)

    def after(self, passes: int, value: float) -> Callable[[StepInfo], None]:
        """Return a callback that brings the fault in after so many passes."""

        def step(info: StepInfo) -> None:
            if info.pass_index >= passes:
                self.value.fill_(value)
            assert info.pass_index < passes + 12, "not noticed"

        return step
