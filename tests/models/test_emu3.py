"""Emu3-Gen: prompts, forced tokens and greedy images equal transformers' own, on a small checkpoint in the public layout."""

from __future__ import annotations

import json
import shutil
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from transformers import Emu3Config, Emu3ForConditionalGeneration, Emu3Processor

from sjd2.api import _compose, generate, load
from sjd2.config import instantiate
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError
from sjd2.files import ROOT
from sjd2.models.emu3 import NEGATIVE, PIECES, POSITIVE, Emu3, Emu3Spec, grid
from sjd2.models.loading import load_tokenizer
from tests.helpers import checkpoints_emu3, family_checks
from tests.helpers.weights import drop

PROMPTS = ["a red fox under the bridge", "two dogs", "a cat and a bad hand, lowres"]
SAMPLING = SamplingParams(guidance_scale=3.0, top_k=20)
KEYS = ROOT / "tests" / "fixtures" / "keys" / "emu3.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints_emu3.write(tmp_path_factory.mktemp("weights") / "emu3")


@pytest.fixture(scope="module")
def model(folder: Path) -> Emu3:
    return load("emu3", dtype="float64", **checkpoints_emu3.settings(folder))


@pytest.fixture(scope="module")
def processor(folder: Path) -> Emu3Processor:
    return Emu3Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Emu3ForConditionalGeneration:
    return Emu3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()


def frame(processor: Emu3Processor, text: str, ratio: str = "1:1", area: int = 1024) -> torch.Tensor:
    """Return what transformers' processor feeds for drawing 32 x 32 pixels (or others): [1, P]."""
    settings = {"return_for_image_generation": True, "ratio": ratio, "image_area": area, "return_tensors": "pt"}
    return processor(text=text, **settings).input_ids


# ---- what is computed: prompts, sizes, branches
def test_both_branches_are_the_reference_prompts(model: Emu3, processor: Emu3Processor, folder: Path) -> None:
    """Positive words after each prompt, the fixed negative text in the other branch, both in the same frame."""
    table = model.full.get_input_embeddings()
    condition = model.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        ids = frame(processor, prompt + " masterpiece, film grained, best quality.")
        assert torch.equal(condition.embeds[row, : condition.lengths[row]], table(ids)[0])
    ids = frame(processor, NEGATIVE)
    assert torch.equal(condition.uncond_embeds, table(ids))
    assert condition.uncond_lengths.tolist() == [ids.shape[1]]
    names = json.loads((folder / "vocab.json").read_text())
    assert ids[0, [0, -5, -4, -3, -2, -1]].tolist() == [
        names[name] for name in ("<|extra_203|>", "<|image start|>", "4", "*", "4", "<|image token|>")
    ]


@pytest.mark.parametrize(("size", "ratio"), [("32", "1:1"), ("48x32", "3:2")])
def test_greedy_images_equal_those_of_transformers(
    folder: Path, processor: Emu3Processor, reference: Emu3ForConditionalGeneration, size: str, ratio: str
) -> None:
    """`generate` with guidance and the documented prefix constraint, one prompt at a time, and the pixels it draws."""
    model = load("emu3", dtype="float64", **checkpoints_emu3.settings(folder) | {"size": size})
    prompts = PROMPTS if ratio == "1:1" else PROMPTS[:1]
    images = generate(model, prompts, decoder="ar", temperature=0.0, top_k=0)
    find, layout = processor.tokenizer.convert_tokens_to_ids, model.layout
    forced = find(["<|extra_200|>", "<|extra_201|>", "<|image end|>", "<|extra_204|>"])
    area = 64 * layout.rows * layout.columns
    for row, prompt in enumerate(prompts):
        ids, negative = (frame(processor, text, ratio, area) for text in (prompt + POSITIVE, NEGATIVE))

        def allowed(batch: int, sequence: torch.Tensor, begin: int = ids.shape[1]) -> list[int]:
            place = len(sequence) - begin
            if place >= layout.rows * layout.stride:
                return [forced[1 + place - layout.rows * layout.stride]]
            end_of_row = place % layout.stride == layout.columns
            return [forced[0]] if end_of_row else reference.vocabulary_mapping.image_tokens

        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, top_k=None, max_new_tokens=layout.length,
            guidance_scale=3.0, negative_prompt_ids=negative, prefix_allowed_tokens_fn=allowed,
        )[:, ids.shape[1] :]  # fmt: skip
        assert torch.equal(model.ids[images.tokens[row]], out[0])
        pixels = reference.decode_image_tokens(image_tokens=out, height=layout.rows, width=layout.columns)
        drawn = processor.postprocess(list(pixels), return_tensors="PIL.Image.Image")["pixel_values"][0]
        difference = np.abs(np.asarray(drawn, dtype=int).transpose(2, 0, 1) - images.images[row].numpy())
        assert difference.max() <= 1  # where a float lies on a step between two integers
        assert (difference > 0).mean() < 0.001
    unguided = generate(model, prompts, decoder="ar", temperature=0.0, top_k=0, guidance_scale=1.0)
    assert not torch.equal(unguided.tokens, images.tokens)


