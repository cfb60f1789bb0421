"""What a training takes its samples from: captioned images as tokens, and captions; each may be made or checked first.

# n samples, N image-phase tokens, L codes of an image
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sjd2.models.base import ImageModel


class Source:
    """Data of a training; a pure function of the seed, so that a resumed run sees what an undisturbed one sees."""

    def check(self) -> None:
        """Raise `UserError` if what the data is made from is missing; loads nothing."""

    def prepare(self, model: ImageModel, out: Path) -> None:
        """Make what does not exist yet, in `out` unless the data has a folder of its own."""


class TokenData(Source):
    """Captioned images as tokens."""

    def batch(self, n: int, seed: int, held_out: bool = False) -> tuple[list[str], Tensor]:
        """Return n captions and codes [n, L]; held-out ones are never trained on."""
        raise NotImplementedError


class Collection(TokenData):
    """A finite set of images, trained on in epochs."""

    def count(self) -> int:
        """Return the number of training images."""
        raise NotImplementedError

    def shuffled(self, n: int, step: int, seed: int) -> tuple[list[str], Tensor]:
        """Return the n images of one step; n times the steps of an epoch go through every image once."""
        raise NotImplementedError


class ScaledData(TokenData):
    """Images that were drawn under known guidance scales; validation_images: how many are measured."""

    validation_images: int

    def scaled(self, n: int, seed: int, held_out: bool = False) -> tuple[list[str], Tensor, Tensor]:
        """Return n captions, codes [n, L] and scales [n]."""
        raise NotImplementedError


class Captions:
    """Where captions come from; the first k of `captions(n)` are `captions(k)`."""

    def check(self) -> None:
        """Raise `UserError` if the captions are missing."""

    def captions(self, n: int, seed: int, held_out: bool) -> list[str]:
        """Return n captions; no caption is held out under one seed and trained on under another."""
        raise NotImplementedError
