"""The front corrector: it starts as the stale distribution, trains on what decoding feeds, raises the overlap, loads back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sjd2.errors import UserError
from sjd2.finetune.data.generated import Generated
from sjd2.finetune.data.sources import Captions
from sjd2.finetune.front import FinetuneFront
from sjd2.finetune.front_pairs import FrontPairs, TeacherForced
from sjd2.front.corrector import Corrector, FrontSettings, embedding_width, read_settings
from sjd2.models.layout import TokenGrid
from tests.helpers.toy import Toy

GRID = TokenGrid(3, 4, 12, prefix=(20,), row_end=22)


@dataclass
class Words(Captions):
    """Captions of one to three words."""

    words: list[str] = field(default_factory=lambda: ["ab", "cd ef", "gh i jk"])

    def captions(self, n: int, seed: int, held_out: bool) -> list[str]:
        return [self.words[i % 3] for i in range(n)]


def recipe(steps: int = 4, **more) -> FinetuneFront:
    data = Generated(captions=Words(), images=48, validation_images=24, batch_size=12)
    corrector = FrontSettings(width=32, inner=48, blocks=1)
    more = {
        "validation_images": 24,
        "validate_every": 100,
        "images": 24,
        "round_steps": 3,
        "warmup": 1,
        "ema": 0.9,
    } | more
    return FinetuneFront(corrector=corrector, data=data, steps=steps, **({"batch_size": 64} | more))


def toy() -> Toy:
    return Toy(GRID)


def test_untrained_it_returns_the_stale_state() -> None:
    corrector = Corrector(FrontSettings(), 16)
    stale, source, old, new = torch.randn(4, 3, 5, 16)
    assert torch.equal(corrector(stale, source, old, new), stale)
    torch.nn.init.normal_(corrector.out.weight)
    assert corrector(stale, source, old, new).shape == (3, 5, 16)
    assert not torch.allclose(corrector(stale, source, old, new), stale)


def test_it_loads_back(tmp_path: Path) -> None:
    model = toy()
    corrector = Corrector(FrontSettings(width=8, inner=8, blocks=2), embedding_width(model))
    torch.nn.init.normal_(corrector.out.weight)
    corrector.save(tmp_path, torch.float32)
    loaded = Corrector.load(tmp_path, model)
    parts = torch.randn(4, 3, 16)
    assert torch.equal(loaded(*parts), corrector(*parts))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(UserError, match="does not fit"):
        Corrector.load(tmp_path, Toy(GRID, width=32))


def test_a_folder_that_is_no_corrector_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="finetune=front"):
        read_settings(tmp_path)


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"round_steps": 0}, {"images": 0}])
def test_wrong_settings_are_told(settings: dict) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        recipe(**settings)


def plain(model: Toy, prompt: str, tokens: Tensor) -> Tensor:
    """Return the state after the last of these tokens [n] in both branches, without a cache: [2, D]."""
    condition = model.encode([prompt])
    states = []
    for embeds, length in (
        (condition.embeds, condition.lengths),
        (condition.uncond_embeds, condition.uncond_lengths),
    ):
        x = torch.cat([embeds[:, : int(length[0])], model.embed(tokens)[None]], 1)
        states.append(model.forward(x, torch.arange(x.shape[1])[None], None)[0, -1])
    return torch.stack(states)


@torch.no_grad()
def test_stale_states_are_those_of_a_plain_forward_with_the_replaced_tokens() -> None:
    model, prompts = toy(), ["ab", "cd ef gh"]
    tokens, first, second = torch.randint(0, 12, (3, 2, GRID.length))
    images = TeacherForced(model, prompts, tokens)
    stale, twice = images.stale(first), images.stale_twice(second)
    for row, prompt in enumerate(prompts):
        own = [row, row + 2]
        for place in (0, 1, 7, GRID.length - 1):
            past = tokens[row, :place]
            assert torch.allclose(
                images.hidden[own, place + 1], plain(model, prompt, tokens[row, : place + 1]), atol=1e-5
            )
            expected = plain(model, prompt, torch.cat([past, first[row, place, None]]))
            assert torch.allclose(stale[own, place], expected, atol=1e-5)
            if place:
                past = torch.cat([past[:-1], first[row, place - 1, None], second[row, place, None]])
                assert torch.allclose(twice[own, place], plain(model, prompt, past), atol=1e-5)


def test_replaced_tokens_are_rejected_drafts(tmp_path: Path) -> None:
    model, training = toy(), recipe()
    training.data.prepare(model, tmp_path)
    pairs: FrontPairs = training.pairs(model, 48, 0)
    free = model.layout.free
    assert (pairs.other != pairs.tokens)[:, free].all()
    same = (pairs.old == pairs.tokens) & free
    assert same.float().mean() < 0.2
    assert (pairs.weight[same] < 1e-5).all()  # a draft that q favours is never what p recovers
    assert pairs.weight.min() >= 0
    assert pairs.weight.max() <= 1
    again = training.pairs(model, 48, 0)
    assert torch.equal(pairs.old, again.old)
    assert not torch.equal(pairs.old, training.pairs(model, 48, 1).old)


def test_guidance_scales_need_not_be_exact_in_float32(tmp_path: Path) -> None:
    model, training = toy(), recipe()
    training.data = Generated(captions=Words(), images=24, validation_images=12, batch_size=12, scales=(1.0, 1.2))
    training.data.prepare(model, tmp_path)
    pairs = training.pairs(model, 24, 0)
    assert len(set(pairs.scales.tolist())) == 2
    assert pairs.weight.isfinite().all()


def test_training_raises_the_overlap_and_writes_what_loads(tmp_path: Path) -> None:
    model = toy()
    figures = recipe(80, round_steps=20).run(model=model, out=tmp_path, log=None, device="cpu", seed=0)
    for scale in ("1", "3"):
        assert figures[f"overlap_g{scale}_d1"] > figures[f"stale_g{scale}_d1"] + 0.03
        assert figures[f"overlap_g{scale}_d2"] > figures[f"stale_g{scale}_d2"]
    assert Corrector.load(tmp_path / "final", model).depth == 16


def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    def stop(step: int, values: dict) -> None:
        raise KeyboardInterrupt

    recipe(8).run(model=toy(), out=tmp_path / "whole", log=None, device="cpu", seed=0)
    part = recipe(8, validate_every=4)
    with pytest.raises(KeyboardInterrupt):
        part.run(model=toy(), out=tmp_path / "cut", log=stop, device="cpu", seed=0)
    recipe(8).run(model=toy(), out=tmp_path / "cut", log=None, device="cpu", seed=0)
    whole, cut = (Corrector.load(tmp_path / name / "final", toy()) for name in ("whole", "cut"))
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(one, other)
