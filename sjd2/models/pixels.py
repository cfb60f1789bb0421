"""Image decoders on a GPU: in bfloat16, channels last and compiled, as long as an image stays what it is to a grey level.

# B images, N image-phase tokens
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor, nn

from sjd2.compiler import Compiler
from sjd2.errors import first_line
from sjd2.models.base import ImageModel

GREY = 1.0  # mean difference in grey levels that a faster decoder may make
CHECKED = 0.8 * GREY  # for the one image that is compared: others may differ a little more
logger = logging.getLogger(__name__)


def fuse_pixels(model: ImageModel) -> bool:
    """Let a bfloat16 model draw its pixels fast, if they come from an image tokeniser; return whether.

    A model of another dtype draws in float32, as every model on a CPU. All happens when the first image is drawn; compiled by
    the model's compiler, if it has one then.
    """
    if model.dtype != torch.bfloat16 or not hasattr(model.vq, "pixel_parts"):
        return False
    model.fast_pixels = model.fast_pixels or FastPixels(model)
    return True


def lower_precision(vq: Any, dtype: torch.dtype) -> None:
    """Hold what turns code vectors into pixels in `dtype`, channels last; codebook and encoder stay as they are."""
    for part in vq.pixel_parts():
        part.to(dtype)
        for module in part.modules():
            if isinstance(module, nn.Conv2d):  # Emu3's joins of frames have five dimensions
                module.to(memory_format=torch.channels_last)


class FastPixels:
    """Decodes one image at a time, so that there is one shape to compile.

    Before the first one an image of random codes is drawn in float32, in bfloat16 and compiled. What fails, or draws another
    image, is undone with one warning.
    """

    def __init__(self, model: ImageModel) -> None:
        self.model, self.prepared = model, False

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return pixels of whole images: [B, N] -> uint8 [B, 3, H, W]."""
        if not self.prepared:
            self.prepared = True
            self._prepare(tokens.device)
        return torch.cat([self.model.decode(image) for image in tokens.split(1)])

    def _prepare(self, device: torch.device) -> None:
        model, rng = self.model, torch.Generator().manual_seed(0)
        codes = torch.randint(model.layout.vocabulary, (1, model.layout.num_codes), generator=rng)
        tokens = model.layout.tokens(codes.to(device))
        plain = model.decode(tokens)
        kept = [dict(part.state_dict()) for part in model.vq.pixel_parts()]
        lower_precision(model.vq, model.dtype)
        if (off := _off(model.decode(tokens), plain)) > CHECKED:
            for part, tensors in zip(model.vq.pixel_parts(), kept, strict=True):
                part.float().load_state_dict(tensors)
            logger.warning("pixels stay in float32: %s would change them by %.1f grey levels.", model.dtype, off)
        del kept
        if model.compiler is not None:
            self._compile(tokens, plain, model.compiler)

    def _compile(self, tokens: Tensor, plain: Tensor, compiler: Compiler) -> None:
        networks, begin = self.model.vq.compiled_parts(), time.perf_counter()
        for network in networks:
            network.compile(dynamic=False, backend=compiler.backend)
        try:
            off = _off(self.model.decode(tokens), plain)
            why = None if off <= GREY else f"the image differs by {off:.1f} grey levels"
        except Exception as error:  # whatever a compiler raises: the image can be drawn without it
            why = first_line(getattr(error, "inner_exception", error)).rstrip(".")
        compiler.seconds["pixels"] = time.perf_counter() - begin
        if why is not None:
            compiler.left_out["pixels"] = why
            for network in networks:
                network._compiled_call_impl = None
            logger.warning("pixels are drawn as they are, not compiled: %s.", why)


def _off(image: Tensor, other: Tensor) -> float:
    """Return the mean difference of two images in grey levels."""
    return (image.float() - other.float()).abs().mean().item()
