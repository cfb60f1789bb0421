"""Lossless decoders against the enumerated distribution of a toy model, and negative controls that must fail."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from sjd2.decoding.decoder import Decoder
from sjd2.decoding.refine import Coupled, Keep, Resample
from sjd2.decoding.sampling import CdfSampler, SamplingParams
from sjd2.decoding.verify import Exact
from tests.helpers.decoders import AR, CUT, FORCED, GUIDED, jacobi, sjd, sjd2
from tests.helpers.enumeration import is_caught, z_score
from tests.helpers.tiers import by_default

EXACT = {
    "ar": (AR, GUIDED),
    "ar cut": (AR, CUT),
    "jacobi": (jacobi(3), GUIDED),
    "sjd": (sjd(3), GUIDED),
    "sjd wide": (sjd(8), SamplingParams()),
    "sjd left": (sjd(4, init="left"), CUT),
    "sjd up": (sjd(4, init="up"), GUIDED),
    "scd": (sjd(4, Coupled()), GUIDED),
    "scd cut": (sjd(8, Coupled()), CUT),
    "scd gumbel": (sjd(4, Coupled(coupling="gumbel")), GUIDED),
    "scd min-p": (sjd(8, Coupled()), SamplingParams(temperature=0.7, min_p=0.4)),
    "match": (sjd(4, Coupled()), replace(GUIDED, sampler="gumbel")),
    "sjd2 age 1": (sjd2(4, Resample(), steps=1), GUIDED),
    "sjd2 age 2 coupled": (sjd2(5, Coupled(), steps=2), CUT),
    "sjd2 slot": (sjd2(5, Coupled(), steps=3, levels="slot", clean=1), GUIDED),
    "sjd2 slot gumbel": (sjd2(5, Coupled(coupling="gumbel"), steps=2, levels="slot", clean=2), GUIDED),
    "sjd2 early": (sjd2(5, Coupled(), steps=2, levels="slot", clean=1, early=0.5), GUIDED),
}


# one case of each decoder by default; every setting in the tier `full`
DEFAULT = ("ar", "jacobi", "sjd", "scd", "match", "sjd2 age 2 coupled", "sjd2 slot")


@pytest.mark.parametrize("name", by_default(EXACT, DEFAULT))
def test_lossless_decoders_have_the_enumerated_distribution(name: str) -> None:
    decoder, sampling = EXACT[name]
    assert decoder.lossless
    assert abs(z_score(decoder, sampling)) < 5


@pytest.mark.parametrize(
    "decoder",
    [pytest.param(sjd(4, Coupled()), marks=pytest.mark.full), sjd2(4, Coupled(), steps=2)],
    ids=["scd", "sjd2"],
)
def test_forced_tokens_do_not_change_the_distribution(decoder: Decoder) -> None:
    assert abs(z_score(decoder, GUIDED, FORCED)) < 5


@pytest.mark.full
def test_appended_timestep_tokens_do_not_change_the_distribution() -> None:
    assert abs(z_score(sjd2(4, Coupled(), steps=2), GUIDED, code="appended")) < 5


class StaleRecord(Coupled):
    """A kept token keeps the distribution it had (rule 1): what SCD's released code does."""

    def __call__(self, draft, test, state):
        new = super().__call__(draft, test, state)
        return replace(new, probs=torch.where(test.accepted[..., None], draft.probs, new.probs))


class NoResidual(Exact):
    """A rejected slot draws from the target instead of the residual (rule 2)."""

    def residual(self, p, q, token):
        return p


class MaskedCoupling(Coupled):
    """Coupling that takes everything after the first rejection for rejected (a bug of a prototype)."""

    def __call__(self, draft, test, state):
        return super().__call__(draft, replace(test, accepted=test.accepted.cumprod(1).bool()), state)


@dataclass(frozen=True, kw_only=True)
class SharedNoise(Resample):
    """All positions draw their drafts with the number of position 0 (rule 3)."""

    def __call__(self, draft, test, state):
        return super().__call__(draft, test, replace(state, sampler=CdfSampler(_OnePosition(state.noise))))


class _OnePosition:
    def __init__(self, noise):
        self.noise = noise

    def uniform(self, positions, purpose, iteration=0, sibling=None):
        return self.noise.uniform(torch.zeros_like(positions), purpose, 0)


BROKEN = {
    "stale record": (sjd(4, StaleRecord()), GUIDED),
    "no residual": (sjd(4, verifier=NoResidual()), GUIDED),
    "masked coupling": (sjd(5, MaskedCoupling()), GUIDED),
    "shared noise": (sjd(4, SharedNoise()), GUIDED),
    "keep": (sjd2(5, Keep(threshold=0.2), lossless=False, steps=1), GUIDED),
    "reach of all slots": (sjd2(5, Resample(), rule="paper", lossless=False, steps=2), GUIDED),
    "paper": (sjd2(5, Keep(), rule="paper", lossless=False, steps=2, nearest=True), GUIDED),
    "paper without refeeding": (
        sjd2(5, Keep(), rule="paper", lossless=False, refeed=False, steps=2, nearest=True),
        GUIDED,
    ),
}


@pytest.mark.parametrize("name", by_default(BROKEN, set(BROKEN) - {"reach of all slots", "paper without refeeding"}))
def test_negative_controls_are_caught(name: str) -> None:
    decoder, sampling = BROKEN[name]
    assert is_caught(decoder, sampling)


@pytest.mark.full
def test_other_seeds_have_the_distribution_too() -> None:
    assert abs(z_score(sjd(4, Coupled()), GUIDED, start=10**6)) < 5
