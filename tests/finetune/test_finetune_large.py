"""Fine-tuning at scale: pictures become tokens once, batches are cut and shared at will, kills lose little."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ChameleonVQVAEConfig

import run
from baselines.eagle import train as eagle
from baselines.eagle.train import FinetuneEagle
from harness.console import CONF
from sjd2 import api
from sjd2.checkpoints import write_tensors
from sjd2.config import check_node, instantiate
from sjd2.errors import UserError
from sjd2.finetune import distributed, next_clean, sharding
from sjd2.finetune.data import images
from sjd2.finetune.data import tokens as tokenised
from sjd2.finetune.data.generated import Generated
from sjd2.finetune.data.tokens import ImageTokens
from sjd2.finetune.distributed import Machine, shares
from sjd2.finetune.next_clean import FinetuneSJD2
from sjd2.finetune.objective import recompute
from sjd2.finetune.trainer import warmup_decay
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.chameleon import ChameleonSpec
from sjd2.models.layout import TokenGrid
from sjd2.models.tiny.tokenizer import build_tokenizer
from sjd2.models.tiny.train_ar import TrainAR
from sjd2.models.vqgan import VQGAN
from tests.helpers import checkpoints_chameleon, checkpoints_emu3, checkpoints_janus, checkpoints_llamagen
from tests.helpers.cli import ROOT
from tests.helpers.torchrun import finish, kill, start, together
from tests.helpers.toy import Toy

GRID = TokenGrid(3, 4, 12, prefix=(20,), row_end=22)
CODES, ROWS, SIDE = 32, 4, 16
FULL = {"kind": "full", "gated": False, "code": "appended"}


# ------------------------------------------------------------------------------------------------- a model and pictures
@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random Chameleon of width 32 (model/), its VQGAN (vq/) and 40 pictures (pictures/, shards/)."""
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
    for name in ("pictures", "shards"):
        (root / name).mkdir()
    for shard in range(4):
        with tarfile.open(root / "shards" / f"{shard}.tar", "w") as tar:
            for i in range(shard * 10, shard * 10 + 10):
                colours = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
                picture = io.BytesIO()
                colours.resize((SIDE + i % 5, SIDE + 4)).save(picture, "png")
                caption = f"{words[i % 3]}\n".encode()
                for ending, data in ((".png", picture.getvalue()), (".txt", caption)):
                    (root / "pictures" / f"{i:03d}{ending}").write_bytes(data)
                    info = tarfile.TarInfo(f"some/{i:03d}{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return root


def spec(place: Path) -> ChameleonSpec:
    return ChameleonSpec(
        name="small",
        weights=str(place / "model"),
        vq_weights=str(place / "vq"),
        rows=ROWS,
        columns=ROWS,
        vocabulary=CODES,
    )


@pytest.fixture(scope="module")
def model(place: Path) -> object:
    return spec(place).load("cpu", "float32")


def tokens(place: Path, name: str = "pictures", **more) -> ImageTokens:
    return ImageTokens(images=str(place / name), **({"held_out_share": 4, "workers": 2} | more))


# -------------------------------------------------------------------------------------------------------------- pictures
def saved(picture: Image.Image, kind: str = "png", **more) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **more)
    return file.getvalue()


def test_a_picture_is_scaled_to_cover_and_its_middle_is_cut_out() -> None:
    """Columns of a 4:1 picture carry their number; of the 2:1 cut the outer quarters are gone, on both sides alike."""
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (16, 1))
    cut = images.pixels(saved(Image.fromarray(np.stack([ramp] * 3, -1))), 8, 16)
    assert cut.shape == (8, 16, 3)
    wanted = ramp[0, 16:48].reshape(16, 2).mean(1)  # 32 of 64 columns, two to one
    assert np.abs(cut[4, 1:-1, 0] - wanted[1:-1]).max() <= 1
    tall = images.pixels(saved(Image.fromarray(np.stack([ramp.T] * 3, -1))), 16, 8)
    assert np.array_equal(tall.transpose(1, 0, 2), cut)


