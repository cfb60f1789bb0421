"""The engine on a CUDA device: the CPU's tokens, no waiting, flat memory, graphs. Run by: python -m pytest -m gpu -n 0"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.architectures import ARCHITECTURES
from sjd2 import api
from sjd2.decoding.cuda_graph import Graphs
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.dispatch import start_engine
from sjd2.decoding.engine import Engine
from sjd2.decoding.generate import CHECK_EVERY, DecodeResult, generate, stream
from sjd2.decoding.noise import Noise, Purpose
from sjd2.decoding.refine import Coupled, Resample
from sjd2.decoding.sampling import SamplingParams, draw
from sjd2.errors import UserError
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.base import Condition, ImageModel
from sjd2.models.kv_cache import SPAN_BUCKET, RowCache
from tests.helpers.decoders import GUIDED, LINE, sjd, sjd2
from tests.helpers.enumeration import PROMPT, strong_toy
from tests.helpers.on_gpu import DECODERS, MARKS, PROMPTS, SEEDS
from tests.helpers.toy import Toy, chi_square_z, enumerate_probs

pytestmark = MARKS
CDF = SamplingParams(guidance_scale=3.0, top_k=100, temperature=0.9)
GUMBEL = replace(CDF, sampler="gumbel")
MANY = ("ar", "sjd", "sjd2", "sjd-fc", "eagle")


@pytest.fixture(scope="module")
def wide() -> dict[str, ImageModel]:
    """The embedded model in float64 on both devices."""
    return {device: api.load("tiny", device=device, dtype="float64") for device in ("cpu", "cuda")}


@pytest.fixture(scope="module")
def half() -> ImageModel:
    """The embedded model in bfloat16 on the device."""
    return api.load("tiny", device="cuda", dtype="bfloat16")


def decode(model: ImageModel, decoder: Decoder, sampling: SamplingParams, graphs: Graphs | None = None) -> DecodeResult:
    with torch.inference_mode():
        condition = model.encode(PROMPTS)
    return generate(model, decoder, condition, SEEDS, sampling=sampling, graphs=graphs)


def serves(decoder: Decoder, sampling: SamplingParams) -> bool:
    """Return whether a decoder can sample with these parameters."""
    try:
        decoder.check_sampling(sampling)
    except UserError:
        return False
    return True


@contextmanager
def no_waiting() -> Iterator[None]:
    """Let everything that waits for the device raise."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def begun(model: ImageModel, decoder: Decoder, sampling: SamplingParams) -> Engine:
    """Start an engine on the prompts and run the first passes, in which parts may build their tables."""
    with torch.inference_mode():
        condition = model.encode(PROMPTS)
    engine = start_engine(model, decoder, len(SEEDS), condition.embeds.shape[1], sampling)
    engine.admit(list(range(len(SEEDS))), condition, SEEDS)
    engine.step()
    engine.step()
    return engine


# ---- tokens


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("sampling", [CDF, GUMBEL], ids=["cdf", "gumbel"])
def test_float64_gives_the_tokens_of_the_cpu(wide: dict[str, ImageModel], name: str, sampling: SamplingParams) -> None:
    if not serves(api.decoder(name, model="tiny"), sampling):
        pytest.skip("sampler=gumbel leaves nothing to relax")
    here, there = (decode(model, api.decoder(name, model="tiny"), sampling) for model in wide.values())
    assert torch.equal(here.tokens, there.tokens)
    assert [s.accepted for s in here.samples] == [s.accepted for s in there.samples]


def test_float32_gives_nearly_all_the_tokens_of_the_cpu() -> None:
    # a token differs only where two codes are as good as equal, and then all that follows in that image differs too
    here, there = (decode(api.load("tiny", device=d), api.decoder("ar"), GUMBEL) for d in ("cpu", "cuda"))
    assert (here.tokens == there.tokens).all(1).sum() >= len(SEEDS) - 1


def test_random_numbers_are_the_cpus() -> None:
    seeds, place = torch.arange(7) * 2**40 + 5, torch.arange(50).expand(7, -1)
    here, there = Noise(seeds), Noise(seeds.cuda())
    for purpose in Purpose:
        expected = here.uniform(place, purpose, torch.arange(7), 3)
        assert torch.equal(expected, there.uniform(place.cuda(), purpose, torch.arange(7).cuda(), 3).cpu())
    assert torch.allclose(here.gumbel(place, 30), there.gumbel(place.cuda(), 30).cpu(), atol=1e-4)
    assert torch.allclose(here.normal(place, 30), there.normal(place.cuda(), 30).cpu(), atol=1e-4)