def test_text_is_cut_as_by_the_original_tokenizer(model: Emu3, folder: Path) -> None:
    """Byte pairs merged by rank within the published pattern's pieces: Emu3's own algorithm, written out."""
    names = json.loads((folder / "vocab.json").read_text())
    letters = dict(zip(*byte_letters(), strict=True))

    def merge(piece: str) -> list[int]:
        parts = [letters[byte] for byte in piece.encode()]
        while len(parts) > 1:
            ranks = [names.get(left + right, len(names)) for left, right in pairwise(parts)]
            best = int(np.argmin(ranks))
            if ranks[best] == len(names):
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return [names[part] for part in parts]

    text = "an old-fashioned  (red) fox’s bridge, 90/16 of cafe\u0301\n\nbest quality! "
    pieces = regex.findall(PIECES, unicodedata.normalize("NFC", text))
    assert {"-fashioned", "’s", " café", "9"} <= set(pieces)
    ids = [i for piece in pieces for i in merge(piece)]
    assert model.tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    converted = load_tokenizer(
        folder, "model.weights"
    )  # model.words=converted: the tokenizer that the folder describes
    assert converted(text, add_special_tokens=False)["input_ids"] != ids
    with pytest.raises(UserError, match="did you mean 'original'"):
        load_spec(words="orginal")


def byte_letters() -> tuple[list[int], list[str]]:
    """Return the bytes and the letters that stand for them in byte-level vocabularies."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return shown + hidden, [*map(chr, shown), *(chr(256 + place) for place in range(len(hidden)))]


@pytest.mark.parametrize(("size", "ratio"), [(720, "1:1"), ("960x544", "16:9"), ("624x832", "3:4")])
def test_sizes_of_the_trained_area_are_the_references(processor: Emu3Processor, size: int | str, ratio: str) -> None:
    assert grid(size) == tuple(processor.calculate_generate_size(ratio, 518400, 8))


def test_the_public_size_is_8193_tokens() -> None:
    spec = load_spec()
    layout = spec.layout
    assert (layout.rows, layout.columns, layout.length, int(layout.free.sum())) == (90, 90, 8193, 8100)
    assert spec.sampling == {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 2048, "top_p": 1.0, "min_p": 0.0}
    assert (spec.positive, spec.negative) == (POSITIVE, NEGATIVE)


def load_spec(**changes: object) -> Emu3Spec:
    """Build the spec that conf/model/emu3.yaml describes."""
    return instantiate(_compose("model", "emu3", changes))


# ---- pixels
def test_pixels_of_one_frame_are_those_of_four(model: Emu3) -> None:
    """The shortcut equals transformers' decoder, which draws four frames and throws three away."""
    codes = model.layout.codes(family_checks.images(model, 3))
    whole = model.vq.vae.decode(codes)
    assert torch.allclose(model.vq.pixels(codes), whole, atol=1e-5)
    drawn = model.decode(family_checks.images(model, 3))
    assert (drawn.dtype, drawn.shape) == (torch.uint8, (3, 3, 32, 32))
    assert (drawn.int() - (whole * 127.5 + 127.5).clamp(0, 255).int()).abs().max() <= 1
    assert drawn.float().std() > 10


