"""Lumina-mGPT 2.0: prompts, forced tokens, greedy images and pixels equal the public algorithm written out."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ChameleonConfig

from sjd2.api import _compose, generate
from sjd2.config import instantiate
from sjd2.models.chameleon_lm import ChameleonLM
from sjd2.models.lumina2 import END, FIRST_CODE, MOVQGAN, ROW_END, START, Lumina2, Lumina2Spec
from sjd2.models.movqgan import MoVQGAN, flat, sizes, stored_name
from tests.helpers import checkpoints_lumina2, family_checks
from tests.helpers.plain_chameleon import Plain
from tests.helpers.plain_movqgan import PlainMoVQGAN
from tests.helpers.public_names import KEYS, public
from tests.helpers.weights import raises_in_one_line

PROMPTS = ["a red fox under the bridge", "two dogs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints_lumina2.write(tmp_path_factory.mktemp("weights") / "lumina2")


@pytest.fixture(scope="module")
def published() -> Lumina2Spec:
    """Build the spec that conf/model/lumina2.yaml describes."""
    return instantiate(_compose("model", "lumina2", {}))


@pytest.fixture(scope="module")
def model(folder: Path, published: Lumina2Spec) -> Lumina2:
    return replace(published, **checkpoints_lumina2.settings(folder)).load(dtype="float64")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return Plain(folder / "model")


@pytest.fixture(scope="module")
def pictures(folder: Path) -> PlainMoVQGAN:
    return PlainMoVQGAN(torch.load(folder / MOVQGAN, weights_only=True))


def at(model: Lumina2, size: str) -> Lumina2:
    """Return the loaded model at another size; the weights are shared."""
    other = copy.copy(model)
    other.spec = replace(model.spec, size=size)
    other.layout = other.spec.layout
    settings = {"vocab_size": FIRST_CODE + model.layout.vocabulary + 1}
    other.ids = torch.tensor(other._model_ids(model.tokenizer.get_vocab(), settings))
    return other


# ---- what is computed
def prompt(plain: Plain, text: str, width: int, height: int) -> list[int]:
    """Write out the conditional prompt; Qwen has no beginning of text, so the end of text stands there."""
    instruction = f"Generate an image of {width}x{height} according to the following prompt:\n"
    return [151643, *plain.text(instruction + text + "<reserved08706>")]


def reference_greedy(plain: Plain, model: Lumina2, text: str, width: int, height: int) -> list[int]:
    """Draw as Lumina-mGPT 2.0's inference_solver does, greedily; start, height and width are given."""
    conditional, scale = prompt(plain, text, width, height), 4.0
    h, w = height // 32, width // 32
    sides = [plain.words.token_to_id(f"<reserved{8800 + side:05d}>") for side in (h, w)]
    head = plain.model.lm_head.weight[FIRST_CODE : FIRST_CODE + model.layout.vocabulary]
    image = [START, *sides]
    while (place := len(image) - 3 + 1) != (4 * w + 1) * 4 * h + 1:
        scale = max(4.0, scale * (1 - (len(image) - 1) / (2 * h * 2 * w)))
        if place % (4 * w + 1) == 0:
            image.append(ROW_END)
        else:
            c, u = (head @ plain.states([*before, *image])[-1] for before in (conditional, []))
            image.append(FIRST_CODE + int((scale * (c - u) + u).argmax()))
    return [*image, END]