def test_turned_and_transparent_pictures_and_small_ones() -> None:
    half = np.zeros((16, 16, 3), np.uint8)
    half[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    assert images.pixels(saved(Image.fromarray(half), "jpeg", exif=exif), 16, 16)[2].max() < 20
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert images.pixels(saved(clear), 16, 16).min() == 255
    assert images.pixels(saved(clear), 16, 16, smallest=17) is None
    with pytest.raises(images.BROKEN):
        images.pixels(saved(Image.fromarray(half))[:60], 16, 16)


def test_a_folder_and_its_shards_hold_the_same(place: Path) -> None:
    folder, shards = (
        [s for part in images.find_parts(str(place / name)) for s in part.samples()] for name in ("pictures", "shards")
    )
    assert len(folder) == len(shards) == 40
    assert [(s.data, s.caption) for s in folder] == [(s.data, s.caption) for s in shards]
    assert folder[1].caption == "two blue squares"
    one = [s for part in images.find_parts(str(place / "shards" / "[01].tar")) for s in part.samples()]
    assert one == shards[:20]


@pytest.mark.parametrize("kind", ["metadata", "jsonl", "list", "object", "json", "caption"])
def test_captions_may_lie_in_many_ways(kind: str, tmp_path: Path) -> None:
    blank, given = saved(Image.new("RGB", (4, 4))), None
    for name in ("a.b.png", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(blank)
    rows = [{"file_name": "a.b.png", "text": "first"}, {"image": "sub/c.png", "caption": "second"}]
    if kind == "metadata":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind in ("jsonl", "list", "object"):
        given = str(tmp_path / f"words.{'jsonl' if kind == 'jsonl' else 'json'}")
        texts = {"list": json.dumps(rows), "object": json.dumps({"a.b.png": "first", "sub/c.png": "second"})}
        Path(given).write_text(texts.get(kind, "\n".join(map(json.dumps, rows))))
    else:
        for name, text in (("a.b", "first"), ("sub/c", "second")):
            (tmp_path / f"{name}.{kind}").write_text(json.dumps({"text": text}) if kind == "json" else text)
    found = [s for part in images.find_parts(str(tmp_path), given) for s in part.samples()]
    assert [(s.name, s.caption) for s in found] == [("a.b.png", "first"), ("sub/c.png", "second")]


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"finetune\.data\.images=FOLDER"):
        ImageTokens()
    with pytest.raises(UserError, match="does not exist"):
        ImageTokens(images=str(tmp_path / "nowhere")).check()
    with pytest.raises(UserError, match=r"no \.jpg"):
        images.find_parts(str(tmp_path))
    (tmp_path / "a.png").touch()
    (tmp_path / "captions.jsonl").write_text('{"file_name": "a.png"}')
    with pytest.raises(UserError, match="cannot be read"):
        images.find_parts(str(tmp_path), str(tmp_path / "captions.jsonl"))
    (tmp_path / "0.tar").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"shard .* cannot be read"):
        list(images.TarPart(tmp_path / "0.tar").samples())


# ---------------------------------------------------------------------------------------------------------------- tokens
def test_tokens_are_the_tokenisers_own_and_held_out_by_content(place: Path, model: object, tmp_path: Path) -> None:
    data, shards = tokens(place), tokens(place, "shards")
    data.prepare(model, tmp_path)
    shards.prepare(model, tmp_path)
    held_out = data.batch(100, 0, held_out=True)
    assert data.count() + len(held_out[0]) == 40
    assert 3 <= len(held_out[0]) <= 20
    wanted = {}
    for sample in images.find_parts(str(place / "pictures"))[0].samples():
        picture = torch.from_numpy(images.pixels(sample.data, SIDE, SIDE)).permute(2, 0, 1)[None]
        wanted[tuple(model.vq.encode(picture / 127.5 - 1).flatten().tolist())] = sample
    trained = data.shuffled(data.count(), 0, 0)
    for prompts, codes, held in ((*held_out, True), (*trained, False)):
        for prompt, row in zip(prompts, codes.tolist(), strict=True):
            sample = wanted[tuple(row)]
            assert sample.caption == prompt
            assert (images.number(sample.data) % 4 == 0) == held
    both = (sorted(map(tuple, d.batch(100, 0, held_out=True)[1].tolist())) for d in (data, shards))
    assert next(both) == next(both)


