"""draft_in_prefill: the prefill is a pass of the window. Tokens of AR, the enumerated distribution, and one pass less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from baselines.pathspec import JacobiPaths
from sjd2.decoding import drafted_prefill, pass_cost
from sjd2.decoding.block import Block
from sjd2.decoding.cuda_graph import Graphs
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.dispatch import start_engine
from sjd2.decoding.generate import generate, stream
from sjd2.decoding.interfaces import Draft, State
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.refine import Coupled, Keep
from sjd2.decoding.shapes import Tree
from sjd2.decoding.verify import Exact
from sjd2.decoding.window import WindowEngine
from sjd2.denoising.denoise import Denoise
from sjd2.errors import UserError
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.base import Condition
from sjd2.models.timesteps import Timesteps
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
        refilled = dict(stream(model, decoder, requests, rows=4, sampling=SAMPLING, graphs=graphs))
        assert all((refilled[i].tokens == sample.tokens).all() for i, sample in enumerate(together.samples))
        assert graphs.kept is not None
        assert set(graphs.kept.prefills) == {2, 8}  # the branches of one row, and of all
        graphs.release()
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


class Far(Toy):
    """Image tokens have position ids of their own, as those of LlamaGen and GLM-Image."""

    def image_start(self, lengths: Tensor) -> Tensor:
        return torch.full_like(lengths, 20)


@pytest.mark.parametrize("kind", [Toy, Far])
@pytest.mark.parametrize("code", ["additive", "appended"])
@torch.inference_mode()
def test_draft_tokens_see_what_a_pass_after_the_prompt_would_show_them(
    kind: type[Toy], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states of the whole window, whose inputs, places and noise decide no token but what comes of the drafts."""
    model = kind(GRID, dtype=torch.float64)
    model.adapter = Adapter(AdapterSettings(rank=2, code=code), model)
    for parameter in model.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.adapter.freeze()
    settled: list[tuple] = []
    settle = WindowEngine.settle
    monkeypatch.setattr(WindowEngine, "settle", lambda *args: settled.append(args) or settle(*args))
    decoder = early(sjd2(9, steps=2))
    engine = start_engine(model, decoder, len(PROMPTS), 4, SAMPLING)
    condition = model.encode(PROMPTS)
    engine.admit(list(range(len(PROMPTS))), condition, list(range(len(PROMPTS))))
    assert (engine.cache.lengths <= engine.cache.bound).all()
    ((newcomers, draft, hidden, _),) = settled
    for row, prompt in enumerate([*condition.embeds, *condition.uncond_embeds.expand(len(PROMPTS), -1, -1)]):
        lengths = torch.cat([condition.lengths, condition.uncond_lengths.expand(len(PROMPTS))])[row : row + 1]
        own, start, count = row % len(PROMPTS), model.image_start(lengths), int(lengths)
        cache = model.cache(1, 64)
        if count > 1:
            model.forward(prompt[None, : count - 1], torch.arange(count - 1)[None], cache)
        cache.lengths = lengths - 1
        x = torch.cat([prompt[None, count - 1 : count], draft.embeds[own : own + 1, 1:]], 1)
        positions = torch.cat([lengths[:, None] - 1, start[:, None] + torch.arange(8)], 1)
        level = draft.level[own : own + 1]
        tokens = newcomers.drafter.timesteps
        timesteps = None if tokens is None else Timesteps(tokens, level, start)
        expected = model.forward(x, positions, cache, None, level > 0, timesteps)
        torch.testing.assert_close(hidden[row], expected[0], rtol=0, atol=1e-9)


def test_what_is_not_finite_in_the_prefill_alone_is_reported(model: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, calls = model.logits, []

    def broken_once(hidden: Tensor) -> Tensor:
        calls.append(len(calls))
        return logits(hidden) * (torch.nan if len(calls) == 1 else 1.0)

    monkeypatch.setattr(model, "logits", broken_once)
    with pytest.raises(UserError, match="the model's distribution is not finite"):
        decode(model, early(sjd(6)))


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
    assert early(replace(sjd(6), window=1)).num_carried == 1  # plain AR, which has no window


class Branches(Jacobi):
    """A drafter of trees that says nothing of a first chain."""

    def propose(self, carried: Draft, fresh: Tensor, state: State) -> Draft:
        tree = Tree.static([0, 0, 0], chain=2, device=torch.device("cpu"))
        return replace(super().propose(carried, fresh, state), shape=tree)


def test_a_tree_after_the_prompt_is_refused(model: Toy) -> None:
    decoder = Decoder(name="x", window=3, lossless=True, drafter=Branches(), verifier=Exact(), refiner=Coupled())
    with pytest.raises(UserError, match="Branches must return a chain of all carried slots from propose_first"):
        decode(model, early(decoder))


def test_passes_are_timed_after_the_prompts_alone(model: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the prefill has committed is no part of the prompts."""
    stand_at, seen = pass_cost.stand_at, []
    monkeypatch.setattr(
        pass_cost, "stand_at", lambda engine, place, prompts: seen.append(prompts) or stand_at(engine, place, prompts)
    )
    condition = model.encode(PROMPTS)
    assert pass_cost.pass_seconds(model, early(sjd(8, Coupled())), condition, sampling=SAMPLING, passes=1) > 0
    expected = torch.cat([condition.lengths, condition.uncond_lengths.expand(len(PROMPTS))])
    assert all(torch.equal(prompts, expected) for prompts in seen)
