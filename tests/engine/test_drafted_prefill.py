"""draft_in_prefill: the prefill is a pass of the window. Tokens of AR, the enumerated distribution, and one pass less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from baselines.pathspec import JacobiPaths
from sjd2.decoding import drafted_prefill
from sjd2.decoding.block import Block
from sjd2.decoding.cuda_graph import Graphs
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import generate, stream
from sjd2.decoding.refine import Coupled, Keep
from sjd2.decoding.verify import Exact
from sjd2.denoising.denoise import Denoise
from sjd2.errors import UserError
from sjd2.models.base import Condition
from tests.helpers import tape
from tests.helpers.bounded_spans import as_on_a_gpu
from tests.helpers.decoders import (
    AR,
    CUT,
    FORCED,
    GRID,
    GUIDED,
    KINDS,
    LINE,
    PROMPTS,
    SAMPLING,
    decode,
    eagle,
    front,
    jacobi,
    sjd,
    sjd2,
)
from tests.helpers.enumeration import is_caught, strong_toy, z_score
from tests.helpers.tiers import by_default
from tests.helpers.toy import Toy, adapted_toy

Build = Callable[[dict[str, str]], Decoder]
BUILDS: dict[str, Build] = {
    "sjd": lambda nets: sjd(6),
    "jacobi": lambda nets: jacobi(6),
    "scd left": lambda nets: sjd(8, Coupled(), init="left"),
    "scd up": lambda nets: sjd(40, Coupled(), init="up"),
    "gumbel": lambda nets: sjd(8, Coupled(coupling="gumbel")),
    "block": lambda nets: sjd(7, Coupled(), verifier=Block()),
    "sjd2": lambda nets: sjd2(9, steps=2),
    "sjd2 slot": lambda nets: sjd2(9, steps=2, levels="slot", clean=3),
    "front": KINDS["front"],
    "front on noise": lambda nets: front(20, nets, Denoise(steps=2), siblings=(2, 1), copies=3, corrected=2, rest=True),
    "k-ary": lambda nets: front(24, nets, siblings=(1,), copies=1, full=True),
}


def early(decoder: Decoder) -> Decoder:
    return replace(decoder, draft_in_prefill=True)


@pytest.fixture(scope="module")
def model() -> Toy:
    return adapted_toy(GRID)


@pytest.mark.parametrize("name", BUILDS)
def test_the_tokens_are_those_of_ar_in_fewer_passes(model: Toy, name: str, nets: dict[str, str]) -> None:
    decoder, sampling = BUILDS[name](nets), replace(SAMPLING, sampler="gumbel")
    usual, got = decode(model, decoder, sampling), decode(model, early(decoder), sampling)
    assert torch.equal(decode(model, AR, sampling).tokens, got.tokens)
    assert sum(s.forwards for s in got.samples) < sum(s.forwards for s in usual.samples)
    assert all(sum(s.accepted) == GRID.length and len(s.accepted) == s.forwards for s in got.samples)
    # two forced tokens come first: both are draft tokens of the prefill, which draws the third token too
    assert all(s.accepted[0] >= 3 for s in got.samples)
    assert all(s.accepted[0] == 1 for s in usual.samples)


@pytest.mark.parametrize("name", ["scd left", "front on noise"])
def test_rows_are_independent_and_replayed_passes_are_equal(
    model: Toy, name: str, nets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sjd2.decoding.cuda_graph.PROMPT", 1)
    decoder = early(BUILDS[name](nets))
    together = decode(model, decoder)
    for i in (0, 2):
        alone = decode(model, decoder, prompts=[PROMPTS[i]], seeds=[i + 1])
        assert torch.equal(alone.tokens, together.tokens[i : i + 1])
        assert alone.samples[0].accepted == together.samples[i].accepted
    requests = [(prompt, i + 1) for i, prompt in enumerate(PROMPTS)]
    refilled = dict(stream(model, decoder, requests, rows=2, sampling=SAMPLING))
    for i, sample in enumerate(together.samples):
        assert (refilled[i].tokens == sample.tokens).all()
        assert refilled[i].accepted == sample.accepted
        assert refilled[i].drafts == sample.drafts
    graphs = Graphs(tape.record)
    with as_on_a_gpu():
        for rows in (slice(2, 4), slice(0, 2)):  # the second prefill is a replay of the first one, for shorter prompts
            seeds = list(range(1, 6))[rows]
            replayed = generate(model, decoder, model.encode(PROMPTS[rows]), seeds, sampling=SAMPLING, graphs=graphs)
            assert torch.equal(replayed.tokens, together.tokens[rows])
        assert graphs.kept is not None
        assert set(graphs.kept.prefills) == {4}  # both guidance branches at once


def test_appended_timestep_tokens_and_the_rule_of_the_paper() -> None:
    """Noise levels that come as tokens; and rule=paper, whose prefill may commit tokens that wait for a clean pass."""
    model = strong_toy(GRID, code="appended")
    exact = sjd2(9, steps=2)
    sampling = replace(SAMPLING, sampler="gumbel")
    assert torch.equal(decode(model, AR, sampling).tokens, decode(model, early(exact), sampling).tokens)
    paper = Decoder(
        name="sjd2", window=9, lossless=False, drafter=Denoise(steps=2, nearest=True), verifier=Exact(), refiner=Keep(),
        rule="paper", draft_in_prefill=True,
    )  # fmt: skip
    together = decode(model, paper)
    for i, prompt in enumerate(PROMPTS):
        assert torch.equal(decode(model, paper, prompts=[prompt], seeds=[i + 1]).tokens, together.tokens[i : i + 1])
    assert torch.equal(together.tokens[:, ~GRID.free], GRID.forced()[~GRID.free].expand(len(PROMPTS), -1))


def test_an_empty_unconditional_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Legal where the first image token is forced: the branch then begins with that token."""
    model, encode = adapted_toy(GRID), Toy.encode

    def without(self: Toy, prompts: list[str]) -> Condition:
        return replace(encode(self, prompts), uncond_lengths=torch.tensor([0]))

    monkeypatch.setattr(Toy, "encode", without)
    sampling = replace(SAMPLING, sampler="gumbel")
    assert torch.equal(decode(model, AR, sampling).tokens, decode(model, early(sjd(6)), sampling).tokens)


