"""Training pairs of the front corrector: the hidden states after replaced tokens, and what they should have been.

# B samples, R model rows [conditional B | unconditional B], P prompt tokens, N image-phase tokens, V image vocabulary, D width
State t, H_t, is the hidden state that predicts token t; it has seen the tokens before t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sjd2.decoding.sampling import SamplingParams, draw
from sjd2.decoding.verify import residual
from sjd2.finetune.windows import both_branches, causal_mask, window_mask
from sjd2.models.base import ImageModel


class TeacherForced:
    """Image tokens [B, N] run through both guidance branches once; any of them can then be replaced in a short second run.

    hidden [R, N + 1, D]: the states H_0..H_N.
    """

    @torch.no_grad()
    def __init__(self, model: ImageModel, prompts: list[str], tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens
        rows, n = tokens.shape
        prompt, self.lengths = both_branches(model, prompts)
        self.width = width = prompt.shape[1]
        self.own = torch.arange(n, device=tokens.device).expand(2 * rows, -1)
        self.place = model.image_start(self.lengths)[:, None] + self.own
        self.cache = model.cache(2 * rows, width + 3 * n)
        start = torch.arange(width, device=tokens.device).expand(2 * rows, -1)
        x = torch.cat([prompt, model.embed(tokens).repeat(2, 1, 1)], 1)
        hidden = model.forward(x, torch.cat([start, self.place], 1), self.cache, causal_mask(self.lengths, width, n))
        first = hidden[torch.arange(2 * rows, device=tokens.device), self.lengths - 1]
        self.hidden = torch.cat([first[:, None], hidden[:, width:]], 1)
        self.cache.lengths = self.cache.lengths + width + n

    @torch.no_grad()
    def stale(self, old: Tensor) -> Tensor:
        """Return H_{t+1} as it would be if token t alone were `old`, for each t: [B, N] -> [R, N, D]."""
        return self._replaced(old, window_mask(self.lengths, self.width, self.own))

    @torch.no_grad()
    def stale_twice(self, old: Tensor) -> Tensor:
        """Return H_{t+1} if token t were `old` and token t - 1 what the last call of `stale` put there: [B, N] -> [R, N, D].

        Token 0 has none before it: only itself is replaced.
        """
        n = old.shape[1]
        self.cache.lengths = self.cache.lengths + n  # the earlier replacements stay: the new ones come after them
        alone = torch.eye(n, dtype=torch.bool, device=old.device)
        seen = window_mask(self.lengths, self.width, (self.own - 1).clamp(min=0))
        seen[:, :, -n:] &= ~alone
        hidden = self._replaced(old, torch.cat([seen, alone.expand(len(seen), -1, -1)], 2))
        self.cache.lengths = self.cache.lengths - n
        return hidden

    def _replaced(self, old: Tensor, attn_mask: Tensor) -> Tensor:
        return self.model.forward(self.model.embed(old).repeat(2, 1, 1), self.place, self.cache, attn_mask)


@dataclass
class FrontPairs:
    """For each image and token t: tokens in its place, and the states after them.

    hidden [B, 2, N + 1, D] (branches in the second place); tokens [B, N]; scales [B] guidance.
    other [B, N], other_stale [B, 2, N, D]: token t alone was `other`, another draw from its distribution.
    old, old_stale: token t alone was `old`, a rejected draft. weight [B, N]: how likely decoding recovers from that rejection
    with the true token, relative to how often this token is drawn.
    second, second_stale: token t - 1 was `old` and token t `second`, a draft that followed it.
    """

    hidden: Tensor
    tokens: Tensor
    scales: Tensor
    other: Tensor
    other_stale: Tensor
    old: Tensor
    old_stale: Tensor
    weight: Tensor
    second: Tensor
    second_stale: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


def probs_of(model: ImageModel, hidden: Tensor, sampling: SamplingParams) -> Tensor:
    """Turn states of both branches [R, ..., D] into the distribution that `sampling` makes of them [B, ..., V]."""
    if not sampling.guided:
        hidden = hidden.chunk(2)[0]
    return sampling.probs(model.logits(hidden))


@torch.no_grad()
def make_pairs(
    model: ImageModel,
    prompts: list[str],
    tokens: Tensor,
    scales: Tensor,
    samplings: dict[float, SamplingParams],
    uniform: Callable[..., Tensor],
) -> FrontPairs:
    """Replace each token of images [B, N] as decoding would: by a draft that verification rejects.

    The draft of token t comes from the distribution q after a wrong token t - 1. Speculative sampling leaves a pair of a
    rejected draft ~ max(0, q - p) and a recovered token ~ max(0, p - q); the image's own token is a draw from p, so the
    probability max(0, 1 - q / p) is its weight.
    scales [B]: the guidance scale of each image; samplings: by scale; uniform: shape -> numbers in (0, 1).
    """
    images = TeacherForced(model, prompts, tokens)

    def target(hidden: Tensor) -> Tensor:
        probs = hidden.new_empty(*tokens.shape, model.layout.vocabulary, dtype=torch.float32)
        for scale, sampling in samplings.items():
            rows = scales == scale
            if rows.any():
                probs[rows] = probs_of(model, hidden[:, : tokens.shape[1]][rows.repeat(2)], sampling).float()
        return probs

    code = tokens.clamp(max=model.layout.vocabulary - 1)
    p = target(images.hidden)
    other = draw(residual(p, None, code), uniform(tokens.shape))
    other_stale = images.stale(other)
    q = torch.cat([p[:, :1], target(other_stale)[:, :-1]], 1)
    old = draw(residual(q, p, code), uniform(tokens.shape))
    old_stale = images.stale(old)
    second = draw(torch.cat([p[:, :1], target(old_stale)[:, :-1]], 1), uniform(tokens.shape))
    weight = 1 - (q / p.clamp(min=1e-9)).gather(-1, code[..., None])[..., 0]
    return FrontPairs(
        _by_image(images.hidden), tokens, scales, other, _by_image(other_stale), old, _by_image(old_stale),
        weight.clamp(min=0), second, _by_image(images.stale_twice(second)),
    )  # fmt: skip


def _by_image(hidden: Tensor) -> Tensor:
    return hidden.unflatten(0, (2, -1)).transpose(0, 1).to(torch.bfloat16).contiguous()


def join(parts: list[FrontPairs]) -> FrontPairs:
    """Put the pairs of several batches of images together."""
    return FrontPairs(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in FrontPairs.__dataclass_fields__}
    )
