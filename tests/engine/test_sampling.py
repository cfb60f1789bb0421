"""The target distribution against transformers' logits processors, and against a distribution written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sjd2.decoding.sampling import SamplingParams

ALL = SamplingParams(guidance_scale=2.5, temperature=0.8, top_k=40, top_p=0.9, min_p=0.08)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_k": 0},
        {"top_p": 1.0},
        {"top_k": 0, "top_p": 1.0},
        {"min_p": 0.0},
        {"min_p": 1.0},
        {"temperature": 3.0},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers_processors(changes: dict[str, float]) -> None:
    """Guidance first, then temperature, top-k, top-p and min-p, each on what the one before has left."""
    params = replace(ALL, **changes)
    logits = 3 * torch.randn(2 * 50, 1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    conditional, unconditional = logits[:, 0].chunk(2)
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    processors.append(MinPLogitsWarper(params.min_p))
    guided = unconditional + params.guidance_scale * (conditional - unconditional)
    expected = processors(torch.zeros(50, 1, dtype=torch.long), guided).softmax(-1)
    found = params.probs(logits)[:, 0]
    assert torch.equal(found > 0, expected > 0)
    assert torch.allclose(found, expected, atol=1e-12)


def test_min_p_by_hand() -> None:
    probs = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04], dtype=torch.float64)

    def cut(**settings: float) -> list[float]:
        return [round(x, 4) for x in SamplingParams(**settings).probs(probs.log()[None, None])[0, 0].tolist()]

    assert cut(min_p=0.2) == [0.5556, 0.2778, 0.1667, 0, 0]  # at least a tenth in all
    assert cut(min_p=0.2, temperature=2.0) == cut(temperature=2.0)  # the flatter distribution keeps all five
    assert cut(min_p=0.4, top_k=4) == cut(min_p=0.4) == [0.6667, 0.3333, 0, 0, 0]
    assert cut(min_p=1.0) == cut(temperature=0) == [1, 0, 0, 0, 0]


def test_what_identifies_a_distribution_is_as_before_where_min_p_is_off() -> None:
    old = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "sampler": "cdf"}
    assert SamplingParams().settings() == SamplingParams(min_p=0).settings() == old
    assert SamplingParams(min_p=0.03).settings() == old | {"min_p": 0.03}
