"""Training sequences for next-clean-token prediction: which inputs are noisy, how noisy, and what they attend to.

# B samples, R rows, P entries before (prompt tokens), N image-phase tokens, S slots of a pass, K levels, D width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin

from sjd2.models.base import ImageModel
from sjd2.models.kv_cache import RowCache, additive


@dataclass
class Segments:
    """Random windows laid end to end over the image: first [B, N] start of each position's window, level [B, N] in 0..K."""

    first: Tensor
    level: Tensor


def draw_segments(
    rows: int, length: int, steps: int, *, shortest: int, longest: int, generator: torch.Generator
) -> Segments:
    """Cut the image into windows of random length; in each the level climbs from 0 (a random share of it) to K.

    Levels never fall inside a window and restart at 0 in the next (arXiv 2510.08994, section 4.1).
    """
    widths = torch.randint(shortest, longest + 1, (rows, length // shortest + 2), generator=generator)
    edges = widths.cumsum(1) - torch.randint(0, longest, (rows, 1), generator=generator)  # the first window is cut
    place = torch.arange(length).expand(rows, -1).contiguous()
    window = torch.searchsorted(edges.contiguous(), place, right=True)
    end = edges.gather(1, window.clamp(max=edges.shape[1] - 1))
    begin = (end - widths.gather(1, window.clamp(max=edges.shape[1] - 1))).clamp(min=0)
    share = torch.rand(widths.shape, generator=generator).gather(1, window.clamp(max=widths.shape[1] - 1))
    clean = ((end - begin) * share).long()  # leading slots of the window that are fed clean
    rise = (place - begin - clean + 1).clamp(min=0)
    height = (end - begin - clean).clamp(min=1)
    return Segments(begin, torch.div(rise * steps + height - 1, height, rounding_mode="floor").clamp(0, steps))


class _PastLayer(CacheLayerMixin):
    """One layer's keys and values [R, heads, P, head width], or None; a pass appends its own."""

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.whole = (keys, values)  # with those of the last pass
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: keys and values are given."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            key_states = torch.cat([self.keys, key_states], 2)
            value_states = torch.cat([self.values, value_states], 2)
        self.whole = key_states, value_states
        return self.whole

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def get_max_length(self) -> int:
        return self.get_seq_length()

    get_max_cache_shape = get_max_length  # the name before transformers 5.20


class Past(Cache):
    """Keys and values of earlier passes, read-only: a layer that runs twice (checkpointing) sees the same."""

    def __init__(self, past: list[_PastLayer]) -> None:
        super().__init__(layers=list(past))
        self.past = past

    @classmethod
    def empty(cls, layers: int) -> Past:
        """Return the past of a first pass."""
        return cls([_PastLayer(None, None) for _ in range(layers)])

    @classmethod
    def of(cls, cache: RowCache, length: int) -> Past:
        """Return the first `length` entries of every row of a cache."""
        layers: list[Any] = cache.layers
        return cls([_PastLayer(layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in layers])

    def following(self) -> Past:
        """Return the past of the next pass: this one, followed by the keys and values of the pass that used it."""
        return Past([_PastLayer(*layer.whole) for layer in self.past])

    def window(self, width: int, dtype: torch.dtype, attn_mask: Tensor) -> dict[str, Any]:
        """Return what `RowCache.window` does, an additive mask: attn_mask [R, S, P + S] -> [R, 1, S, P + S]."""
        return {"attention_mask": additive(attn_mask, dtype)[:, None]}


def both_branches(model: ImageModel, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Encode prompts for both guidance branches, padded to one width: [2B, P, D], lengths [2B]; unconditional rows last."""
    condition, rows = model.encode(prompts), len(prompts)
    branches = (condition.embeds, condition.uncond_embeds.expand(rows, -1, -1))
    width = max(embeds.shape[1] for embeds in branches)
    prompt = torch.cat([pad(embeds, (0, 0, 0, width - embeds.shape[1])) for embeds in branches])
    return prompt, torch.cat([condition.lengths, condition.uncond_lengths.expand(rows)])


def one_branch(model: ImageModel, prompts: list[str], drop: Tensor) -> tuple[Tensor, Tensor]:
    """Encode prompts, those of `drop` [B] replaced by the unconditional one: [B, P, D], lengths [B]."""
    prompt, lengths = both_branches(model, prompts)
    rows = torch.arange(len(prompts), device=prompt.device) + drop.to(prompt.device) * len(prompts)
    return prompt[rows], lengths[rows]


def causal_mask(lengths: Tensor, width: int, n: int) -> Tensor:
    """Return the causal mask of [prompt P | image N] without prompt padding: lengths [B] -> bool [B, P + N, P + N]."""
    size = width + n
    seen = torch.ones(size, size, dtype=torch.bool, device=lengths.device).tril().repeat(len(lengths), 1, 1)
    seen[:, width:, :width] &= _prompt(lengths, width)
    return seen


def window_mask(lengths: Tensor, width: int, first: Tensor) -> Tensor:
    """Return what window slots attend to in [prompt P | clean image N | windows N]: first [B, N] -> bool [B, N, P + 2N].

    The prompt, the clean tokens before their window, and the slots of their window up to themselves: what decoding shows.
    """
    place = torch.arange(first.shape[1], device=first.device)
    before = place < first[..., None]
    inside = (place <= place[:, None]) & ~before
    return torch.cat([_prompt(lengths, width).expand(-1, len(place), -1), before, inside], 2)


def _prompt(lengths: Tensor, width: int) -> Tensor:
    return (torch.arange(width, device=lengths.device) < lengths[:, None])[:, None]
