"""Prompt lookup: the enumerated distribution, exactly AR's tokens, no dependence on the batch, and a negative control."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from baselines.lookup import Lookup
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import stream
from sjd2.decoding.interfaces import Draft, State
from sjd2.decoding.noise import Noise
from sjd2.decoding.sampling import CdfSampler, SamplingParams
from sjd2.decoding.verify import Exact
from sjd2.errors import UserError
from sjd2.models.layout import TokenGrid
from tests.helpers.decoders import AR, BLOCK, CUT, FORCED, GRID, GUIDED, PROMPTS, SAMPLING, decode
from tests.helpers.enumeration import is_caught, z_score
from tests.helpers.tiers import by_default
from tests.helpers.toy import Toy


def lookup(window: int, drafter: Lookup | None = None, context: int = 2) -> Decoder:
    drafter = drafter or Lookup(context=context)
    return Decoder(name="lookup", window=window, lossless=True, drafter=drafter, verifier=Exact())


@pytest.mark.parametrize(
    ("decoder", "sampling", "grid"),
    [
        (lookup(3), GUIDED, BLOCK),
        pytest.param(lookup(8, context=1), CUT, BLOCK, marks=pytest.mark.full),
        pytest.param(lookup(4), GUIDED, FORCED, marks=pytest.mark.full),
    ],
    ids=["narrow", "wide cut", "forced"],
)
def test_lookup_has_the_enumerated_distribution(decoder: Decoder, sampling: SamplingParams, grid: TokenGrid) -> None:
    assert abs(z_score(decoder, sampling, grid)) < 5


class Claimed(Lookup):
    """Copies recorded as draws from a uniform distribution, which they are not (rule 1)."""

    def propose(self, carried: Draft, fresh: torch.Tensor, state: State) -> Draft:
        filled = super().propose(carried, fresh, state)
        rows, size = filled.tokens.shape
        vocabulary = state.model.layout.vocabulary
        return replace(filled, probs=torch.full((rows, size - 1, vocabulary), 1 / vocabulary))


def test_a_false_record_is_caught() -> None:
    assert is_caught(lookup(4, Claimed()), GUIDED, BLOCK)


# ---- equalities


@pytest.fixture(scope="module")
def model() -> Toy:
    return Toy(GRID, dtype=torch.float64, width=16)


MANY = [lookup(2), lookup(6, context=1), lookup(40, context=3)]


@pytest.mark.parametrize("decoder", MANY, ids=lambda decoder: str(decoder.window))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_gumbel_matching_returns_exactly_the_tokens_of_ar(model: Toy, decoder: Decoder, temperature: float) -> None:
    sampling = replace(SAMPLING, sampler="gumbel", temperature=temperature)
    expected, got = decode(model, AR, sampling), decode(model, decoder, sampling)
    assert torch.equal(expected.tokens, got.tokens)
    assert sum(s.forwards for s in got.samples) < sum(s.forwards for s in expected.samples)


@pytest.mark.parametrize("decoder", MANY, ids=lambda decoder: str(decoder.window))
@pytest.mark.parametrize("rows", by_default([1, 2], [2]))
def test_lookup_does_not_depend_on_batch_or_refilling(model: Toy, decoder: Decoder, rows: int) -> None:
    expected = decode(model, decoder).samples
    requests = [(prompt, seed + 1) for seed, prompt in enumerate(PROMPTS)]
    for index, sample in stream(model, decoder, requests, rows=rows, sampling=SAMPLING):
        assert (sample.tokens == expected[index].tokens).all()
        assert sample.accepted == expected[index].accepted


# ---- what is copied

WIDE = TokenGrid(3, 4, 9)


def drafted(tokens: list[int], window: int, context: int = 2, grid: TokenGrid = WIDE) -> list[int]:
    """Return what is drafted after committed tokens; whatever lies beyond them is 8."""
    n, noise = len(tokens), Noise(torch.tensor([0]))
    board = torch.tensor([tokens + [8] * (grid.length + window - n)])
    forced = torch.cat([grid.forced(), torch.zeros(window, dtype=torch.long)])
    count = torch.tensor([n])
    state = State(
        tokens=board, committed=count, cached=count - 1, iteration=count, forced=forced, noise=noise,
        sampler=CdfSampler(noise), model=SimpleNamespace(layout=grid), sampling=SamplingParams(), window=window,
        image_start=count, length=grid.length, finite=torch.ones(3, 1, dtype=torch.bool),
    )  # fmt: skip
    fresh = torch.zeros(1, 1, dtype=torch.bool)
    filled = Lookup(context=context).propose(Draft(board[:, n - 1 : n]), fresh, state)
    assert filled.probs is None
    assert filled.tokens[0, 0] == tokens[-1]
    return filled.tokens[0, 1:].tolist()


@pytest.mark.parametrize(
    ("tokens", "context", "expected"),
    [
        ([5], 2, [5, 5, 5]),  # nothing to look up: repeat
        ([5, 6], 2, [6, 6, 6]),  # no match in the first row: copy the left neighbour
        ([1, 2, 3, 4, 5, 6], 2, [3, 4, 5]),  # no match: copy the row above
        ([1, 2, 3, 4, 1, 2], 2, [3, 4, 1]),  # right above
        ([2, 3, 7, 3, 1, 3], 1, [7, 3, 1]),  # both 3 match: the one right above
        ([2, 3, 7, 1, 3, 2, 3], 2, [7, 1, 3]),  # the longer match, though not above
        ([1, 2, 1, 2], 2, [1, 2, 1]),  # a copy that runs into itself continues with its period
        ([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3], 2, [4, 0, 0]),  # beyond the image: forced
    ],
)
def test_what_follows_the_best_match_is_copied(tokens: list[int], context: int, expected: list[int]) -> None:
    assert drafted(tokens, 4, context) == expected


def test_forced_tokens_are_no_draft_tokens_at_free_places() -> None:
    grid = TokenGrid(3, 2, 9, row_end=21)
    # 9 is the row end's local id; the last two tokens match across it, and what follows is shifted by one
    assert drafted([1, 2, 9, 2], 4, 1, grid) == [8, 9, 8]


def test_wrong_settings_name_the_fix() -> None:
    with pytest.raises(UserError, match="context must be 1 or more"):
        Lookup(context=0)
