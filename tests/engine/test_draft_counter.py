"""What is counted of draft tokens: verifiers with a known acceptance probability, by depth, without forced tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluation.acceptance import depth_counts
from sjd2.decoding.verify import Exact
from sjd2.models.layout import TokenGrid
from tests.helpers.decoders import AR, GRID, LINE, decode, sjd, sjd2
from tests.helpers.toy import Toy, adapted_toy


@dataclass(frozen=True)
class Constant(Exact):
    """Accepts every draft token with the same probability."""

    exact = False
    probability: float

    def accept_prob(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        return torch.full_like(token, self.probability, dtype=p.dtype)


def constant(probability: float, window: int = 4):
    return sjd(window, verifier=Constant(probability), lossless=False)


def test_a_constant_acceptance_probability_is_found_at_every_depth() -> None:
    samples = decode(Toy(TokenGrid(2, 6, 12)), constant(0.6), prompts=["one"] * 200).samples
    tests, accepts = depth_counts(asdict(sample.drafts) for sample in samples)
    assert len(tests) == 3
    assert (np.abs(accepts / tests - 0.6) < 4 * (0.24 / tests) ** 0.5).all()
    assert (tests[1:] <= accepts[:-1]).all()  # a depth is reached where the one before it was accepted


@pytest.mark.parametrize(("probability", "accepts"), [(0.0, 0), (1.0, 1)])
def test_none_and_all(probability: float, accepts: int) -> None:
    sample = decode(Toy(LINE), constant(probability, 3), prompts=["one"]).samples[0]  # 5 tokens, all free
    assert sample.drafts.tests == ([4] if accepts == 0 else [2, 1])  # 1 + 3 + 1: the last pass has one token left
    assert sample.drafts.accepts == [accepts * count for count in sample.drafts.tests]
    assert sample.drafts.accepted == sum(sample.drafts.accepts)
    assert sample.accepted == ([1] * 5 if accepts == 0 else [1, 3, 1])


def test_forced_tokens_are_no_tests() -> None:
    sample = decode(Toy(GRID), constant(1.0, 32), prompts=["one"]).samples[0]  # the whole image in one pass
    assert sum(sample.drafts.tests) == 24
    assert sample.drafts.accepted == 30  # the prefill commits one forced token of 31


@pytest.mark.parametrize("decoder", [sjd(6), sjd2(6, steps=2)], ids=["sjd", "sjd2"])
def test_accepted_drafts_and_the_drawn_token_are_what_a_pass_commits(decoder) -> None:
    for sample in decode(adapted_toy(GRID), decoder).samples:
        drawn = sum(sample.accepted[1:]) - sample.drafts.accepted
        assert 0 <= drawn <= sample.forwards - 1  # none after a noisy input, and none after the image's last token
        assert all(a <= t for a, t in zip(sample.drafts.accepts, sample.drafts.tests, strict=True))


def test_ar_drafts_nothing() -> None:
    assert decode(Toy(LINE), AR, prompts=["one"]).samples[0].drafts is None
