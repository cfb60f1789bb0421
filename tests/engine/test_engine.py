"""Token-for-token equalities in float64, invariances, and the invariants of the engine."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch

from sjd2.decoding.decoder import Decoder
from sjd2.decoding.dispatch import start_engine
from sjd2.decoding.generate import stream
from sjd2.decoding.likelihood import nll
from sjd2.decoding.noise import Noise, Purpose
from sjd2.decoding.refine import Coupled, Resample
from sjd2.decoding.sampling import SamplingParams, draw
from sjd2.denoising.embedding_space import EmbeddingSpace
from sjd2.denoising.schedule import Schedule, alpha_sigma
from sjd2.errors import UserError
from sjd2.models.adapter import AdapterSettings
from sjd2.models.kv_cache import RowCache
from sjd2.models.layout import TokenGrid
from tests.helpers.decoders import AR, GRID, GUIDED, PROMPTS, SAMPLING, decode, sjd, sjd2
from tests.helpers.tiers import by_default
from tests.helpers.toy import Toy, adapted_toy


@pytest.fixture(scope="module")
def model() -> Toy:
    return adapted_toy(GRID)


DECODERS = [
    sjd(), sjd(3, init="left"), sjd(40, init="up"), sjd(8, Coupled()), sjd(8, Coupled(coupling="gumbel")),
    sjd2(steps=1), sjd2(9, steps=3), sjd2(9, steps=2, levels="slot", clean=3),
]  # fmt: skip


@pytest.mark.parametrize("decoder", DECODERS)
def test_gumbel_matching_returns_exactly_the_tokens_of_ar(model: Toy, decoder: Decoder) -> None:
    sampling = replace(SAMPLING, sampler="gumbel")
    expected, got = decode(model, AR, sampling), decode(model, decoder, sampling)
    assert torch.equal(expected.tokens, got.tokens)
    assert sum(s.forwards for s in got.samples) < sum(s.forwards for s in expected.samples)


@pytest.mark.parametrize("init", ["random", "left", "up"])
def test_greedy_jacobi_is_greedy_ar(model: Toy, init: str) -> None:
    sampling = replace(SAMPLING, temperature=0.0)
    jacobi = sjd(7, Resample(record=False), init)
    assert torch.equal(decode(model, AR, sampling).tokens, decode(model, jacobi, sampling).tokens)


@pytest.mark.parametrize("refiner", [Resample(), Coupled()])
def test_a_window_of_one_is_ar(model: Toy, refiner: object) -> None:
    assert torch.equal(decode(model, AR).tokens, decode(model, sjd(1, refiner)).tokens)


@pytest.mark.parametrize("decoder", [AR, *DECODERS])
def test_tokens_do_not_depend_on_the_batch(model: Toy, decoder: Decoder) -> None:
    together = decode(model, decoder)
    for row in range(len(PROMPTS)):
        alone = decode(model, decoder, prompts=[PROMPTS[row]], seeds=[row + 1]).samples[0]
        assert (alone.tokens == together.samples[row].tokens).all()
        assert alone.accepted == together.samples[row].accepted


@pytest.mark.parametrize("decoder", [AR, sjd(6, Resample(record=False)), sjd(5, init="up"), *DECODERS[3:]])
@pytest.mark.parametrize("rows", by_default([1, 2, 4], [2]))
@pytest.mark.parametrize("sampler", ["cdf", "gumbel"])
def test_refilled_rows_give_the_same_images(model: Toy, decoder: Decoder, rows: int, sampler: str) -> None:
    sampling = replace(SAMPLING, sampler=sampler)
    expected = decode(model, decoder, sampling).samples
    requests = [(prompt, seed + 1) for seed, prompt in enumerate(PROMPTS)]
    got = dict(stream(model, decoder, requests, rows=rows, sampling=sampling))
    assert sorted(got) == list(range(len(PROMPTS)))
    for index, sample in got.items():
        assert (sample.tokens == expected[index].tokens).all()
        assert sample.accepted == expected[index].accepted


@pytest.mark.parametrize("decoder", [AR, *DECODERS])
def test_invariants(model: Toy, decoder: Decoder) -> None:
    forced = GRID.forced().numpy()
    for sample in decode(model, decoder).samples:
        assert sum(sample.accepted) == GRID.length
        assert len(sample.accepted) == sample.forwards
        assert min(sample.accepted) >= 1
        assert max(sample.accepted) <= decoder.window
        assert (sample.tokens[forced >= 0] == forced[forced >= 0]).all()
        assert sample.tokens[forced < 0].min() >= 0
        assert sample.tokens[forced < 0].max() < GRID.vocabulary
    if decoder is AR:
        assert all(sample.forwards == GRID.length for sample in decode(model, decoder).samples)


def test_one_decoder_serves_two_models() -> None:
    models = [adapted_toy(GRID), adapted_toy(TokenGrid(3, 5, 9))]
    shared = sjd2(6, steps=1)
    assert {shared: 1}[sjd2(6, steps=1)] == 1  # settings are hashable and equal where they say the same
    engines = [start_engine(model, shared, 1, 4, GUIDED) for model in models]
    for model, engine in zip(models, engines, strict=True):
        engine.admit([0], model.encode(["two words"]), [7])
    while not all(engine.finished() for engine in engines):  # in turns, pass by pass
        for engine in engines:
            engine.step()
    for model, engine in zip(models, engines, strict=True):
        alone = decode(model, sjd2(6, steps=1), GUIDED, ["two words"], [7]).samples[0]
        assert (engine.collect(0).tokens == alone.tokens).all()
    assert pickle.dumps(shared) == pickle.dumps(sjd2(6, steps=1))  # no model is copied with a decoder that has run


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_levels_by_age_bound_the_compression(model: Toy, steps: int) -> None:
    # a slot must have been in `steps` passes before it is clean, so at most W / (K + 1) tokens a pass (docs/exactness.md)
    window = 12
    for sample in decode(model, sjd2(window, steps=steps)).samples:
        assert GRID.length / sample.forwards <= window / (steps + 1) + 1


def test_clean_slots_are_bit_identical_to_the_untuned_model(model: Toy) -> None:
    x = model.embed(torch.randint(0, 12, (2, 8)))
    positions = torch.arange(8).expand(2, -1)
    gate = torch.zeros(2, 8, dtype=torch.bool)
    gate[:, 5:] = True
    tuned = model.forward(x, positions, None, None, gate)
    plain = model.forward(x, positions, None)
    assert torch.equal(tuned[:, :5], plain[:, :5])
    assert not torch.allclose(tuned[:, 5:], plain[:, 5:])


def test_window_passes_equal_single_passes_after_roll_back(model: Toy) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 12, (3, 14))
    x, lengths = model.embed(tokens), torch.tensor([3, 5, 1])
    whole = model.forward(x, torch.arange(14).expand(3, -1), None)
    cache = RowCache(2, 3, 40, torch.device("cpu"))
    model.forward(x[:, :5], torch.arange(5).expand(3, -1), cache)  # right-padded prompts: the padding is overwritten
    cache.lengths = lengths.clone()
    garbage = torch.randn(3, 6, 16, dtype=torch.float64) * 50
    for width in (4, 1, 3):
        positions = cache.lengths[:, None] + torch.arange(6)
        model.forward(garbage, positions, cache)  # a rejected window: its entries lie beyond the lengths
        rows = cache.lengths[:, None] + torch.arange(width)
        picked = x.gather(1, rows[..., None].expand(-1, -1, 16))
        out = model.forward(picked, rows, cache)
        assert torch.allclose(out, whole.gather(1, rows[..., None].expand(-1, -1, 16)), atol=1e-6)
        cache.lengths = cache.lengths + width


def test_both_branches_in_one_batch_equal_two_passes(model: Toy) -> None:
    condition = model.encode(["two words"])
    tokens = decode(model, AR, prompts=["two words"], seeds=[5]).tokens
    guided = nll(model, condition, tokens, SamplingParams(guidance_scale=2.0))
    x = model.embed(tokens)[:, :-1]
    logits = []
    for embeds in (condition.embeds, condition.uncond_embeds):
        full = torch.cat([embeds, x], 1)
        hidden = model.forward(full, torch.arange(full.shape[1])[None], None)
        logits.append(model.logits(hidden[:, embeds.shape[1] - 1 :]))
    log_p = (logits[1] + 2.0 * (logits[0] - logits[1])).log_softmax(-1)
    free = GRID.free
    expected = -log_p[0, free].gather(-1, tokens[0, free, None]).sum()
    assert torch.allclose(guided[0], expected, atol=1e-9)


def test_likelihoods_do_not_depend_on_the_chunk(model: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    condition, tokens = model.encode(PROMPTS), decode(model, AR).tokens
    whole = nll(model, condition, tokens, SAMPLING)
    monkeypatch.setattr("sjd2.decoding.likelihood.CHUNK", 7)
    assert torch.allclose(nll(model, condition, tokens, SAMPLING), whole, atol=1e-9)


def test_ddim_in_one_jump_equals_two(model: Toy) -> None:
    times = Schedule().times(4)
    e, e0 = torch.randn(7), torch.randn(7)
    for path in ("flow", "vp"):
        a, s = alpha_sigma(times, path)

        def jump(e, k, j, a=a, s=s):
            return s[j] / s[k] * e + (a[j] - a[k] * s[j] / s[k]) * e0

        assert torch.allclose(jump(jump(e, 4, 2), 2, 1), jump(e, 4, 1), atol=1e-5)
        assert torch.allclose(jump(e, 3, 0), e0, atol=1e-6)
        # the printed form of the paper, where it is defined
        k, j = 3, 2
        printed = s[j] / s[k] * e + a[k] * (a[j] / a[k] - s[j] / s[k]) * e0
        assert torch.allclose(printed, jump(e, k, j), atol=1e-5)


def test_nearest_entry_of_a_little_noise_is_the_token(model: Toy) -> None:
    space = EmbeddingSpace(model)
    tokens = torch.arange(12)[None]
    assert torch.equal(space.nearest(space.normal(tokens) + 0.05), tokens)
    assert torch.allclose(space.model_input(space.normal(tokens)), model.embed(tokens))


def test_draws_follow_the_distribution_and_never_hit_zero_mass() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    u = (torch.arange(100_000, dtype=torch.float32) + 0.5) / 100_000
    counts = torch.bincount(draw(p.expand(len(u), -1), u, block=2), minlength=6) / len(u)
    assert torch.allclose(counts, p, atol=1e-4)
    edge = torch.tensor([2.0**-24, 1 - 2.0**-24])
    assert set(draw(p.expand(2, -1), edge, block=2).tolist()) == {1, 4}


def test_random_numbers_are_uniform_and_distinct() -> None:
    noise = Noise(torch.arange(500))
    positions = torch.arange(200).expand(500, -1)
    u = noise.uniform(positions, Purpose.ACCEPT, torch.arange(500))
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * (2 * 99) ** 0.5
    others = [
        noise.uniform(positions, Purpose.RESIDUAL, torch.arange(500)),
        noise.uniform(positions, Purpose.ACCEPT, torch.arange(500) + 9),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]) < 0.02
    normal = Noise(torch.arange(50)).normal(positions[:50], 16)
    assert abs(normal.mean()) < 0.01
    assert abs(normal.std() - 1) < 0.01


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sjd(0), "window"),
        (lambda: sjd2(steps=0), "steps"),
        (lambda: sjd2(levels="ages"), "did you mean 'age'"),
        (lambda: sjd(init="lift"), "did you mean 'left'"),
        (lambda: Coupled(coupling="max"), "maximal"),
        (lambda: SamplingParams(top_p=0), "top_p"),
        (lambda: SamplingParams(min_p=1.5), "min_p must lie in \\[0, 1\\], got 1.5; 0 switches it off"),
        (lambda: SamplingParams(min_p=math.nan), "min_p must be a finite number"),
        (lambda: SamplingParams(top_k=13).check(12), "vocabulary of 12"),
        (lambda: Decoder(name="x", window=4, lossless=True), "needs a drafter"),
        (lambda: AdapterSettings(kind="full"), "gated=false"),
    ],
)
def test_wrong_settings_name_the_fix(make, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()
