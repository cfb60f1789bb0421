"""LlamaGen's VQ-16 image tokeniser on transformers' own modules: images to codes and back.

Encoder, decoder and convolutions are those of `JanusVQVAE`; only the names of the keys differ. Code vectors are compared
and looked up with length 1 (`codebook_l2_norm` in LlamaGen's vq_model.py), which Janus only does in the look-up.

B images, H x W pixels, h x w codes, V codes of C channels.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from sjd2.errors import UserError
from sjd2.models.shared import to_bytes
from sjd2.models.tensors import load_exactly, read_tensors

USAGE = "quantize.codebook_used"  # a counter of the training, published with the weights and unused
MIDDLE = ("block_1", "attn_1", "block_2")


class VQ16(nn.Module):
    """An image tokeniser: `encode` [B, 3, H, W] -> codes [B, h, w], `decode` back to uint8."""

    def __init__(self, config: JanusVQVAEConfig) -> None:
        super().__init__()
        self.vae = JanusVQVAE(config)

    @property
    def codebook(self) -> Tensor:
        """The code vectors as they are used, of length 1: [V, C]."""
        return F.normalize(self.vae.quantize.embedding.weight, dim=-1)

    def latents(self, images: Tensor) -> Tensor:
        """Encode without quantising: [B, 3, H, W] in [-1, 1] -> [B, C, h, w]."""
        return self.vae.quant_conv(self.vae.encoder(images))

    def nearest(self, latents: Tensor) -> Tensor:
        """Find the code of largest cosine similarity at each place: [B, C, h, w] -> [B, h, w]."""
        flat = latents.permute(0, 2, 3, 1)  # their length does not change the order
        return (flat @ self.codebook.T).argmax(-1)

    def pixels(self, quantised: Tensor) -> Tensor:
        """Decode code vectors [B, C, h, w] to an image in [-1, 1] (not clipped) [B, 3, H, W]."""
        return self.vae.decoder(self.vae.post_quant_conv(quantised.to(self.vae.post_quant_conv.weight.dtype)))

    def pixel_parts(self) -> list[nn.Module]:
        """Return what turns code vectors into pixels."""
        return [self.vae.post_quant_conv, self.vae.decoder]

    def compiled_parts(self) -> list[nn.Module]:
        """Return the networks of `decode` that are worth compiling: they are called once for an image."""
        return [self.vae.decoder]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokenise images [B, 3, H, W] in [-1, 1] -> codes [B, h, w]."""
        return self.nearest(self.latents(images.to(self.codebook.dtype)))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes [B, h, w] -> uint8 [B, 3, H, W]."""
        quantised = F.embedding(codes, self.codebook).permute(0, 3, 1, 2).contiguous()
        return to_bytes(self.pixels(quantised), rounded=True)

    @classmethod
    def load(cls, path: Path) -> VQ16:
        """Read a published checkpoint (vq_ds16_t2i.pt). Raises `UserError` if it does not fit."""
        key = "model.vq_weights"
        tensors = read_tensors(path, key)
        tensors.pop(USAGE, None)
        model = cls(_config(tensors, path))
        load_exactly(model.vae, tensors, f"{key}={path}", published_name)
        return model.eval().requires_grad_(False)


def published_name(name: str) -> str:
    """Rename a key of JanusVQVAE to the name in LlamaGen's checkpoints."""
    name = re.sub(r"^encoder\.down\.|^decoder\.up\.", lambda m: m[0].split(".")[0] + ".conv_blocks.", name)
    name = re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)
    return re.sub(r"\.mid\.(\w+)\.", lambda m: f".mid.{MIDDLE.index(m[1])}.", name)


def _config(tensors: dict[str, Tensor], path: Path) -> JanusVQVAEConfig:
    """Read the sizes off the tensors: the file holds no other description of the network."""
    try:
        base = len(tensors["encoder.conv_in.weight"])
        codes, channels = tensors["quantize.embedding.weight"].shape
        latent = len(tensors["post_quant_conv.weight"])
        levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.conv_blocks."))
        blocks = sum(bool(re.fullmatch(r"encoder\.conv_blocks\.0\.res\.\d+\.conv1\.weight", name)) for name in tensors)
        widths = [len(tensors[f"encoder.conv_blocks.{level}.res.0.conv1.weight"]) for level in range(levels)]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"model.vq_weights={path} is not a LlamaGen image tokeniser; use vq_ds16_t2i.pt of peizesun/llamagen_t2i."
        ) from error
    return JanusVQVAEConfig(
        base_channels=base,
        channel_multiplier=[width // base for width in widths],
        num_res_blocks=blocks,
        latent_channels=latent,
        num_embeddings=codes,
        embed_dim=channels,
        double_latent=False,
    )