def test_an_epoch_shows_every_picture_once_in_an_order_of_its_own(place: Path, model: object, tmp_path: Path) -> None:
    data = tokens(place)
    data.prepare(model, tmp_path)
    size = data.count()
    steps = [data.shuffled(5, step, 7)[1].tolist() for step in range(2 * size // 5 + 1)]
    rows = [tuple(row) for step in steps for row in step]
    every = sorted(map(tuple, data._take(data._rows[False])[1].tolist()))
    assert sorted(rows[:size]) == sorted(rows[size : 2 * size]) == every
    assert rows[:size] != rows[size : 2 * size]
    assert data.shuffled(5, 3, 7)[1].tolist() == steps[3]
    assert data.shuffled(5, 3, 8)[1].tolist() != steps[3]


def test_damaged_pictures_are_counted_named_and_skipped(
    place: Path, model: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for file in (place / "pictures").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    broken = folder / "003.png"
    broken.write_bytes(broken.read_bytes()[:40])
    (folder / "007.txt").unlink()
    data = tokens(tmp_path, tolerated=0.05)
    with caplog.at_level("INFO"):
        data.prepare(model, tmp_path / "out")
    assert "2 skipped: " in caplog.text
    assert "1 damaged" in caplog.text
    assert "1 no caption (e.g. 003.png" in caplog.text
    assert data.count() + len(data.batch(100, 0, True)[0]) == 38
    with pytest.raises(UserError, match=r"too many.*003\.png"):
        tokens(tmp_path, tolerated=0.04).prepare(model, tmp_path / "out")
    with pytest.raises(UserError, match="held_out_share"):
        tokens(tmp_path, held_out_share=100_000).prepare(model, tmp_path / "out")


def test_tokenising_goes_on_after_a_kill_and_is_done_once(
    place: Path, model: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokens(place)
    whole.prepare(model, tmp_path / "whole")
    monkeypatch.setattr(images, "PART", 8)
    real, seen = tokenised._encode, []

    def encode(model: object, pictures: np.ndarray) -> np.ndarray:
        seen.append(len(pictures))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(model, pictures)

    monkeypatch.setattr(tokenised, "_encode", encode)
    cut = tokens(place)
    with pytest.raises(KeyboardInterrupt):
        cut.prepare(model, tmp_path / "cut")
    cut.prepare(model, tmp_path / "cut")
    assert sum(seen) == 40 + 8  # the part in hand was lost
    seen[:] = [0] * 9
    again = tokens(place, held_out_share=3)  # another share needs no encoding
    again.prepare(model, tmp_path / "cut")
    assert len(seen) == 9
    monkeypatch.undo()
    order = [sorted(map(tuple, d._take(d._rows[False])[1].tolist())) for d in (whole, cut)]
    assert order[0] == order[1]
    tokens(place, smallest=1).prepare(model, tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("tokens-*"))) == 2


# -------------------------------------------------------------------------------------------------- batches that are cut
class Columns:
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


def gradients(made: FinetuneSJD2, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], float, Toy]:
    """Return the gradients and the loss of one step on the toy model."""
    model = Toy(GRID, dtype=dtype)
    torch.manual_seed(1)
    model.adapter = Adapter(made.adapter, model)
    for parameter in model.adapter.parameters():  # a LoRA that starts at zero has no gradient on one side
        torch.nn.init.normal_(parameter, std=0.3)
    objective = made._objective(model, model.adapter)
    total = 0.0
    for value, figures in made._pieces(model, objective, step=5, seed=0):
        value.backward()
        total += float(figures["loss"])
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}, total, model


@pytest.mark.parametrize("name", VARIANTS)
def test_accumulating_four_times_one_is_one_times_four(name: str) -> None:
    once, loss, _ = gradients(recipe(machine={"micro_batch": 4}, **VARIANTS[name]))
    for micro in (1, 3):
        cut, other, _ = gradients(recipe(machine={"micro_batch": micro}, **VARIANTS[name]))
        assert other == pytest.approx(loss, rel=1e-12)
        assert once.keys() == cut.keys()
        assert max(float((once[key] - cut[key]).abs().max() / once[key].abs().max()) for key in once) < 1e-9


def test_a_mean_of_means_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: windows have different numbers of noisy slots, so samples must not weigh the same."""
    whole, cut = (recipe(machine={"micro_batch": micro}) for micro in (4, 1))
    real = FinetuneSJD2.loss
    monkeypatch.setattr(FinetuneSJD2, "loss", lambda self, *a, count=None, **k: real(self, *a, **k) * len(a[2]) / 4)
    assert abs(gradients(whole)[1] - gradients(cut)[1]) > 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_recomputed_layers_give_the_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind a cache of the clean image, which a layer that runs twice must not write twice."""
    plain, loss, _ = gradients(recipe(machine={"micro_batch": 2}, **VARIANTS[name]))
    monkeypatch.setattr(next_clean, "AT_ONCE", 12 * 5)  # pieces of 5 tokens, made twice as well
    calls = []
    real = type(Toy(GRID).transformer.layers[0].mlp).forward
    monkeypatch.setattr(
        type(Toy(GRID).transformer.layers[0].mlp), "forward", lambda s, x: calls.append(x.shape[1]) or real(s, x)
    )
    again, other, _ = gradients(recipe(machine={"micro_batch": 2, "checkpointing": True}, **VARIANTS[name]))
    assert other == pytest.approx(loss, rel=1e-12)
    assert max(float((plain[key] - again[key]).abs().max() / plain[key].abs().max()) for key in plain) < 1e-9
    assert len(calls) == 2 * 2 * 3  # micro-batches, layers; the clean pass, the noisy one, the noisy one again


def test_shares_are_everything_once() -> None:
    for rows, micro in ((64, 2), (5, 2), (4, None), (1, 3)):
        parts = [list(range(rows))[part] for part, weight in shares(rows, micro) if weight]
        assert [row for part in parts for row in part] == list(range(rows))


def test_schedules_rise_stay_and_fall() -> None:
    cosine, line, flat = (warmup_decay(100, 10, decay, wave) for decay, wave in ((0.5, True), (0.5, False), (0, False)))
    for schedule in (cosine, line, flat):
        assert schedule(0) == pytest.approx(0.1)
        assert schedule(30) == 1.0
    assert flat(99) == 1.0
    assert line(75) == pytest.approx(cosine(75)) == pytest.approx(0.5)
    assert cosine(95) < line(95) == pytest.approx(0.1)


def test_frozen_weights_may_be_bfloat16_but_not_what_is_trained(place: Path, tmp_path: Path) -> None:
    half = spec(place).load("cpu", "bfloat16")
    made = recipe(Codes(), bf16=True, machine={"micro_batch": 2})
    made.run(model=half, out=tmp_path, log=None, device="cpu", seed=0)
    assert {p.dtype for p in half.adapter.parameters()} == {torch.float32}
    assert half.transformer.dtype == torch.bfloat16
    loaded = replace(spec(place), adapter=str(tmp_path / "final")).load("cpu", "bfloat16")
    assert {p.dtype for p in loaded.adapter.parameters()} == {torch.bfloat16}
    for mine, theirs in zip(half.adapter.parameters(), loaded.adapter.parameters(), strict=True):
        assert torch.equal(mine.bfloat16(), theirs)


def test_written_tensors_are_read_by_safetensors(tmp_path: Path) -> None:
    given = {"b": torch.randn(3, 5), "a.c": torch.randn(7).double(), "scalar": torch.tensor(2.0)}
    for dtype in (torch.bfloat16, torch.float32):
        write_tensors(tmp_path / "mine", given, dtype)
        save_file({name: tensor.to(dtype) for name, tensor in given.items()}, tmp_path / "theirs")
        mine, theirs = load_file(tmp_path / "mine"), load_file(tmp_path / "theirs")
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == dtype for name in mine)