@pytest.mark.parametrize(("size", "width", "height"), [("32", 32, 32), ("64x32", 64, 32)])
def test_greedy_images_are_the_reference_solvers(
    model: Lumina2, plain: Plain, pictures: PlainMoVQGAN, size: str, width: int, height: int
) -> None:
    model = at(model, size)
    prompts = PROMPTS if width == height else PROMPTS[:1]
    images = generate(model, prompts, decoder="ar", temperature=0.0, top_k=0)
    for row, text in enumerate(prompts):
        ids = reference_greedy(plain, model, text, width, height)
        assert model.ids[images.tokens[row]].tolist() == ids
        codes = torch.tensor([i - FIRST_CODE for i in ids[3:-1] if i != ROW_END]).view(1, height // 8, width // 8)
        drawn = ((pictures.pixels(codes) + 1) * 127.5).round().clamp(0, 255)[0]
        assert (drawn - images.images[row]).abs().max() <= 1  # float32: where a float lies between two integers
        assert (drawn != images.images[row]).double().mean() < 0.001


def test_both_branches_are_the_reference_prompts(model: Lumina2, plain: Plain) -> None:
    """Tokens of the joined text, as the public code cuts it; the unconditional branch has nothing before the image."""
    texts = [*PROMPTS, " a < b, <old-fashioned>\n", ""]
    assert model.prompt_ids(texts) == [prompt(plain, text, 32, 32) for text in texts]
    condition = model.encode(texts)
    assert condition.uncond_lengths.tolist() == [0]
    table = model.full.get_input_embeddings()
    assert torch.equal(condition.embeds[1, : condition.lengths[1]], table(torch.tensor(model.prompt_ids(texts)[1])))


def test_first_and_last_code(model: Lumina2, published: Lumina2Spec) -> None:
    """Published: 155000 to 171383; inputs and logits of a code are the rows of its id."""
    assert FIRST_CODE + published.vocabulary - 1 == 171383
    ends = torch.tensor([[0, model.layout.vocabulary - 1]])
    rows = FIRST_CODE + ends[0]
    assert torch.equal(model.ids[ends[0]], rows)
    assert torch.equal(model.embed(ends)[0], model.full.get_input_embeddings().weight[rows])
    hidden = torch.randn(2, 32, dtype=torch.float64)
    assert torch.allclose(model.logits(hidden)[:, ends[0]], model.full.lm_head(hidden)[:, rows])
    assert model.decode(model.layout.tokens(ends[:, [0, 1] * 8])).shape == (1, 3, 32, 32)


def test_the_public_size_is_9316_tokens(published: Lumina2Spec) -> None:
    layout = published.layout
    assert (layout.rows, layout.columns, layout.length, int(layout.free.sum())) == (96, 96, 9316, 9216)
    assert layout.prefix == (START, 8824, 8824)
    assert published.sampling == {"guidance_scale": 4.0, "temperature": 1.0, "top_k": 4096, "top_p": 1.0, "min_p": 0.0}
    assert replace(published, size="1536x384").layout.prefix == (START, 8812, 8848)


# ---- pixels
def test_images_become_codes_and_images_again(model: Lumina2, pictures: PlainMoVQGAN) -> None:
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    codes = model.vq.encode(images)
    assert codes.unique().numel() > 8
    assert torch.equal(codes, pictures.encode(images))
    assert torch.allclose(model.vq.pixels(codes).double(), pictures.pixels(codes), atol=1e-5)
    assert model.vq.decode(codes).shape == images.shape
    assert model.codebook.shape == (64, 4)


def test_the_image_tokeniser_keeps_float32(model: Lumina2) -> None:
    half = model.spec.load(dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for tensor in half.vq.state_dict().values())
    assert half.decode(family_checks.images(half, 1)).dtype == torch.uint8


# ---- weights
def test_derived_public_names_are_those_of_the_full_size_models() -> None:
    """Every tensor of the 7B model and of MoVQGAN 270M has its public name, and there is no other."""
    config = ChameleonConfig(vocab_size=171385, vocabulary_map={"<image>": 0})
    config.norm_rows = 1
    with torch.device("meta"):
        full = ChameleonLM(config)
    expected = public("lumina")
    rows = {"model.embed_tokens.weight": (171385, 4096), "lm_head.weight": (171385, 4096)}
    assert {name: tuple(t.shape) for name, t in full.state_dict().items()} == expected | rows
    assert sum(p.numel() for p in full.parameters()) == 7_880_273_920
    published = public("movqgan-270m")
    meta = {name: flat(name, torch.empty(shape, device="meta")) for name, shape in published.items()}
    with torch.device("meta"):
        movqgan = MoVQGAN(sizes(meta, Path("movqgan_270M.ckpt")))
    assert {stored_name(name): t.shape for name, t in movqgan.state_dict().items()} == {
        name: t.shape for name, t in meta.items()
    }
    assert sum(p.numel() for p in movqgan.parameters()) == 270_669_103


def test_the_checkpoint_has_the_public_names(folder: Path) -> None:
    index = json.loads((folder / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) < public("lumina").keys()
    tensors = torch.load(folder / MOVQGAN, weights_only=True)
    published = {line.split()[0] for line in (KEYS / "movqgan-270m.txt").read_text().splitlines()}
    assert tensors.keys() - {"loss.logvar"} < published


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (720, "multiples of 32"),
        ("768*768", "WIDTHxHEIGHT"),
        (800, "larger than the area of 768 x 768"),
        ("1024x768", "larger than the area of 768 x 768"),
        ("1024x224", "4 times as long.*use 896 pixels at most beside 224"),
    ],
)
def test_sizes_that_cannot_be_drawn_are_refused(published: Lumina2Spec, size: int | str, words: str) -> None:
    raises_in_one_line(replace(published, size=size).check, words)


