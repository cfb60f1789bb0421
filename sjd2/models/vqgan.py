"""The VQGAN of the Chameleon family (Lumina-mGPT, Anole, tiny): images to codes and back, on transformers' own modules.

Encoder, quantiser and both 1x1 convolutions are `ChameleonVQVAE`; the pixel decoder, which transformers does not ship
for Chameleon, is Janus' decoder class without the attention that Chameleon's does not have. Files keep the key names of
taming-transformers, so that Meta's `vqgan.ckpt` loads as it is, and so do conversions of Anole that contain the decoder,
alone or within the whole model.

B images, H x W pixels, h x w codes, V codes of C channels.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from sjd2.errors import UserError
from sjd2.models.shared import to_bytes
from sjd2.models.tensors import load_exactly, read_header, read_tensors

WEIGHTS = "vqgan.safetensors"
INSIDE_MODEL = ("model.vqmodel.", "vqmodel.")  # prefixes of the tokeniser in a whole model's files
PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
KEY = "model.vq_weights"
BUDGET = 2**19  # pixels decoded at once: at full size 2 images of 512 px; one of 1024 px takes about 3 GB


class VQGAN(nn.Module):
    """An image tokeniser: `encode` [B, 3, H, W] -> codes [B, h, w], `decode` back to uint8."""

    def __init__(self, config: ChameleonVQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.vae = ChameleonVQVAE(config)
        self.decoder = JanusVQVAEDecoder(
            JanusVQVAEConfig(
                base_channels=config.base_channels,
                channel_multiplier=list(config.channel_multiplier),
                num_res_blocks=config.num_res_blocks,
                latent_channels=config.latent_channels,
                out_channels=config.in_channels,
                dropout=config.dropout,
            )
        )
        self.decoder.up[0].attn = nn.ModuleList()  # Janus attends at the lowest level, Chameleon does not
        for norm in self.modules():
            if isinstance(norm, nn.GroupNorm):
                # 32 groups from 128 channels on, as published; narrower networks get groups of 4: a norm over 1 channel
                # erases flat colour
                norm.num_groups = min(32, norm.num_channels // 4)

    @property
    def codebook(self) -> Tensor:
        """The code vectors [V, C]."""
        return self.vae.quantize.embedding.weight

    def latents(self, images: Tensor) -> Tensor:
        """Encode without quantising: [B, 3, H, W] in [-1, 1] -> [B, C, h, w]."""
        return self.vae.quant_conv(self.vae.encoder(images))

    def nearest(self, latents: Tensor) -> Tensor:
        """Find the nearest code of each place: [B, C, h, w] -> [B, h, w]."""
        flat = latents.float().permute(0, 2, 3, 1).flatten(0, 2)
        book = self.codebook.float()
        # |z - e|^2 without |z|^2, which is the same for every code
        distance = book.square().sum(1) - 2 * flat @ book.T
        return distance.argmin(1).view(len(latents), *latents.shape[2:])

    def pixels(self, quantised: Tensor) -> Tensor:
        """Decode code vectors [B, C, h, w] to an image in [-1, 1] (not clipped) [B, 3, H, W]."""
        return self.decoder(self.vae.post_quant_conv(quantised.to(self.vae.post_quant_conv.weight.dtype)))

    def pixel_parts(self) -> list[nn.Module]:
        """Return what turns code vectors into pixels."""
        return [self.vae.post_quant_conv, self.decoder]

    def compiled_parts(self) -> list[nn.Module]:
        """Return the networks of `decode` that are worth compiling: they are called once for an image."""
        return [self.decoder]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokenise images [B, 3, H, W] in [-1, 1] -> codes [B, h, w]."""
        return self.nearest(self.latents(images.to(self.codebook.dtype)))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes [B, h, w] -> uint8 [B, 3, H, W], a few images at a time."""
        scale = 2 ** (len(self.config.channel_multiplier) - 1)
        at_once = max(1, BUDGET // (codes[0].numel() * scale**2))
        return torch.cat([self._decode(part) for part in codes.split(at_once)])

    def _decode(self, codes: Tensor) -> Tensor:
        quantised = F.embedding(codes, self.codebook).permute(0, 3, 1, 2).contiguous()
        return to_bytes(self.pixels(quantised), rounded=True)

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and vqgan.safetensors, keys as in taming-transformers."""
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config.to_diff_dict(), indent=1) + "\n")
        state = {_taming(key, len(self.decoder.up)): value for key, value in self.state_dict().items()}
        tensors = {key: value.to(dtype).contiguous() for key, value in state.items()}
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def load(cls, path: Path | str, codes: int | None = None) -> "VQGAN":
        """Read a folder that `save` wrote, a taming `.ckpt`, or safetensors of a conversion, alone or within its model.

        codes: the expected V, None for any. Raises `UserError` if something is missing or does not fit.
        """
        path = Path(path)
        if not path.exists():
            raise UserError(f"{KEY}={path} does not exist; give a folder or a taming checkpoint.")
        own = path.is_dir() and (path / WEIGHTS).is_file()
        if own and not (path / "config.json").is_file():
            raise UserError(f"{KEY}={path} has no config.json; copy the folder again.")
        tensors = _read(path / WEIGHTS if own else path)
        settings = json.loads((path / "config.json").read_text()) if own else _sizes(tensors, path)
        config = ChameleonVQVAEConfig(**settings)
        if not any(name.startswith("decoder.") for name in tensors):
            raise UserError(
                f"{KEY}={path} has no pixel decoder (conversions of Chameleon leave it out); use Meta's vqgan.ckpt instead."
            )
        model = cls(config)
        load_exactly(model, tensors, f"{KEY}={path}", lambda name: _taming(name, len(model.decoder.up)))
        if codes is not None and len(model.codebook) != codes:
            raise UserError(f"{KEY}={path} has {len(model.codebook)} codes, but model.vocabulary={codes}.")
        return model.eval().requires_grad_(False)


