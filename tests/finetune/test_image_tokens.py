"""Images become tokens once: any folder or shard, captions in many ways, damaged files skipped, kills lose little."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sjd2.errors import UserError
from sjd2.finetune.data import images
from sjd2.finetune.data import tokens as tokenised
from sjd2.finetune.data.tokens import ImageTokens
from tests.helpers.separators import SEPARATORS
from tests.helpers.small_training import SIDE, tokens


def saved(image: Image.Image, kind: str = "png", **more) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def test_an_image_is_scaled_to_cover_and_cropped_to_its_centre() -> None:
    """Columns of a 4:1 image hold their number; a 2:1 crop loses the outer quarters, equally on both sides."""
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (16, 1))
    cut = images.pixels(saved(Image.fromarray(np.stack([ramp] * 3, -1))), 8, 16)
    assert cut.shape == (8, 16, 3)
    wanted = ramp[0, 16:48].reshape(16, 2).mean(1)  # 32 of 64 columns, two to one
    assert np.abs(cut[4, 1:-1, 0] - wanted[1:-1]).max() <= 1
    tall = images.pixels(saved(Image.fromarray(np.stack([ramp.T] * 3, -1))), 16, 8)
    assert np.array_equal(tall.transpose(1, 0, 2), cut)


def test_rotated_transparent_and_small_images() -> None:
    half = np.zeros((16, 16, 3), np.uint8)
    half[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    assert images.pixels(saved(Image.fromarray(half), "jpeg", exif=exif), 16, 16)[2].max() < 20
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert images.pixels(saved(clear), 16, 16).min() == 255
    assert images.pixels(saved(clear), 16, 16, smallest=17) is None
    with pytest.raises(images.BROKEN):
        images.pixels(saved(Image.fromarray(half))[:60], 16, 16)


def test_a_folder_and_its_shards_hold_the_same(place: Path) -> None:
    folder, shards = (
        [s for part in images.find_parts(str(place / name)) for s in part.samples()] for name in ("images", "shards")
    )
    assert len(folder) == len(shards) == 40
    assert [(s.data, s.caption) for s in folder] == [(s.data, s.caption) for s in shards]
    assert folder[1].caption == "two blue squares"
    one = [s for part in images.find_parts(str(place / "shards" / "[01].tar")) for s in part.samples()]
    assert one == shards[:20]


@pytest.mark.parametrize("kind", ["metadata", "jsonl", "list", "object", "json", "caption"])
def test_captions_may_lie_in_many_ways(kind: str, tmp_path: Path) -> None:
    blank, given = saved(Image.new("RGB", (4, 4))), None
    for name in ("a.b.png", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(blank)
    rows = [{"file_name": "a.b.png", "text": "first"}, {"image": "sub/c.png", "caption": "second"}]
    if kind == "metadata":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind in ("jsonl", "list", "object"):
        given = str(tmp_path / f"words.{'jsonl' if kind == 'jsonl' else 'json'}")
        texts = {"list": json.dumps(rows), "object": json.dumps({"a.b.png": "first", "sub/c.png": "second"})}
        Path(given).write_text(texts.get(kind, "\n".join(map(json.dumps, rows))))
    else:
        for name, text in (("a.b", "first"), ("sub/c", "second")):
            (tmp_path / f"{name}.{kind}").write_text(json.dumps({"text": text}) if kind == "json" else text)
    found = [s for part in images.find_parts(str(tmp_path), given) for s in part.samples()]
    assert [(s.name, s.caption) for s in found] == [("a.b.png", "first"), ("sub/c.png", "second")]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_captions_hold_every_separator(kind: str, place: Path, model: object, tmp_path: Path) -> None:
    """Characters at which str.splitlines splits, a byte order mark, Windows line ends, a file name that is not UTF-8."""
    blank, odd = (place / "images" / "000.png").read_bytes(), f"a{SEPARATORS}b"
    names = [f"{i}.png" for i in range(8)] + [os.fsdecode(b"caf\xe9.png")]
    (tmp_path / "images").mkdir()
    for i, name in enumerate(names):
        image = io.BytesIO()
        Image.new("RGB", (SIDE, SIDE), (i * 20, 0, 0)).save(image, "png")
        (tmp_path / "images" / name).write_bytes(image.getvalue() or blank)
    rows = [json.dumps({"file_name": name, "text": odd}, ensure_ascii=name == names[-1]) for name in names]
    list_of = {"jsonl": "\r\n".join(rows), "json": f"[{', '.join(rows)}]"}[kind]
    given = tmp_path / f"captions.{kind}"
    given.write_bytes(b"\xef\xbb\xbf" + list_of.encode())
    for _ in range(2):  # made, then read again
        data = tokens(tmp_path, captions=str(given), held_out_share=2)
        data.prepare(model, tmp_path / "out")
        assert set(data.batch(9, 0)[0]) | set(data.batch(9, 0, held_out=True)[0]) == {odd}
    given.write_text(
        rows[0].replace("a", "\\ud83d", 1) if kind == "jsonl" else '[{"image": "0.png", "text": "\\ud83d"}]'
    )
    with pytest.raises(UserError, match="cannot be read"):
        images.find_parts(str(tmp_path / "images"), str(given))


def test_what_is_left_out_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for name in ("a.png", "b.bmp", "c.tif", "d.tif"):
        (tmp_path / name).touch()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": "e.png", "text": "y"}')
    (part,) = images.find_parts(str(tmp_path))
    assert len(part.images) == 1
    assert "left out: 2 .tif, 1 .bmp" in caplog.text
    assert "1 captions name no image there, e.g. e.png" in caplog.text
    (tmp_path / "0.tar").touch()
    images.find_parts(str(tmp_path))
    assert "1 .png" in caplog.text  # beside a shard


def test_missing_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"finetune\.data\.images=FOLDER"):
        ImageTokens()
    with pytest.raises(UserError, match="does not exist"):
        ImageTokens(images=str(tmp_path / "nowhere")).check()
    with pytest.raises(UserError, match=r"no \.jpg"):
        images.find_parts(str(tmp_path))
    (tmp_path / "a.png").touch()
    (tmp_path / "captions.jsonl").write_text('{"file_name": "a.png"}')
    with pytest.raises(UserError, match="cannot be read"):
        images.find_parts(str(tmp_path), str(tmp_path / "captions.jsonl"))
    (tmp_path / "0.tar").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"shard .* cannot be read"):
        list(images.TarPart(tmp_path / "0.tar").samples())


def test_tokens_are_the_tokenisers_own_and_held_out_by_content(place: Path, model: object, tmp_path: Path) -> None:
    data, shards = tokens(place), tokens(place, "shards")
    data.prepare(model, tmp_path)
    shards.prepare(model, tmp_path)
    held_out = data.batch(100, 0, held_out=True)
    assert data.count() + len(held_out[0]) == 40
    assert 3 <= len(held_out[0]) <= 20
    wanted = {}
    for sample in images.find_parts(str(place / "images"))[0].samples():
        image = torch.from_numpy(images.pixels(sample.data, SIDE, SIDE)).permute(2, 0, 1)[None]
        wanted[tuple(model.vq.encode(image / 127.5 - 1).flatten().tolist())] = sample
    trained = data.shuffled(data.count(), 0, 0)
    for prompts, codes, held in ((*held_out, True), (*trained, False)):
        for prompt, row in zip(prompts, codes.tolist(), strict=True):
            sample = wanted[tuple(row)]
            assert sample.caption == prompt
            assert (images.number(sample.data) % 4 == 0) == held
    both = (sorted(map(tuple, d.batch(100, 0, held_out=True)[1].tolist())) for d in (data, shards))
    assert next(both) == next(both)


def test_an_epoch_shows_every_image_once_in_its_own_order(place: Path, model: object, tmp_path: Path) -> None:
    data = tokens(place)
    data.prepare(model, tmp_path)
    size = data.count()
    steps = [data.shuffled(5, step, 7)[1].tolist() for step in range(2 * size // 5 + 1)]
    rows = [tuple(row) for step in steps for row in step]
    every = sorted(map(tuple, data._take(data._rows[False])[1].tolist()))
    assert sorted(rows[:size]) == sorted(rows[size : 2 * size]) == every
    assert rows[:size] != rows[size : 2 * size]
    assert data.shuffled(5, 3, 7)[1].tolist() == steps[3]
    assert data.shuffled(5, 3, 8)[1].tolist() != steps[3]


def test_damaged_images_are_counted_named_and_skipped(
    place: Path, model: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for file in (place / "images").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    broken = folder / "003.png"
    broken.write_bytes(broken.read_bytes()[:40])
    (folder / "007.txt").unlink()
    data = tokens(tmp_path, tolerated=0.05)
    with caplog.at_level("INFO"):
        data.prepare(model, tmp_path / "out")
    assert "2 skipped: " in caplog.text
    assert "1 damaged" in caplog.text
    assert "1 no caption (e.g. 003.png" in caplog.text
    assert data.count() + len(data.batch(100, 0, True)[0]) == 38
    with pytest.raises(UserError, match=r"too many.*003\.png"):
        tokens(tmp_path, tolerated=0.04).prepare(model, tmp_path / "out")
    with pytest.raises(UserError, match="held_out_share"):
        tokens(tmp_path, held_out_share=100_000).prepare(model, tmp_path / "out")


def test_tokenising_resumes_after_a_kill_and_is_done_once(
    place: Path, model: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokens(place)
    whole.prepare(model, tmp_path / "whole")
    monkeypatch.setattr(images, "PART", 8)
    real, seen = tokenised._encode, []

    def encode(model: object, arrays: np.ndarray) -> np.ndarray:
        seen.append(len(arrays))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(model, arrays)

    monkeypatch.setattr(tokenised, "_encode", encode)
    cut = tokens(place)
    with pytest.raises(KeyboardInterrupt):
        cut.prepare(model, tmp_path / "cut")
    cut.prepare(model, tmp_path / "cut")
    assert sum(seen) == 40 + 8  # the part in hand was lost
    seen[:] = [0] * 9
    again = tokens(place, held_out_share=3)  # another share needs no encoding
    again.prepare(model, tmp_path / "cut")
    assert len(seen) == 9
    monkeypatch.undo()
    order = [sorted(map(tuple, d._take(d._rows[False])[1].tolist())) for d in (whole, cut)]
    assert order[0] == order[1]
    tokens(place, smallest=1).prepare(model, tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("tokens-*"))) == 2
