"""How far a decoder's images are from the enumerated distribution of a toy model."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import generate
from sjd2.decoding.sampling import SamplingParams
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.layout import TokenGrid
from tests.helpers.decoders import LINE
from tests.helpers.toy import Toy, chi_square_z, enumerate_probs

SAMPLES, PART = 12_000, 4000
PROMPT = "a b"


def strong_toy(grid: TokenGrid = LINE, code: str = "additive") -> Toy:
    """Return a toy with a strong random adapter: noisy slots get distributions far from the clean ones."""
    model = Toy(grid)
    model.adapter = Adapter(AdapterSettings(rank=2, code=code), model)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.adapter.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    model.adapter.freeze()
    return model


def z_scores(
    decoder: Decoder, sampling: SamplingParams, grid: TokenGrid = LINE, code: str = "additive", start: int = 0
) -> Iterator[float]:
    """Decode PART images at a time; yield the z-score of all frequencies so far under the enumerated distribution."""
    model = strong_toy(grid, code)
    _, probs = enumerate_probs(model, PROMPT, sampling)
    free = model.layout.free
    digits = 3 ** torch.arange(int(free.sum()) - 1, -1, -1)
    counts = torch.zeros(len(probs), dtype=torch.long)
    for part in range(start, start + SAMPLES, PART):
        seeds = list(range(part, part + PART))
        tokens = generate(model, decoder, model.encode([PROMPT] * PART), seeds, sampling=sampling).tokens
        assert torch.equal(tokens[0, ~free], model.layout.forced()[~free])
        counts += torch.bincount((tokens[:, free] * digits).sum(1), minlength=len(probs))
        z = chi_square_z(counts, probs)
        print(f"z = {z:.1f} of {int(counts.sum())} images")
        yield z


def z_score(
    decoder: Decoder, sampling: SamplingParams, grid: TokenGrid = LINE, code: str = "additive", start: int = 0
) -> float:
    """Return the z-score of SAMPLES images."""
    return list(z_scores(decoder, sampling, grid, code, start))[-1]


def is_caught(decoder: Decoder, sampling: SamplingParams, grid: TokenGrid = LINE) -> bool:
    """Return whether the z-score leaves 5 within SAMPLES images; a broken decoder mostly needs fewer."""
    return any(abs(z) > 5 for z in z_scores(decoder, sampling, grid))
