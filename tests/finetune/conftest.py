"""A random Chameleon of width 32 and 40 images, made once per worker."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import ChameleonVQVAEConfig

from sjd2.config import CONF
from sjd2.finetune.tiny.train_ar import TrainAR
from sjd2.models.tiny.tokenizer import build_tokenizer
from sjd2.models.vqgan import VQGAN
from tests.helpers.small_training import CODES, SIDE, spec


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random Chameleon of width 32 (model/), its VQGAN (vq/) and 40 images (images/, shards/)."""
    root = tmp_path_factory.mktemp("large")
    settings = yaml.safe_load((CONF / "finetune" / "ar.yaml").read_text())
    settings |= {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2}
    settings.pop("_target_")
    torch.manual_seed(0)
    TrainAR(**settings).build(CODES).save_pretrained(root / "model")
    build_tokenizer(CODES).save_pretrained(root / "model")
    widths = {"base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 0, "latent_channels": 32}
    VQGAN(ChameleonVQVAEConfig(**widths, num_embeddings=CODES, embed_dim=4, resolution=SIDE)).save(root / "vq")
    rng, words = np.random.default_rng(0), ("a red circle", "two blue squares", "one green ring")
    for name in ("images", "shards"):
        (root / name).mkdir()
    for shard in range(4):
        with tarfile.open(root / "shards" / f"{shard}.tar", "w") as tar:
            for i in range(shard * 10, shard * 10 + 10):
                colours = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
                image = io.BytesIO()
                colours.resize((SIDE + i % 5, SIDE + 4)).save(image, "png")
                caption = f"{words[i % 3]}\n".encode()
                for ending, data in ((".png", image.getvalue()), (".txt", caption)):
                    (root / "images" / f"{i:03d}{ending}").write_bytes(data)
                    info = tarfile.TarInfo(f"some/{i:03d}{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return root


@pytest.fixture(scope="session")
def model(place: Path) -> object:
    return spec(place).load("cpu", "float32")
