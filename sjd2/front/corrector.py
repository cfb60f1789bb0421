"""The front corrector: a small network that corrects the distribution after a draft token that has just been replaced.

A Jacobi pass computes the distribution of a position given the draft token on its left. When that token is rejected, the
distribution is stale, and half of all passes stop there. The corrector moves the hidden state of the position to where the new
left token would have put it; the model's own image head turns it into a distribution. It is draft-only: a token drawn from a
corrected distribution, which is recorded, is verified like any other, so the output distribution is untouched
(docs/exactness.md).
# D width
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sjd2.checkpoints import read_part
from sjd2.errors import UserError
from sjd2.models.base import ImageModel

SETTINGS, WEIGHTS = "front.json", "front.safetensors"


@dataclass(frozen=True, kw_only=True)
class FrontSettings:
    """How a corrector is built: enough to load it without the recipe that made it.

    width: channels of its residual stream. inner: channels of each block's gated MLP. blocks: their number.
    """

    width: int = 192
    inner: int = 512
    blocks: int = 3

    def __post_init__(self) -> None:
        if min(self.width, self.inner, self.blocks) < 1:
            raise UserError(f"finetune.corrector needs width, inner and blocks of 1 or more, got {self}.")


def read_settings(folder: Path) -> FrontSettings:
    """Read a corrector's settings. Raises `UserError` if the folder does not hold one."""
    return read_part(folder, FrontSettings, settings=SETTINGS, weights=WEIGHTS, what="front corrector", recipe="front")


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])  # without weights: the linear map after it has them


class _Block(nn.Module):
    """A pre-norm gated MLP: x [..., W] -> [..., W]."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Corrector(nn.Module):
    """Corrects the hidden state of a position whose left token was replaced; untrained, it returns the stale state.

    depth: D, the model's width.
    """

    def __init__(self, settings: FrontSettings, depth: int) -> None:
        super().__init__()
        self.settings, self.depth = settings, depth
        self.merge = nn.Linear(4 * depth, settings.width)
        self.blocks = nn.ModuleList([_Block(settings.width, settings.inner) for _ in range(settings.blocks)])
        self.out = nn.Linear(settings.width, depth)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, stale: Tensor, source: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Return the corrected hidden state: four times [..., D] -> [..., D].

        stale: last hidden state (after the final norm) at the slot of the replaced left token, the state that gave the stale
        distribution. source: the hidden state that predicted the left token. old, new: embeddings of the replaced and the new
        token. Each guidance branch is corrected with its own states.
        """
        x = _norm(torch.stack([stale, source, old, new], -2)).flatten(-2)
        x = self.merge(x.to(self.merge.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return stale + self.out(_norm(x)).to(stale.dtype)

    def save(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write front.json and front.safetensors with weights of `dtype`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).write_text(json.dumps(asdict(self.settings), indent=1) + "\n")
        save_file(
            {k: v.detach().to(dtype).contiguous().clone() for k, v in self.state_dict().items()}, folder / WEIGHTS
        )

    @classmethod
    def load(cls, folder: Path, model: ImageModel) -> Corrector:
        """Load the corrector in `folder` for this model. Raises `UserError` if the two do not fit."""
        settings = read_settings(folder)
        try:
            stored = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise UserError(f"the front corrector {folder / WEIGHTS} cannot be read: {error}") from error
        corrector = cls(settings, embedding_width(model))
        own = corrector.state_dict()
        wrong = set(own) ^ set(stored) or {k for k in own if own[k].shape != stored[k].shape}
        if wrong:
            raise UserError(f"the front corrector {folder} does not fit this model (e.g. {min(wrong)}).")
        corrector.load_state_dict(stored)
        return corrector.to(device=model.device, dtype=model.dtype).eval().requires_grad_(False)


def embedding_width(model: ImageModel) -> int:
    """Return D, the width of the model's inputs and hidden states."""
    return model.embed(torch.zeros(1, dtype=torch.long, device=model.device)).shape[-1]
