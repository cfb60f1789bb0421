"""What a distance compares with and a metric needs is checked before sampling: statistics, folders of images, weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from evaluation.metrics import fid, references
from evaluation.metrics.batches import check_weights
from sjd2.errors import UserError
from tests.helpers.extractors import MeanColour
from tests.helpers.runs import gaussian, pixels


def test_reference_from_a_folder_is_kept(tmp_path: Path) -> None:
    for i, image in enumerate(pixels(5)):
        (tmp_path / "real" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "real" / str(i % 2) / f"{i}.png")
    extractor = MeanColour()
    for _ in range(2):
        reference = references.ImageFolder(tmp_path / "real", tmp_path / "kept").read(extractor)
        assert extractor.seen == 5
        assert reference.name == "real (5 images)"
        assert reference.features.shape == (5, 12)


def test_references_from_files(tmp_path: Path) -> None:
    x, extractor = gaussian(30, 12), MeanColour()
    np.savez(tmp_path / "features.npz", features=x, digest="meancolour", name="mine")
    np.savez(tmp_path / "moments.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))  # as clean-fid keeps them
    full, moments = (references.read_reference(tmp_path / f"{name}.npz", extractor) for name in ("features", "moments"))
    assert full.name == "mine"
    assert fid.frechet(full.statistics, moments.statistics) == pytest.approx(0, abs=1e-6)
    assert moments.features is None


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"features": gaussian(9, 12), "digest": "other"}, "holds features of extractor other"),
        ({"features": gaussian(9, 5)}, "has 5 features"),
        ({"x": np.zeros(3)}, "neither `features` nor `mu`"),
        ({"features": np.zeros((1, 12))}, "`features` has shape .1, 12., a distance needs at least 2 rows"),
        ({"features": np.array(3)}, "`features` has shape"),
        ({"features": np.full((4, 12), np.nan)}, "no finite numbers"),
        ({"features": np.array([[None] * 12])}, "no readable npz"),
        ({"mu": np.zeros(12), "sigma": np.zeros(12)}, "`sigma` has shape .12,., a distance needs shape .12, 12."),
        ({"mu": np.zeros(12), "sigma": np.full((12, 12), np.inf)}, "`sigma` holds values that are no finite numbers"),
        ({"mu": np.zeros(12)}, "neither `features` nor `mu` and `sigma`, but mu"),
        (None, "no readable npz"),
    ],
)
def test_wrong_references_are_refused(tmp_path: Path, arrays: dict | None, says: str) -> None:
    path = tmp_path / "reference.npz"
    np.savez(path, **arrays) if arrays else path.write_bytes(b"PK")
    with pytest.raises(UserError, match=says):
        fid.FeatureDistance(extractor=MeanColour(), reference=str(path)).check()


def test_only_what_a_reference_needs_is_read_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ADM's files hold the images too: 2 GB that no distance needs."""
    path, read, real = tmp_path / "adm.npz", [], np.lib.npyio.NpzFile.__getitem__
    np.savez(path, arr_0=np.zeros((9, 4, 4, 3), np.uint8), mu=np.zeros(12), sigma=np.eye(12), mu_s=np.zeros(3))

    def counted(self: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
        read.append(key)
        return real(self, key)

    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", counted)
    metric = fid.FeatureDistance(extractor=MeanColour(), reference=str(path))
    metric.check()
    assert metric.reference.name == "adm"
    assert read == ["mu", "sigma"]


def test_a_folder_of_references_is_checked_before_it_is_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder, extractor = tmp_path / "real", MeanColour()
    folder.mkdir()
    for name, kind in (("a.png", "png"), ("b.jpg", "jpeg"), ("c.webp", "webp"), ("d.tif", "tiff")):
        Image.fromarray(pixels(1, 64)[0]).save(folder / name, kind)
    (folder / "notes.txt").write_text("x")
    metric = fid.FeatureDistance(extractor=extractor, reference=str(folder), cache=str(tmp_path / "kept"))
    metric.check()
    assert "3 images; left out: 1 .tif, 1 .txt" in caplog.text.replace("1 .txt, 1 .tif", "1 .tif, 1 .txt")
    assert extractor.seen == 0
    whole = (folder / "b.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "c.webp").write_bytes(b"<html>")
    again = fid.FeatureDistance(extractor=extractor, reference=str(folder), cache=str(tmp_path / "kept"))
    with pytest.raises(UserError, match=r"2 of 3 reference images cannot be read: .*b\.jpg \(.*truncated.*c\.webp"):
        again.check()
    (folder / "b.jpg").write_bytes(whole)
    (folder / "c.webp").unlink()
    kept = fid.FeatureDistance(extractor=extractor, reference=str(folder), cache=str(tmp_path / "kept"))
    assert kept.reference.features.shape == (2, 12)
    (stored,) = (tmp_path / "kept").iterdir()
    stored.write_bytes(stored.read_bytes()[:50])  # what the cache lost is made again
    assert fid.FeatureDistance(extractor=extractor, reference=str(folder), cache=str(tmp_path / "kept")).reference.files


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.bin"])
def test_weights_that_were_cut_short_are_refused(tmp_path: Path, name: str) -> None:
    path, tensors = tmp_path / name, {"a": torch.ones(1000)}
    save_file(tensors, path) if name == "w.safetensors" else torch.save(tensors, path)
    check_weights(path)
    for content in (path.read_bytes()[:2000], b"<html>not found</html>", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"w\.(safetensors|pt|bin)"):
            check_weights(path)
