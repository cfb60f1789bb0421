"""SJD2's fine-tuning: it trains on what decoding feeds, learns, leaves the clean path alone, and loads back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sjd2.errors import UserError
from sjd2.finetune.data.sources import TokenData
from sjd2.finetune.next_clean import FinetuneSJD2
from sjd2.finetune.windows import causal_mask, draw_segments, window_mask
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.layout import TokenGrid
from tests.helpers.toy import Toy

GRID = TokenGrid(4, 6, 12, prefix=(20,), row_end=22)


class Columns(TokenData):
    """Images whose columns are constant: easy to predict from the row above, whatever is noisy in between."""

    def batch(self, n: int, seed: int, held_out: bool = False) -> tuple[list[str], torch.Tensor]:
        generator = torch.Generator().manual_seed(seed + held_out)
        return ["some words"] * n, torch.randint(0, 12, (n, 6), generator=generator).repeat(1, 4)


def recipe(steps: int = 6, **more) -> FinetuneSJD2:
    adapter = AdapterSettings(**({"rank": 4} | more.pop("adapter", {})))
    more = {"levels": (1, 2), "shortest": 4, "longest": 12, "validation_images": 16, "validate_every": 100} | more
    return FinetuneSJD2(adapter=adapter, data=Columns(), steps=steps, batch_size=8, lr=1e-2, warmup=2, **more)


VARIANTS = {
    "gated": {},
    "appended": {"adapter": {"code": "appended"}},
    "vp": {"adapter": {"path": "vp"}},
    "ungated": {"adapter": {"gated": False}, "context": "in_place"},
    "full": {"adapter": {"kind": "full", "gated": False, "code": "appended"}, "context": "in_place"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_it_learns_and_loads_back(name: str, tmp_path: Path) -> None:
    model, plain = Toy(GRID), Toy(GRID)
    before = recipe(**VARIANTS[name])
    model.adapter = Adapter(before.adapter, model)
    start = before.validate(model, 0)
    model = Toy(GRID)
    end = recipe(40, **VARIANTS[name]).run(model=model, out=tmp_path, log=None, device="cpu", seed=0)
    assert all(end[key] < start[key] - 0.05 for key in start)
    loaded = Toy(GRID)
    loaded.adapter = Adapter.load(tmp_path / "final", loaded)
    x, positions = model.embed(torch.randint(0, 12, (2, 9))), torch.arange(9).expand(2, -1)
    gate = torch.ones(2, 9, dtype=torch.bool)
    tuned = model.forward(x, positions, None, None, gate)
    # stored in bfloat16
    assert torch.allclose(loaded.forward(x, positions, None, None, gate), tuned, atol=0.1)
    same = torch.equal(model.forward(x, positions, None), plain.forward(x, positions, None))
    assert same == before.adapter.gated


def test_no_steps_give_an_adapter_that_changes_nothing(tmp_path: Path) -> None:
    recipe(0).run(model=Toy(GRID), out=tmp_path, log=None, device="cpu", seed=0)
    tuned, plain = Toy(GRID), Toy(GRID)
    tuned.adapter = Adapter.load(tmp_path / "final", tuned)
    x, positions = plain.embed(torch.randint(0, 12, (2, 9))), torch.arange(9).expand(2, -1)
    noisy = torch.ones(2, 9, dtype=torch.bool)
    assert torch.equal(tuned.forward(x, positions, None, None, noisy), plain.forward(x, positions, None))


def test_a_killed_fine_tuning_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, cut = Toy(GRID), Toy(GRID)
    recipe(6).run(model=whole, out=tmp_path / "whole", log=None, device="cpu", seed=0)

    def stop(step: int, values: dict) -> None:
        raise KeyboardInterrupt

    part = recipe(6, validate_every=3)
    with pytest.raises(KeyboardInterrupt):
        part.run(model=cut, out=tmp_path / "cut", log=stop, device="cpu", seed=0)
    cut = Toy(GRID)
    recipe(6).run(model=cut, out=tmp_path / "cut", log=None, device="cpu", seed=0)
    for one, other in zip(whole.adapter.parameters(), cut.adapter.parameters(), strict=True):
        assert torch.equal(one, other)


def test_windows_see_what_a_decoding_pass_sees() -> None:
    model = Toy(GRID, dtype=torch.float64)
    model.adapter = Adapter(AdapterSettings(rank=2), model)
    for parameter in model.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    condition = model.encode(["two words"])
    width, n = condition.embeds.shape[1], GRID.length
    clean = model.embed(torch.randint(0, 12, (1, n)))
    noisy = torch.randn(1, n, 16, dtype=torch.float64)
    first = torch.full((1, n), 9)  # one window from position 9 to 15
    first[:, :9], first[:, 16:] = 0, 16
    lengths, place = condition.lengths, condition.lengths[:, None] + torch.arange(n)
    cache = model.cache(1, width + 2 * n)
    start = torch.arange(width)[None]
    prompt = torch.cat([condition.embeds, clean], 1)
    model.forward(prompt, torch.cat([start, place], 1), cache, causal_mask(lengths, width, n))
    cache.lengths = cache.lengths + width + n
    gate = torch.ones(1, n, dtype=torch.bool)
    trained = model.forward(noisy, place, cache, window_mask(lengths, width, first), gate)[:, 9:16]

    decode = model.cache(1, 60)
    past = torch.cat([condition.embeds, clean[:, :9]], 1)
    model.forward(past, torch.arange(past.shape[1])[None], decode)
    decode.lengths = torch.tensor([past.shape[1]])
    decoded = model.forward(noisy[:, 9:16], place[:, 9:16], decode, None, gate[:, 9:16])
    assert torch.allclose(trained, decoded, atol=1e-6)


def test_levels_climb_inside_windows_and_restart() -> None:
    generator = torch.Generator().manual_seed(0)
    for steps in (1, 3):
        segments = draw_segments(64, 40, steps, shortest=4, longest=12, generator=generator)
        assert segments.level.min() == 0
        assert segments.level.max() == steps
        same = segments.first[:, 1:] == segments.first[:, :-1]
        assert (segments.level.diff(dim=1)[same] >= 0).all()
        assert (segments.first <= torch.arange(40)).all()
        assert (segments.first[:, 1:] - segments.first[:, :-1] >= 0).all()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"context": "in_place"}, "gated"),
        ({"context": "window"}, "did you mean 'windows'"),
        ({"corrupt": 2.0}, "corrupt"),
        ({"levels": (0,)}, "levels"),
        ({"longest": 2}, "longest"),
        ({"steps": -1}, "finetune.steps must be 0 or more, got -1"),
    ],
)
def test_wrong_settings_are_refused_with_the_fix(more: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        recipe(**more)


def test_a_folder_without_a_fine_tuning_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="finetune=sjd2"):
        Adapter.load(tmp_path, Toy(GRID))
