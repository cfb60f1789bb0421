"""Training sequences for next-clean-token prediction: which inputs are noisy, how noisy, and what they may see.

# B samples, P prompt tokens, N image-phase tokens, K levels, D width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def window_mask(lengths: Tensor, width: int, first: Tensor) -> Tensor:
    """Return who sees whom in [prompt P | clean image N | windows N]: lengths [B], first [B, N] -> bool [B, L, L].

    A slot of a window sees the prompt, the clean tokens before its window and the slots of its window up to itself: exactly
    what it sees while decoding.
    """
    rows, n = first.shape
    place = torch.arange(n, device=first.device)
    prompt = (torch.arange(width, device=first.device) < lengths[:, None])[:, None]  # [B, 1, P]
    size = width + 2 * n
    seen = torch.zeros(rows, size, size, dtype=torch.bool, device=first.device)
    seen[:, :width, :width] = torch.ones(width, width, dtype=torch.bool, device=first.device).tril()
    seen[:, width:, :width] = prompt
    seen[:, width : width + n, width : width + n] = place <= place[:, None]
    seen[:, width + n :, width : width + n] = place < first[..., None]
    inside = (place <= place[:, None]) & (place >= first[..., None])
    seen[:, width + n :, width + n :] = inside
    return seen


def in_place_mask(lengths: Tensor, width: int, n: int) -> Tensor:
    """Return the causal mask of [prompt P | image N] without prompt padding: lengths [B] -> bool [B, L, L]."""
    size = width + n
    seen = torch.ones(size, size, dtype=torch.bool, device=lengths.device).tril().repeat(len(lengths), 1, 1)
    seen[:, width:, :width] &= (torch.arange(width, device=lengths.device) < lengths[:, None])[:, None]
    return seen
