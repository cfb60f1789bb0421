"""LlamaGen: small checkpoints in the published layout against a plain forward written from the public description."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from baselines.eagle.head import EagleHead, EagleSettings
from baselines.eagle.train import make_pairs, predict
from sjd2 import api
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import generate, stream
from sjd2.decoding.likelihood import nll
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError
from sjd2.files import ROOT
from sjd2.finetune.front_pairs import TeacherForced
from sjd2.finetune.next_clean import FinetuneSJD2
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.layout import TokenGrid
from sjd2.models.llamagen import GridRotary, LlamaGen, convert, public_names
from sjd2.models.llamagen_text import clean
from sjd2.models.vq16 import USAGE, published_name
from tests.helpers import checkpoints_llamagen as small
from tests.helpers import family_checks
from tests.helpers.plain_llamagen import Reference, book, draw, read
from tests.helpers.tiers import by_default

PROMPTS = ["a red cat", "The blue dog on a green circle!", "x", "circles of the cats"]
SAMPLING = SamplingParams(guidance_scale=7.5, top_k=20)
GREEDY = replace(SAMPLING, temperature=0.0)
AR = Decoder(name="ar", window=1, lossless=True)
KEYS = ROOT / "tests" / "fixtures" / "keys"
SIDE = 4  # of the grid in most tests: N = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write(tmp_path_factory.mktemp("llamagen"))


def load(folder: Path, dtype: str = "float64", **settings: object) -> LlamaGen:
    """Load as `model=llamagen` does, from local files; a size of its own needs the file's name."""
    local = {"weights": str(folder), "vq_weights": str(folder), "text_weights": str(folder / "flan-t5-xl")}
    if "size" not in settings:
        local |= {"weights": str(folder / "t2i_XL_stage2_512.pt"), "size": 16 * SIDE}
    return api.load("llamagen", dtype=dtype, **(local | {"vocabulary": small.CODES, "heads": small.HEADS} | settings))


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaGen:
    return load(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder, SIDE)


@pytest.fixture(scope="module")
def wanted(reference: Reference) -> Tensor:
    return reference.greedy(PROMPTS, SIDE * SIDE, SAMPLING.guidance_scale)


def decode(model: LlamaGen, decoder: object, sampling: SamplingParams = GREEDY, prompts: list[str] = PROMPTS) -> Tensor:
    return generate(model, decoder, model.encode(prompts), list(range(1, len(prompts) + 1)), sampling=sampling).tokens


# ---- the distribution


def test_greedy_ar_returns_the_tokens_of_the_reference(model: LlamaGen, wanted: Tensor) -> None:
    assert len({len(model.text.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS}) > 2  # captions of many lengths
    assert torch.equal(decode(model, AR), wanted)
    assert len(set(wanted.flatten().tolist())) > 12


def test_greedy_ar_in_float32_too(folder: Path, wanted: Tensor) -> None:
    assert torch.equal(decode(load(folder, "float32"), AR), wanted)


def test_the_likelihood_is_that_of_the_reference(model: LlamaGen, reference: Reference) -> None:
    tokens = decode(model, AR, SAMPLING)
    logits = reference.guided(PROMPTS, tokens[:, :-1], SAMPLING.guidance_scale)
    logits = logits.masked_fill(logits < logits.topk(SAMPLING.top_k).values[..., -1:], -torch.inf)
    expected = -logits.log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2))
    assert torch.allclose(nll(model, model.encode(PROMPTS), tokens, SAMPLING), expected, atol=1e-4)
    # what a wrong unconditional row, or a first token at the caption's own length, would give
    wrong = reference.guided(PROMPTS, tokens[:, :-1], SAMPLING.guidance_scale, masked=False)
    assert not torch.allclose(wrong, reference.guided(PROMPTS, tokens[:, :-1], SAMPLING.guidance_scale), atol=0.1)


def test_the_place_of_the_first_token_matters(model: LlamaGen, wanted: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaGen, "image_start", lambda self, lengths: lengths)
    assert not torch.equal(decode(model, AR), wanted)


def test_a_long_caption_is_cut_to_120_tokens_and_an_empty_one_has_one(model: LlamaGen) -> None:
    condition = model.encode(["cat " * 300, ""])
    assert condition.lengths.tolist() == [120, 1]
    assert condition.uncond_lengths.tolist() == [120, 1]
    tokens = decode(model, AR, prompts=["cat " * 300, ""])
    assert torch.equal(tokens[1:], decode(model, AR, prompts=[""]))