@pytest.mark.parametrize("vocabulary", [512, 8192, 16384, 32768, 64000])
def test_distributions_and_draws_of_large_vocabularies_are_the_cpus(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 33, vocabulary, generator=generator, dtype=torch.float64) * 4
    u = torch.rand(4, 33, generator=generator, dtype=torch.float64)
    for sampling in (
        SamplingParams(guidance_scale=3.0, top_k=min(2000, vocabulary - 1)),
        SamplingParams(guidance_scale=2.0, top_p=0.9),
    ):
        expected, got = sampling.probs(logits), sampling.probs(logits.cuda())
        assert torch.allclose(expected, got.cpu(), atol=1e-12)
        assert torch.equal(draw(expected, u), draw(got, u.cuda()).cpu())
        single = draw(got.float(), u.cuda().float())
        assert (got.gather(-1, single[..., None]) > 0).all()


@pytest.mark.parametrize("name", DECODERS)
def test_bfloat16_runs(half: ImageModel, name: str) -> None:
    result = decode(half, api.decoder(name, model="tiny"), CDF)
    assert result.tokens.shape == (len(SEEDS), half.layout.length)
    assert ((result.tokens >= 0) & (result.tokens < half.layout.vocabulary)).all()
    for sample in result.samples:
        assert sum(sample.accepted) == half.layout.length
        assert min(sample.accepted) >= 1
    images = half.decode(result.tokens.cuda())
    assert images.dtype == torch.uint8
    assert images.float().std() > 1


@pytest.mark.parametrize("name", MANY)
def test_neither_batch_nor_refilling_changes_a_token(wide: dict[str, ImageModel], name: str) -> None:
    model, decoder = wide["cuda"], api.decoder(name, model="tiny")
    together = decode(model, decoder, CDF)
    for rows in (1, 2):
        for index, sample in stream(model, decoder, zip(PROMPTS, SEEDS, strict=True), rows=rows, sampling=CDF):
            assert (sample.tokens == together.samples[index].tokens).all()
            assert sample.accepted == together.samples[index].accepted


def test_pixels_are_the_cpus() -> None:
    models = {device: api.load("tiny", device=device) for device in ("cpu", "cuda")}
    tokens = torch.randint(512, (4, 144), generator=torch.Generator().manual_seed(0))
    here, there = (model.decode(tokens.to(device)).cpu().float() for device, model in models.items())
    assert (here - there).abs().mean() < 0.1
    assert (here - there).abs().max() < 4


# ---- distributions


class OnGpu(Toy):
    """A toy whose prompts and tables lie on the device."""

    @classmethod
    def of(cls, toy: Toy) -> OnGpu:
        moved = copy.deepcopy(toy)
        moved.__class__ = cls
        for module in (moved.transformer, moved.adapter):
            module.to("cuda")
        for name in ("table", "head", "words", "codebook"):
            setattr(moved, name, getattr(moved, name).cuda())
        return moved

    def encode(self, prompts: list[str]) -> Condition:
        found = super().encode(prompts)
        parts = (found.embeds, found.lengths, found.uncond_embeds, found.uncond_lengths)
        return Condition(*(part.cuda() for part in parts))


@pytest.mark.parametrize(
    "decoder", [sjd(4, Coupled()), sjd2(5, Coupled(), steps=2), sjd(3, Resample())], ids=["scd", "sjd2", "sjd"]
)
@pytest.mark.parametrize("replayed", [False, True])
def test_lossless_decoders_have_the_enumerated_distribution(decoder: Decoder, replayed: bool) -> None:
    plain = strong_toy()
    _, probs = enumerate_probs(plain, PROMPT, GUIDED)
    model, graphs = OnGpu.of(plain), Graphs() if replayed else None
    tokens = [
        generate(
            model, decoder, model.encode([PROMPT] * 4000), list(range(at, at + 4000)), sampling=GUIDED, graphs=graphs
        ).tokens
        for at in range(0, 12_000, 4000)
    ]
    digits = 3 ** torch.arange(LINE.length - 1, -1, -1)
    counts = torch.bincount((torch.cat(tokens) * digits).sum(1), minlength=len(probs))
    assert abs(chi_square_z(counts, probs)) < 5


# ---- no waiting, flat memory, bounded spans


@pytest.mark.parametrize("name", DECODERS)
def test_no_pass_waits_for_the_device(wide: dict[str, ImageModel], name: str) -> None:
    decoder = api.decoder(name, model="tiny")
    for sampling in filter(partial(serves, decoder), (CDF, GUMBEL)):
        engine = begun(wide["cuda"], decoder, sampling)
        with no_waiting():
            for _ in range(4):
                engine.step()
        engine.finished()


