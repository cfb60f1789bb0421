"""Lumina-mGPT: settings, checkpoints in every published form, precision, placement and the public names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from transformers import ChameleonConfig

from sjd2 import api
from sjd2.decoding.generate import generate
from sjd2.decoding.refine import Coupled
from sjd2.errors import UserError
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.chameleon import Chameleon
from sjd2.models.chameleon_lm import ChameleonLM
from sjd2.models.lumina import lumina
from tests.helpers import checkpoints_chameleon as small
from tests.helpers.public_names import index_bytes, public
from tests.helpers.small_lumina import AR, PROMPTS, SAMPLING, chain, load

HERE = {"weights": "here", "vq_weights": "here", "sampling": {}}


@pytest.mark.parametrize(
    ("size", "grid", "length", "weights"),
    [
        (512, (32, 32), 1061, "Alpha-VLLM/Lumina-mGPT-7B-512"),
        (768, (48, 48), 2357, "Alpha-VLLM/Lumina-mGPT-7B-768"),
        (1024, (64, 64), 4165, "Alpha-VLLM/Lumina-mGPT-7B-1024"),
        ("1024x576", (36, 64), 3 + 36 * 65 + 2, "Alpha-VLLM/Lumina-mGPT-7B-768"),
        ("256x512", (32, 16), 3 + 32 * 17 + 2, "Alpha-VLLM/Lumina-mGPT-7B-512"),
    ],
)
def test_sizes_have_their_grid_and_checkpoint(size: object, grid: tuple, length: int, weights: str) -> None:
    spec = lumina(name="x", size=size, vq_weights="x/y", sampling={})
    width, height = grid[1] * 16, grid[0] * 16
    assert (spec.rows, spec.columns, spec.layout.length, spec.weights) == (*grid, length, weights)
    assert spec.prefix == (8197, 8804 + height // 32, 8804 + width // 32)
    assert f" {width}x{height} " in spec.instruction
    # only the 768 px repository holds a tokenizer
    assert [source.where for source in spec.sources()][2:] == (
        [] if weights.endswith("768") else ["Alpha-VLLM/Lumina-mGPT-7B-768"]
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 700}, "multiples of 32 pixels"),
        ({"size": "768x"}, "multiples of 32 pixels"),
        ({"size": 0}, "multiples of 32 pixels"),
        ({"size": 2048, "weights": None}, "larger than any published"),
        ({"uncond_context": "start"}, "did you mean 'start_token'"),
    ],
)
def test_impossible_settings_say_what_is_possible(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        lumina(**({"name": "x", "size": 768, **HERE} | settings))
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_takes_the_one_that_is_named(
    folder: Path, model: Chameleon, tmp_path: Path
) -> None:
    small.write_lumina(tmp_path / "model", words=False)
    words = str(folder / "tokenizer" / "text_tokenizer.json")  # Meta's
    bare = load(tmp_path, vq_weights=str(folder / "tokenizer" / "vqgan.ckpt"), text_weights=words)
    assert bare.prompt_ids(PROMPTS) == model.prompt_ids(PROMPTS)
    spec = lumina(name="x", size=64, weights=str(tmp_path / "model"), vq_weights="x/y", sampling={})
    assert spec.text_weights == "Alpha-VLLM/Lumina-mGPT-7B-768"


def _config(**change: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return spoil


def _rewrite(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for file in folder.glob("model*"):
            file.unlink()
        small.write_sharded(folder, change(small.language_model(1, 0)), 2)

    return spoil


def _rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.expand(4, -1) if "_norm." in name and t.ndim == 2 else t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_rewrite(_rows), "4 shards of the heads"),
        (
            _rewrite(lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up" not in k}),
            "lacks 1 of the model's tensors",
        ),
        (_config(vocabulary_map=small.names() | {"<reserved08799>": 8804}), "id 8804 for <reserved08799>"),
        (_config(vocabulary_map={"<image>": 5}), "has 0 image codes"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be read as a tokenizer"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused_in_one_sentence(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(UserError, match=words) as error:
        load(tmp_path, vq_weights=str(folder / "tokenizer" / "vqgan.ckpt"))
    assert "\n" not in str(error.value)


def test_a_config_without_names_takes_the_tokenizers(folder: Path, model: Chameleon, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    _config(vocabulary_map=None)(tmp_path / "model")
    bare = load(tmp_path, vq_weights=str(folder / "tokenizer" / "vqgan.ckpt"))
    assert torch.equal(bare.ids, model.ids)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_low_precision_keeps_pixels_and_distributions_in_float32(folder: Path, dtype: str) -> None:
    low = load(folder, dtype, device_map="auto" if dtype == "bfloat16" else None)
    assert low.dtype == getattr(torch, dtype)
    assert low.codebook.dtype == torch.float32
    result = api.generate(low, PROMPTS, decoder=chain("scd", 8, refiner=Coupled()))
    assert result.images.shape == (2, 3, 64, 64)
    assert low.logits(low.embed(result.tokens)).dtype == torch.float32


def test_layers_and_head_that_lie_elsewhere_change_no_token(folder: Path, model: Chameleon, tmp_path: Path) -> None:
    """As device_map leaves them where the memory is short: a layer and the head come from the disk when they are called."""
    spread = load(folder, device_map="auto")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"), "cpu")
    places |= {"model.layers.1": "disk", "lm_head": "disk"}
    spread.full = dispatch_model(spread.full, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert spread.full.lm_head.weight.device.type == "meta"
    condition = model.encode(PROMPTS)
    drawn = [generate(each, AR, condition, [1, 2], sampling=SAMPLING).tokens for each in (model, spread)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(("kind", "gated"), [("lora", True), ("lora", False), ("full", False)])
def test_fine_tunings_are_put_on(folder: Path, model: Chameleon, tmp_path: Path, kind: str, gated: bool) -> None:
    """Whole ones replace every weight, LoRA acts everywhere or, gated, on noisy slots alone; norms keep their one row."""
    torch.manual_seed(0)
    source = load(folder)
    adapter = Adapter(AdapterSettings(kind=kind, gated=gated, rank=2), source)
    with torch.no_grad():
        for parameter in adapter.trainable():
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapter.save(tmp_path / "adapter", torch.float64)
    source.adapter = adapter
    loaded = load(folder, adapter=str(tmp_path / "adapter"))
    x = model.embed(torch.arange(12).view(2, 6))
    places, gate = torch.arange(6).expand(2, -1), torch.tensor([0, 0, 0, 1, 1, 1]).bool().expand(2, -1)
    outs = [each.forward(x, places, None, None, gate) for each in (source, loaded)]
    assert torch.equal(*outs)
    untouched = model.forward(x, places, None)
    assert torch.equal(outs[0][:, :3], untouched[:, :3]) == gated
    assert not torch.allclose(outs[0][:, 3:], untouched[:, 3:])


def test_derived_names_fill_the_full_size_model() -> None:
    with torch.device("meta"):
        config = ChameleonConfig(vocabulary_map={"<image>": 8711})
        config.norm_rows = 1
        built = ChameleonLM(config)
    names = public("lumina")
    assert {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()} == names
    stored = 2 * sum(torch.Size(shape).numel() for shape in names.values())
    assert round(stored / 1e9, 2) == 14.03  # 9.98 + 4.05 GB
    assert index_bytes(names, 2, stored) == 34_406  # the hub lists 34.4 kB


def test_small_checkpoints_have_the_public_names(folder: Path) -> None:
    index = json.loads((folder / "model" / "model.safetensors.index.json").read_text())
    of_two_layers = {name for name in public("lumina") if ".layers." not in name or name.split(".")[2] in "01"}
    assert set(index["weight_map"]) == of_two_layers


def test_sjd2_without_a_fine_tuning_ends_before_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    import hydra
    from omegaconf import OmegaConf

    from harness.plan import make_plan
    from sjd2.files import ROOT

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = hydra.compose("config", ["model=lumina", "decoder=sjd2"])
    OmegaConf.resolve(cfg.model)
    assert (cfg.decoder.window, cfg.decoder.steps) == (96, 25)
    with pytest.raises(UserError, match=r"finetune=sjd2 model=lumina .*decoder=scd") as error:
        make_plan(cfg)
    assert "\n" not in str(error.value)