# -------------------------------------------------------------------------------------------------------- every family
FAMILIES = ("lumina", "emu3", "janus", "llamagen")


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
        made = {"emu3": checkpoints_emu3, "janus": checkpoints_janus}[name]
        given = made.settings(folder if folder.exists() else made.write(folder))
    return api.load(name, dtype=dtype, **given)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_tokenised_and_tuned(name: str, place: Path, tmp_path: Path) -> None:
    """A LoRA over bfloat16 weights and all weights in float32, both in micro-batches and with recomputed layers."""
    for kind, dtype in (("gated", "bfloat16"), ("full", "float32")):
        model, out = family(name, tmp_path / "weights", dtype), tmp_path / kind
        fresh = copy.deepcopy(model)
        data = tokens(place, "shards/0.tar", folder=str(tmp_path), held_out_share=3)
        more = {"steps": 1, "bf16": kind == "gated", "machine": {"micro_batch": 2, "checkpointing": True}, "lr": 1e-3}
        made = recipe(data, validation_images=2, **more, **VARIANTS[kind])
        figures = made.run(model=model, out=out, log=None, device="cpu", seed=0)
        assert all(np.isfinite(value) for value in figures.values())
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
        size = model.decode(model.layout.tokens(codes[:1])).shape[2:]
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


