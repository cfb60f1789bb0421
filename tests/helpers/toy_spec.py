"""The toy model behind the settings of a real one, for quick commands: `--config-dir tests/conf model=toy`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sjd2.errors import UserError
from sjd2.finetune.recipe import Recipe
from sjd2.models.layout import TokenGrid
from tests.helpers.toy import Toy


class SlowToy(Toy):
    """A toy that sleeps before it turns tokens into pixels, so that a test can hit a run between two batches."""

    def decode(self, tokens: Tensor) -> Tensor:
        time.sleep(float(os.environ.get("TOY_SECONDS_PER_BATCH", "0")))
        return super().decode(tokens).repeat_interleave(4, -1).repeat_interleave(4, -2)


@dataclass(kw_only=True)
class ToySpec:
    """A model without its weights."""

    name: str
    rows: int
    columns: int
    vocabulary: int
    weights: str | None = None
    adapter: str | None = None
    pixels: str = "decode"
    sampling: Mapping[str, Any] | None = None

    @property
    def layout(self) -> TokenGrid:
        return TokenGrid(self.rows, self.columns, self.vocabulary)

    def check(self) -> None:
        if self.weights is not None and not os.path.exists(self.weights):
            raise UserError(f"model.weights={self.weights} does not exist.")

    def check_guidance(self, scale: float) -> None:
        pass

    def digest(self) -> str:
        return "toy"

    def load(self, device: str, dtype: str) -> Toy:  # always on the CPU
        print("weights are loaded", flush=True)
        return SlowToy(self.layout, dtype=getattr(torch, dtype))


class Count(Recipe):
    """A training that only counts its steps."""

    def __init__(self, *, steps: int, needs_model: bool) -> None:
        self.steps, self.needs_model = steps, needs_model

    def run(
        self, *, out: Path, log: Callable[[int, dict], None], device: str, seed: int, model: Toy | None = None
    ) -> dict[str, float]:
        for step in range(1, self.steps + 1):
            log(step, {"loss": 1 / step})
        (out / "final").mkdir(exist_ok=True)
        (out / "final" / "seed").write_text(f"{seed} {model is not None}")
        return {"loss": 1 / self.steps}
