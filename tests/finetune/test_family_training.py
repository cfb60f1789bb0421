"""Every model family is tokenised and fine-tuned."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from baselines.eagle import train as eagle
from baselines.eagle.train import FinetuneEagle
from sjd2 import api
from sjd2.finetune.data import images
from sjd2.finetune.data.generated import Generated
from sjd2.finetune.distributed import Machine
from sjd2.models.adapter import Adapter
from tests.helpers import (
    checkpoints_chameleon,
    checkpoints_emu3,
    checkpoints_glm_image,
    checkpoints_janus,
    checkpoints_llamagen,
    checkpoints_lumina2,
    checkpoints_simplear,
)
from tests.helpers.small_training import VARIANTS, Words, recipe, tokens
from tests.helpers.tiers import by_default

FAMILIES = ("lumina", "emu3", "janus", "llamagen", "lumina2", "glm-image", "simplear")


def family(name: str, folder: Path, dtype: str) -> object:
    """Load a small checkpoint of the public layout; images of at most 64 x 64 pixels."""
    if name == "lumina":
        if not folder.exists():
            checkpoints_chameleon.write_lumina(folder / "model")
            checkpoints_chameleon.write_tokenizer_folder(folder / "vq")
        given = {"weights": str(folder / "model"), "vq_weights": str(folder / "vq" / "vqgan.ckpt"), "size": 64}
    elif name == "llamagen":
        if not folder.exists():
            checkpoints_llamagen.write(folder)
        sizes = {"vocabulary": checkpoints_llamagen.CODES, "heads": checkpoints_llamagen.HEADS, "size": 64}
        given = sizes | {"vq_weights": str(folder), "text_weights": str(folder / "flan-t5-xl")}
        given["weights"] = str(folder / "t2i_XL_stage2_512.pt")
    else:
        made = {
            "emu3": checkpoints_emu3,
            "janus": checkpoints_janus,
            "lumina2": checkpoints_lumina2,
            "glm-image": checkpoints_glm_image,
            "simplear": checkpoints_simplear,
        }[name]
        given = made.settings(folder if folder.exists() else made.write(folder))
    return api.load(name, dtype=dtype, **given)


@pytest.mark.parametrize("name", by_default(FAMILIES, ["lumina"]))
def test_every_family_is_tokenised_and_tuned(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA over bfloat16 weights and all weights in float32, both in micro-batches and with recomputed layers."""
    monkeypatch.setattr("sjd2.models.glm_image.PREVIEW", 4)  # 12 codes instead of 238
    for kind, dtype in (("gated", "bfloat16"), ("full", "float32")):
        model, out = family(name, tmp_path / "weights", dtype), tmp_path / kind
        fresh = copy.deepcopy(model)
        data = tokens(place, "shards/0.tar", folder=str(tmp_path), held_out_share=3)
        more = {"steps": 1, "bf16": kind == "gated", "machine": {"micro_batch": 2, "checkpointing": True}, "lr": 1e-3}
        made = recipe(data, validation_images=2, **more, **VARIANTS[kind])
        metrics = made.run(model=model, out=out, log=None, device="cpu", seed=0)
        assert all(np.isfinite(value) for value in metrics.values())
        before = {key: t.clone() for key, t in fresh.transformer.state_dict(prefix="decoder.").items()}
        loaded, tuned = Adapter.load(out / "final", fresh).tensors(), model.adapter.tensors()
        assert all(torch.equal(loaded[key].bfloat16(), tuned[key].bfloat16()) for key in tuned)
        if kind == "full":
            same = [key for key in tuned.keys() & before.keys() if torch.equal(before[key], tuned[key])]
            assert not [key for key in same if "layers." in key]
        else:
            assert all(tensor.dtype == torch.float32 for tensor in tuned.values())
            assert all(
                tensor.any() for key, tensor in tuned.items() if "__" in key
            )  # a LoRA's second half starts at zero
    prompts, codes = data.batch(2, 1)
    for prompt, row in zip(prompts, codes.tolist(), strict=True):
        samples = [s for s in images.TarPart(place / "shards" / "0.tar").samples() if s.caption == prompt]
        size = model.encoded_size or model.decode(model.layout.tokens(codes[:1])).shape[2:]
        shown = torch.from_numpy(np.stack([images.pixels(s.data, *size) for s in samples])).permute(0, 3, 1, 2)
        assert row in model.vq.encode(shown / 127.5 - 1).flatten(1).tolist()


def test_dropout_of_a_familys_layers_does_not_reach_an_eagle_head(tmp_path: Path) -> None:
    """Emu3's layers drop a tenth of their outputs in training, at random: cut batches would learn something else."""
    states = []
    for micro in (1, 2):
        data = Generated(captions=Words(), images=4, validation_images=2, batch_size=2, folder=str(tmp_path))
        made = FinetuneEagle(
            head=eagle.EagleSettings(), data=data, steps=2, batch_size=2, lr=1e-3, validation_depth=1,
            machine=Machine(micro_batch=micro),
        )  # fmt: skip
        made.run(
            model=family("emu3", tmp_path / "w", "float32"), out=tmp_path / str(micro), log=None, device="cpu", seed=0
        )
        states.append(torch.load(tmp_path / str(micro) / "checkpoint.pt")["module"])
    assert max(float((states[0][key] - states[1][key]).abs().max()) for key in states[0]) < 1e-5
