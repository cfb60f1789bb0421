"""Anole and Chameleon's image tokeniser: small checkpoints in the public layouts against a plain forward, public names."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import ChameleonConfig, ChameleonVQVAEConfig

from baselines.eagle.eagle_drafter import Eagle
from baselines.eagle.head import EagleHead, EagleSettings
from baselines.zipar import ZipAR
from sjd2 import api
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import generate
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.refine import Coupled
from sjd2.decoding.sampling import SamplingParams
from sjd2.decoding.verify import Exact
from sjd2.errors import UserError
from sjd2.models import vqgan
from sjd2.models.chameleon import Chameleon, ChameleonSpec
from sjd2.models.chameleon_lm import ChameleonLM
from sjd2.models.vqgan import VQGAN, _taming
from tests.helpers import checkpoints_chameleon as small
from tests.helpers import family_checks
from tests.helpers.plain_chameleon import Plain
from tests.helpers.public_names import index_bytes, public

PROMPTS = ["a red cat in the hat", "Two dogs!"]
SAMPLING = SamplingParams(guidance_scale=3.0, top_k=2000)
GREEDY, MATCH = replace(SAMPLING, temperature=0.0), replace(SAMPLING, sampler="gumbel")
AR = Decoder(name="ar", window=1, lossless=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anole")
    small.write_anole(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Chameleon:
    """Load as `model=anole` does, from a local folder, the image tokeniser out of the model's own files."""
    return api.load("anole", dtype="float64", weights=str(folder), vq_weights=str(folder), rows=4, columns=4)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return Plain(folder)


def test_greedy_ar_is_a_plain_forward_over_lanterns_prompts(model: Chameleon, plain: Plain) -> None:
    tokens = generate(model, AR, model.encode(PROMPTS), [1, 2], sampling=GREEDY).tokens
    for row, text in enumerate(PROMPTS):
        conditional, image = [0, *plain.text(text), 8710, 8197], []
        for _ in range(16):
            image.append(4 + int(plain.guided(conditional, [0, 8197], image, 3.0).argmax()))
        assert model.ids[tokens[row]].tolist() == image


def test_prompts_begin_with_id_0_whatever_the_config_says(model: Chameleon, folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text())["bos_token_id"] == 1
    conditional, unconditional = model.prompt_ids(["x"])
    assert [row[0] for row in conditional] == [0]
    assert conditional[0][-2:] == [8710, 8197]
    assert unconditional == [0, 8197]


def test_ids_of_the_first_and_last_code_and_odd_prompts(model: Chameleon) -> None:
    assert model.ids[[0, 8191]].tolist() == [4, 8195]
    assert (model.layout.codes(model.layout.tokens(torch.full((1, 16), 8191))) == 8191).all()
    family_checks.odd_prompts_and_seeds(model, SAMPLING)


def test_the_yaml_draws_1024_tokens() -> None:
    spec = api.instantiate(api._compose("model", "anole", {}))
    assert (spec.layout.length, spec.layout.forced_ids) == (1024, ())
    assert (spec.sampling["guidance_scale"], spec.sampling["top_k"]) == (3.0, 2000)


@pytest.mark.parametrize("name", ["scd", "eagle", "zipar"])
def test_decoders_run_on_it(model: Chameleon, name: str, tmp_path: Path) -> None:
    """Lossless ones return AR's tokens; an EAGLE head has the norms per head that the model has."""
    condition = model.encode(PROMPTS)
    if name == "zipar":
        tokens = generate(
            model, ZipAR(name=name, lossless=False, window_size=2), condition, [1, 2], sampling=SAMPLING
        ).tokens
        assert model.decode(tokens).shape == (2, 3, 64, 64)
        return
    head = EagleHead(EagleSettings(), model)
    head.start("last")
    head.save(tmp_path, torch.float32)
    drafter = {"scd": Jacobi(), "eagle": Eagle(weights=str(tmp_path), depth=3, top_k=4)}[name]
    refiner = Coupled() if name == "scd" else None
    decoder = Decoder(name=name, window=8, lossless=True, drafter=drafter, verifier=Exact(), refiner=refiner)
    tokens = [generate(model, each, condition, [1, 2], sampling=MATCH).tokens for each in (AR, decoder)]
    assert torch.equal(*tokens)


def test_an_empty_unconditional_prompt_needs_a_forced_token() -> None:
    settings = {"name": "x", "weights": "a/b", "vq_weights": "a/b", "vocabulary": 8192, "rows": 2, "columns": 2}
    with pytest.raises(UserError, match=r"model\.prefix"):
        ChameleonSpec(**settings, uncond=())
    assert ChameleonSpec(**settings, uncond=(), prefix=(8197,)).layout.length == 5


# ---- the image tokeniser


@pytest.fixture(scope="module")
def tokeniser() -> VQGAN:
    return small.vqgan(1)


def _codes(*shape: int) -> Tensor:
    return torch.randint(8192, shape, generator=torch.Generator().manual_seed(0))


