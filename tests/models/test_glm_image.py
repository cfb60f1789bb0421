"""GLM-Image: prompts, positions and greedy codes equal transformers' own, on a small checkpoint in the public layout."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GlmImageConfig, GlmImageForConditionalGeneration, GlmImageProcessor

from sjd2 import api
from sjd2.config import instantiate
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import generate
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.refine import Coupled
from sjd2.decoding.sampling import SamplingParams
from sjd2.decoding.verify import Exact
from sjd2.errors import UserError
from sjd2.models import glm_image
from sjd2.models.glm_image import START, GlmImage, grid, preview
from sjd2.models.layout import TokenGrid
from tests.helpers import checkpoints_glm_image
from tests.helpers.public_names import KEYS
from tests.helpers.toy import Toy

PROMPTS = ["a red fox under the bridge", "two dogs", " a cat and a bad hand, lowres "]  # of different lengths
SIZES = ("160x128", "32x2080")  # 238 + 20 and 128 + 65 codes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints_glm_image.write(tmp_path_factory.mktemp("weights") / "glm-image")


@pytest.fixture(scope="module")
def model(folder: Path) -> GlmImage:
    return load(folder, dtype="float64")


@pytest.fixture(scope="module")
def reference(folder: Path) -> GlmImageForConditionalGeneration:
    there = folder / "vision_language_encoder"
    return GlmImageForConditionalGeneration.from_pretrained(there, dtype=torch.float64).eval()


def load(folder: Path, **settings: Any) -> Any:
    return api.load("glm-image", **checkpoints_glm_image.settings(folder) | settings)


def public_inputs(model: GlmImage) -> Any:
    """Return what diffusers' pipeline feeds for the prompts, padded on the left, and the sizes of the grids."""
    messages = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in PROMPTS]
    sides = {"target_h": 32 * model.layout.rows, "target_w": 32 * model.layout.columns}
    texts = model.processor.apply_chat_template(messages)
    return model.processor(text=texts, padding=True, return_tensors="pt", **sides)


# ---- what is computed: prompts, positions, codes
def test_prompts_are_the_processors(model: GlmImage) -> None:
    inputs, condition = public_inputs(model), model.encode(PROMPTS)
    table = model.full.get_input_embeddings()
    assert len(set(condition.lengths.tolist())) == 3
    for row, length in enumerate(condition.lengths.tolist()):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row] > 0]
        assert len(ids) == length
        assert torch.equal(condition.embeds[row, :length], table(ids))
    message = [{"role": "user", "content": [{"type": "text", "text": PROMPTS[-1]}]}]
    sides = {"target_h": 128, "target_w": 160}  # in one call, as diffusers' pipeline has it
    assert model.processor.apply_chat_template(message, tokenize=True, return_dict=True, **sides)["input_ids"] == [
        ids.tolist()
    ]
    words = model.processor.tokenizer.convert_ids_to_tokens(ids)
    assert "".join(words).endswith("<sop>4Ġ5<eop><sop>14Ġ17<eop><|dit_token_64|>")