def test_window_passes_equal_single_passes_after_roll_back(model: LlamaGen) -> None:
    torch.manual_seed(0)
    condition = model.encode(PROMPTS)
    rows, lengths, n = len(PROMPTS), condition.lengths, SIDE * SIDE
    x = model.embed(torch.randint(0, small.CODES, (rows, n)))
    width = condition.embeds.shape[1]

    def start() -> object:
        cache = model.cache(rows, width + n + 8)
        model.forward(condition.embeds, torch.arange(width).expand(rows, -1), cache)
        cache.lengths = lengths.clone()
        return cache

    def run(cache: object, begin: int, size: int) -> Tensor:
        positions = model.image_start(lengths)[:, None] + torch.arange(begin, begin + size)
        return model.forward(x[:, begin : begin + size], positions, cache)

    single, cache = [], start()
    for i in range(n):
        single.append(run(cache, i, 1))
        cache.lengths = cache.lengths + 1
    single, cache, begin = torch.cat(single, 1), start(), 0
    for size in (5, 1, 7, 3):
        garbage = torch.randn(rows, 8, x.shape[2], dtype=x.dtype) * 9
        model.forward(garbage, torch.full((rows, 8), 120 + n + 3), cache)  # a rejected window, beyond the table's end
        assert torch.allclose(run(cache, begin, size), single[:, begin : begin + size], atol=1e-6)
        cache.lengths, begin = cache.lengths + size, begin + size


# ---- decoders


