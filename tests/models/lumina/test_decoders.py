"""Lumina-mGPT: every decoder, and rows that are refilled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baselines.eagle.eagle_drafter import Eagle
from baselines.eagle.head import EagleHead, EagleSettings
from baselines.gsd import Grouped
from baselines.lantern import Relaxed
from baselines.reuse import Reuse
from baselines.zipar import ZipAR
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import generate, stream
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.refine import Coupled, Keep, Resample
from sjd2.denoising.denoise import Denoise
from sjd2.front.corrector import Corrector, FrontSettings
from sjd2.front.front_drafter import Front
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.chameleon import Chameleon
from tests.helpers import checkpoints_chameleon as small
from tests.helpers.small_lumina import AR, CONTEXTS, MATCH, PROMPTS, SAMPLING, at, chain, load
from tests.helpers.tiers import by_default


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
DEFAULT = [("sjd-fc", "start_token"), ("eagle", "start_token"), ("sjd2", "start_token"), ("sjd2", "sep_token")]


@pytest.fixture(scope="module")
def tuned(folder: Path, parts: dict[str, Path]) -> Chameleon:
    return load(folder, adapter=str(parts["sjd2"]))


@pytest.mark.parametrize("case", by_default(BOTH, DEFAULT), ids="-".join)
def test_lossless_decoders_return_the_tokens_of_ar(
    tuned: Chameleon, parts: dict[str, Path], case: tuple[str, str]
) -> None:
    """With gated weights in place too: what is committed comes from the untouched model."""
    name, context = case
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
    tokens = generate(drawing, LOSSY[name](), drawing.encode(PROMPTS), [1, 2], sampling=SAMPLING).tokens
    assert torch.equal(tokens[:, forced >= 0], forced[forced >= 0].expand(2, -1))
    assert tokens[:, forced < 0].max() < 8192
    assert drawing.decode(tokens).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("context", CONTEXTS)
def test_zipar_with_whole_rows_is_ar(model: Chameleon, context: str) -> None:
    """Its header goes into the prefill, after an empty prompt too."""
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
    expected = generate(model, scd, model.encode(prompts), seeds, sampling=SAMPLING).tokens
    got = dict(stream(model, scd, zip(prompts, seeds, strict=True), rows=2, sampling=SAMPLING))
    assert all((got[row].tokens == expected[row].numpy()).all() for row in range(3))
