"""Captioned scenes as tokens, for fine-tuning the embedded model.

n images, N image tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from sjd2.models.tiny import scenes
from sjd2.models.tiny.ar import encode, token_batch
from sjd2.models.vqgan import VQGAN
from sjd2.paths import find


@dataclass(kw_only=True)
class SceneTokens:
    """Rendered scenes through the VQGAN of `vq_weights`, made on the fly; a pure function of the seed."""

    vq_weights: str

    @cached_property
    def vqgan(self) -> VQGAN:
        return VQGAN.load(find(self.vq_weights))

    def batch(self, n: int, seed: int, held_out: bool = False) -> tuple[list[str], Tensor]:
        """Return n captions and codes [n, N]; held-out captions are never trained on."""
        if not held_out:
            return token_batch(self.vqgan, n, seed)
        shown = scenes.held_out(n, seed)
        return [scenes.caption(scene) for scene in shown], encode(self.vqgan, shown, seed)