# ------------------------------------------------------------------------------------------------------- two processes
@dataclass
class Codes:
    """Images for the small Chameleon, made from the seed."""

    def batch(self, n: int, seed: int, held_out: bool = False) -> tuple[list[str], Tensor]:
        generator = torch.Generator().manual_seed(seed + held_out)
        prompts = [" ".join(["red"] * (1 + i % 3)) for i in range(n)]
        return prompts, torch.randint(0, CODES, (n, ROWS * ROWS), generator=generator)


def kinds(place: Path, out: Path, device: str) -> dict[str, object]:
    """Train a gated LoRA and all weights for three steps of four images."""
    made = {}
    for name, more in VARIANTS.items():
        model = spec(place).load(device, "float32")
        built = recipe(Codes(), machine={"micro_batch": 2, "checkpointing": name == "full"}, bf16=False, **more)
        made[name] = (model, built.run(model=model, out=out / name, log=None, device=device, seed=0))
    return made


def member(place: Path, out: Path) -> None:
    """One of two processes: train both kinds, and say what of the weights lies here."""
    with distributed.processes("cpu") as device:
        model, _ = kinds(place, out, device)["full"]
        layer = model.transformer.layers[0].mlp.up_proj.weight
        facts = {"type": type(layer).__name__, "here": layer.to_local().numel(), "whole": layer.numel()}
        facts["norm"] = norm(place, device)
        (out / f"{distributed.rank()}.json").write_text(json.dumps(facts))
        data = tokens(place, "shards", folder=str(out / "tokens"))
        data.prepare(model, out)
        pairs = heads(out / "eagle")
        (out / f"drawn{distributed.rank()}.json").write_text(json.dumps(pairs))


def norm(place: Path, device: str) -> float:
    """Return the gradient's norm over all weights, as clipping sees it."""
    model, made = spec(place).load(device, "float32"), recipe(Codes(), machine={"micro_batch": 2}, **VARIANTS["full"])
    model.adapter = Adapter(made.adapter, model)
    objective = made._objective(model, model.adapter)
    for value, _ in made._pieces(model, objective, 0, 0):
        value.backward()
    found = torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
    return float(found.full_tensor() if objective.sharded else found)


def heads(out: Path) -> list[list[int]]:
    """Train an EAGLE head on the toy's own images; return the images' tokens."""
    data = Generated(captions=Words(), images=22, validation_images=9, batch_size=4)
    made = FinetuneEagle(
        head=eagle.EagleSettings(),
        data=data,
        steps=3,
        batch_size=4,
        lr=1e-2,
        bf16=False,
        machine=Machine(micro_batch=2),
    )
    made.run(model=Toy(GRID), out=out, log=None, device="cpu", seed=0)
    return [data._sets[held_out]["tokens"].tolist() for held_out in (False, True)]


class Words:
    """Captions of one to three words."""

    def captions(self, n: int, seed: int, held_out: bool) -> list[str]:
        return [" ".join("cd" if held_out else "ab" for _ in range(i % 3 + 1)) for i in range(n)]


