"""`python -m benchmarks.whole_images` draws the same images with several decoders in turns and compares their times."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import whole_images
from sjd2.decoding.decoder import Decoder


@pytest.mark.full
def test_decoders_take_turns_on_the_same_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["scd", "sjd2-wc window=20 drafter.siblings=[] drafter.copies=0 drafter.corrected=0"]
    out = whole_images.main([*words, "--images", "4", "--out", str(tmp_path / "images.json")])
    first, other = json.loads(out.read_text())["rows"]
    assert first["to_first"] == [1.0, 1.0, 1.0]
    assert (first["draft_passes"], other["slots"]) == (0, 20)
    assert other["passes"] < first["passes"]
    assert other["draft_passes"] == other["passes"] - 1  # the prefill has none
    low, high = other["to_first"][1:]
    assert 0 < low <= other["to_first"][0] <= high
    assert f"| {words[1]} | 20 |" in capsys.readouterr().out


def test_each_comes_first_in_turn_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def generate(model, prompt, *, decoder, seed, progress, guidance_scale):
        calls.append((decoder.name, seed, prompt))
        return SimpleNamespace(forwards=[100 * seed], seconds={"prefill": 1.0, "decode": seed})

    monkeypatch.setattr(whole_images.api, "generate", generate)
    decoders = [Decoder(name=name, window=1, lossless=True) for name in "abc"]
    model = SimpleNamespace(device=torch.device("cuda"))
    rounds = list(whole_images.draw_in_turns(model, decoders, ["one", "two", "three"], guidance_scale=1.0))
    assert "".join(name for name, _, _ in calls) == "abc" + "acb" + "cab" + "cba"
    assert [(seed, prompt) for _, seed, prompt in calls[::3]] == [(0, "one"), (1, "one"), (2, "two"), (3, "three")]
    assert rounds == [[(2.0, 100, 0)] * 3, [(3.0, 200, 0)] * 3, [(4.0, 300, 0)] * 3]


def test_finished_images_count_when_it_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds(*_, **__):
        for image in range(5):
            yield [whole_images.Drawn(1.0 + image, 144, 0)]
        raise KeyboardInterrupt

    monkeypatch.setattr(whole_images, "draw_in_turns", rounds)
    out = whole_images.main(["ar", "--images", "9", "--out", str(tmp_path / "images.json")])
    result = json.loads(out.read_text())
    assert result["images"] == len(result["rows"][0]["each"]) == 5
    assert result["sampling"]["guidance_scale"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scdd"], "did you mean 'scd'"),
        (["scd", "scd wndow=3"], "did you mean 'window'"),
        (["scd verifier=blok"], "did you mean 'block'"),
        (["sjd2-wc", "sjd2-wc drafter.siblins=[]"], "did you mean 'siblings'"),
        ([""], "decoder"),
        (["scd", "--images", "3"], "must be 4 or more"),
        (["scd", "--skip", "1990"], "2000 lines"),
        (["scd", "--skip", "-1"], "0 or more"),
        (["scd", "--prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_wrong_options_say_how_to_fix_them(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        whole_images.main(arguments)
    assert words in capsys.readouterr().err