def _taming(key: str, levels: int) -> str:
    """Rename a key of this class to taming-transformers' name: `up` counts from the finest level there."""
    if key.startswith("decoder.up."):
        level, rest = key.removeprefix("decoder.up.").split(".", 1)
        return f"decoder.up.{levels - 1 - int(level)}.{rest}"
    return key.removeprefix("vae.")


def _read(path: Path) -> dict[str, Tensor]:
    """Read the tokeniser's tensors by taming's names; losses and a surrounding language model are left out."""
    found = _read_folder(path) if path.is_dir() else read_tensors(path, KEY)
    prefix = next((prefix for prefix in INSIDE_MODEL if any(name.startswith(prefix) for name in found)), "")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(PARTS)}
    levels = {int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up.")}
    if "decoder.up.0.upsample.conv.weight" in tensors and len(levels) > 1:  # counted from the coarsest level
        tensors = {_taming(name, max(levels) + 1): tensor for name, tensor in tensors.items()}
    return tensors


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """Read what can be the tokeniser's from a folder's safetensors: a model of 14 GB around it stays on the disk."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        names = [name for name in read_header(file, KEY) if name.startswith((*INSIDE_MODEL, *PARTS))]
        with safe_open(file, "pt") as stored:
            tensors |= {name: stored.get_tensor(name) for name in names}
    if not tensors:
        raise UserError(
            f"{KEY}={folder} has no {WEIGHTS} and no other weights of an image tokeniser; give a folder or file of one, "
            "e.g. Meta's vqgan.ckpt."
        )
    return tensors


def _sizes(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Read widths, levels and codes off the tensors: the published files have no config."""
    needed = ("encoder.conv_in.weight", "encoder.conv_out.weight", "quantize.embedding.weight")
    lacking = [name for name in needed if name not in tensors]
    if lacking:
        raise UserError(
            f"{KEY}={path} lacks {lacking[0]!r}, so it is not a Chameleon image tokeniser; use Meta's vqgan.ckpt."
        )
    blocks = [
        match for match in (re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv2\.weight", n) for n in tensors) if match
    ]
    levels = 1 + max((int(match[1]) for match in blocks), default=0)
    base = tensors["encoder.conv_in.weight"].shape[0]
    widths = {int(match[1]): tensors[match[0]].shape[0] for match in blocks}
    codes, width = tensors["quantize.embedding.weight"].shape
    return {
        "embed_dim": width,
        "num_embeddings": codes,
        "latent_channels": tensors["encoder.conv_out.weight"].shape[0],
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "base_channels": base,
        "channel_multiplier": [widths.get(level, base) // base for level in range(levels)],
        "num_res_blocks": 1 + max((int(match[2]) for match in blocks), default=-1),
    }
