"""Lumina-mGPT: small checkpoints in the public layout against a plain forward, every decoder on them, and the public names."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from transformers import ChameleonConfig

from baselines.eagle.eagle_drafter import Eagle
from baselines.eagle.head import EagleHead, EagleSettings
from baselines.eagle.train import make_pairs, predict
from baselines.gsd import Grouped
from baselines.lantern import Relaxed
from baselines.reuse import Reuse
from baselines.zipar import ZipAR
from sjd2 import api
from sjd2.decoding.generate import Decoder, generate, stream
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.likelihood import nll
from sjd2.decoding.refine import Coupled, Keep, Resample
from sjd2.decoding.sampling import SamplingParams
from sjd2.decoding.verify import Exact
from sjd2.denoising.denoise import Denoise
from sjd2.errors import UserError
from sjd2.files import ROOT
from sjd2.finetune.front_pairs import Images
from sjd2.finetune.next_clean import FinetuneSJD2
from sjd2.front.corrector import Corrector, FrontSettings
from sjd2.front.front_drafter import Front
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.chameleon import Chameleon
from sjd2.models.chameleon_lm import ChameleonLM
from sjd2.models.kv_cache import RowCache
from sjd2.models.lumina import lumina
from tests.helpers import checkpoints_chameleon as small
from tests.helpers.plain_chameleon import Plain

KEYS = ROOT / "tests" / "fixtures" / "keys"
PROMPTS = ["a red cat in the hat", "Two dogs!"]
LAW = SamplingParams(guidance_scale=3.0, top_k=2000)
GREEDY, MATCH = replace(LAW, temperature=0.0), replace(LAW, sampler="gumbel")
AR = Decoder(name="ar", window=1, lossless=True)
CONTEXTS = {"start_token": [], "sep_token": [8710]}  # ids before the image in the unconditional row
HERE = {"weights": "here", "vq_weights": "here", "sampling": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lumina")
    small.write_lumina(folder / "model")
    small.write_tokenizer_folder(folder / "tokenizer")
    return folder


def load(folder: Path, dtype: str = "float64", **settings: object) -> Chameleon:
    """Load as `model=lumina` does, from local files."""
    local = {"weights": str(folder / "model"), "vq_weights": str(folder / "tokenizer" / "vqgan.ckpt"), "size": 64}
    return api.load("lumina", dtype=dtype, **(local | settings))


@pytest.fixture(scope="module")
def model(folder: Path) -> Chameleon:
    return load(folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return Plain(folder / "model")


def at(model: Chameleon, context: str, size: str = "64") -> Chameleon:
    """Return the loaded model with another unconditional context or size; the weights are shared."""
    spec = lumina(name="lumina", size=size, weights=model.spec.weights, vq_weights=model.spec.vq_weights,
                  sampling={}, uncond_context=context)  # fmt: skip
    other = copy.copy(model)
    other.spec, other.layout = spec, spec.layout
    other.ids = other._token_ids(small.names())
    return other


def prompt(plain: Plain, text: str, width: int, height: int) -> list[int]:
    """Write out the conditional prompt: <s> instruction text end-of-turn."""
    told = f"Generate an image of {width}x{height} according to the following prompt:\n{text}"
    return [0, *plain.text(told), 8710]


def reference_greedy(plain: Plain, text: str, width: int, height: int, before: list[int]) -> list[int]:
    """Draw as Lumina-mGPT's inference_solver does, greedily; start, height and width are given."""
    conditional, columns = prompt(plain, text, width, height), width // 16
    image = [8197, 8804 + height // 32, 8804 + width // 32]
    while len(image) - 3 < (height // 16) * (columns + 1):
        if (len(image) - 3 + 1) % (columns + 1) == 0:
            image.append(8803)
        else:
            image.append(4 + int(plain.guided(conditional, before, image, 3.0).argmax()))
    return [*image, 8196, 8710]


# ---- the law


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("size", "width", "height"), [("64", 64, 64), ("96x64", 96, 64)])
def test_greedy_ar_is_the_reference_solver(
    model: Chameleon, plain: Plain, context: str, size: str, width: int, height: int
) -> None:
    drawing = at(model, context, size)
    tokens = generate(drawing, AR, drawing.encode(PROMPTS), [1, 2], sampling=GREEDY).tokens
    for row, text in enumerate(PROMPTS):
        assert drawing.ids[tokens[row]].tolist() == reference_greedy(plain, text, width, height, CONTEXTS[context])


def test_the_two_contexts_are_two_laws(model: Chameleon) -> None:
    tokens = [
        generate(other, AR, other.encode(PROMPTS), [1, 2], sampling=GREEDY).tokens
        for other in (at(model, context) for context in CONTEXTS)
    ]
    assert not torch.equal(*tokens)


@pytest.mark.parametrize("context", CONTEXTS)
def test_likelihoods_are_those_of_plain_forwards(model: Chameleon, plain: Plain, context: str) -> None:
    drawing, law = at(model, context), SamplingParams(guidance_scale=3.0, temperature=0.8, top_k=4000)
    codes = torch.randint(8192, (2, 16), generator=torch.Generator().manual_seed(0))
    tokens = drawing.layout.tokens(codes)
    expected = []
    for row, text in enumerate(PROMPTS):
        image, total = drawing.ids[tokens[row]].tolist(), 0.0
        branches = [plain.logits([*before, *image]) for before in (prompt(plain, text, 64, 64), CONTEXTS[context])]
        for place in torch.nonzero(drawing.layout.free)[:, 0].tolist():
            c, u = (logits[len(logits) - len(image) + place - 1][4:8196] for logits in branches)
            guided = (u + 3.0 * (c - u)) / 0.8
            kept = guided >= guided.topk(4000).values[-1]
            chance = torch.where(kept, guided, -torch.inf).softmax(0)[image[place] - 4]
            total -= float(chance.clamp(min=1e-9).log())
        expected.append(total)
    assert nll(drawing, drawing.encode(PROMPTS), tokens, law).tolist() == pytest.approx(expected, rel=1e-9)


def test_window_passes_equal_single_passes(model: Chameleon) -> None:
    torch.manual_seed(0)
    x = model.embed(torch.randint(8192, (3, 14)))
    whole = model.forward(x, torch.arange(14).expand(3, -1), None)
    cache = RowCache(small.LAYERS, 3, 40, torch.device("cpu"))
    model.forward(x[:, :5], torch.arange(5).expand(3, -1), cache)
    cache.lengths = torch.tensor([3, 5, 0])  # an empty row too: what the unconditional prompt leaves
    for width in (4, 1, 3):
        rows = cache.lengths[:, None] + torch.arange(width)
        model.forward(torch.randn(3, 6, small.WIDTH).double(), rows[:, :1] + torch.arange(6), cache)  # rejected
        picked = rows[..., None].expand(-1, -1, small.WIDTH)
        out = model.forward(x.gather(1, picked), rows, cache)
        assert torch.allclose(out, whole.gather(1, picked), atol=1e-6)
        cache.lengths = cache.lengths + width


# ---- decoders


def chain(name: str, window: int, **parts: object) -> Decoder:
    parts = {"drafter": Jacobi(), "verifier": Exact(), "refiner": Resample(), "lossless": True} | parts
    return Decoder(name=name, window=window, **parts)


@pytest.fixture(scope="module")
def parts(model: Chameleon, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a random EAGLE head, a random corrector and a random adapter for the model."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    head = EagleHead(EagleSettings(), model)
    head.start("last")
    head.save(folder / "eagle", torch.float32)
    corrector = Corrector(FrontSettings(width=8, inner=8, blocks=1), small.WIDTH)
    torch.nn.init.normal_(corrector.out.weight, std=0.1)
    corrector.save(folder / "front")
    tuned = copy.copy(model)
    tuned.full = copy.deepcopy(model.full)
    tuned.transformer, tuned.head_module = tuned.full.get_decoder(), tuned.full.lm_head
    adapter = Adapter(AdapterSettings(rank=2), tuned)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    adapter.save(folder / "sjd2", torch.float32)
    return {name: folder / name for name in ("eagle", "front", "sjd2")}


def lossless(parts: dict[str, Path]) -> dict[str, Decoder]:
    front = {"weights": str(parts["front"]), "corrected": 2}
    eagle = {"weights": str(parts["eagle"])}
    return {
        "jacobi": chain("jacobi", 8, refiner=Resample(record=False)),
        "sjd": chain("sjd", 8),
        "scd": chain("scd", 12, refiner=Coupled()),
        "sjd++": chain("sjd++", 8, refiner=Reuse()),
        "sjd-pac": chain("sjd-pac", 16, refiner=Coupled(),
                         drafter=Front(chain=Jacobi(), siblings=(2, 2), copies=2, full=True)),
        "sjd-fc": chain("sjd-fc", 14, refiner=Coupled(),
                        drafter=Front(chain=Jacobi(), siblings=(2, 1), copies=2, **front)),
        "eagle": chain("eagle", 12, refiner=None, drafter=Eagle(depth=3, top_k=4, **eagle)),
        "eagle1": chain("eagle1", 6, refiner=None,
                        drafter=Eagle(shape="static", tree=((0,), (1,), (0, 0), (0, 1), (0, 0, 0)), **eagle)),
        "sjd2": chain("sjd2", 9, refiner=Coupled(), drafter=Denoise(steps=2)),
    }  # fmt: skip


LOSSLESS = ("jacobi", "sjd", "scd", "sjd++", "sjd-pac", "sjd-fc", "eagle", "eagle1", "sjd2")
BOTH = [(name, "start_token") for name in LOSSLESS] + [
    (name, "sep_token") for name in ("sjd", "sjd-fc", "eagle", "sjd2")
]


@pytest.fixture(scope="module")
def tuned(folder: Path, parts: dict[str, Path]) -> Chameleon:
    return load(folder, adapter=str(parts["sjd2"]))


@pytest.mark.parametrize(("name", "context"), BOTH)
def test_lossless_decoders_return_the_tokens_of_ar(
    tuned: Chameleon, parts: dict[str, Path], name: str, context: str
) -> None:
    """With gated weights in place too: what is committed comes from the untouched model."""
    drawing = at(tuned, context)
    condition = drawing.encode(PROMPTS)
    expected = generate(drawing, AR, condition, [1, 2], sampling=MATCH)
    got = generate(drawing, lossless(parts)[name], condition, [1, 2], sampling=MATCH)
    assert torch.equal(got.tokens, expected.tokens)
    assert sum(sample.forwards for sample in got.samples) < sum(sample.forwards for sample in expected.samples)


LOSSY: dict[str, Callable[[], object]] = {
    "gsd": lambda: chain("gsd", 8, verifier=Grouped(), lossless=False),
    "lantern": lambda: chain("lantern", 8, verifier=Relaxed(neighbours=9), lossless=False),
    "zipar": lambda: ZipAR(name="zipar", lossless=False, window_size=2),
    "sjd2 paper": lambda: chain("sjd2", 12, drafter=Denoise(steps=3, nearest=True), refiner=Keep(), rule="paper",
                                lossless=False),
}  # fmt: skip


@pytest.mark.parametrize(("name", "context"), [*((name, "start_token") for name in LOSSY), ("zipar", "sep_token")])
def test_lossy_decoders_draw_whole_images(
    tuned: Chameleon, name: str, context: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    drawing, forced = at(tuned, context), tuned.layout.forced()
    tokens = generate(drawing, LOSSY[name](), drawing.encode(PROMPTS), [1, 2], sampling=LAW).tokens
    assert torch.equal(tokens[:, forced >= 0], forced[forced >= 0].expand(2, -1))
    assert tokens[:, forced < 0].max() < 8192
    assert drawing.decode(tokens).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("context", CONTEXTS)
def test_zipar_with_whole_rows_is_ar(model: Chameleon, context: str) -> None:
    """Its header goes into the prefill, behind an empty prompt too."""
    drawing = at(model, context)
    whole = ZipAR(name="zipar", lossless=False, window_size=4)
    condition = drawing.encode(PROMPTS)
    tokens = [generate(drawing, each, condition, [1, 2], sampling=MATCH).tokens for each in (AR, whole)]
    assert torch.equal(*tokens)


def test_timestep_tokens_stand_where_an_empty_prompt_ends(folder: Path, model: Chameleon, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tuned = load(folder)
    tuned.adapter = Adapter(AdapterSettings(rank=2, code="appended"), tuned)
    for parameter in tuned.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    sjd2 = chain("sjd2", 8, refiner=Coupled(), drafter=Denoise(steps=2))
    condition = model.encode(PROMPTS)
    tokens = [
        generate(each, decoder, condition, [1, 2], sampling=MATCH).tokens
        for each, decoder in ((model, AR), (tuned, sjd2))
    ]
    assert torch.equal(*tokens)


def test_rows_that_are_refilled_draw_the_same(model: Chameleon) -> None:
    scd = chain("scd", 8, refiner=Coupled())
    prompts, seeds = [*PROMPTS, "x"], [1, 2, 3]
    expected = generate(model, scd, model.encode(prompts), seeds, sampling=LAW).tokens
    got = dict(stream(model, scd, zip(prompts, seeds, strict=True), rows=2, sampling=LAW))
    assert all((got[row].tokens == expected[row].numpy()).all() for row in range(3))


# ---- training with an empty unconditional prompt


def unconditional(model: Chameleon, rows: int, width: int = 3) -> tuple[Tensor, Tensor]:
    """Return empty prompts padded to some width, as batches with conditional rows have them."""
    empty = model.encode(["x"]).uncond_embeds
    return torch.nn.functional.pad(empty, (0, 0, 0, width - 1)).expand(rows, -1, -1), torch.zeros(
        rows, dtype=torch.long
    )


@pytest.fixture(scope="module")
def image(model: Chameleon) -> Tensor:
    codes = torch.randint(8192, (2, 16), generator=torch.Generator().manual_seed(1))
    return model.layout.tokens(codes)


def test_an_eagle_head_trains_on_what_it_will_see(model: Chameleon, plain: Plain, image: Tensor) -> None:
    """Behind an empty prompt: the states are those of plain forwards, and training, decoding and a plain call agree."""
    torch.manual_seed(3)
    head = EagleHead(EagleSettings(), model).eval().requires_grad_(False)
    pairs = make_pairs(model, *unconditional(model, 2), image)
    for row in range(2):
        states = plain.states(model.ids[image[row]].tolist())
        assert torch.allclose(pairs.states[row, 1:], states[:-1], atol=1e-6)  # H_1.. : behind tokens 0..
    assert pairs.states[:, 0].abs().max() == 0
    first, second = predict(head, pairs, 2)
    length = image.shape[1] - 2  # pairs 1..: token t and the state before it, at positions 0..
    mask = torch.full((length, length), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
    told = head(
        pairs.embeds[:, 1:], pairs.states[:, 1:-1], torch.arange(length).expand(2, -1), None, mask.expand(2, 1, -1, -1)
    )
    assert torch.allclose(first[:, 1:], told, atol=1e-9)
    cache = head.cache(2, 64)
    empty, lengths = unconditional(model, 2, 1)
    cache.bound = 64
    ahead = head.prefill(
        cache, torch.arange(2), empty, model.forward(empty, torch.zeros(2, 1).long(), None), lengths, image[:, 0]
    )
    assert torch.allclose(ahead, first[:, 0], atol=1e-9)
    seen = torch.ones(1, 1, 1, dtype=torch.bool)
    drafted = head.step(cache, image[:, 1:2], ahead[:, None], torch.ones(1, 1).long(), seen)  # a guess for token 1
    assert torch.allclose(drafted[:, 0], second[:, 1], atol=1e-9)
    count = torch.tensor([4, 4])
    assert torch.allclose(head.extend(cache, image[:, 1:7], pairs.states[:, 1:7], count), first[:, 4], atol=1e-9)


def test_front_pairs_and_clean_passes_have_plain_states(model: Chameleon, plain: Plain, image: Tensor) -> None:
    n = image.shape[1]
    hidden = Images(model, PROMPTS, image).hidden  # [conditional | unconditional]
    recipe = FinetuneSJD2(adapter=AdapterSettings(rank=2), data=None, steps=1, batch_size=1, lr=1.0)
    clean = recipe._clean_pass(model, image, *unconditional(model, 2))[1]
    for row, text in enumerate(PROMPTS):
        ids = model.ids[image[row]].tolist()
        behind = plain.states([*prompt(plain, text, 64, 64), *ids])
        assert torch.allclose(hidden[row], behind[-n - 1 :], atol=1e-6)
        alone = plain.states(ids)
        assert torch.allclose(hidden[2 + row, 1:], alone, atol=1e-6)
        assert torch.allclose(clean[row], alone[:-1], atol=1e-6)


# ---- settings and files


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
        (_config(vocabulary_map={"<image>": 5}), "names 0 image codes"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be read as a tokenizer"),
    ],
)
def test_checkpoints_that_do_not_fit_are_told_in_one_sentence(
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
def test_low_precision_keeps_pixels_and_laws_in_float32(folder: Path, dtype: str) -> None:
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
    drawn = [generate(each, AR, condition, [1, 2], sampling=LAW).tokens for each in (model, spread)]
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


# ---- the public files


def public(name: str) -> dict[str, tuple[int, ...]]:
    lines = (KEYS / f"{name}.txt").read_text().splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#"))
    return {name: tuple(map(int, shape.split("x"))) for name, shape in pairs}


def index_bytes(names: dict[str, tuple[int, ...]], shards: int, total: int) -> int:
    """Return the size of the index that transformers writes for these names."""
    weight_map = dict.fromkeys(sorted(names), f"model-00001-of-{shards:05d}.safetensors")
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return len(json.dumps(content, indent=2, sort_keys=True) + "\n")


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