@pytest.mark.parametrize("trained", ["large", 0, 700])
def test_a_trained_size_that_is_no_side_is_refused(published: Lumina2Spec, trained: Any) -> None:
    raises_in_one_line(replace(published, trained_size=trained).check, "trained_size must be a side in multiples of 32")


def test_without_weights_the_command_that_fetches_them_is_told(published: Lumina2Spec, folder: Path) -> None:
    raises_in_one_line(published.check, "hf download Alpha-VLLM/Lumina-mGPT-2.0")
    raises_in_one_line(
        replace(published, weights=str(folder / "model")).check, "hf download ai-forever/MoVQGAN movqgan_270M.ckpt"
    )


def test_a_tokeniser_without_its_weights_is_an_error_and_never_noise(
    model: Lumina2, folder: Path, tmp_path: Path
) -> None:
    tensors = torch.load(folder / MOVQGAN, weights_only=True)
    file = tmp_path / "other.ckpt"
    lost = "decoder.up.3.attn.0.norm.conv_b.weight"
    for changed, words in (
        ({name: t for name, t in tensors.items() if name != lost}, rf"lacks '{lost}' \(1 missing"),
        (
            {name: t for name, t in tensors.items() if not name.startswith("decoder.")},
            "lacks 'decoder.conv_out.weight'",
        ),
        (tensors | {"encoder.extra": torch.zeros(1)}, "unknown 'encoder.extra'"),
        (tensors | {"post_quant_conv.bias": torch.zeros(5)}, "'post_quant_conv.bias' has shape"),
    ):
        torch.save(changed, file)
        raises_in_one_line(lambda: MoVQGAN.load(file, 64), words)
    torch.save({"state_dict": tensors}, file)  # as a trainer writes it
    assert torch.equal(MoVQGAN.load(file, 64).codebook, tensors["quantize.embedding.weight"])
    raises_in_one_line(lambda: MoVQGAN.load(file, 65), "has 64 codes, but model.vocabulary=65")
    raises_in_one_line(replace(model.spec, vq_weights=str(tmp_path)).check, f"has no {MOVQGAN}")


def test_what_does_not_fit_the_checkpoint_is_refused(model: Lumina2, folder: Path, tmp_path: Path) -> None:
    raises_in_one_line(replace(model.spec, vocabulary=66).load, "does not have 66 image codes from id 155000")
    other = tmp_path / "model"
    shutil.copytree(folder / "model", other)
    words = (other / "tokenizer.json").read_text()
    for old, new, message in (
        (
            f'"<eoss>": {END}',
            '"<eoss>": 151800',
            rf"has id 151800 for <eoss> instead of {END}; use weights of model=lumina2",
        ),
        ("<reserved08801>", "<other>", "has id None for <reserved08801>; use"),
        ("<reserved08706>", "<other>", "has no token <reserved08706>"),
    ):
        for separators in ((old, new), (old.replace(": ", ":"), new.replace(": ", ":"))):
            changed = words.replace(*separators)
            if changed != words:
                break
        content = json.loads(changed)
        for token in content["added_tokens"]:
            token["id"] = content["model"]["vocab"].get(token["content"], token["id"])
        (other / "tokenizer.json").write_text(json.dumps(content))
        raises_in_one_line(replace(model.spec, weights=str(other)).load, message)
    (other / "tokenizer.json").write_text(words)
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": None, "eos_token": None}))
    raises_in_one_line(replace(model.spec, weights=str(other)).load, "names neither a bos_token nor an eos_token")
