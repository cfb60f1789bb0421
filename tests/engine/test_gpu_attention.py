"""The kernels on a CUDA device: against SDPA and modules, in whole decoders, recorded. Run by: python -m pytest -m gpu -n 0"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.architectures import ARCHITECTURES
from sjd2 import api
from sjd2.decoding.cuda_graph import Graphs
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import DecodeResult, generate
from sjd2.decoding.sampling import SamplingParams
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.base import ImageModel
from sjd2.models.layer_check import device_seconds, fuse_layers
from sjd2.models.projections import join_projections
from sjd2.models.window_attention import TOLERANCE, check, fuse_attention, set_attention, stores
from tests.helpers.on_gpu import DECODERS, MARKS, PROMPTS, SEEDS

window_kernel = pytest.importorskip("sjd2.models.window_kernel", reason="needs Triton", exc_type=ImportError)
pytestmark = MARKS
SAMPLING = SamplingParams(guidance_scale=3.0, top_k=100, temperature=0.9)
GPU = torch.device("cuda")


def decode(model: ImageModel, decoder: Decoder, graphs: Graphs | None = None) -> DecodeResult:
    with torch.inference_mode():
        condition = model.encode(PROMPTS)
    return generate(model, decoder, condition, SEEDS, sampling=SAMPLING, graphs=graphs)


@pytest.fixture(scope="module")
def model() -> ImageModel:
    """The embedded model in float32, fused."""
    return api.load("tiny", device="cuda")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [32, 64, 100, 128, 256])
def test_the_kernel_is_sdpa(dtype: torch.dtype, width: int) -> None:
    for rows, heads, shared in ((2, 8, 8), (3, 8, 2), (16, 7, 1)):
        for slots in (1, 2, 17, 32, 96):
            assert check(rows, heads, shared, slots, width, dtype, GPU) < TOLERANCE[dtype], (rows, heads, shared, slots)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_keys_and_values_are_stored_where_scatter_does(dtype: torch.dtype) -> None:
    assert all(stores(shared, width, dtype, GPU) for shared in (1, 8) for width in (20, 64, 128))


def test_a_key_too_many_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = window_kernel.attend

    def broken(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, seen: Tensor, *more: Any) -> Tensor:
        seen = torch.cat([seen, torch.ones_like(seen[:, :, :1])], 2)  # the entry after each row's last
        return kernel(query, keys, values, lengths, seen, *more)

    monkeypatch.setattr(window_kernel, "attend", broken)
    for dtype, tolerance in TOLERANCE.items():
        assert check(2, 8, 8, 4, 64, dtype, GPU) > tolerance


def test_models_are_fused_when_loaded(model: ImageModel) -> None:
    assert model.fused
    assert api.load("tiny", device="cuda", dtype="bfloat16").fused
    assert fuse_attention(api.load("tiny", device="cuda", dtype="float64")) == "float64 stays on SDPA"


@pytest.mark.parametrize("name", DECODERS)
def test_float32_gives_nearly_all_the_tokens_of_sdpa(model: ImageModel, name: str) -> None:
    # a token differs only where two codes are as good as equal, and then all that follows in that image differs too
    decoder = api.decoder(name, model="tiny")
    fused = decode(model, decoder)
    set_attention(model, fused=False)
    try:
        plain = decode(model, decoder)
    finally:
        set_attention(model, fused=True)
    assert (fused.tokens == plain.tokens).all(1).sum() >= len(SEEDS) - 1


@pytest.mark.parametrize("name", DECODERS)
def test_one_recording_serves_the_whole_image(model: ImageModel, name: str) -> None:
    decoder, graphs = api.decoder(name, model="tiny"), Graphs()
    plain = decode(model, decoder)
    for _ in range(2):
        replayed = decode(model, decoder, graphs)
        assert torch.equal(replayed.tokens, plain.tokens)
        assert [s.accepted for s in replayed.samples] == [s.accepted for s in plain.samples]
    assert name == "zipar" or len(graphs.kept.graphs) == 1


@torch.inference_mode()
def test_joined_projections_compute_what_the_layers_did() -> None:
    plan, states = ARCHITECTURES["lumina"].small(), []
    for joined in (True, False):
        model = plan.build(GPU, torch.bfloat16)  # the same random weights
        assert not joined or join_projections(model) == 3 * len(model.transformer.layers)
        x = torch.randn(2, 6, 32, generator=torch.Generator(GPU).manual_seed(0), device=GPU, dtype=torch.bfloat16)
        states.append(model.forward(x, torch.arange(6, device=GPU).expand(2, -1), None).float())
    assert float((states[0] - states[1]).norm() / states[1].norm()) < 2e-2


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_every_family_has_the_states_of_sdpa(name: str, dtype: torch.dtype) -> None:
    model, states = ARCHITECTURES[name].small().build(GPU, dtype), []
    x = torch.randn(2, 6, model.transformer.get_input_embeddings().weight.shape[1], device=GPU, dtype=dtype)
    assert fuse_attention(model) is None
    for fused in (True, False):
        set_attention(model, fused=fused)
        cache, place = model.cache(2, 80), torch.arange(6, device=GPU).expand(2, -1)
        cache.bound = 6
        model.forward(x, place, cache)
        cache.lengths = torch.tensor([0, 5], device=GPU)
        states.append(model.forward(x, place + cache.lengths[:, None], cache).float())
    assert float((states[0] - states[1]).norm() / states[1].norm()) < (1e-4 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_family_passes_the_check_of_its_layers(name: str, dtype: torch.dtype) -> None:
    model = ARCHITECTURES[name].small().build(GPU, dtype)
    assert fuse_attention(model) is None
    assert fuse_layers(model, lambda work: 1.0) == []  # narrow models are not what is timed
    model.adapter = Adapter(AdapterSettings(rank=16), model).freeze()
    assert model.adapter.fuse(True) is None
    x = torch.randn(2, 6, model.transformer.get_input_embeddings().weight.shape[1], device=GPU, dtype=dtype)
    with torch.inference_mode():
        assert device_seconds(GPU, lambda: model.transformer.layers[0].mlp(x)) > 0
