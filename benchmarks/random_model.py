"""A published architecture with random weights under the settings of a real model, so that run.py times whole images of it.

python run.py --config-dir benchmarks/conf model=random decoder=scd evaluation=none limit=4
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.architectures import ARCHITECTURES, Architecture
from sjd2.errors import UserError, choose
from sjd2.models.base import Condition, ImageModel
from sjd2.models.hub import WeightSource
from sjd2.models.layout import TokenGrid
from sjd2.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class RandomSpec(ModelSpec):
    """architecture: a name of benchmarks/architectures.py. small: narrow and shallow, to try the command on a CPU."""

    architecture: str
    small: bool = False

    @property
    def plan(self) -> Architecture:
        """Return the architecture, as it is measured."""
        choose("model.architecture", self.architecture, ARCHITECTURES)
        plan = ARCHITECTURES[self.architecture]
        return plan.small() if self.small else plan

    @property
    def layout(self) -> TokenGrid:
        """Return which token stands where."""
        return self.plan.layout

    def sources(self) -> list[WeightSource]:
        """Return nothing: no weights are read."""
        return []

    def check(self) -> None:
        """Raise `UserError` if a setting is wrong, or for a full-size model without a GPU: building it takes minutes there."""
        super().check()
        if not self.small and not torch.cuda.is_available():
            raise UserError(
                "model=random at full size needs a GPU, and torch sees none; add model.small=true to try it here."
            )

    def digest(self) -> str:
        """Return a name in place of weights."""
        return f"random-{self.architecture}{'-small' if self.small else ''}"

    def build(self, device: torch.device, dtype: torch.dtype) -> ImageModel:
        """Build the model on its device; prompts become random vectors of the usual length."""
        plan = self.plan
        model: Any = plan.build(device, dtype)

        def encode(model: ImageModel, prompts: list[str]) -> Condition:
            return plan.condition(model, len(prompts))

        model.encode = types.MethodType(encode, model)
        return model
