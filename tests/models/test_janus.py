"""Janus-Pro: prompts and greedy images equal transformers' own, on small checkpoints in the public layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor, LlamaConfig

from sjd2.api import _compose, generate, load
from sjd2.config import instantiate
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError
from sjd2.files import ROOT
from sjd2.models.janus import Janus, JanusSpec
from tests.helpers import checkpoints_janus, family_checks
from tests.helpers.weights import drop

PROMPTS = ["a red fox under the bridge", "two dogs", " a cat and a bad hand, lowres "]
SAMPLING = SamplingParams(guidance_scale=5.0, top_k=20)
KEYS = ROOT / "tests" / "fixtures" / "keys"
SIZES = {"1b": (2048, 5632, 24, 16), "7b": (4096, 11008, 30, 32)}  # width, inner width, layers, heads


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints_janus.write(tmp_path_factory.mktemp("weights") / "janus")


@pytest.fixture(scope="module")
def model(folder: Path) -> Janus:
    return load("janus", dtype="float64", **checkpoints_janus.settings(folder))


@pytest.fixture(scope="module")
def reference(folder: Path) -> JanusForConditionalGeneration:
    return JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()


def public_ids(folder: Path, prompt: str) -> torch.Tensor:
    """Return what transformers' processor feeds for drawing, from the published turn markers: [1, P]."""
    text = f"<|User|>: {prompt.strip()}\n\n<|Assistant|>:"
    processor = JanusProcessor.from_pretrained(folder)  # older ones take a text that is no list for a list of letters
    return processor(text=[text], generation_mode="image", return_tensors="pt").input_ids


def spec(**changes: object) -> JanusSpec:
    """Build the spec that conf/model/janus.yaml describes."""
    return instantiate(_compose("model", "janus", changes))


# ---- what is computed: prompts and branches
def test_both_branches_are_the_reference_prompts(model: Janus, folder: Path) -> None:
    """The second has padding for all but the first and last id, and is attended to: one per prompt."""
    table = model.full.get_input_embeddings()
    names = model.tokenizer.convert_tokens_to_ids
    condition = model.encode(PROMPTS)
    assert condition.uncond_lengths.tolist() == condition.lengths.tolist()
    assert len(set(condition.lengths.tolist())) == 3
    for row, prompt in enumerate(PROMPTS):
        ids = public_ids(folder, prompt)[0]
        assert torch.equal(condition.embeds[row, : len(ids)], table(ids))
        assert ids[[0, 1, -2, -1]].tolist() == names([checkpoints_janus.BOS, "<|User|>", ":", "<begin_of_image>"])
        ids[1:-1] = names(checkpoints_janus.PAD)
        assert torch.equal(condition.uncond_embeds[row, : len(ids)], table(ids))
    assert not torch.equal(condition.uncond_embeds[0, :3], table(torch.tensor(names([checkpoints_janus.PAD] * 3))))