SMALL: dict[str, Build] = {
    "sjd": lambda nets: sjd(4),
    "scd": lambda nets: sjd(8, Coupled()),
    "block": lambda nets: sjd(5, Coupled(), verifier=Block()),
    "sjd2": lambda nets: sjd2(5, steps=2),
    "front": lambda nets: front(9, nets, siblings=(2, 1), copies=2, corrected=2, rest=True),
}
CASES = [f"{name}, {grid}" for name in SMALL for grid in ("line", "forced")]
DEFAULT = ("scd, line", "sjd2, line", "front, forced")


@pytest.mark.parametrize("case", by_default(CASES, DEFAULT, slow=set(CASES) - set(DEFAULT)))
def test_the_distribution_is_the_enumerated_one(case: str, nets: dict[str, str]) -> None:
    name, grid = case.split(", ")
    decoder = early(SMALL[name](nets))
    assert abs(z_score(decoder, CUT if name == "scd" else GUIDED, {"line": LINE, "forced": FORCED}[grid])) < 5


def test_a_prompt_that_sees_its_draft_tokens_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: slot 0's output computed with a draft token in its place."""
    gather = drafted_prefill.gather_slots
    monkeypatch.setattr(drafted_prefill, "gather_slots", lambda x, slots: gather(x, slots + (slots == slots[:, :1])))
    assert is_caught(early(sjd(4)), GUIDED)


def test_draft_tokens_recorded_with_another_distribution_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the first draft tokens are drawn from few codes and recorded as if from all."""
    monkeypatch.setattr("sjd2.decoding.noise.Noise.codes", lambda self, positions, size, sibling=None: positions * 0)
    assert is_caught(early(sjd(4)), GUIDED)


def test_decoders_without_a_lasting_chain_are_refused(nets: dict[str, str]) -> None:
    builds = (
        lambda: eagle(5, nets, shape="chain", verifier=Exact()),
        lambda: Decoder(name="pathspec", window=13, lossless=True, drafter=JacobiPaths(paths=3), verifier=Exact(),
                        refiner=Coupled()),
        lambda: AR,
    )  # fmt: skip
    for build in builds:
        with pytest.raises(UserError, match="draft_in_prefill needs one chain"):
            early(build())
