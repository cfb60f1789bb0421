"""How likely a model finds given tokens: the sharpest detector of a biased decoder.

# B samples, R model rows, P prompt tokens, N image-phase tokens
"""

from __future__ import annotations

import torch
from torch import Tensor

from sjd2.decoding.sampling import SamplingParams
from sjd2.models.base import Condition, ImageModel

# positions whose distributions are in memory at once: those of all 8193 of Emu3 would take several GB an image
CHUNK = 512
FLOOR = 1e-9  # a token that top-k or top-p has cut off counts as this probability, not as infinitely unlikely


@torch.inference_mode()
def nll(model: ImageModel, condition: Condition, tokens: Tensor, sampling: SamplingParams) -> Tensor:
    """Return -log p of the free tokens under the target distribution, summed, in nats: tokens [B, N] -> [B].

    One teacher-forced pass. A token outside top-k or top-p counts as `FLOOR`.
    """
    tokens = tokens.to(model.device)
    x = model.embed(tokens)[:, :-1]
    hidden = [_hidden(model, condition.embeds, condition.lengths, x)]
    if sampling.guided:
        rows = len(tokens)
        hidden.append(
            _hidden(model, condition.uncond_embeds.expand(rows, -1, -1), condition.uncond_lengths.expand(rows), x)
        )
    picked = []
    for begin in range(0, tokens.shape[1], CHUNK):
        part = slice(begin, begin + CHUNK)
        probs = sampling.probs(model.logits(torch.cat([states[:, part] for states in hidden])))  # [B, n, V]
        picked.append(probs.gather(-1, tokens[:, part].clamp(max=probs.shape[-1] - 1)[..., None])[..., 0])
    free = model.layout.free.to(model.device)
    return -(torch.cat(picked, 1).clamp(min=FLOOR).log().double() * free).sum(1)


def _hidden(model: ImageModel, prompt: Tensor, lengths: Tensor, x: Tensor) -> Tensor:
    """Run prompt and image tokens through an empty cache and return the states that predict each token: [B, N, D]."""
    rows, width = prompt.shape[:2]
    cache = model.cache(rows, width + x.shape[1])
    index = torch.arange(rows, device=x.device)
    start = model.forward(prompt, torch.arange(width, device=x.device).expand(rows, -1), cache)[index, lengths - 1]
    cache.lengths = lengths  # right padding is overwritten by the image
    cache.bound = width
    positions = model.image_start(lengths)[:, None] + torch.arange(x.shape[1], device=x.device)
    return torch.cat([start[:, None], model.forward(x, positions, cache)], 1)
