"""Decide one pass with given random numbers: what public code decided on the same numbers is in tests/fixtures/public_code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sjd2.decoding.finite import FaultSource
from sjd2.decoding.interfaces import Draft, State
from sjd2.decoding.noise import Noise, Purpose
from sjd2.decoding.sampling import CdfSampler, SamplingParams
from sjd2.models.base import ImageModel

FOLDER = Path(__file__).parents[1] / "fixtures" / "public_code"


def recorded(name: str) -> dict[str, Any]:
    """Return the recorded numbers of one public repository."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def exact(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


class GivenNoise(Noise):
    """Numbers from lists, for one row: coins of draft slots 1, 2, ..., others of positions 1, 2, ...; the last one repeats."""

    def __init__(self, gumbel: Tensor | None = None, **numbers: list[float]) -> None:
        super().__init__(torch.zeros(1, dtype=torch.long), torch.float64)
        self.numbers = {Purpose[name.upper()]: exact(values) for name, values in numbers.items()}
        self.table = gumbel

    def uniform(self, positions, purpose, iteration=0, sibling=None):
        given = self.numbers[purpose]
        return given[None] if purpose == Purpose.ACCEPT else given[(positions - 1).clamp(max=len(given) - 1)]

    def gumbel(self, positions, vocabulary):
        assert self.table is not None
        return self.table[positions - 1]


def state(noise: Noise, window: int, model: ImageModel | None = None, rows: int = 1) -> State:
    """Return one token committed and nothing forced."""
    return State(
        length=window + 8,
        tokens=torch.zeros(rows, window + 8, dtype=torch.long),
        committed=torch.ones(rows, dtype=torch.long),
        iteration=torch.zeros(rows, dtype=torch.long),
        forced=torch.full((window + 8,), -1),
        image_start=torch.zeros(rows, dtype=torch.long),
        noise=noise,
        sampler=CdfSampler(noise),
        finite=torch.ones(len(FaultSource), rows, dtype=torch.bool),
        model=model,
        sampling=SamplingParams(),
        window=window,
        cached=torch.zeros(rows, dtype=torch.long),
    )


def target_of(case: dict[str, Any]) -> Tensor:
    """Return the target distributions of a recorded pass: [1, S, V]."""
    sampling = SamplingParams(guidance_scale=case["guidance"], top_k=case["top_k"])
    return sampling.probs(exact([case["cond"], case["uncond"]] if sampling.guided else [case["cond"]]))


def draft_of(case: dict[str, Any]) -> Draft:
    return Draft(torch.tensor([case["tokens"]]), exact([case["draft_logits"]]).softmax(-1))
