"""Quantised layers: row by row every promise of a lossless decoder holds; with the library's outlier columns none does.

bitsandbytes computes its 8-bit layers in another way on a CPU, so the layer here has the arithmetic of its CUDA kernels:
activations are quantised by the largest value of their row, weights by that of their output; with a threshold above 0 the
columns in which any row exceeds it are left out of that and computed in full precision (LLM.int8(), arXiv 2208.07339).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sjd2.decoding.cuda_graph import Graphs
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import generate, stream
from sjd2.decoding.refine import Coupled
from sjd2.models.loading import LoadOptions
from tests.helpers import tape
from tests.helpers.bounded_spans import as_on_a_gpu
from tests.helpers.decoders import AR, GRID, PROMPTS, SAMPLING, decode, sjd, sjd2
from tests.helpers.toy import Toy, adapted_toy

MATCH = replace(SAMPLING, sampler="gumbel")
LARGE = 2.0  # a few of the toy's activations exceed it
DECODERS = {"sjd": sjd(6), "scd": sjd(8, Coupled()), "sjd2": sjd2(9, steps=2)}


class Int8(nn.Linear):
    """An 8-bit layer as on CUDA, in float64: sums of integers are exact in any order."""

    threshold = 0.0

    def forward(self, x: Tensor) -> Tensor:
        outliers = (x.abs() > self.threshold).flatten(0, -2).any(0) & (
            self.threshold > 0
        )  # [D], over all rows and slots
        rows = x.masked_fill(outliers, 0)
        rows_scale, scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-9), self.weight.abs().amax(1)
        product = (rows * 127 / rows_scale).round() @ (self.weight * 127 / scale[:, None]).round().T
        return product * rows_scale * scale / 127**2 + (x * outliers) @ self.weight.T


def quantise(model: Toy, threshold: float) -> Toy:
    for name, layer in model.transformer.layers.named_modules():
        if type(layer) is nn.Linear and "lora_" not in name:  # a fine-tuning stays as it is
            layer.__class__, layer.threshold = Int8, threshold
    return model


@pytest.fixture(scope="module")
def by_row() -> Toy:
    return quantise(adapted_toy(GRID), 0.0)


@pytest.fixture(scope="module")
def by_column() -> Toy:
    return quantise(adapted_toy(GRID), LARGE)


def alike(model: Toy, decoder: Decoder) -> int:
    """Return how many images are AR's, drawn with the same noise."""
    images = zip(decode(model, AR, MATCH).samples, decode(model, decoder, MATCH).samples, strict=True)
    return sum(bool((theirs.tokens == ours.tokens).all()) for theirs, ours in images)


@pytest.mark.parametrize("name", DECODERS)
def test_row_by_row_every_decoder_returns_the_tokens_of_ar(by_row: Toy, name: str) -> None:
    assert alike(by_row, DECODERS[name]) == len(PROMPTS)


def test_with_outlier_columns_they_do_not(by_column: Toy) -> None:
    assert min(alike(by_column, decoder) for decoder in DECODERS.values()) < len(PROMPTS)


def test_row_by_row_tokens_depend_neither_on_the_batch_nor_on_refilling(by_row: Toy) -> None:
    decoder = DECODERS["sjd2"]
    together = decode(by_row, decoder).samples
    alone = decode(by_row, decoder, prompts=PROMPTS[1:2], seeds=[2]).samples[0]
    assert (alone.tokens == together[1].tokens).all()
    requests = [(prompt, seed) for seed, prompt in enumerate(PROMPTS, 1)]
    for index, sample in stream(by_row, decoder, requests, rows=2, sampling=SAMPLING):
        assert (sample.tokens == together[index].tokens).all()


@pytest.mark.parametrize("threshold", [0.0, LARGE])
def test_a_sample_is_independent_of_its_batch_row_by_row_alone(threshold: float) -> None:
    model = quantise(Toy(GRID, dtype=torch.float64), threshold)
    x, positions = model.embed(torch.arange(12).reshape(3, 4)) * 4, torch.arange(4).expand(3, -1)
    alone = [model.forward(x[row, None], positions[:1], None)[0] for row in range(3)]
    assert torch.equal(model.forward(x, positions, None), torch.stack(alone)) is (threshold == 0)


@pytest.mark.parametrize("threshold", [0.0, LARGE])
def test_a_gated_fine_tuning_leaves_clean_slots_alone_row_by_row(threshold: float) -> None:
    plain, tuned = quantise(Toy(GRID, dtype=torch.float64), threshold), quantise(adapted_toy(GRID), threshold)
    x = plain.embed(torch.arange(12)[None]).repeat(2, 1, 1) * 4
    positions, gate = torch.arange(12).expand(2, -1), torch.arange(12).expand(2, -1) > 7
    noisy = torch.where(gate[..., None], 3 * x.flip(1), x)
    expected = plain.forward(x[:, :8], positions[:, :8], None)
    found = tuned.forward(noisy, positions, None, gate=gate)[:, :8]
    assert torch.equal(expected, found) is (threshold == 0)


def test_recorded_passes_of_quantised_layers_give_the_same_tokens(by_row: Toy) -> None:
    expected = decode(by_row, DECODERS["sjd"], prompts=PROMPTS[:2]).tokens
    with as_on_a_gpu():
        got = generate(by_row, DECODERS["sjd"], by_row.encode(PROMPTS[:2]), [1, 2], sampling=SAMPLING,
                       graphs=Graphs(tape.record))  # fmt: skip
    assert torch.equal(got.tokens, expected)


def test_8_bits_are_row_by_row() -> None:
    options = LoadOptions(weights="w", device=torch.device("cpu"), dtype=torch.bfloat16, quantisation="8bit")
    assert options.keywords()["quantization_config"].llm_int8_threshold == 0
