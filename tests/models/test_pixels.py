"""Pixels in bfloat16 stay within a grey level of float32's; what fails, or draws another image, is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sjd2
from benchmarks.architectures import ARCHITECTURES
from sjd2.compiler import Compiler
from sjd2.models import pixels
from sjd2.models.base import ImageModel
from sjd2.models.pixels import GREY, fuse_pixels, lower_precision

FAMILIES = ("lumina", "lumina2", "emu3", "janus-1b", "llamagen", "simplear-0.5b")  # one of each image tokeniser
TOKENS = torch.randint(512, (3, 144), generator=torch.Generator().manual_seed(1))


def drawn(model: ImageModel) -> Tensor:
    """Draw images of random codes."""
    layout = model.layout
    codes = torch.randint(layout.vocabulary, (2, layout.num_codes), generator=torch.Generator().manual_seed(3))
    return model.draw(layout.tokens(codes), ["", ""], [0, 0]).float()


def dtypes(model: ImageModel) -> set[torch.dtype]:
    return {p.dtype for part in model.vq.pixel_parts() for p in part.parameters()}


def realistic(model: ImageModel) -> ImageModel:
    """Scale the last layer of a random decoder, whose images are flat, to a photograph's deviation of 60 grey levels."""
    named = [pair for part in model.vq.pixel_parts() for pair in part.named_modules()]
    last: Any = [m for name, m in named if name.startswith("conv_out") and isinstance(m, nn.Conv2d)][-1]
    with torch.no_grad():
        for _ in range(3):  # clipping makes it take more than one step
            scale = 60 / drawn(model).std()
            last.weight.mul_(scale)
            if last.bias is not None:
                last.bias.mul_(scale)
    return model


@pytest.mark.parametrize("name", [*FAMILIES, "tiny"])
def test_pixels_of_a_bfloat16_model_are_those_of_float32_within_a_grey_level(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The embedded model's decoder is trained; those of the published families have random weights and are narrow here."""
    if name == "tiny":
        model = sjd2.load("tiny", dtype="bfloat16")
    else:
        model = realistic(ARCHITECTURES[name].small().build(torch.device("cpu"), torch.bfloat16))
    book, plain = model.codebook.clone(), drawn(model)
    assert plain.std() > 20
    assert dtypes(model) == {torch.float32}
    assert fuse_pixels(model)
    off = (drawn(model) - plain).abs().mean().item()
    assert off <= GREY
    refused = "pixels stay in float32" in caplog.text
    assert dtypes(model) == {torch.float32 if refused else torch.bfloat16}
    assert not (refused and name == "tiny")
    assert torch.equal(model.codebook, book)


def test_too_few_bits_are_seen_and_undone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def coarse(vq: Any, dtype: torch.dtype) -> None:
        for part in vq.pixel_parts():
            for weight in part.parameters():
                weight.data = weight.to(torch.float8_e5m2).float()
        lower_precision(vq, dtype)

    model = sjd2.load("tiny", dtype="bfloat16")
    plain = drawn(model)
    monkeypatch.setattr(pixels, "lower_precision", coarse)
    assert fuse_pixels(model)
    assert torch.equal(drawn(model), plain)
    assert dtypes(model) == {torch.float32}
    assert "pixels stay in float32: torch.bfloat16 would change them by" in caplog.text


def test_a_float32_model_draws_as_it_is() -> None:
    model = sjd2.load("tiny")
    assert not fuse_pixels(model)
    assert model.fast_pixels is None


def as_it_is(graph: Any, inputs: Any) -> Any:
    return graph.forward


def broken(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no kernel for this card.\nand more")


def wrong(graph: Any, inputs: Any) -> Any:
    return lambda *args: tuple(1 - x for x in graph.forward(*args))


@pytest.mark.full
@pytest.mark.parametrize(
    ("backend", "words"), [(as_it_is, ""), (broken, "no kernel for this card"), (wrong, "grey levels")]
)
def test_images_are_compiled_or_drawn_as_they_are(backend: Any, words: str, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model = sjd2.load("tiny", dtype="bfloat16")
    model.compiler = Compiler(backend)
    assert fuse_pixels(model)
    with torch.inference_mode():
        found = model.draw(TOKENS, ["a"] * 3, [0] * 3)
    said = [record.message for record in caplog.records if record.name == "sjd2.models.pixels"]
    assert [words in message for message in said] == ([True] if words else [])
    assert model.compiler.seconds["pixels"] > 0
    assert words in model.compiler.left_out.get("pixels", "")
    compiled = [network._compiled_call_impl is not None for network in model.vq.compiled_parts()]
    assert compiled == [not words]
    assert torch.equal(found, torch.cat([model.decode(image) for image in TOKENS.split(1)]))
