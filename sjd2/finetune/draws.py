"""Random numbers of a training batch: one stream for all of it, or one per sample, so that the batch may be cut.

# B samples
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Draws:
    """Numbers for `rows` samples; with one seed per sample they do not depend on which samples share a batch."""

    def __init__(self, seeds: Sequence[int], rows: int) -> None:
        if rows % len(seeds):
            raise ValueError(f"{len(seeds)} seeds for {rows} samples")
        self.rows = rows // len(seeds)  # of each stream
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def index(self, n: int) -> int:
        """Draw a number below n from the first stream."""
        return int(torch.randint(n, (), generator=self.streams[0]))

    def rand(self, *shape: int, blocks: int = 1) -> Tensor:
        """Draw uniform numbers [blocks * B, *shape]; block after block."""
        return self._draw(lambda rows, stream: torch.rand(rows, *shape, generator=stream), blocks)

    def randn(self, *shape: int, device: torch.device) -> Tensor:
        """Draw normal numbers [B, *shape]; on an accelerator by its own generator, since the host is slow for so many."""
        if device.type == "cpu":
            return self._draw(lambda rows, stream: torch.randn(rows, *shape, generator=stream), 1)

        def draw(rows: int, stream: torch.Generator) -> Tensor:
            seed = int(torch.randint(2**62, (), generator=stream))
            there = torch.Generator(device).manual_seed(seed)
            return torch.randn(rows, *shape, generator=there, device=device)

        return self._draw(draw, 1)

    def _draw(self, draw: Callable[[int, torch.Generator], Tensor], blocks: int) -> Tensor:
        parts = [draw(blocks * self.rows, stream).unflatten(0, (blocks, self.rows)) for stream in self.streams]
        return torch.cat(parts, 1).flatten(0, 1)