LOSSLESS = {
    "jacobi": {"window": 6}, "sjd": {"window": 6}, "scd": {"window": 8}, "sjd++": {"window": 6},
    "sjd-pac": {"window": 24}, "sjd2": {"window": 8}, "lookup": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def tuned(folder: Path) -> LlamaGen:
    model = load(folder)
    model.adapter = Adapter(AdapterSettings(rank=2), model)
    for parameter in model.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.adapter.requires_grad_(False)
    model.spec = replace(model.spec, adapter="random")
    return model


@pytest.mark.parametrize("name", by_default(LOSSLESS, ["sjd-pac", "sjd2"]))
def test_lossless_decoders_return_the_tokens_of_ar(tuned: LlamaGen, name: str) -> None:
    decoder, sampling = api.decoder(name, **LOSSLESS[name]), replace(SAMPLING, sampler="gumbel")
    decoder.check(tuned.spec)
    expected = decode(tuned, AR, sampling)
    assert torch.equal(decode(tuned, decoder, sampling), expected)
    seeds = list(enumerate(PROMPTS, 1))
    requests = dict(stream(tuned, decoder, [(prompt, seed) for seed, prompt in seeds], rows=2, sampling=sampling))
    assert all((requests[i].tokens == expected[i].numpy()).all() for i in range(len(PROMPTS)))


@pytest.mark.parametrize("name", ["eagle", "eagle1"])
def test_drafts_of_a_head_leave_the_tokens_alone(model: LlamaGen, tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    head = EagleHead(EagleSettings(), model)
    head.start("last")
    head.save(tmp_path, torch.float32)
    more = {"window": 12, "drafter": {"depth": 3, "top_k": 4}} if name == "eagle" else {"drafter": {}}
    more["drafter"]["weights"] = str(tmp_path)
    sampling = replace(SAMPLING, sampler="gumbel")
    expected = decode(model, AR, sampling)
    requests = [(prompt, seed) for seed, prompt in enumerate(PROMPTS, 1)]
    for index, sample in stream(model, api.decoder(name, **more), requests, rows=2, sampling=sampling):
        assert (sample.tokens == expected[index].numpy()).all()


def test_jacobi_needs_fewer_passes_than_ar(model: LlamaGen) -> None:
    sampling = replace(SAMPLING, temperature=0.3)
    result = generate(model, api.decoder("scd", window=8), model.encode(PROMPTS), [1, 2, 3, 4], sampling=sampling)
    assert sum(sample.forwards for sample in result.samples) < len(PROMPTS) * SIDE * SIDE


def test_relaxed_decoders_run_and_end_in_the_exact_one(model: LlamaGen, wanted: Tensor) -> None:
    grouped = api.decoder("gsd", window=6)
    exact = replace(grouped, verifier=replace(grouped.verifier, group=1))
    assert torch.equal(decode(model, exact), wanted)
    assert decode(model, grouped, SAMPLING).max() < small.CODES
    from baselines.lantern import Relaxed

    for neighbours in (1, 4):
        near = replace(api.decoder("sjd", window=6), verifier=Relaxed(neighbours=neighbours), lossless=False)
        tokens = decode(model, near, GREEDY if neighbours == 1 else SAMPLING)
        assert tokens.min() >= 0
        assert torch.equal(tokens, wanted) == (neighbours == 1)


def test_zipar_of_a_whole_row_is_ar(model: LlamaGen, wanted: Tensor) -> None:
    assert torch.equal(decode(model, api.decoder("zipar", window_size=SIDE)), wanted)
    narrow = generate(
        model, api.decoder("zipar", window_size=2), model.encode(PROMPTS), [1, 2, 3, 4], sampling=SAMPLING
    )
    assert all(sample.forwards < SIDE * SIDE for sample in narrow.samples)


# ---- training sees what decoding sees


def test_training_passes_have_the_states_of_decoding(model: LlamaGen, reference: Reference) -> None:
    codes = torch.randint(0, small.CODES, (len(PROMPTS), SIDE * SIDE), generator=torch.Generator().manual_seed(1))
    features, mask = reference.captions(PROMPTS)
    expected = reference.logits(features, mask, codes)
    condition = model.encode(PROMPTS)
    pairs = make_pairs(model, condition.embeds, condition.lengths, codes)
    assert torch.allclose(model.logits(pairs.states), expected[:, :-1], atol=1e-5)
    images = TeacherForced(model, PROMPTS, codes)
    assert torch.allclose(model.logits(images.hidden[: len(PROMPTS)]), expected, atol=1e-5)


class Spy(torch.nn.Module):
    """Notes the position ids that a rotary embedding is asked for."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.places = inner, []

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        self.places.append(position_ids)
        return self.inner(x, position_ids)


@pytest.mark.parametrize("context", ["windows", "in_place", "appended"])
def test_fine_tuning_puts_image_tokens_at_their_places(folder: Path, context: str) -> None:
    model = load(folder, "float32")
    model.transformer.rotary_emb = spy = Spy(model.transformer.rotary_emb)
    settings = AdapterSettings(
        rank=2, gated=context != "in_place", code="appended" if context == "appended" else "additive"
    )
    model.adapter = Adapter(settings, model)
    recipe = FinetuneSJD2(
        adapter=settings, data=None, steps=1, batch_size=4, lr=1.0, shortest=4, longest=8,
        context="in_place" if context == "in_place" else "windows",
    )  # fmt: skip
    codes = torch.randint(0, small.CODES, (len(PROMPTS), SIDE * SIDE))
    assert recipe.loss(model, PROMPTS, codes, [3], steps=2).isfinite()
    *before, last = spy.places
    if context == "appended":
        assert (last[:, -2:] == 120).all()
        last = last[:, :-2]
    for places in (*before, last):
        assert (places[:, -SIDE * SIDE :] == 120 + torch.arange(SIDE * SIDE)).all()


def test_an_eagle_head_drafts_as_it_was_trained(model: LlamaGen) -> None:
    torch.manual_seed(5)
    head = EagleHead(EagleSettings(), model).requires_grad_(False)
    head.start("last")
    condition = model.encode(PROMPTS)
    tokens = torch.randint(0, small.CODES, (len(PROMPTS), SIDE * SIDE))
    pairs = make_pairs(model, condition.embeds, condition.lengths, tokens)
    first, second = predict(head, pairs, 2)
    width = condition.embeds.shape[1]
    hidden = model.forward(condition.embeds, torch.arange(width).expand(len(PROMPTS), -1), model.cache(4, width))
    cache = head.cache(len(PROMPTS), 200)
    rows = torch.arange(len(PROMPTS))
    out = head.prefill(cache, rows, condition.embeds, hidden, condition.lengths, tokens[:, 0])
    assert torch.allclose(out, first[:, 0], atol=1e-6)
    out = head.extend(cache, tokens[:, 1:5], pairs.states[:, 1:5], torch.full((len(PROMPTS),), 4))
    assert torch.allclose(out, first[:, 4], atol=1e-6)
    step = torch.ones(1, 1, 1, dtype=torch.bool)
    out = head.step(cache, tokens[:, 5:6], out[:, None], torch.ones(1, 1, dtype=torch.long), step)
    assert torch.allclose(out[:, 0], second[:, 5], atol=1e-6)


# ---- pixels


def test_pixels_and_codes_are_those_of_the_reference(model: LlamaGen, folder: Path) -> None:
    w = torch.load(folder / "vq_ds16_t2i.pt", weights_only=True)["model"]
    tokens = torch.randint(0, small.CODES, (2, SIDE * SIDE), generator=torch.Generator().manual_seed(0))
    x = draw(w, tokens.unflatten(1, (SIDE, SIDE)))
    drawn = model.decode(tokens)
    assert drawn.shape == (2, 3, 16 * SIDE, 16 * SIDE)
    assert drawn.dtype == torch.uint8
    assert (drawn - (127.5 * x + 127.5).clamp(0, 255)).abs().max() < 0.51
    assert drawn.float().std() > 20
    images = drawn.float() / 127.5 - 1
    assert torch.equal(model.vq.encode(images), read(w, images))
    assert torch.allclose(model.codebook, book(w))


# ---- files


def test_the_published_folder_loads_by_size(folder: Path) -> None:
    for size, other in ((512, 256), (256, 512)):
        one = load(folder, "float32", size=size)
        assert one.layout.length == (size // 16) ** 2
        assert one.spec.sampling == {
            "guidance_scale": 7.5,
            "temperature": 1.0,
            "top_k": 1000,
            "top_p": 1.0,
            "min_p": 0.0,
        }
        assert one.spec.digest() != replace(one.spec, size=other).digest()
    rows = api.generate(one, PROMPTS[:1], decoder="scd", top_k=0)
    assert rows.images.shape == (1, 3, 256, 256)
    assert sum(rows.accepted[0]) == 256


def test_bfloat16_and_a_text_encoder_elsewhere(folder: Path) -> None:
    model = load(folder, "bfloat16", text_device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.logits(model.embed(torch.zeros(1, 2, dtype=torch.long))).dtype == torch.float32
    assert decode(model, AR, SAMPLING).shape == (len(PROMPTS), SIDE * SIDE)
    family_checks.odd_prompts_and_seeds(model, SAMPLING)  # in one batch: captions of 1 and of 120 tokens


def test_the_text_encoder_never_runs_in_float16(folder: Path) -> None:
    model = load(folder, "float16")
    assert (model.dtype, model.text.model.dtype) == (torch.float16, torch.float32)
    for layer in model.text.model.encoder.block:
        layer.layer[-1].DenseReluDense.wo.weight.mul_(1e6)  # features stay small, what is between overflows in float16
    assert model.encode(PROMPTS).embeds.isfinite().all()
    model.text.model.half()
    with pytest.raises(UserError, match=r"the encoded prompt is not finite .*use dtype=bfloat16 or float32"):
        decode(model, AR, SAMPLING)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 100}, "multiple of 16, got 100"),
        ({"weights": "{folder}/t2i_XL_stage1_256.pt", "size": 512}, "generates 256 pixels; set model.size=256"),
        ({"size": 384}, "model.size=384 has no published checkpoint; use 256 or 512"),
        ({"heads": 3}, "model.heads=3 does not divide the width 32"),
        ({"vocabulary": 16384}, "has 48 image codes, but model.vocabulary is 16384"),
        ({"weights": "{folder}/vq_ds16_t2i.pt", "size": 64}, "not a LlamaGen text-to-image checkpoint: it lacks"),
        ({"vq_weights": "{folder}/t2i_XL_stage1_256.pt"}, "not a LlamaGen image tokeniser"),
        ({"weights": "{folder}/flan-t5-xl", "size": 256}, "has no t2i_XL_stage1_256.pt"),
        ({"text_weights": "{folder}"}, "has no config.json"),
        ({"text_weights": "{folder}/nowhere"}, "does not exist"),
        ({"weights": "peizesun/llamagen_t2i", "size": 256}, "HF_HUB_OFFLINE is set.*hf download peizesun/llamagen_t2i"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_settings_say_the_mend(folder: Path, settings: dict[str, object], words: str) -> None:
    given = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(UserError, match=words) as error:
        load(folder, "float32", **given)
    assert "\n" not in str(error.value)


def test_a_memory_too_small_for_the_text_encoder_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sjd2.models import llamagen_text

    monkeypatch.setattr(llamagen_text, "free_bytes", lambda device: 100)
    with pytest.raises(UserError, match=r"model.text_weights=.* needs .* GB and cpu .*model.text_device=cpu"):
        load(folder, "float32")


def listed(name: str) -> dict[str, tuple[int, ...]]:
    lines = (KEYS / name).read_text().splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#"))
    return {name: tuple(map(int, shape.split("x"))) for name, shape in pairs}


def test_derived_names_of_the_full_size_are_all_accounted_for() -> None:
    """Derived: the list comes from the public class, see the head of the fixture; the files themselves were not read."""
    from transformers import LlamaForCausalLM

    names = listed("llamagen-t2i-XL.txt")
    sizes = {"layers": 36, "width": 1280, "inner": 3584, "codes": 16384, "features": 2048}
    assert names == small.language_shapes(**sizes)
    assert set(names) == public_names(36)
    assert sum(torch.Size(shape).numel() for shape in names.values()) * 4 == pytest.approx(3.11e9, rel=0.002)
    meta = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    config, language, caption = convert(meta, 20, Path("meta"))
    with torch.device("meta"):
        own = LlamaForCausalLM(config).state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in language.items()}
    assert sum(tensor.numel() for part in (language, caption) for tensor in part.values()) == sum(
        tensor.numel() for tensor in meta.values()
    )
    assert GridRotary(TokenGrid(32, 32, 16384), config.head_dim).cos.shape == (120 + 1024, 64)


def test_derived_names_of_the_image_tokeniser_are_all_accounted_for() -> None:
    """Derived: the list comes from the public class, see the head of the fixture; the file itself was not read."""
    from transformers.models.janus.modeling_janus import JanusVQVAE

    from sjd2.models.vq16 import _config

    names = listed("llamagen-vq16.txt")
    sizes = {"base": 128, "multiples": (1, 1, 2, 2, 4), "blocks": 2, "latent": 256, "codes": 16384, "channels": 8}
    assert names == small.tokeniser_shapes(**sizes)
    assert sum(torch.Size(shape).numel() for shape in names.values()) * 4 == pytest.approx(288e6, rel=0.002)
    with torch.device("meta"):
        own = JanusVQVAE(_config({n: torch.empty(s) for n, s in names.items()}, Path("meta"))).state_dict()
    assert {published_name(name): tuple(tensor.shape) for name, tensor in own.items()} == {
        name: shape for name, shape in names.items() if name != USAGE
    }


def test_one_missing_or_unknown_name_is_told() -> None:
    tensors = small.random_tensors(small.language_shapes(**small.SMALL), 0)
    convert(
        {**tensors, "freqs_cis": torch.zeros(1)}, small.HEADS, Path("x")
    )  # older files carry the rotary table along
    for broken in ({**tensors, "extra": torch.zeros(1)}, {k: v for k, v in tensors.items() if "w2" not in k}):
        with pytest.raises(UserError, match=r"an unknown 'extra'|lacks 'layers\.0\.feed_forward\.w2\.weight'"):
            convert(broken, small.HEADS, Path("x"))


# ---- captions; what clean_caption of the public code returned for these


CLEANED = {
    "A red cat, on the mat.": "a red cat, on the mat.",
    "visit www.shop.com now FREE SHIPPING!": "visit now !",
    "<b>Bold</b> &amp; &lt;i&gt; text": "bold text",
    "this-is-my-cute-cat_photo_2": "this is my cute cat photo 2",
    "jc6640vc image.jpg": "",
    "“quoted” ‘text’ — dash": "\"quoted\" 'text' - dash",
    "猫 cat 日本 カタカナ": "cat カタカナ",
    "a 3x4 table 10×20": "a table",
    "'_start and end-": "start and end",
    "\"\"\"AUSVERKAUFT\"\"\"": "ausverkauft",
    "a.b,c/d": "a. b, c d",
    "(paren) [brack] {brace} | / \\ *": "paren brack brace",
    "mojibake â€œhiâ€\x9d": "mojibake \"hi\"",
    "a+b%20c+d": "a b c d",
    "<script>x=1</script>hello": "hello",
    "download free worldwide free shipping": "",
}  # fmt: skip


@pytest.mark.parametrize("caption", CLEANED)
def test_captions_are_cleaned_as_in_training(caption: str) -> None:
    assert clean(caption) == CLEANED[caption]
    assert not re.search(r"\s{2}", clean(caption))
