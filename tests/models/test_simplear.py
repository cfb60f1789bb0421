"""SimpleAR: prompts, greedy tokens and pixels equal those of the public code, on small checkpoints in the public layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from sjd2.api import _compose, generate, load
from sjd2.config import instantiate
from sjd2.errors import UserError
from sjd2.files import ROOT
from sjd2.models.cosmos import UNUSED, CosmosTokenizer, one_frame, one_frame_name
from sjd2.models.hub import locate
from sjd2.models.simplear import SimpleAR, SimpleARSpec, image_rows
from sjd2.models.tensors import load_exactly
from tests.helpers import checkpoints_simplear, family_checks
from tests.helpers.checkpoints_simplear import LEVELS, write_cosmos
from tests.helpers.weights import raises_in_one_line

PROMPTS = ["a red fox under the bridge", "two dogs", " a cat and a bad hand, lowres "]
FIXTURES = ROOT / "tests" / "fixtures"
NEGATIVE = (
    "<|t2i|>An image of aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, bad "
    "eyes, bad limbs, distortion<|soi|>"
)  # generate.py in wdrink/SimpleAR


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints_simplear.write(tmp_path_factory.mktemp("weights") / "simplear")


@pytest.fixture(scope="module")
def model(folder: Path) -> SimpleAR:
    return load("simplear", dtype="float64", **checkpoints_simplear.settings(folder))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def spec(**changes: object) -> SimpleARSpec:
    """Build the spec that conf/model/simplear.yaml describes."""
    return instantiate(_compose("model", "simplear", changes))


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Read a list of published tensors."""
    lines = (FIXTURES / "keys" / name).read_text().splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#"))
    return {key: tuple(map(int, shape.split("x"))) for key, shape in pairs}


# ---- what is computed: prompts, guidance, the rows of the image codes
def test_both_branches_are_the_public_prompts(model: SimpleAR) -> None:
    table, condition = model.full.get_input_embeddings(), model.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        ids = model.tokenizer(f"<|t2i|>A highly realistic image of {prompt}<|soi|>", return_tensors="pt").input_ids[0]
        assert model.tokenizer.convert_ids_to_tokens(ids[[0, -1]].tolist()) == ["<|t2i|>", "<|soi|>"]
        assert condition.lengths[row] == len(ids)
        assert torch.equal(condition.embeds[row, : len(ids)], table(ids))
    negative = model.tokenizer(NEGATIVE, return_tensors="pt").input_ids
    assert torch.equal(condition.uncond_embeds, table(negative))
    assert condition.uncond_lengths.tolist() == [negative.shape[1]]


def test_greedy_tokens_equal_those_of_transformers(model: SimpleAR, reference: Qwen2ForCausalLM) -> None:
    """Its guidance is the public CFGLogits: scale times the difference of log-probabilities, a negative prompt of its own."""
    first = len(model.tokenizer)
    negative = model.tokenizer(NEGATIVE, return_tensors="pt").input_ids
    penalty = reference.generation_config
    reference.generation_config = GenerationConfig()  # of chats; the page says what of it is not applied
    assert penalty.repetition_penalty == 1.1
    for scale in (6.0, 1.0):
        tokens = generate(model, PROMPTS, decoder="ar", temperature=0.0, guidance_scale=scale).tokens
        for row, prompt in enumerate(PROMPTS):
            text = f"<|t2i|>A highly realistic image of {prompt}<|soi|>"
            ids = model.tokenizer(text, return_tensors="pt").input_ids
            plain = GenerationConfig(
                do_sample=False, max_new_tokens=16, guidance_scale=scale, suppress_tokens=list(range(first))
            )
            out = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                negative_prompt_ids=negative,
                negative_prompt_attention_mask=torch.ones_like(negative),
                generation_config=plain,
            )
            assert torch.equal(out[0, ids.shape[1] :] - first, tokens[row])


def test_the_first_and_the_last_code(model: SimpleAR, reference: Qwen2ForCausalLM) -> None:
    """Codes follow the last word of the text: the table of inputs ends with them, and so does the head."""
    first, table = len(model.tokenizer), reference.get_input_embeddings().weight
    codes = torch.tensor([[0, 63]])
    assert torch.equal(model.embed(codes)[0], table[[first, -1]])
    hidden = torch.randn(2, 3, 32, dtype=torch.float64)
    assert torch.allclose(model.logits(hidden), reference.lm_head(hidden)[..., first:], atol=1e-12)
    assert model.logits(hidden).shape == (2, 3, 64)
    assert torch.equal(model.codebook[[0, -1]], torch.tensor([[-1.0] * 3, [0.5] * 3]))