def test_images_become_codes_and_images_again(model: Emu3) -> None:
    """One frame through the encoder gives the codes of transformers' four equal ones."""
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    codes = model.vq.encode(images)
    assert (codes.shape, codes.dtype) == ((2, 4, 6), torch.int64)
    assert codes.unique().numel() > 4
    assert torch.equal(codes, torch.stack(model.vq.vae.encode(images, torch.tensor([[32, 48]] * 2)).image_tokens))
    assert model.vq.decode(codes).shape == images.shape
    assert model.codebook.shape == (64, 4)


def test_the_image_tokeniser_keeps_float32(folder: Path, model: Emu3) -> None:
    """The files' own numbers in any dtype of the language model: the reference draws in float32."""
    half = load("emu3", dtype="bfloat16", **checkpoints_emu3.settings(folder))
    assert half.dtype == torch.bfloat16
    assert all(
        torch.equal(a, b) for a, b in zip(half.vq.state_dict().values(), model.vq.state_dict().values(), strict=True)
    )
    assert half.full.model.vqmodel is None


# ---- weights
def test_derived_public_names_are_those_of_the_full_size_model() -> None:
    """Every tensor of the 8B model has its public name and there is no other (fixture: derived, see its head)."""
    public = {line for line in KEYS.read_text().splitlines() if not line.startswith("#")}
    with torch.device("meta"):
        full = Emu3ForConditionalGeneration(Emu3Config(text_config={}, vq_config={}, vocabulary_map={"<image>": 0}))
    assert {checkpoints_emu3.public_name(name) for name in full.state_dict()} == public
    assert sum(p.numel() for p in full.parameters()) == 8_762_751_807
    text, vq = full.config.text_config, full.config.vq_config
    assert (text.vocab_size, text.num_key_value_heads, text.max_position_embeddings) == (184622, 8, 9216)
    assert (vq.codebook_size, vq.embed_dim) == (32768, 4)


def test_the_checkpoint_has_the_public_names_and_files(folder: Path) -> None:
    """The generator leaves out layers, not kinds of names; the rotary base survives the old way of writing it."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) < set(KEYS.read_text().splitlines())
    assert {"generation_config.json", "preprocessor_config.json", "tokenizer_config.json", "merges.txt"} <= {
        file.name for file in folder.iterdir()
    }
    assert "rope_parameters" not in (folder / "config.json").read_text()


def test_ids_of_the_first_and_last_code(model: Emu3) -> None:
    ends = model.tokenizer.convert_ids_to_tokens(model.ids[[0, 63]])
    assert ends == ["<|visual token 000000|>", "<|visual token 000063|>"]
    assert load_spec().vocabulary == 32768


def test_old_rotary_settings_are_read(model: Emu3) -> None:
    assert model.full.config.text_config.rope_parameters["rope_theta"] == 1000000.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 723}, "multiples of 8"),
        ({"size": 4}, "multiples of 8"),
        ({"size": "720*720"}, "WIDTHxHEIGHT"),
        ({"size": "720x"}, "WIDTHxHEIGHT"),
        ({"size": 768}, "9315 tokens.*760 at most"),
    ],
)
def test_sizes_that_cannot_be_drawn_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_spec(**changes).check()
    assert "\n" not in str(error.value)


def test_without_weights_the_command_that_fetches_them_is_told() -> None:
    with pytest.raises(UserError, match="hf download BAAI/Emu3-Gen-hf"):
        load_spec().check()


def test_what_does_not_fit_the_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    settings = checkpoints_emu3.settings(folder)
    for changes, words in (
        ({"vocabulary": 65}, "does not have 65 visual tokens"),
        ({"row_end": 1}, r"model.row_end and model.suffix are \[1"),
        ({"weights": str(tmp_path)}, "no config.json"),
    ):
        with pytest.raises(UserError, match=words):
            load("emu3", **settings | changes)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "Emu3"}))
    with pytest.raises(UserError, match=r"holds a 'Emu3' model.*use e.g. BAAI/Emu3-Gen-hf"):
        load("emu3", **settings | {"weights": str(other)})
    (other / "config.json").write_text(json.dumps(config))
    drop(other, "vqmodel.decoder.conv_out.bias")  # never noise
    with pytest.raises(UserError, match=r"lacks 'decoder.conv_out.bias'"):
        load("emu3", **settings | {"weights": str(other)})
    (other / "model-00001-of-00010.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot be loaded|lacks"):
        load("emu3", **settings | {"weights": str(other)})