@pytest.mark.parametrize(
    ("size", "side"),
    [("160x128", 4), ("64x256", 4), pytest.param("32x2080", 16, marks=pytest.mark.full)],
    ids=["wide", "high", "public preview"],
)
def test_greedy_codes_equal_those_of_transformers(
    folder: Path, reference: Any, size: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of prompts of different lengths; the end token is forced, where transformers' model may draw it anywhere."""
    monkeypatch.setattr(glm_image, "PREVIEW", side)  # smaller ones take fewer passes
    shape = (*grid(size), *preview(*grid(size), size))
    monkeypatch.setattr(GlmImageProcessor, "_get_target_shape", lambda *sizes, **named: shape)
    model = load(folder, dtype="float64", size=size)
    sampling = SamplingParams(temperature=0.0)
    found = generate(model, api.decoder("ar"), model.encode(PROMPTS), [0, 1, 2], sampling=sampling).tokens
    inputs, n = public_inputs(model), model.layout.length
    rest = list(range(model.layout.vocabulary, reference.config.text_config.vision_vocab_size))
    out = reference.generate(**inputs, max_new_tokens=n - 1, do_sample=False, suppress_tokens=rest)
    assert torch.equal(found[:, :-1], out[:, inputs["input_ids"].shape[1] :])
    assert (found[:, -1] == model.layout.vocabulary).all()
    assert model.embed(found[:, -1:]).equal(model.full.get_input_embeddings().weight[None, None, 65].expand(3, 1, -1))
    codes = model.layout.codes(found)
    assert torch.equal(codes.flatten(1), found[:, -1 - codes[0].numel() : -1])
    assert len({tuple(row) for row in found.tolist()}) == 3


@pytest.mark.parametrize("size", SIZES)
def test_positions_are_those_of_transformers(folder: Path, model: GlmImage, reference: Any, size: str) -> None:
    other = load(folder, size=size)
    inputs = public_inputs(other)
    network, mask = reference.model, inputs["attention_mask"]
    grids = {"image_grid_thw": inputs["image_grid_thw"], "images_per_sample": inputs["images_per_sample"]}
    prompt, _ = network.get_rope_index(inputs["input_ids"], attention_mask=mask, **grids)
    image = network._cached_decode_position_ids.transpose(0, 1)  # [3, B, N]
    lengths = mask.sum(1)
    place = torch.arange(other.layout.length)
    assert torch.equal(other.rotary_ids(other.image_start(lengths)[:, None] + place), image)
    for row, length in enumerate(lengths.tolist()):
        own = other.rotary_ids(torch.arange(length)[None])[:, 0]
        assert torch.equal(own, prompt[:, row, mask[row] > 0])
    # EAGLE's pair of the last prompt token, and slots after the end, whose tokens mean nothing
    before = other.image_start(lengths)[:, None] - 1
    assert torch.equal(other.rotary_ids(before), (lengths - 1)[None, :, None].expand(3, -1, 1))
    assert torch.equal(other.rotary_ids(before + place[-1] + 9), image[:, :, -1:])
    assert network.config.text_config.max_position_embeddings < START


def test_codes_go_in_and_out_by_their_own_numbers(model: GlmImage) -> None:
    """The first and the last code: row k of the embeddings, row k of the head."""
    codes = torch.tensor([[0, 63]])
    assert torch.equal(model.embed(codes)[0], model.full.get_input_embeddings().weight[[0, 63]])
    assert model.processor.tokenizer.convert_ids_to_tokens([0, 63]) == ["<|dit_token_0|>", "<|dit_token_63|>"]
    hidden = torch.randn(2, 3, 32, dtype=torch.float64)
    assert torch.allclose(model.logits(hidden), model.full.lm_head(hidden)[..., :64], atol=1e-12)
    assert model.logits(hidden).shape == (2, 3, 64)


def test_the_public_sizes() -> None:
    spec = instantiate(api._compose("model", "glm-image", {}))
    assert spec.layout.length == 16 * 16 + 32 * 32 + 1
    assert (spec.layout.forced_ids, spec.layout.preview) == ((16385,), (16, 16))
    assert grid("1152x768") == (24, 36)
    assert preview(24, 36, "1152x768") == (13, 19)
    assert spec.sampling == {"guidance_scale": 1.0, "temperature": 0.9, "top_k": 0, "top_p": 0.75, "min_p": 0.0}


# ---- the layout
def test_a_preview_comes_before_the_grid() -> None:
    layout = TokenGrid(2, 3, 9, suffix=(20,), preview=(2, 2))
    assert (layout.length, layout.num_codes, layout.begin) == (11, 10, 4)
    assert layout.free.tolist() == [True] * 10 + [False]
    assert layout.shown.tolist() == [False] * 4 + [True] * 6 + [False]
    tokens = layout.tokens(torch.arange(10)[None] % 9)
    assert layout.codes(tokens).tolist() == [[[4, 5, 6], [7, 8, 0]]]
    place = torch.arange(11)
    above = place - layout.strides(place)
    above = torch.where(above < layout.tops(place), -1, above)
    assert above[:10].tolist() == [-1, -1, 0, 1, -1, -1, -1, 4, 5, 6]  # the first row of the grid has nothing above it
    with pytest.raises(UserError, match="cannot have row ends"):
        TokenGrid(2, 3, 9, row_end=20, preview=(2, 2))


@pytest.mark.parametrize("init", ["left", "up"])
def test_copies_stay_within_their_grid(init: str) -> None:
    toy = Toy(TokenGrid(3, 3, 12, suffix=(20,), preview=(2, 2)), dtype=torch.float64)
    sampling = SamplingParams(sampler="gumbel")
    drafting = Decoder(
        name=init, window=6, lossless=True, drafter=Jacobi(init=init), verifier=Exact(), refiner=Coupled()
    )
    found, ar = (
        generate(toy, d, toy.encode(["a", "b"]), [1, 2], sampling=sampling) for d in (drafting, api.decoder("ar"))
    )
    assert torch.equal(found.tokens, ar.tokens)


# ---- the image tokeniser
def test_images_become_the_codes_of_transformers(model: GlmImage, reference: Any) -> None:
    """A picture at the size of a grid, through transformers' image processor, vision encoder and quantiser."""
    assert model.encoded_size == (64, 80)
    picture = np.random.default_rng(0).integers(256, size=(64, 80, 3), dtype=np.uint8)
    fed = model.processor.image_processor(images=[picture], do_resize=False, return_tensors="pt")
    assert fed["image_grid_thw"].tolist() == [[1, 4, 5]]
    features = reference.get_image_features(fed["pixel_values"].double(), fed["image_grid_thw"]).pooler_output
    wanted = reference.get_image_tokens([x.double() for x in features])
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].double() / 127.5 - 1
    codes = model.vq.encode(pixels)
    assert codes.shape == (1, model.layout.num_codes)
    assert torch.equal(codes[0, 238:], wanted)
    assert wanted.unique().numel() > 4
    assert torch.equal(model.layout.codes(model.layout.tokens(codes))[0].flatten(), wanted)
    assert torch.equal(model.layout.all_codes(model.layout.tokens(codes)), codes)