@pytest.fixture(scope="module")
def pair(place: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Train everything in one process and in two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    together(member, place, two)
    return SimpleNamespace(one=one, two=two, made=kinds(place, one, "cpu"), drawn=heads(one / "eagle"))


def test_two_processes_learn_what_one_learns(pair: SimpleNamespace, place: Path) -> None:
    alone, joined = (torch.load(path / "gated" / "checkpoint.pt")["module"] for path in (pair.one, pair.two))
    assert alone.keys() == joined.keys()
    assert max(float((alone[key] - joined[key]).abs().max()) for key in alone) < 1e-6
    # all weights: the shards of two processes, read by one
    model, figures = pair.made["full"]
    alone = {name: tensor.clone() for name, tensor in model.adapter.tensors().items()}
    other = spec(place).load("cpu", "float32")
    other.adapter = Adapter(AdapterSettings(**FULL), other)
    objective = recipe(Codes(), **VARIANTS["full"])._objective(other, other.adapter)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad])
    before = {name: tensor.clone() for name, tensor in other.adapter.tensors().items()}
    folder = sharding.newest(pair.two / "full")
    assert sharding.facts(folder)["step"] == 3
    sharding.load(folder, objective, [optimizer])
    joined = other.adapter.tensors()
    assert max(float((alone[key] - joined[key]).abs().max()) for key in alone) < 1e-6
    assert max(float((before[key] - joined[key]).abs().max()) for key in alone) > 1e-3  # the control: it did train
    assert min(float(state["step"]) for state in optimizer.state.values()) == 3
    curves = [
        [json.loads(line) for line in (p / "full" / "curve.jsonl").read_text().splitlines()]
        for p in (pair.one, pair.two)
    ]
    assert len(curves[0]) == len(curves[1]) == 1
    for key in ("loss", "val_loss_k1", "val_loss_k2"):
        assert curves[0][0][key] == pytest.approx(curves[1][0][key], abs=1e-5)
    assert figures["val_loss_k1"] == pytest.approx(curves[1][0]["val_loss_k1"], abs=1e-5)


def test_weights_are_really_sharded(pair: SimpleNamespace, place: Path) -> None:
    wanted = norm(place, "cpu")
    for rank in range(2):
        facts = json.loads((pair.two / f"{rank}.json").read_text())
        assert facts["type"] == "DTensor"
        assert 2 * facts["here"] == facts["whole"]
        assert facts["norm"] == pytest.approx(wanted, rel=1e-5)  # of all weights, not of those that lie here
    parts = sorted(file.stat().st_size for file in sharding.newest(pair.two / "full").glob("*.distcp"))
    assert len(parts) == 2
    assert parts[0] > 0.8 * parts[1]
    with pytest.raises(
        RuntimeError, match="not sharded"
    ):  # the control: what accelerate does on a CPU would be noticed
        sharding.check_sharded(torch.nn.Linear(2, 2))


def test_a_result_of_two_processes_loads_as_that_of_one(pair: SimpleNamespace, place: Path) -> None:
    for name in VARIANTS:
        mine, theirs = (load_file(path / name / "final" / "sjd2.safetensors") for path in (pair.one, pair.two))
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert torch.allclose(mine[key].float(), theirs[key].float(), atol=1e-3)  # bfloat16
        loaded = replace(spec(place), adapter=str(pair.two / name / "final")).load("cpu", "float32")
        assert loaded.adapter.settings.kind == ("full" if name == "full" else "lora")


def test_processes_encode_and_draw_different_parts_of_the_same(
    pair: SimpleNamespace, model: object, tmp_path: Path
) -> None:
    alone = tokens(place_of(pair, model), "shards", folder=str(tmp_path))
    alone.prepare(model, tmp_path)
    (mine,), (theirs,) = (list(folder.glob("tokens-*")) for folder in (tmp_path, pair.two / "tokens"))
    assert mine.name == theirs.name
    assert len(list(theirs.glob("*.npy"))) == 4
    for file in mine.iterdir():
        assert file.read_bytes() == (theirs / file.name).read_bytes()
    for rank in range(2):
        assert json.loads((pair.two / f"drawn{rank}.json").read_text()) == pair.drawn
    heads = [load_file(path / "eagle" / "final" / "eagle.safetensors") for path in (pair.one, pair.two)]
    assert max(float((heads[0][key].float() - heads[1][key].float()).abs().max()) for key in heads[0]) < 1e-2
    states = [torch.load(path / "eagle" / "checkpoint.pt")["module"] for path in (pair.one, pair.two)]
    assert max(float((states[0][key] - states[1][key]).abs().max()) for key in states[0]) < 1e-5


def place_of(pair: SimpleNamespace, model: object) -> Path:
    return Path(model.spec.weights).parent


