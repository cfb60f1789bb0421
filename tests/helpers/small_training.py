"""A small model, images and training settings that the tests of fine-tuning share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch import Tensor

from sjd2.config import CONF
from sjd2.finetune.data.sources import Captions, TokenData
from sjd2.finetune.data.tokens import ImageTokens
from sjd2.finetune.distributed import Machine
from sjd2.finetune.next_clean import FinetuneSJD2
from sjd2.models.adapter import AdapterSettings
from sjd2.models.chameleon import ChameleonSpec
from sjd2.models.layout import TokenGrid

GRID = TokenGrid(3, 4, 12, prefix=(20,), row_end=22)
CODES, ROWS, SIDE = 32, 4, 16
FULL = {"kind": "full", "gated": False, "code": "appended"}


def spec(place: Path) -> ChameleonSpec:
    return ChameleonSpec(
        name="small",
        weights=str(place / "model"),
        vq_weights=str(place / "vq"),
        rows=ROWS,
        columns=ROWS,
        vocabulary=CODES,
    )


def tokens(place: Path, name: str = "images", **more) -> ImageTokens:
    return ImageTokens(images=str(place / name), **({"held_out_share": 4, "workers": 2} | more))


class Columns(TokenData):
    """Images of constant columns, made from the seed."""

    def batch(self, n: int, seed: int, held_out: bool = False) -> tuple[list[str], Tensor]:
        generator = torch.Generator().manual_seed(seed + held_out)
        prompts = [" ".join(["word"] * (1 + i % 3)) for i in range(n)]
        return prompts, torch.randint(0, 12, (n, 4), generator=generator).repeat(1, 3)


def recipe(data: object = None, **more) -> FinetuneSJD2:
    adapter = AdapterSettings(**({"rank": 4, "targets": ("o_proj", "down_proj")} | more.pop("adapter", {})))
    machine = Machine(**({"checkpoint_s": 0} | more.pop("machine", {})))
    more = {
        "levels": (1, 2),
        "shortest": 4,
        "longest": 8,
        "validation_images": 5,
        "validate_every": 100,
        "steps": 3,
    } | more
    more = {"batch_size": 4, "lr": 1e-2, "warmup": 1} | more
    return FinetuneSJD2(adapter=adapter, data=data or Columns(), machine=machine, **more)


VARIANTS = {"gated": {}, "full": {"adapter": FULL, "context": "in_place"}}


@dataclass
class Codes(TokenData):
    """Images for the small Chameleon, made from the seed."""

    def batch(self, n: int, seed: int, held_out: bool = False) -> tuple[list[str], Tensor]:
        generator = torch.Generator().manual_seed(seed + held_out)
        prompts = [" ".join(["red"] * (1 + i % 3)) for i in range(n)]
        return prompts, torch.randint(0, CODES, (n, ROWS * ROWS), generator=generator)


class Words(Captions):
    """Captions of one to three words."""

    def captions(self, n: int, seed: int, held_out: bool) -> list[str]:
        return [" ".join("cd" if held_out else "ab" for _ in range(i % 3 + 1)) for i in range(n)]


def settings(*overrides: str) -> OmegaConf:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)
