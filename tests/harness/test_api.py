"""The Python face on the embedded model: a handful of lines, and clear words for wrong ones."""

from __future__ import annotations

import pytest
import torch

import sjd2
from sjd2.errors import UserError

PROMPTS = [
    "a large red circle above a small blue square on a plain teal background",
    "two large green triangles on a plain gray background",
]


@pytest.fixture(scope="module")
def model():
    return sjd2.load("tiny")


def test_a_few_lines_give_images_tokens_and_passes(model) -> None:
    result = sjd2.generate(model, PROMPTS)
    assert result.images.shape == (2, 3, 48, 48)
    assert result.images.dtype == torch.uint8
    assert result.tokens.shape == (2, 144)
    assert all(sum(passes) == 144 for passes in result.accepted)
    assert max(result.forwards) < 100


def test_decoders_by_name_and_setting(model) -> None:
    narrow = sjd2.decoder("scd", window=4)
    result = sjd2.generate(model, PROMPTS[:1], decoder=narrow, guidance_scale=1.0)
    assert max(result.accepted[0]) <= 4


def test_gumbel_matching_on_the_real_backbone_in_float64() -> None:
    model = sjd2.load("tiny", dtype="float64")
    expected = sjd2.generate(model, PROMPTS, decoder="ar", sampler="gumbel", seed=3)
    for name in ("sjd", "scd", "sjd2"):
        got = sjd2.generate(model, PROMPTS, decoder=name, sampler="gumbel", seed=3)
        assert torch.equal(got.tokens, expected.tokens)
        assert sum(got.forwards) < sum(expected.forwards) / 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: sjd2.load("tinny"), "did you mean 'tiny'"),
        (lambda m: sjd2.load("tiny", dtype="foo"), "float32"),
        (lambda m: sjd2.load("tiny", wights="x"), "weights"),
        (lambda m: sjd2.decoder("sjd3"), "sjd2"),
        (lambda m: sjd2.decoder("sjd", widow=3), "window"),
        (lambda m: sjd2.generate(m, []), "at least one prompt"),
        (lambda m: sjd2.generate(m, PROMPTS, guidance=2), "guidance_scale"),
        (lambda m: sjd2.generate(m, PROMPTS, top_k=1000), "vocabulary of 512"),
        (lambda m: sjd2.generate(m, PROMPTS, decoder=sjd2.decoder("sjd2", window=1)), "window of 2"),
        (lambda m: sjd2.generate(m, PROMPTS, decoder=sjd2.decoder("sjd2", steps=31)), "fewer"),
        (lambda m: sjd2.generate(m, PROMPTS, decoder=sjd2.decoder("sjd2", levels="slot")), "clean"),
    ],
)
def test_wrong_calls_say_the_mend(model, call, words: str) -> None:
    with pytest.raises(UserError, match=words):
        call(model)


def test_sjd2_without_a_fine_tuning_names_the_ways_out() -> None:
    model = sjd2.load("tiny", adapter=None)
    with pytest.raises(UserError, match=r"finetune=sjd2.*decoder=scd"):
        sjd2.generate(model, PROMPTS)