def test_what_decides_images_is_in_the_digest(folder: Path, tmp_path: Path) -> None:
    """The chat template and the scheduler are no weights; what transformers' own save writes is a processor too."""
    there = tmp_path / "there"
    shutil.copytree(folder, there)
    spec = instantiate(api._compose("model", "glm-image", checkpoints_glm_image.settings(there)))
    before = spec.digest()
    glm_image.load_processor(there / "processor").save_pretrained(tmp_path / "saved")
    (there / "processor" / "preprocessor_config.json").unlink()
    shutil.copy(tmp_path / "saved" / "processor_config.json", there / "processor")
    spec.check()
    assert glm_image.load_processor(there / "processor").image_processor.patch_size == 16
    saved = spec.digest()
    (there / "processor" / "chat_template.jinja").write_text("{{ messages[0]['content'][0]['text'] }}!")
    assert len({before, saved, spec.digest()}) == 3


# ---- what is refused
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 1000}, "multiples of 32 pixels"),
        ({"size": "1024*768"}, "multiples of 32 pixels"),
        ({"size": "32x8224"}, "preview would have no row or column"),
        ({"vocabulary": 65}, "has 64 image codes, but model.vocabulary is 65"),
        ({"end": 70}, "ends images with token 65, but model.end is 70"),
        ({"pixels": "decode"}, "no model_index.json.*; model.pixels=none does without the diffusion stage"),
        ({"pixels": "nothing"}, "unknown model.pixels 'nothing'. Valid: decode, none"),
    ],
)
def test_settings_that_do_not_fit(folder: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(folder, **settings)


def test_guidance_and_source_images_are_refused(model: GlmImage) -> None:
    with pytest.raises(UserError, match=r"guidance_scale=3, but glm-image draws its tokens without guidance"):
        api.generate(model, PROMPTS, decoder="ar", guidance_scale=3.0)
    with pytest.raises(UserError, match=r"<\|image\|>, which stands for a source image"):
        model.encode(["a sign with <|image|> on it"])


def test_files_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    shutil.copytree(folder, there)
    stage, words = there / "vision_language_encoder", there / "processor"
    shards = json.loads((stage / "model.safetensors.index.json").read_text())["weight_map"]
    shard = stage / shards["model.vqmodel.quant_conv.weight"]
    tensors = load_file(shard)
    save_file({name: x for name, x in tensors.items() if "quant_conv.weight" not in name}, shard)
    with pytest.raises(UserError, match=r"lacks \d of the model's tensors, e.g. model.vqmodel"):
        load(there)
    (words / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat_template.jinja"):
        load(there)
    (words / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no processor/tokenizer.json"):
        load(there)
    config = json.loads((stage / "config.json").read_text())
    (stage / "config.json").write_text(json.dumps(config | {"model_type": "glm4"}))
    shutil.copy(folder / "processor" / "tokenizer.json", words)
    with pytest.raises(UserError, match=r"holds a 'glm4' model.*use e.g. zai-org/GLM-Image"):
        load(there)


def test_other_sampling_parameters_are_reported(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a generation_config.json says nothing, transformers has values of its own."""
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert not caplog.records
    there = tmp_path / "there"
    shutil.copytree(folder, there)
    (there / "vision_language_encoder" / "generation_config.json").write_text('{"temperature": 0.7, "top_p": 0.75}')
    with caplog.at_level(logging.WARNING):
        load(there)
    assert "samples with temperature=0.7 top_k=50 by its generation_config.json" in caplog.text


# ---- weights
def test_derived_public_names_are_those_of_the_full_size_model(model: GlmImage) -> None:
    """Every tensor has its public name and shape and there is no other (fixture: derived, see its head)."""
    with torch.device("meta"):
        full = GlmImageForConditionalGeneration(GlmImageConfig())
    lines = (KEYS / "glm-image.txt").read_text().splitlines()
    public = {}
    for name, shape in (line.split() for line in lines if not line.startswith("#")):
        for layer in range(40) if "*" in name else [0]:  # both networks have 40 layers
            public[name.replace("*", str(layer))] = tuple(map(int, shape.split("x")))
    assert {name: tuple(tensor.shape) for name, tensor in full.state_dict().items()} == public
    assert set(model.full.state_dict()) <= set(public)
