"""Train the embedded model's VQGAN: 48 x 48 pixels to 12 x 12 codes out of 512.

B images, h x w codes, V codes of C channels.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ChameleonVQVAEConfig

from sjd2.finetune.recipe import Training, TrainRecipe
from sjd2.finetune.trainer import Metrics, Piece, step_rng
from sjd2.models.tiny import scenes
from sjd2.models.vqgan import VQGAN


def training_images(n: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Render n training scenes -> float [n, 3, 48, 48] in [-1, 1]."""
    return to_float(scenes.render(scenes.training(n, seed), seed)).to(device)


def to_float(images: np.ndarray) -> Tensor:
    """Turn uint8 [n, H, W, 3] into float [n, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


class CodebookEMA(nn.Module):
    """Moving averages that make the codebook a running k-means of the latents; codes that die restart on a latent."""

    uses: Tensor
    sums: Tensor

    def __init__(self, codes: int, channels: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("uses", torch.zeros(codes))
        self.register_buffer("sums", torch.zeros(codes, channels))

    @torch.no_grad()
    def start(self, codebook: Tensor, latents: Tensor, rounds: int = 15) -> None:
        """Set the codebook [V, C] by k-means on latents [n, C]."""
        codebook.copy_(latents[torch.randperm(len(latents))[: len(codebook)]])
        for _ in range(rounds):
            self.uses.zero_()
            self.sums.zero_()
            self._update(codebook, latents, _assign(codebook, latents), decay=0.0)

    @torch.no_grad()
    def update(self, codebook: Tensor, latents: Tensor, codes: Tensor) -> None:
        """Move the codebook [V, C] towards the latents [n, C] that chose each of the codes [n]."""
        self._update(codebook, latents, codes, self.decay)

    def _update(self, codebook: Tensor, latents: Tensor, codes: Tensor, decay: float) -> None:
        uses = torch.bincount(codes, minlength=len(codebook)).to(latents)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, latents)
        self.uses.lerp_(uses, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        dead = self.uses < 0.02 * len(codes) / len(codebook)  # a fiftieth of a fair share
        fresh = latents[torch.randint(len(latents), (len(codebook),), device=latents.device)]
        share = len(codes) / len(codebook)
        self.uses[dead] = share
        self.sums[dead] = fresh[dead] * share
        codebook.copy_(self.sums / self.uses[:, None])


def _assign(codebook: Tensor, latents: Tensor) -> Tensor:
    return (codebook.square().sum(1) - 2 * latents @ codebook.T).argmin(1)


@dataclass(kw_only=True)
class TrainVQ(TrainRecipe):
    """Train the tokeniser on rendered scenes; the result is config.json and vqgan.safetensors."""

    lr: float
    codes: int
    channels: int
    base_channels: int
    channel_multiplier: list[int]
    num_res_blocks: int
    kmeans_step: int
    ema: float
    commitment: float
    edges: float
    validation_images: int

    def usage(self, result: Path) -> str:
        """Return the settings of a command that uses the result."""
        return f"stage=finetune finetune=ar finetune.vq_weights={result}"

    def build(self) -> VQGAN:
        """Make an untrained tokeniser of these settings."""
        return VQGAN(
            ChameleonVQVAEConfig(
                embed_dim=self.channels,
                num_embeddings=self.codes,
                latent_channels=self.base_channels * self.channel_multiplier[-1],
                resolution=scenes.SIDE,
                base_channels=self.base_channels,
                channel_multiplier=list(self.channel_multiplier),
                num_res_blocks=self.num_res_blocks,
            )
        )

    def build_training(self, model: None, *, out: Path, device: str, seed: int) -> Training:
        """Build an untrained tokeniser; its metrics are PSNR in dB, codes in use and the entropy of the codes in nats."""
        network = self.build().to(device).train().requires_grad_(True)
        network.codebook.requires_grad_(False)  # moved by its averages, not by gradients
        average = CodebookEMA(self.codes, self.channels, self.ema).to(device)
        learned = [p for p in network.parameters() if p.requires_grad]
        shown = to_float(scenes.render(scenes.held_out(self.validation_images, seed), seed)).to(device)

        def loss(step: int) -> Piece:
            images = training_images(self.batch_size, int(step_rng(seed, step).integers(2**62)), device)
            return self.loss(network, average, images, step)

        def finish(folder: Path) -> Metrics:
            # Half precision halves the shipped file; the AR model is trained on the codes of the file, not of the run.
            network.save(folder, torch.float16)
            return measure(VQGAN.load(folder).to(device), shown)

        return Training(
            module=nn.ModuleList([network, average]),
            optimizers=[torch.optim.AdamW(learned, self.lr, betas=(0.9, 0.98), weight_decay=1e-4)],
            loss=loss,
            validate=lambda: measure(network, shown),
            finish=finish,
        )

    def loss(self, network: VQGAN, average: CodebookEMA, images: Tensor, step: int) -> Piece:
        """Return the loss on images [n, 3, H, W] and two of its parts, moving the codebook from `kmeans_step` on."""
        latents = network.latents(images).float()
        quantised, penalty = latents, latents.new_zeros(())
        if step >= self.kmeans_step:
            flat = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
            if step == self.kmeans_step:
                average.start(network.codebook, flat)
            codes = network.nearest(latents.detach())
            chosen = F.embedding(codes, network.codebook).permute(0, 3, 1, 2)
            penalty = F.mse_loss(latents, chosen)
            quantised = latents + (chosen - latents).detach()  # straight-through gradient
            average.update(network.codebook, flat, codes.flatten())
        drawn = network.pixels(quantised).float()
        error = F.mse_loss(drawn, images)
        sharp = _edges(drawn - images)
        total = error + self.edges * sharp + self.commitment * penalty
        return total, {"mse": error.detach(), "commitment": penalty.detach()}


def _edges(error: Tensor) -> Tensor:
    """Mean absolute error of the finite differences: blurred borders cost more than flat offsets."""
    return error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


@torch.no_grad()
def measure(model: VQGAN, images: Tensor) -> dict[str, float]:
    """Reconstruct images [n, 3, H, W] -> PSNR (dB, over all pixels), codes in use, entropy of the codes (nats)."""
    codes = model.encode(images)
    drawn = model.decode(codes).float() / 127.5 - 1
    share = torch.bincount(codes.flatten(), minlength=len(model.codebook)).double() / codes.numel()
    return {
        "psnr": 10 * math.log10(4 / F.mse_loss(drawn, images).item()),
        "codes_used": int((share > 0).sum()),
        "entropy": float(-(share * share.clamp_min(1e-12).log()).sum()),
    }
