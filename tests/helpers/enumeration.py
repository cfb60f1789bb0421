"""How far a decoder's images are from the enumerated distribution of a toy model."""

from __future__ import annotations

import torch

from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import generate
from sjd2.decoding.sampling import SamplingParams
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.layout import TokenGrid
from tests.helpers.decoders import LINE
from tests.helpers.toy import Toy, chi_square_z, enumerate_probs

SAMPLES = 12_000
PROMPT = "a b"


def strong_toy(grid: TokenGrid = LINE, code: str = "additive") -> Toy:
    """Return a toy with a strong random adapter: noisy slots get distributions far from the clean ones."""
    model = Toy(grid)
    model.adapter = Adapter(AdapterSettings(rank=2, code=code), model)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.adapter.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    model.adapter.requires_grad_(False)
    return model


def z_score(
    decoder: Decoder, sampling: SamplingParams, grid: TokenGrid = LINE, code: str = "additive", start: int = 0
) -> float:
    """Decode SAMPLES images and return the z-score of their frequencies under the enumerated distribution."""
    model = strong_toy(grid, code)
    _, probs = enumerate_probs(model, PROMPT, sampling)
    free = model.layout.free
    digits = 3 ** torch.arange(int(free.sum()) - 1, -1, -1)
    tokens = []
    for part in range(0, SAMPLES, 4000):
        seeds = list(range(start + part, start + part + 4000))
        tokens.append(generate(model, decoder, model.encode([PROMPT] * 4000), seeds, sampling=sampling).tokens)
    counts = torch.bincount((torch.cat(tokens)[:, free] * digits).sum(1), minlength=len(probs))
    assert torch.equal(torch.cat(tokens)[0, ~free], model.layout.forced()[~free])
    z = chi_square_z(counts, probs)
    print(f"z = {z:.1f}")
    return z