def test_waiting_is_found(wide: dict[str, ImageModel]) -> None:
    engine = begun(wide["cuda"], api.decoder("ar"), CDF)
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        engine.finished()


@pytest.mark.parametrize("name", MANY)
def test_memory_stays_flat_over_passes(wide: dict[str, ImageModel], name: str) -> None:
    engine = begun(wide["cuda"], api.decoder(name, model="tiny"), CDF)
    held = []
    for _ in range(30):
        engine.step()
        engine.finished()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    # a pass leaves only its count of committed tokens; masks and distributions are as wide as the span's bucket
    assert max(held[10:]) - min(held[2:10]) < 2**21


def test_a_finished_loop_gives_its_memory_back(wide: dict[str, ImageModel]) -> None:
    held = []
    for _ in range(3):
        decode(wide["cuda"], api.decoder("sjd2"), CDF)
        held.append(torch.cuda.memory_allocated())
    assert held[2] <= held[1] + 2**20


@pytest.mark.parametrize("name", MANY)
def test_spans_are_buckets_close_to_the_longest_row(
    wide: dict[str, ImageModel], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    window, found = RowCache.window, []

    def noted(cache: RowCache, width: int, *args: Any, **kwargs: Any) -> dict[str, Any]:
        attention = window(cache, width, *args, **kwargs)
        found.append((cache.span, int(cache.lengths.max()) + width))
        return attention

    decoder = api.decoder(name, model="tiny")
    engine = begun(wide["cuda"], decoder, CDF)
    monkeypatch.setattr(RowCache, "window", noted)
    passes = 0
    while len(engine.finished() if passes % CHECK_EVERY == 0 else []) < len(SEEDS):
        engine.step()
        passes += 1
    assert not engine.cache.reads
    assert all(span % SPAN_BUCKET == 0 and span >= need for span, need in found)
    slack = CHECK_EVERY * decoder.window + 2 * SPAN_BUCKET
    assert all(span - need <= slack for span, need in found)


# ---- graphs


@pytest.mark.parametrize("name", DECODERS)
def test_replayed_passes_give_the_tokens_of_the_plain_engine(wide: dict[str, ImageModel], name: str) -> None:
    model, decoder, graphs = wide["cuda"], api.decoder(name, model="tiny"), Graphs()
    plain = decode(model, decoder, CDF)
    first, second = (decode(model, decoder, CDF, graphs) for _ in range(2))
    assert torch.equal(plain.tokens, first.tokens)
    assert torch.equal(plain.tokens, second.tokens)
    assert [s.accepted for s in plain.samples] == [s.accepted for s in second.samples]
    assert any(graphs.kept.graphs.values())


def test_refilled_rows_may_be_replayed(wide: dict[str, ImageModel]) -> None:
    model, decoder, graphs = wide["cuda"], api.decoder("sjd2"), Graphs()
    plain = decode(model, decoder, CDF)
    requests = zip(PROMPTS, SEEDS, strict=True)
    for index, sample in stream(model, decoder, requests, rows=2, sampling=CDF, graphs=graphs):
        assert (sample.tokens == plain.samples[index].tokens).all()


def test_a_replayed_pass_does_not_wait(wide: dict[str, ImageModel]) -> None:
    graphs, model = Graphs(), wide["cuda"]
    decode(model, decoder := api.decoder("sjd2"), CDF, graphs)
    with torch.inference_mode():
        condition = model.encode(PROMPTS)
    engine = graphs.start(model, decoder, len(SEEDS), condition.embeds.shape[1], CDF)
    engine.admit([0, 1, 2], condition, SEEDS)
    with no_waiting():
        for _ in range(3):
            engine.step()
    assert engine.finished() == []


# ---- the published architectures, narrow


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_every_family_draws(name: str, graph: bool) -> None:
    plan = ARCHITECTURES[name].small()
    model = plan.build(torch.device("cuda"), torch.bfloat16)
    model.adapter = Adapter(AdapterSettings(rank=2), model).freeze()
    sampling = SamplingParams(guidance_scale=plan.guidance, top_k=plan.top_k)
    for decoder in (api.decoder("ar"), api.decoder("sjd2", window=6)):
        condition = plan.condition(model, 2)
        result = generate(model, decoder, condition, [1, 2], sampling=sampling, graphs=Graphs() if graph else None)
        forced = plan.layout.forced()
        assert (result.tokens[:, forced >= 0] == forced[forced >= 0]).all()
        assert (result.tokens[:, forced < 0] < plan.layout.vocabulary).all()
        if model.pixel_part == "image":
            assert model.decode(result.tokens.cuda()).shape[:2] == (2, 3)