def _checkpoint(folder: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": tensors | {"loss.logvar": torch.zeros(())}, "global_step": 3}, folder / "vqgan.ckpt")
    return folder / "vqgan.ckpt"


def _alone(folder: Path, tensors: dict[str, Tensor]) -> Path:
    (folder / "config.json").write_text(json.dumps(small.VQ_CONFIG))
    save_file(tensors, folder / "model.safetensors")
    return folder


def _coarsest_first(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({_taming(name, 5): tensor for name, tensor in tensors.items()}, folder / "vq.safetensors")
    return folder / "vq.safetensors"


def _within(folder: Path, tensors: dict[str, Tensor]) -> Path:
    inner = {f"model.vqmodel.{name}": tensor for name, tensor in tensors.items()}
    small.write_sharded(folder, inner | {"lm_head.weight": torch.zeros(3)}, 2)
    return folder


@pytest.mark.parametrize("write", [_checkpoint, _alone, _coarsest_first, _within])
def test_every_published_form_draws_the_same(
    tokeniser: VQGAN, tmp_path: Path, write: Callable[[Path, dict[str, Tensor]], Path]
) -> None:
    """Meta's checkpoint with losses, a conversion's folder or file, and the middle of a whole model."""
    loaded = VQGAN.load(write(tmp_path, small.vqgan_tensors(tokeniser)), 8192)
    codes = _codes(1, 2, 3)
    assert loaded.config.channel_multiplier == [1, 1, 2, 2, 4]
    assert torch.equal(loaded.decode(codes), tokeniser.decode(codes))


def _drop(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(part)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop("decoder."), "has no pixel decoder"),
        (_drop("quantize."), "not a Chameleon image tokeniser"),
        (_drop("post_quant_conv.bias"), "lacks 'post_quant_conv.bias'"),
        (
            lambda tensors: tensors | {"decoder.up.0.attn.0.q.bias": torch.zeros(1)},
            "unknown 'decoder.up.0.attn.0.q.bias'",
        ),
        (lambda tensors: tensors | {"quantize.embedding.weight": torch.zeros(16, 8)}, "has 16 codes"),
    ],
)
def test_tokenisers_that_do_not_fit_are_told_in_one_sentence(
    tokeniser: VQGAN, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str
) -> None:
    file = _checkpoint(tmp_path, change(small.vqgan_tensors(tokeniser)))
    with pytest.raises(UserError, match=words) as error:
        VQGAN.load(file, 8192)
    assert "\n" not in str(error.value)


def test_codes_and_pixels_go_round(tokeniser: VQGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and value range at sizes that are no square; a few images at a time give what all at once give.

    In float64: in float32 a convolution of three images rounds as one of three single images does on some CPUs only.
    """
    tokeniser = deepcopy(tokeniser).double()
    codes = _codes(3, 2, 4)
    drawn = tokeniser.decode(codes)
    assert (drawn.shape, drawn.dtype) == ((3, 3, 32, 64), torch.uint8)
    again = tokeniser.encode(drawn.double() / 127.5 - 1)
    assert (again.shape, again.dtype) == ((3, 2, 4), torch.long)
    assert tokeniser.decode(again).shape == drawn.shape
    monkeypatch.setattr(vqgan, "BUDGET", 32 * 64)
    assert torch.equal(tokeniser.decode(codes), drawn)


# ---- the public files


def test_derived_names_fill_the_full_size_model_and_tokeniser() -> None:
    with torch.device("meta"):
        config = ChameleonConfig(vocabulary_map={"<image>": 8711})
        language, tokeniser = ChameleonLM(config), VQGAN(ChameleonVQVAEConfig())
        assert tokeniser.pixels(torch.empty(1, 256, 64, 64)).shape == (1, 3, 1024, 1024)
    state = {_taming(name, 5): tuple(tensor.shape) for name, tensor in tokeniser.state_dict().items()}
    assert state == public("chameleon-vqgan")
    assert (
        round(4 * sum(torch.Size(shape).numel() for shape in state.values()) / 1e6) == 275
    )  # leloy/Anole-7b-v0.1-vqvae-hf
    whole = {name: tuple(tensor.shape) for name, tensor in language.state_dict().items()}
    whole |= {f"model.vqmodel.{name}": shape for name, shape in state.items()}
    assert whole == public("anole")
    assert index_bytes(whole, 3, 14_300_000_000) == 60_735  # the hub lists 60.7 kB
    without = {name: shape for name, shape in whole.items() if not name.startswith("model.vqmodel.decoder.")}
    assert index_bytes(without, 3, 14_100_000_000) == 46_065  # a conversion of Chameleon itself: 46.1 kB


def test_the_small_checkpoint_has_the_public_names(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    language = {name for name in index["weight_map"] if "vqmodel" not in name}
    wanted = {name for name in public("anole") if "vqmodel" not in name}
    assert language == {name for name in wanted if ".layers." not in name or name.split(".")[2] in "01"}
    assert {name for name in index["weight_map"] if "vqmodel" in name} < set(public("anole"))