def test_a_head_of_its_own_is_taken(tmp_path: Path) -> None:
    """Where the checkpoint has one; the public ones share it with the inputs."""
    there = checkpoints_simplear.write(tmp_path / "untied", tied=False)
    untied = load("simplear", dtype="float64", **checkpoints_simplear.settings(there))
    stored = load_file(there / "model.safetensors")["lm_head.weight"].double()
    assert torch.equal(untied.head_module.weight, stored[-64:])


def test_a_head_that_device_map_left_on_the_host_is_read_from_there() -> None:
    head = torch.nn.Linear(4, 6, bias=False)
    wanted = head.weight[2:5].clone()
    cpu_offload(torch.nn.Sequential(head), execution_device=torch.device("cpu"))
    assert head.weight.device.type == "meta"
    assert torch.equal(image_rows(head, 2, 3).weight, wanted)


def test_the_public_size_is_4096_tokens() -> None:
    layout = spec().layout
    assert (layout.rows, layout.columns, layout.length, layout.forced_ids) == (64, 64, 4096, ())
    assert layout.vocabulary == 64000
    assert spec().sampling == {"guidance_scale": 6.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert f"<|t2i|>{spec().negative}<|soi|>" == NEGATIVE
    assert spec().prefix == "A highly realistic image of "


# ---- pixels
def test_pixels_and_codes_are_the_public_ones(tmp_path: Path) -> None:
    """Against what the public video tokeniser (simpar/model/tokenizer, commit d56b6e5) makes of the same weights."""
    expected = load_file(FIXTURES / "cosmos" / "one_frame.safetensors")
    own = CosmosTokenizer.load(write_cosmos(tmp_path), LEVELS).double()
    codes = torch.tensor([[[0, 63, 17], [5, 42, 31]]])
    assert torch.allclose(own.pixels(codes).float(), expected["pixels"], atol=1e-6)
    y, x = torch.meshgrid(torch.arange(32), torch.arange(48), indexing="ij")
    image = torch.stack([((c + 1) * 0.13 * x + 0.21 * y * (c - 1.5)).sin() for c in range(3)])[None].double()
    assert torch.allclose(own.latents(image).float(), expected["latents"], atol=1e-6)
    assert torch.equal(own.encode(image), expected["codes"])
    drawn = own.decode(codes)
    rounded = ((expected["pixels"].clamp(-1, 1) + 1) / 2 * 255 + 0.5).to(torch.uint8)  # torchvision's save_image
    assert (drawn.int() - rounded.int()).abs().max() <= 1
    assert (drawn != rounded).float().mean() < 0.001


def test_every_code_is_nearest_to_its_own_vector() -> None:
    with torch.device("meta"):
        public = CosmosTokenizer((8, 8, 8, 5, 5, 5))
    own = CosmosTokenizer((8, 8, 8, 5, 5, 5), width=4, factors=(1, 1, 1), blocks=1, latent=2)
    assert own.codebook.shape == public.codebook.shape == (64000, 6)
    levels = own.steps[:, None]
    # what the encoder would give to land in the middle of a level
    reach, offset = (levels - 1) * 1.001 / 2, (levels % 2 == 0) * 0.5
    wanted = own.codebook.T * (levels // 2)
    latents = ((wanted + offset) / reach).atanh() - (offset / reach).atanh()
    assert torch.equal(own.nearest(latents[None, :, :, None])[0, :, 0], torch.arange(64000))


def test_the_image_tokeniser_is_float32(folder: Path) -> None:
    half = load("simplear", dtype="bfloat16", **checkpoints_simplear.settings(folder))
    assert (half.dtype, half.codebook.dtype) == (torch.bfloat16, torch.float32)
    tokens = family_checks.images(half, 5)
    drawn = half.decode(tokens)
    assert (drawn.shape, drawn.dtype) == ((5, 3, 64, 64), torch.uint8)
    assert drawn.float().std() > 10
    assert half.logits(half.embed(tokens)).dtype == torch.float32


# ---- weights
def test_derived_public_names_are_those_of_the_full_size_models() -> None:
    """Every tensor has its public name and there is no other (fixtures: derived, see their heads)."""
    public = shapes("simplear-0.5b.txt")
    for width, inner, layers, heads in ((896, 4864, 24, 14), (1536, 8960, 28, 12)):
        with torch.device("meta"):
            full = Qwen2ForCausalLM(
                Qwen2Config(
                    vocab_size=151672 + 64000, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                    num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=True,
                )
            )  # fmt: skip
        own = {name: tuple(tensor.shape) for name, tensor in full.state_dict().items() if name != "lm_head.weight"}
        if layers == 24:
            assert own == public
        else:
            kinds = {name.replace("layers.23", "layers.27") for name in public}
            assert {name for name in own if ".27." in name} == {name for name in kinds if ".27." in name}


def test_every_published_tensor_of_the_tokeniser_has_a_place() -> None:
    published = {name: torch.empty(shape, device="meta") for name, shape in shapes("cosmos-dv8x16x16.txt").items()}
    with torch.device("meta"):
        own = CosmosTokenizer((8, 8, 8, 5, 5, 5))
    used = {one_frame_name(k): one_frame(v) for k, v in published.items() if not UNUSED.fullmatch(k)}
    load_exactly(own, used, "the list")
    unused = [name for name in published if UNUSED.fullmatch(name)]
    # queries and keys of the two attentions over time; a convolution over time in each half that halves or doubles no time
    assert len(unused) == 2 * 4 + 2 * 2


def test_missing_weights_of_the_tokeniser_are_an_error(folder: Path, tmp_path: Path) -> None:
    """The public code reads them with strict=False, and draws noise."""
    lost = "decoder.up.1.block.0.conv1.1.conv3d.weight"
    there = write_cosmos(tmp_path / "lost", without=lost)
    settings = checkpoints_simplear.settings(folder)
    for changes, words in (
        ({"vq_weights": str(there)}, r"lacks 'decoder.up.1.block.0.conv1.1.weight' \(1 missing, 0 unknown"),
        ({"vq_weights": str(folder)}, "model.vq_weights=.* has no encoder.jit"),
        ({"levels": [8, 8]}, r"has codes of \[4, 4, 4\] levels; set model.levels=\[4,4,4\]"),
    ):
        raises_in_one_line(lambda changes=changes: load("simplear", **settings | changes), words)
    (there / "decoder.jit").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 132000000\n")
    raises_in_one_line(lambda: CosmosTokenizer.load(there, LEVELS), "Git LFS pointer.*git lfs pull")
    (there / "decoder.jit").write_bytes(b"PK\x03\x04 cut short")
    raises_in_one_line(lambda: CosmosTokenizer.load(there, LEVELS), "cannot be read as TorchScript")


def test_what_does_not_fit_the_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    settings = checkpoints_simplear.settings(folder)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    for file in other.glob("*token*.json"):
        file.write_text(file.read_text().replace("<|soi|>", "<|else|>"))
    for changes, words in (
        ({"size": 1000}, "model.size must be the side of a square in multiples of 16 pixels, 1024 at most"),
        ({"size": 1040}, "1024 at most .*, got 1040"),
        ({"size": "1024x768"}, "the side of a square .*, got 1024x768"),
        ({"vocabulary": 65}, "model.levels make 64 codes, but model.vocabulary is 65"),
        ({"vocabulary": 128, "levels": [8, 4, 4]}, "so 64 image codes, but model.vocabulary is 128"),
        ({"weights": str(tmp_path)}, "no config.json"),
        ({"weights": str(other)}, r"lacks <\|soi\|>, so it is not SimpleAR's"),
        ({"weights": "Daniel0724/SimpleAR-1.5B-RL"}, "hf download Daniel0724/SimpleAR-1.5B-RL"),
    ):
        raises_in_one_line(lambda changes=changes: load("simplear", **settings | changes), words)
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(UserError, match=r"holds a 'llama' model.*use e.g. Daniel0724/SimpleAR-0.5B-RL"):
        load("simplear", **settings | {"weights": str(other)})


def test_the_tokeniser_is_taken_from_the_hubs_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are complete without safetensors; nothing is asked for again."""
    monkeypatch.setattr("sjd2.models.hub._snapshot", lambda source, local_files_only=False: folder / "cosmos")
    source = spec().sources()[1]
    assert source.repository == source.where == "nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"
    monkeypatch.setattr("sjd2.models.hub._ask_hub", lambda source: pytest.fail("asks the hub"))
    assert locate(source) == folder / "cosmos"
