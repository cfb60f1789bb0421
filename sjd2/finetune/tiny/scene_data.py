"""Captioned scenes as tokens, for fine-tuning the embedded model.

n images, N image tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from sjd2.files import find, read_text, split_lines
from sjd2.finetune.data.sources import Captions, TokenData
from sjd2.finetune.tiny.train_ar import encode, token_batch
from sjd2.models.tiny import scenes
from sjd2.models.vqgan import VQGAN

PROMPTS = Path(scenes.__file__).parent / "captions.txt"


@dataclass(kw_only=True)
class SceneTokens(TokenData):
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


@dataclass(kw_only=True)
class SceneCaptions(Captions):
    """Captions of scenes for models that draw their own training images; those of `prompts=shapes` are never among them."""

    def captions(self, n: int, seed: int, held_out: bool) -> list[str]:
        """Return n captions; held-out ones are distinct and neither trained on nor in captions.txt."""
        if not held_out:
            return [scenes.caption(scene) for scene in scenes.training(n, seed)]
        prompts = set(split_lines(read_text(PROMPTS)))
        # + 1: seed 0 is what captions.txt was drawn with; of another seed's captions a few per cent are in it
        shown = [scenes.caption(scene) for scene in scenes.held_out(2 * n + 100, seed + 1)]
        return [text for text in shown if text not in prompts][:n]