def test_greedy_images_equal_those_of_transformers(
    model: Janus, reference: JanusForConditionalGeneration, folder: Path
) -> None:
    """`generate(generation_mode="image")` with guidance, one prompt at a time, and the pixels it draws."""
    images = generate(model, PROMPTS, decoder="ar", temperature=0.0)
    for row, prompt in enumerate(PROMPTS):
        ids = public_ids(folder, prompt)
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=False)
        assert torch.equal(images.tokens[row], out[0])
        drawn = reference.decode_image_tokens(out)[0].permute(2, 0, 1)  # [3, H, W]
        expected = ((drawn + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
        difference = (images.images[row].int() - expected.int()).abs()
        assert difference.max() <= 1  # where a float lies on a step between two integers
        assert (difference > 0).float().mean() < 0.001
    unguided = generate(model, PROMPTS, decoder="ar", temperature=0.0, guidance_scale=1.0)
    assert not torch.equal(unguided.tokens, images.tokens)


def test_inputs_and_distributions_go_through_aligner_and_image_head(
    model: Janus, reference: JanusForConditionalGeneration
) -> None:
    codes = torch.randint(0, 64, (2, 7))
    assert torch.allclose(model.embed(codes), reference.prepare_embeddings_for_image_generation(codes), atol=1e-12)
    hidden = torch.randn(2, 3, 32, dtype=torch.float64)
    assert torch.equal(model.logits(hidden), reference.model.generation_head(hidden))
    assert model.logits(hidden).shape == (2, 3, 64)


def test_the_public_size_is_576_tokens() -> None:
    layout = spec().layout
    assert (layout.rows, layout.columns, layout.length, layout.forced_ids) == (24, 24, 576, ())
    assert spec().sampling == {"guidance_scale": 5.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


# ---- pixels
def test_images_become_codes_and_images_again(model: Janus) -> None:
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    codes = model.vq.encode(images)
    assert codes.shape == (2, 4, 4)
    assert codes.unique().numel() > 4
    drawn = model.vq.decode(codes)
    assert (drawn.dtype, drawn.shape) == (torch.uint8, images.shape)
    assert drawn.float().std() > 10
    assert torch.equal(model.decode(model.layout.tokens(codes.flatten(1))), drawn)


def test_codes_are_the_nearest_directions(model: Janus, reference: JanusForConditionalGeneration) -> None:
    """The original compares vectors of length 1; transformers' encoder forgets to, and finds other codes."""
    book = model.codebook
    assert book.shape == (64, 8)
    assert torch.allclose(book.norm(dim=1), torch.ones(64))
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    latent = reference.float().model.vqmodel.quant_conv(reference.model.vqmodel.encoder(images))
    reference.double()
    flat = F.normalize(latent.permute(0, 2, 3, 1), dim=-1)
    nearest = (flat[..., None, :] - book).square().sum(-1).argmin(-1)
    assert torch.equal(model.vq.encode(images), nearest)
    theirs = reference.model.vqmodel.encode(images.double()).image_tokens.view(4, 4, 4)
    assert not torch.equal(theirs, nearest)


def test_the_image_tokeniser_is_float32(folder: Path, model: Janus) -> None:
    half = load("janus", dtype="bfloat16", **checkpoints_janus.settings(folder))
    assert (half.dtype, half.table.dtype, half.codebook.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert half.full.model.vqmodel is None
    tokens = family_checks.images(half, 2)
    assert half.decode(tokens).shape == (2, 3, 64, 64)
    assert half.logits(half.embed(tokens)).dtype == torch.float32


# ---- weights
@pytest.mark.parametrize("size", SIZES)
def test_derived_public_names_are_those_of_the_full_size_model(size: str) -> None:
    """Every tensor of the 1B and 7B models has its public name and there is no other (fixtures: derived, see their heads)."""
    width, inner, layers, heads = SIZES[size]
    text = LlamaConfig(
        vocab_size=102400,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    vision, vq = {"projection_dim": width}, {"projection_dim": width, "image_token_embed_dim": width}
    with torch.device("meta"):
        full = JanusForConditionalGeneration(JanusConfig(text_config=text, vision_config=vision, vq_config=vq))
    public = {line for line in (KEYS / f"janus-pro-{size}.txt").read_text().splitlines() if not line.startswith("#")}
    assert set(full.state_dict()) == public
    assert full.model.generation_embeddings.weight.shape == (16384, 8)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file as 1B", "shards as 7B"])
def test_the_checkpoint_has_the_public_names_and_files(
    folder: Path, model: Janus, tmp_path: Path, sharded: bool
) -> None:
    """The generator leaves out layers, not kinds of names; both layouts load."""
    there = checkpoints_janus.write(tmp_path / "sharded", sharded=True) if sharded else folder
    names = {file.name for file in there.iterdir()}
    assert ("model.safetensors.index.json" if sharded else "model.safetensors") in names
    assert {
        "generation_config.json",
        "processor_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    } <= names
    if sharded:
        index = json.loads((there / "model.safetensors.index.json").read_text())["weight_map"]
        assert set(index) < set((KEYS / "janus-pro-1b.txt").read_text().splitlines())
        again = load("janus", dtype="float64", **checkpoints_janus.settings(there))
        assert torch.equal(again.table, model.table)


def test_what_does_not_fit_the_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    settings = checkpoints_janus.settings(folder)
    for changes, words in (
        ({"size": 70}, "multiple of 16"),
        ({"size": 512}, "generates 64 pixels; set model.size=64"),
        ({"vocabulary": 65}, "has 64 image codes, but model.vocabulary is 65"),
        ({"weights": str(tmp_path)}, "no config.json"),
        ({"weights": "deepseek-community/Janus-Pro-7B", "size": 384}, "hf download deepseek-community/Janus-Pro-7B"),
    ):
        with pytest.raises(UserError, match=words):
            load("janus", **settings | changes)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "multi_modality"}))
    with pytest.raises(UserError, match=r"holds a 'multi_modality' model.*use e.g. deepseek-community/Janus-Pro-1B"):
        load("janus", **settings | {"weights": str(other)})
    (other / "config.json").write_text(json.dumps(config))
    drop(other, "model.vqmodel.decoder.conv_out.bias")  # never noise
    with pytest.raises(UserError, match=r"lacks 1 of the model's tensors, e.g. model.vqmodel.decoder.conv_out.bias"):
        load("janus", **settings | {"weights": str(other)})
