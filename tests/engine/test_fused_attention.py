"""Decoders whose passes attend in the kernel (interpreted on a CPU) give exactly the tokens of SDPA, eager and recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sjd2.decoding.cuda_graph import Graphs
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import generate, stream
from sjd2.decoding.sampling import SamplingParams
from sjd2.models.base import ImageModel
from sjd2.models.layout import TokenGrid
from sjd2.models.window_attention import set_attention
from tests.helpers import tape
from tests.helpers.bounded_spans import as_on_a_gpu
from tests.helpers.decoders import AR, GUIDED, KINDS, eagle, sjd2
from tests.helpers.enumeration import strong_toy

pytest.importorskip("triton", minversion="3.9")  # older ones do not interpret with numpy 2.4
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not interpreted; test_gpu.py has the same")
GRID = TokenGrid(2, 3, 3, prefix=(20,), row_end=21)  # 9 tokens: a program takes the interpreter 20 ms and more
PROMPTS, SEEDS = ["one", "two short words"], [1, 2]

DECODERS: dict[str, Callable[[dict[str, str]], Decoder]] = {
    "sjd2": lambda nets: sjd2(4, steps=2),  # its timestep tokens see themselves only
    "eagle": lambda nets: eagle(5, nets, shape="dynamic", depth=2, top_k=2),  # a tree of its own for each row
}


@pytest.fixture
def model() -> ImageModel:
    toy = strong_toy(GRID, code="appended")
    toy.transformer.layers = toy.transformer.layers[:1]
    toy.transformer.config.num_hidden_layers = 1
    return toy


@pytest.mark.parametrize("name", ["sjd2", pytest.param("eagle", marks=pytest.mark.slow)])
def test_the_kernel_gives_the_tokens_of_sdpa(model: ImageModel, name: str, nets: dict[str, str]) -> None:
    decoder = DECODERS[name](nets)
    plain = generate(model, decoder, model.encode(PROMPTS[1:]), SEEDS[1:], sampling=GUIDED)
    set_attention(model, fused=True)
    fused = generate(model, decoder, model.encode(PROMPTS[1:]), SEEDS[1:], sampling=GUIDED)
    assert torch.equal(fused.tokens, plain.tokens)
    assert [s.accepted for s in fused.samples] == [s.accepted for s in plain.samples]


def test_one_recording_serves_the_whole_image(model: ImageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sjd2.decoding.cuda_graph.BUCKET", 2)  # five graphs of a cache that is not fused
    sampling = SamplingParams()
    plain = generate(model, AR, model.encode(PROMPTS[:1]), SEEDS[:1], sampling=sampling)
    set_attention(model, fused=True)
    graphs = Graphs(tape.record)
    with as_on_a_gpu():
        fused = generate(model, AR, model.encode(PROMPTS[:1]), SEEDS[:1], sampling=sampling, graphs=graphs)
    assert torch.equal(fused.tokens, plain.tokens)
    assert len(graphs.kept.graphs) == 1
    assert all(graphs.kept.graphs.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_the_kernel_gives_the_tokens_of_sdpa_with_refilled_rows(name: str, nets: dict[str, str]) -> None:
    model, decoder = strong_toy(TokenGrid(3, 4, 3, prefix=(20,), row_end=21)), KINDS[name](nets)
    prompts = [*PROMPTS, "three", "four words are here"]
    plain = generate(model, decoder, model.encode(prompts), list(range(4)), sampling=GUIDED)
    set_attention(model, fused=True)
    for index, sample in stream(model, decoder, zip(prompts, range(4), strict=True), rows=2, sampling=GUIDED):
        assert (sample.tokens == plain.samples[index].tokens).all()
