"""MoVQGAN, the image tokeniser of Lumina-mGPT 2.0: images to codes and back, on the modules of Emu3's tokeniser.

Emu3's tokeniser in transformers is this one with layers that join frames before and after it; without those layers its
modules are MoVQGAN's. Files are those of ai-forever/MoVQGAN, whose names are kept on disk.

# B images, H x W pixels, h x w codes, V codes of C channels
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAEDecoder, Emu3VQVAEEncoder

from sjd2.errors import UserError
from sjd2.models.shared import to_bytes
from sjd2.models.tensors import load_exactly, read_tensors

KEY = "model.vq_weights"
PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
EXAMPLE = "movqgan_270M.ckpt of ai-forever/MoVQGAN"
# transformers' names in the order of replacing, and the file's
RENAMES = (
    (r"down_block\.down\.", "down."),
    (r"up_block\.up\.", "up."),
    (r"middle_block\.attn_norm\.", "mid.attn_1.norm."),
    (r"middle_block\.", "mid."),
    (r"attn_norms\.(\d+)\.", r"attn.\1.norm."),
    (r"\.([qkv])_proj\.", r".\1."),
    (r"\.out_proj\.", ".proj_out."),
)


class MoVQGAN(nn.Module):
    """An image tokeniser: `encode` [B, 3, H, W] -> codes [B, h, w], `decode` back to uint8."""

    def __init__(self, config: Emu3VQVAEConfig) -> None:
        super().__init__()
        config._attn_implementation = "sdpa"
        self.encoder: Any = Emu3VQVAEEncoder(config)
        self.decoder: Any = Emu3VQVAEDecoder(config)
        for part in (self.encoder, self.decoder):
            part.time_conv, part.time_res_stack = nn.ModuleList(), nn.ModuleList()
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.codebook_size, config.embed_dim)})
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)

    @property
    def codebook(self) -> Tensor:
        """The code vectors [V, C]."""
        return self.get_parameter("quantize.embedding.weight")

    def latents(self, images: Tensor) -> Tensor:
        """Encode without quantising: [B, 3, H, W] in [-1, 1] -> [B, C, h, w]."""
        return self.quant_conv(self.encoder(images[:, None])[:, 0])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokenise images [B, 3, H, W] in [-1, 1] -> codes [B, h, w], one at a time."""
        return torch.cat([self._nearest(self.latents(image)) for image in images.to(self.codebook).split(1)])

    def _nearest(self, latents: Tensor) -> Tensor:
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
        # |z - e|^2 without |z|^2, which is the same for every code
        distance = self.codebook.square().sum(1) - 2 * flat @ self.codebook.T
        return distance.argmin(1).view(len(latents), *latents.shape[2:])

    @torch.no_grad()
    def pixels(self, codes: Tensor) -> Tensor:
        """Decode codes [B, h, w] -> [B, 3, H, W], in [-1, 1] before clipping."""
        vectors = F.embedding(codes, self.codebook).permute(0, 3, 1, 2).contiguous()
        vectors = vectors.to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(vectors)[:, None], vectors[:, None])

    def pixel_parts(self) -> list[nn.Module]:
        """Return what turns code vectors into pixels."""
        return [self.post_quant_conv, self.decoder]

    def compiled_parts(self) -> list[nn.Module]:
        """Return the networks of `decode` that are worth compiling: they are called once for an image."""
        return [self.decoder]

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes [B, h, w] -> uint8 [B, 3, H, W], one image at a time."""
        return torch.cat([to_bytes(self.pixels(image), rounded=True) for image in codes.split(1)])

    @classmethod
    def load(cls, file: Path, codes: int) -> MoVQGAN:
        """Read a checkpoint of ai-forever/MoVQGAN of any size; codes: the expected V.

        Raises `UserError` if a tensor is missing or does not fit.
        """
        stored = read_tensors(file, KEY)
        tensors = {name: flat(name, tensor.float()) for name, tensor in stored.items() if name.startswith(PARTS)}
        with torch.device("meta"):  # saves 270M random numbers that the file replaces
            model = cls(sizes(tensors, file))
        model.to_empty(device="cpu")
        load_exactly(model, tensors, f"{KEY}={file}", stored_name)
        if len(model.codebook) != codes:
            raise UserError(f"{KEY}={file} has {len(model.codebook)} codes, but model.vocabulary={codes}.")
        return model.eval().requires_grad_(False)


def stored_name(name: str) -> str:
    """Return the name that a tensor of this class has in the file."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def flat(name: str, tensor: Tensor) -> Tensor:
    """Return a weight of attention, a 1x1 convolution in the file, as that of a linear layer: [C, C, 1, 1] -> [C, C]."""
    attends = re.search(r"\.attn\w*\.(\d+\.)?(q|k|v|proj_out)\.weight$", name)
    return tensor.flatten(1) if attends else tensor


def sizes(tensors: dict[str, Tensor], file: Path) -> Emu3VQVAEConfig:
    """Read widths, levels, attention and codes off the tensors: the file has no config."""
    needed = (
        "encoder.conv_in.weight",
        "encoder.conv_out.weight",
        "decoder.conv_out.weight",
        "quantize.embedding.weight",
    )
    lacking = [name for name in needed if name not in tensors]
    if lacking:
        raise UserError(f"{KEY}={file} lacks {lacking[0]!r}, so it is not a MoVQGAN; use {EXAMPLE}.")
    found = [re.match(r"encoder\.down\.(\d+)\.(block|attn)\.(\d+)\.(?:conv2|q)\.weight", name) for name in tensors]
    parts = [(int(match[1]), match[2], int(match[3]), match[0]) for match in found if match]
    base = tensors["encoder.conv_in.weight"].shape[0]
    widths = {level: tensors[name].shape[0] for level, kind, _, name in parts if kind == "block"}
    levels = 1 + max(widths, default=0)
    codes, channels = tensors["quantize.embedding.weight"].shape
    return Emu3VQVAEConfig(
        codebook_size=codes,
        embed_dim=channels,
        latent_channels=tensors["encoder.conv_out.weight"].shape[0],
        base_channels=base,
        channel_multiplier=[widths.get(level, base) // base for level in range(levels)],
        num_res_blocks=1 + max((number for _, kind, number, _ in parts if kind == "block"), default=-1),
        attn_resolutions=sorted({level for level, kind, _, _ in parts if kind == "attn"}),
        hidden_size=widths.get(levels - 1, base),  # the width of attention: that of the last level
        double_latent=False,
        temporal_downsample_factor=1,
    )
