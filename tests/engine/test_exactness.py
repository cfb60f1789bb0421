"""Every decoder that claims to be lossless against the enumerated law of a toy model, and broken twins that must fail."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from sjd2.decoding.generate import Decoder, generate
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.refine import Coupled, Keep, Resample
from sjd2.decoding.sampling import SamplingParams
from sjd2.decoding.verify import Exact
from sjd2.denoising.denoise import Denoise
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.layout import TokenGrid
from tests.helpers.toy import Toy, chi_square_z, enumerate_law

SAMPLES = 12_000
PROMPT = "a b"
GRID = TokenGrid(1, 5, 3)
# a header, row ends inside the window and a footer: 5 free tokens of 9
FORCED = TokenGrid(2, 2, 3, prefix=(20,), row_end=21, suffix=(22, 23))
GUIDED = SamplingParams(guidance_scale=2.0)
CUT = SamplingParams(temperature=0.7, top_k=2)


def toy(grid: TokenGrid = GRID, code: str = "additive") -> Toy:
    """A toy with a strong random adapter: noisy slots get laws far from the clean ones."""
    model = Toy(grid)
    model.adapter = Adapter(AdapterSettings(rank=2, code=code), model)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.adapter.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    model.adapter.requires_grad_(False)
    return model


def jacobi(window: int, refiner: object, init: str = "random", **more) -> Decoder:
    more = {"lossless": True, "verifier": Exact()} | more
    return Decoder(name="jacobi", window=window, drafter=Jacobi(init=init), refiner=refiner, **more)


def noisy(window: int, refiner: object, rule: str = "exact", lossless: bool = True, refeed: bool = True, **drafter):
    return Decoder(
        name="sjd2", window=window, lossless=lossless, drafter=Denoise(**drafter), verifier=Exact(), refiner=refiner,
        rule=rule, refeed=refeed,
    )  # fmt: skip


def z_score(
    decoder: Decoder, sampling: SamplingParams, grid: TokenGrid = GRID, code: str = "additive", start: int = 0
) -> float:
    """Decode SAMPLES images and compare their frequencies with the enumerated distribution."""
    model = toy(grid, code)
    _, probs = enumerate_law(model, PROMPT, sampling)
    free = model.layout.free
    digits = 3 ** torch.arange(int(free.sum()) - 1, -1, -1)
    tokens = []
    for part in range(0, SAMPLES, 4000):
        seeds = list(range(start + part, start + part + 4000))
        tokens.append(generate(model, decoder, model.encode([PROMPT] * 4000), seeds, sampling=sampling).tokens)
    counts = torch.bincount((torch.cat(tokens)[:, free] * digits).sum(1), minlength=len(probs))
    assert torch.equal(torch.cat(tokens)[0, ~free], model.layout.forced()[~free])
    return chi_square_z(counts, probs)


AR = Decoder(name="ar", window=1, lossless=True)
EXACT = {
    "ar": (AR, GUIDED),
    "ar cut": (AR, CUT),
    "jacobi": (jacobi(3, Resample(record=False)), GUIDED),
    "sjd": (jacobi(3, Resample()), GUIDED),
    "sjd wide": (jacobi(8, Resample()), SamplingParams()),
    "sjd left": (jacobi(4, Resample(), "left"), CUT),
    "sjd up": (jacobi(4, Resample(), "up"), GUIDED),
    "scd": (jacobi(4, Coupled()), GUIDED),
    "scd cut": (jacobi(8, Coupled()), CUT),
    "scd gumbel": (jacobi(4, Coupled(coupling="gumbel")), GUIDED),
    "match": (jacobi(4, Coupled()), replace(GUIDED, sampler="gumbel")),
    "sjd2 age 1": (noisy(4, Resample(), steps=1), GUIDED),
    "sjd2 age 2 coupled": (noisy(5, Coupled(), steps=2), CUT),
    "sjd2 slot": (noisy(5, Coupled(), steps=3, levels="slot", clean=1), GUIDED),
    "sjd2 slot gumbel": (noisy(5, Coupled(coupling="gumbel"), steps=2, levels="slot", clean=2), GUIDED),
    "sjd2 early": (noisy(5, Coupled(), steps=2, levels="slot", clean=1, early=0.5), GUIDED),
}


@pytest.mark.parametrize("name", EXACT)
def test_lossless_decoders_have_the_enumerated_law(name: str) -> None:
    decoder, law = EXACT[name]
    assert decoder.lossless
    assert abs(z_score(decoder, law)) < 5


@pytest.mark.parametrize("decoder", [jacobi(4, Coupled()), noisy(4, Coupled(), steps=2)], ids=["scd", "sjd2"])
def test_forced_tokens_do_not_change_the_law(decoder: Decoder) -> None:
    assert abs(z_score(decoder, GUIDED, FORCED)) < 5


def test_appended_timestep_tokens_do_not_change_the_law() -> None:
    assert abs(z_score(noisy(4, Coupled(), steps=2), GUIDED, code="appended")) < 5


class StaleRecord(Coupled):
    """A kept token keeps the law it had (rule 1): what SCD's released code does."""

    def __call__(self, draft, law, chance, keep, state):
        new = super().__call__(draft, law, chance, keep, state)
        return replace(new, probs=torch.where(keep[..., None], draft.probs, new.probs))


class NoResidual(Exact):
    """A rejected slot draws from the target instead of the residual (rule 2)."""

    def rest(self, p, q, token):
        return p


class MaskedCoupling(Coupled):
    """Coupling told that everything behind the first rejection was rejected (a bug of a prototype)."""

    def __call__(self, draft, law, chance, keep, state):
        return super().__call__(draft, law, chance, keep.cumprod(1).bool(), state)


@dataclass(frozen=True, kw_only=True)
class SharedNoise(Resample):
    """All positions draw their drafts with the number of position 0 (rule 3)."""

    def __call__(self, draft, law, chance, keep, state):
        kept = state.noise
        state.noise = _OnePosition(kept)
        new = super().__call__(draft, law, chance, keep, state)
        state.noise = kept
        return new


class _OnePosition:
    def __init__(self, noise):
        self.noise = noise

    def uniform(self, positions, purpose, iteration=0, lane=None):
        return self.noise.uniform(torch.zeros_like(positions), purpose, 0)


BROKEN = {
    "stale record": (jacobi(4, StaleRecord()), GUIDED),
    "no residual": (jacobi(4, Resample(), verifier=NoResidual()), GUIDED),
    "masked coupling": (jacobi(5, MaskedCoupling()), GUIDED),
    "shared noise": (jacobi(4, SharedNoise()), GUIDED),
    "keep": (noisy(5, Keep(), lossless=False, steps=1), GUIDED),
    "reach of all slots": (noisy(5, Resample(), "paper", False, steps=2), GUIDED),
    "paper": (noisy(5, Keep(), "paper", False, steps=2, nearest=True), GUIDED),
    "paper without refeeding": (noisy(5, Keep(), "paper", False, False, steps=2, nearest=True), GUIDED),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_twins_are_caught(name: str) -> None:
    decoder, law = BROKEN[name]
    assert abs(z_score(decoder, law)) > 5


def test_other_seeds_have_the_law_too() -> None:
    assert abs(z_score(jacobi(4, Coupled()), GUIDED, start=10**6)) < 5
