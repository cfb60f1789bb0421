"""ZipAR against a slow reference that follows its description sample by sample, and against AR where it is AR."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from baselines.zipar import ZipAR
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import generate, stream
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError
from sjd2.models.layout import TokenGrid
from tests.helpers.tiers import by_default
from tests.helpers.toy import Toy, chi_square_z, enumerate_probs
from tests.helpers.zipar_book import PROMPT, Book, counts

PROMPTS = ["one", "two words", "three short words", "four", "five is more"]
AR = Decoder(name="ar", window=1, lossless=True)
SAMPLING = SamplingParams(guidance_scale=2.0, top_k=7)
PLAIN = TokenGrid(4, 6, 12)
FORCED = TokenGrid(4, 6, 12, prefix=(20, 21), row_end=22, suffix=(23,))  # N = 31, 24 free


def zipar(window_size: int, adaptive: bool = True) -> ZipAR:
    return ZipAR(name="zipar", lossless=False, window_size=window_size, adaptive=adaptive)


def decode(
    model: Toy, decoder: ZipAR | Decoder, sampling: SamplingParams = SAMPLING, prompts: list[str] = PROMPTS, seeds=None
):
    return generate(model, decoder, model.encode(prompts), seeds or list(range(1, len(prompts) + 1)), sampling=sampling)


@pytest.fixture(scope="module", params=[PLAIN, FORCED], ids=["plain", "forced"])
def model(request: pytest.FixtureRequest) -> Toy:
    return Toy(request.param, dtype=torch.float64)


# ---- equalities


@pytest.mark.parametrize("sampler", ["cdf", "gumbel"])
def test_a_window_of_a_whole_row_is_ar(model: Toy, sampler: str) -> None:
    sampling = replace(SAMPLING, sampler=sampler)
    expected = decode(model, AR, sampling).tokens
    # under gumbel a first token that is tested against the complete row is AR's too, under cdf it is so in distribution
    for decoder in (zipar(6), zipar(6, False), zipar(99), *([zipar(5)] if sampler == "gumbel" else [])):
        got = decode(model, decoder, sampling)
        assert torch.equal(got.tokens, expected)
        # forced tokens cost no pass of their own
        assert all(sample.forwards == model.layout.free.sum() for sample in got.samples)


@pytest.mark.parametrize("sampler", ["cdf", "gumbel"])
@pytest.mark.parametrize("decoder", [zipar(1), zipar(3), zipar(2, False)])
def test_tokens_do_not_depend_on_the_batch_or_on_refilling(model: Toy, decoder: ZipAR, sampler: str) -> None:
    sampling = replace(SAMPLING, sampler=sampler)
    together = decode(model, decoder, sampling).samples
    alone = [decode(model, decoder, sampling, [prompt], [row + 1]).samples[0] for row, prompt in enumerate(PROMPTS)]
    requests = [(prompt, seed + 1) for seed, prompt in enumerate(PROMPTS)]
    for rows in (1, 3):
        refilled = dict(stream(model, decoder, requests, rows=rows, sampling=sampling))
        for row, sample in enumerate(together):
            for other in (alone[row], refilled[row]):
                assert (other.tokens == sample.tokens).all()
                assert other.accepted == sample.accepted


@pytest.mark.parametrize("window_size", [1, 4])
def test_passes_of_the_fixed_window(model: Toy, window_size: int) -> None:
    grid = model.layout
    for sample in decode(model, zipar(window_size, adaptive=False)).samples:
        assert sample.forwards == len(sample.accepted) == grid.columns + (grid.rows - 1) * window_size


def test_invariants(model: Toy) -> None:
    grid, forced = model.layout, model.layout.forced().numpy()
    for decoder in (zipar(1), zipar(2), zipar(1, False), zipar(4, False)):
        for sample in decode(model, decoder).samples:
            assert sum(sample.accepted) == grid.length
            assert len(sample.accepted) == sample.forwards
            assert min(sample.accepted) >= 1
            assert sample.accepted[0] == len(grid.prefix) + 1
            assert grid.columns + (grid.rows - 1) * decoder.window_size <= sample.forwards <= grid.free.sum()
            assert (sample.tokens[forced >= 0] == forced[forced >= 0]).all()
            assert (sample.tokens[forced < 0] < grid.vocabulary).all()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match="window_size must be 1 or more"):
        zipar(0)
    with pytest.raises(UserError, match="lossless=false"):
        ZipAR(name="zipar", lossless=True, window_size=4)


# ---- the distribution


SMALL = TokenGrid(3, 3, 2)
WIDE = TokenGrid(2, 4, 2)
ENDED = TokenGrid(2, 4, 2, prefix=(20, 21), row_end=22, suffix=(23,))
GUIDED = SamplingParams(guidance_scale=2.0)
CASES = {
    "fixed": (SMALL, 1, False, GUIDED),
    "adaptive": (SMALL, 1, True, GUIDED),
    "adaptive wide": (WIDE, 1, True, SamplingParams(temperature=0.8)),
    "fixed 2": (WIDE, 2, False, GUIDED),
    "row ends, fixed": (ENDED, 1, False, GUIDED),
    "row ends, adaptive": (ENDED, 1, True, GUIDED),
}


def by_the_book(model: Toy, sampling: SamplingParams, window_size: int, adaptive: bool) -> torch.Tensor:
    book = Book(model, sampling, window_size, adaptive).run(PROMPT)
    codes = itertools.product(range(model.layout.vocabulary), repeat=int(model.layout.free.sum()))
    return torch.tensor([book.get(code, 0.0) for code in codes], dtype=torch.float64)


@pytest.mark.parametrize("name", by_default(CASES, ["fixed", "adaptive", "row ends, adaptive"]))
def test_the_distribution_is_that_of_the_description_and_not_ar(name: str) -> None:
    grid, window_size, adaptive, sampling = CASES[name]
    model = Toy(grid)
    expected = by_the_book(model, sampling, window_size, adaptive)
    assert float(expected.sum()) == pytest.approx(1, abs=1e-5)
    found = counts(model, zipar(window_size, adaptive), sampling)
    assert abs(chi_square_z(found, expected)) < 5
    assert abs(chi_square_z(found, enumerate_probs(model, PROMPT, sampling)[1])) > 5  # negative control: AR
    other = by_the_book(model, sampling, window_size, not adaptive)
    assert abs(chi_square_z(found, other)) > 5  # negative control: the other window


def test_the_book_of_a_whole_row_is_ar() -> None:
    model = Toy(ENDED)
    expected = enumerate_probs(model, PROMPT, GUIDED)[1]
    for window_size, adaptive in ((4, True), (4, False), (3, True)):
        assert torch.allclose(by_the_book(model, GUIDED, window_size, adaptive), expected, atol=1e-5)


def test_a_test_against_the_whole_row_has_the_distribution_of_ar() -> None:
    model = Toy(SMALL)
    assert abs(chi_square_z(counts(model, zipar(2), GUIDED), enumerate_probs(model, PROMPT, GUIDED)[1])) < 5
