"""The VQGAN of the Chameleon family (Lumina-mGPT, Anole, tiny): images to codes and back, on transformers' own modules.

Encoder, quantiser and both 1x1 convolutions are `ChameleonVQVAE`; the pixel decoder, which transformers does not ship
for Chameleon, is Janus' decoder class with the attention removed that Chameleon's has not. Files keep the key names of
the taming-transformers checkpoints, so that Meta's `vqgan.ckpt` loads as it is.

B images, H x W pixels, h x w codes, V codes of C channels.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from sjd2.errors import UserError

WEIGHTS = "vqgan.safetensors"


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
            if isinstance(norm, nn.GroupNorm):  # 32 groups from 128 channels on, as published; narrower nets get
                norm.num_groups = min(32, norm.num_channels // 4)  # groups of 4: a norm of 1 channel erases flat colour

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
        return self.decoder(self.vae.post_quant_conv(quantised))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokenise images [B, 3, H, W] in [-1, 1] -> codes [B, h, w]."""
        return self.nearest(self.latents(images.to(self.codebook.dtype)))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Draw codes [B, h, w] -> uint8 [B, 3, H, W]."""
        quantised = F.embedding(codes, self.codebook).permute(0, 3, 1, 2).contiguous()
        image = self.pixels(quantised).float()
        return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and vqgan.safetensors, keys as in taming-transformers."""
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config.to_diff_dict(), indent=1) + "\n")
        state = {_taming(key, len(self.decoder.up)): value for key, value in self.state_dict().items()}
        tensors = {key: value.to(dtype).contiguous() for key, value in state.items()}
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def load(cls, path: Path | str) -> "VQGAN":
        """Read a folder that `save` wrote, or a taming `.ckpt` of Chameleon's default shape.

        Raises UserError when something is missing or does not fit.
        """
        path = Path(path)
        if path.is_dir():
            for name in ("config.json", WEIGHTS):
                if not (path / name).is_file():
                    raise UserError(f"VQGAN folder {path} has no {name}.")
            config = ChameleonVQVAEConfig(**json.loads((path / "config.json").read_text()))
            tensors: Mapping[str, Tensor] = _read(path / WEIGHTS)
        elif path.is_file():
            config, tensors = ChameleonVQVAEConfig(), _read(path)
        else:
            raise UserError(f"VQGAN weights {path} do not exist; give a folder or a taming checkpoint.")
        model = cls(config)
        _load_strictly(model, tensors, path)
        return model.eval().requires_grad_(False)


def _taming(key: str, levels: int) -> str:
    """Rename a key of this class to taming-transformers' name: `up` counts from the finest level there."""
    if key.startswith("decoder.up."):
        level, rest = key.removeprefix("decoder.up.").split(".", 1)
        return f"decoder.up.{levels - 1 - int(level)}.{rest}"
    return key.removeprefix("vae.")


def _read(path: Path) -> dict[str, Tensor]:
    """Read tensors from safetensors or a taming checkpoint; its loss (discriminator, LPIPS) is left out."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError) as error:
        raise UserError(f"VQGAN weights {path} cannot be read: {str(error).splitlines()[0]}.") from error
    tensors = tensors.get("state_dict", tensors)
    return {key: value for key, value in tensors.items() if not key.startswith("loss.")}


def _load_strictly(model: VQGAN, tensors: Mapping[str, Tensor], path: Path) -> None:
    wanted = {_taming(key, len(model.decoder.up)): key for key in model.state_dict()}
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unknown:
        what = f"lack {missing[0]!r}" if missing else f"have an unknown {unknown[0]!r}"
        raise UserError(f"VQGAN weights {path} {what} ({len(missing)} missing, {len(unknown)} unknown keys).")
    state = model.state_dict()
    for name, key in wanted.items():
        if tensors[name].shape != state[key].shape:
            have, want = tuple(tensors[name].shape), tuple(state[key].shape)
            raise UserError(f"VQGAN weights {path}: {name!r} has shape {have}, the config wants {want}.")
    model.load_state_dict({key: tensors[name].float() for name, key in wanted.items()}, strict=True)
