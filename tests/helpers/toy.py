"""A causal toy model whose distribution can be enumerated: a random Chameleon of width 16 with the engine's own cache."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from transformers import ChameleonConfig, ChameleonModel

from sjd2.decoding.sampling import SamplingParams
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.base import Condition, ImageModel
from sjd2.models.layout import TokenGrid


class Toy(ImageModel):
    """V codes on a grid of rows x columns; sharp enough to tell distributions apart. Prompts are words hashed to 7 vectors."""

    def __init__(self, grid: TokenGrid, *, dtype: torch.dtype = torch.float32, width: int = 16, seed: int = 0) -> None:
        vq = {"embed_dim": 4, "num_embeddings": 4, "latent_channels": 4, "resolution": 8, "base_channels": 32}
        vq |= {"channel_multiplier": [1], "num_res_blocks": 1}
        config = ChameleonConfig(
            vocab_size=32, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=256, vocabulary_map={"<image>": 31}, vq_config=vq,
            attn_implementation="sdpa",
        )  # fmt: skip
        torch.manual_seed(seed)
        transformer = ChameleonModel(config).to(dtype).eval()
        super().__init__(transformer, grid)
        generator = torch.Generator().manual_seed(seed)
        v = grid.vocabulary
        self.table = torch.randn(v + len(grid.forced_ids), width, generator=generator).to(dtype)
        self.head = (torch.randn(v, width, generator=generator) * 0.35).to(dtype)
        self.words = torch.randn(7, width, generator=generator).to(dtype)
        self.codebook = torch.randn(v, 4, generator=generator)
        with torch.no_grad():  # small initial weights make a model that hardly looks at its past
            for parameter in transformer.layers.parameters():
                if parameter.ndim == 2:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5 * 1.5)

    def encode(self, prompts: list[str]) -> Condition:
        ids = [[sum(map(ord, word)) % 6 for word in prompt.split()] + [6] for prompt in prompts]
        lengths = torch.tensor([len(row) for row in ids])
        padded = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in ids])
        return Condition(self.words[padded], lengths, self.words[None, 6:], torch.tensor([1]))

    def embed(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.embedding(tokens, self.table)

    def logits(self, hidden: Tensor) -> Tensor:
        out = hidden @ self.head.T
        return out if out.dtype == torch.float64 else out.float()

    def decode(self, tokens: Tensor) -> Tensor:
        codes = self.layout.codes(tokens)
        return (codes * 255 // self.layout.vocabulary).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)


@torch.inference_mode()
def enumerate_probs(model: Toy, prompt: str, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """Return all free token sequences [K, F] and the exact probability of each [K], by plain forwards without a cache."""
    free = model.layout.free
    sequences = torch.tensor(list(itertools.product(range(model.layout.vocabulary), repeat=int(free.sum()))))
    tokens = model.layout.forced().clamp(min=0).repeat(len(sequences), 1)
    tokens[:, free] = sequences
    condition = model.encode([prompt])
    rows = []
    branches = [(condition.embeds, condition.lengths), (condition.uncond_embeds, condition.uncond_lengths)]
    for embeds, lengths in branches[: 2 if sampling.guided else 1]:
        head = embeds[:1, : int(lengths[0])].expand(len(tokens), -1, -1)
        x = torch.cat([head, model.embed(tokens)], 1)[:, :-1]
        hidden = model.forward(x, torch.arange(x.shape[1]).expand(len(x), -1), None)
        rows.append(model.logits(hidden[:, int(lengths[0]) - 1 :]))
    probs = sampling.probs(torch.cat(rows)).double()
    picked = probs[:, free].gather(-1, sequences[..., None])[..., 0]
    return sequences, picked.prod(1)


def chi_square_z(counts: Tensor, probs: Tensor) -> float:
    """Return the z-score of Pearson's statistic; cells with an expectation below 5 are merged into one."""
    expected = probs * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare].double(), counts[rare].double().sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < 5:  # nothing rare: the merged cell is empty
        observed, expected = observed[:-1], expected[:-1]
    freedom = len(expected) - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def adapted_toy(grid: TokenGrid, dtype: torch.dtype = torch.float64) -> Toy:
    """Return a toy whose adapter does something."""
    toy = Toy(grid, dtype=dtype, width=16)
    toy.adapter = Adapter(AdapterSettings(rank=2), toy)
    for parameter in toy.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    toy.adapter.freeze()
    return toy