def test_an_eagle_head_learns_the_same_from_cut_batches_and_laws(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also with both guidance branches and the head's own states, whose laws are joined token by token."""
    losses = {"unconditional": None, "guided": 0.5, "rejection": 0.5, "unroll": 2, "noise": 0.2, "steps": 1, "lr": 0.0}
    found = []
    for micro, at_once, checkpointing in ((4, 2**26, False), (1, 2**26, False), (4, 8 * 12 * 3, True)):
        monkeypatch.setattr(eagle, "AT_ONCE", at_once)
        data = Generated(captions=Words(), images=8, validation_images=4, batch_size=4)
        made = FinetuneEagle(
            head=eagle.EagleSettings(), data=data, batch_size=4,
            machine=Machine(micro_batch=micro, checkpointing=checkpointing), **losses,
        )  # fmt: skip
        model = Toy(GRID, dtype=torch.float64)
        data.prepare(model, tmp_path)
        torch.manual_seed(0)
        head = eagle.EagleHead(made.head, model)
        if checkpointing:
            recompute([head.layer])
        total = 0.0
        for value, _ in made._pieces(model, head, 0, 0):
            value.backward()
            total += float(value.detach())
        overlaps = made.validate(model, head)
        found.append((total, {name: p.grad for name, p in head.named_parameters()}, overlaps))
    for total, grads, overlaps in found[1:]:
        assert total == pytest.approx(found[0][0], rel=1e-6)  # the model's norms round to float32 inside
        for name, grad in grads.items():
            assert float((grad - found[0][1][name]).abs().max() / grad.abs().max()) < 1e-5
        assert overlaps == pytest.approx(found[0][2], rel=1e-6)


# ----------------------------------------------------------------------------------------------------- the command line
def command(place: Path, out: Path, *more: str) -> list[str]:
    """Return a short full fine-tuning of the small model as a command."""
    model = {"weights": place / "model", "vq_weights": place / "vq", "rows": ROWS, "columns": ROWS, "vocabulary": CODES}
    made = [
        "stage=finetune",
        "finetune=sjd2-paper",
        "model=tiny",
        "model.adapter=null",
        "logger=none",
        f"run_dir={out}",
    ]
    made += [f"model.{key}={value}" for key, value in model.items()]
    data = {"images": place / "shards", "smallest": 0, "held_out_share": 4, "workers": 2, "batch_size": 4}
    made += [f"finetune.data.{key}={value}" for key, value in data.items()]
    rest = {
        "epochs": 0.9,
        "batch_size": 4,
        "lr": 0.01,
        "warmup": 1,
        "shortest": 4,
        "longest": 8,
        "levels": "[2]",
        "bf16": "false",
    }
    made += [f"finetune.{key}={value}" for key, value in rest.items()]
    return [*made, "finetune.machine.micro_batch=2", "finetune.machine.checkpoint_s=0", *more]


def commanded(arguments: list[str]) -> None:
    """Run a command in this process, as one of several."""
    sys.argv = ["run.py", *arguments]
    code = run.cli()
    sys.exit(code)


@pytest.fixture(scope="module")
def trained(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Run the command under torchrun."""
    out = tmp_path_factory.mktemp("torchrun") / "run"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--standalone",
    ]
    done = subprocess.run(
        [*launcher, str(ROOT / "run.py"), *command(place, out)], cwd=out.parent, capture_output=True, text=True, timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return SimpleNamespace(out=out, done=done)


def test_torchrun_trains_shards_and_speaks_with_one_voice(trained: SimpleNamespace) -> None:
    done, out = trained.done, trained.out
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("result: ") == 1
    assert done.stderr.count("sharded 29 weights") == 1
    assert len(list(out.glob("tokens-*/*.npy"))) == 4
    steps = [json.loads(line)["step"] for line in (out / "curve.jsonl").read_text().splitlines()]
    count = sum(
        json.loads(line)["content"] % 4 != 0
        for file in out.glob("tokens-*/*.jsonl")
        for line in file.read_text().splitlines()
    )
    assert steps[-1] == round(0.9 * count / 4)
    assert "identity" in OmegaConf.load(out / "config.yaml")


def test_a_training_whose_processes_are_all_killed_ends_with_the_same_weights(
    place: Path, trained: SimpleNamespace, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    processes = start(commanded, command(place, out))
    try:
        end = time.monotonic() + 900
        while not list(out.glob("shards-0000000[2-9]/facts.json")) and time.monotonic() < end:
            assert not any(process.exitcode for process in processes)
            time.sleep(0.005)
    finally:
        kill(processes)
    assert not (out / "final").exists()
    began = sharding.facts(sharding.newest(out))["step"]
    finish(
        start(commanded, command(place, out, "finetune.machine.checkpointing=false"))
    )  # the machine's part may change
    assert 2 <= began < sharding.facts(sharding.newest(out))["step"]
    whole, cut = (load_file(path / "final" / "sjd2.safetensors") for path in (trained.out, out))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    curves = [
        [json.loads(line)["step"] for line in (p / "curve.jsonl").read_text().splitlines()] for p in (trained.out, out)
    ]
    assert curves[0] == curves[1]


def test_the_result_decodes(place: Path, trained: SimpleNamespace) -> None:
    from sjd2.decoding.generate import generate
    from sjd2.decoding.sampling import SamplingParams

    loaded = replace(spec(place), adapter=str(trained.out / "final")).load("cpu", "float32")
    decoder = instantiate(settings("decoder=sjd2", "decoder.rule=paper", "decoder.steps=2", "decoder.window=8").decoder)
    done = generate(loaded, decoder, loaded.encode(["a red circle"]), [3], sampling=SamplingParams())
    assert done.tokenised.shape == (1, loaded.layout.length)
    assert loaded.decode(done.tokens).shape == (1, 3, SIDE, SIDE)


def test_recipes_of_one_process_refuse_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        together(commanded, ["stage=finetune", "finetune=vq", "logger=none", f"runs_dir={tmp_path}"])
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- settings
def settings(*overrides: str) -> OmegaConf:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


RECIPES = sorted(path for path in (CONF / "finetune_defaults").glob("*.yaml"))
MODELS = {path.stem for path in (CONF / "model").glob("*.yaml")}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_reach_their_model_and_the_command_line_wins(path: Path) -> None:
    name, model = path.stem.rsplit("-", 1)
    head = [line for line in path.read_text().splitlines()[:8] if line.startswith("#")]
    assert any(f"finetune={name} model={model}" in line for line in head)
    assert model in MODELS
    words = ("finetune.machine.micro_batch=3", "finetune.machine.checkpoint_s=7")
    cfg = settings("stage=finetune", f"finetune={name}", f"model={model}", *words)
    check_node(cfg.finetune)
    assert OmegaConf.load(path).finetune.machine.micro_batch != cfg.finetune.machine.micro_batch == 3
    assert cfg.finetune.machine.checkpoint_s == 7  # set by what recipes share
    assert cfg.dtype == "auto"
    assert cfg.run_dir == f"runs/finetune-{name}-{cfg.model.name}"
    if name != "eagle":
        assert cfg.finetune.batch_size == 64
        assert cfg.finetune.data._target_.endswith("ImageTokens")


def test_any_recipe_takes_any_data(place: Path) -> None:
    """Settings of the one kind must not stay behind for the other."""
    given = "+finetune.data={_target_: sjd2.finetune.data.tokenised.ImageTokens, images: " + str(place / "shards") + "}"
    for name, model in (("eagle", "janus"), ("sjd2", "tiny")):
        more = ("decoder=scd",) if name == "eagle" else ()
        cfg = settings("stage=finetune", f"finetune={name}", f"model={model}", "~finetune.data", given, *more)
        check_node(cfg.finetune)
        assert isinstance(instantiate(cfg.finetune).data, ImageTokens)
    own = settings(
        "stage=finetune", "finetune=eagle", "model=janus", "finetune.data.captions.path=x.txt", "decoder=scd",
        "+finetune.data.decoder=${decoder}",
    )  # fmt: skip
    data = instantiate(own.finetune).data
    assert (data.decoder.name, data.scales) == ("scd", [own.guidance_scale])


def test_the_papers_recipe_has_the_papers_numbers() -> None:
    tuned = settings("stage=finetune", "finetune=sjd2-paper").finetune
    assert (tuned.batch_size, tuned.lr, tuned.epochs, tuned.steps) == (64, 2e-5, 6, None)
    assert (tuned.adapter.kind, tuned.adapter.code, tuned.context) == ("full", "appended", "in_place")
    assert settings("stage=finetune", "finetune=sjd2").get("run_dir") is None  # the embedded model's stays as it was
