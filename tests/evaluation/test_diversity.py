"""Precision, recall, density and coverage against a brute force; distances within prompts; CMMD; CLIP and DINOv2 features."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from evaluation.declared import declared, shown, withheld
from evaluation.metrics import diversity
from evaluation.metrics.backbones import ClipFeatures, DinoFeatures
from evaluation.metrics.cmmd import Cmmd, cmmd
from evaluation.metrics.fid import FeatureDistance
from evaluation.score import read_scores, score
from sjd2.errors import UserError
from tests.helpers.extractors import MeanColour
from tests.helpers.runs import a_run, gaussian, pixels


def brute_force(images: np.ndarray, reference: np.ndarray, nearest: int) -> dict[str, float]:
    """Write the definitions once more, point by point, with Python's own distances."""

    def radius(points: np.ndarray, index: int) -> float:
        others = [math.dist(points[index], points[j]) for j in range(len(points)) if j != index]
        return sorted(others)[nearest - 1]

    theirs = [radius(reference, i) for i in range(len(reference))]
    ours = [radius(images, j) for j in range(len(images))]
    gap = [[math.dist(r, f) for f in images] for r in reference]
    inside = [sum(gap[i][j] < theirs[i] for i in range(len(reference))) for j in range(len(images))]
    return {
        "precision": sum(count > 0 for count in inside) / len(images),
        "recall": sum(any(gap[i][j] < ours[j] for j in range(len(images))) for i in range(len(reference)))
        / len(reference),
        "density": sum(inside) / (nearest * len(images)),
        "coverage": sum(any(g < theirs[i] for g in gap[i]) for i in range(len(reference))) / len(reference),
    }


@pytest.mark.parametrize(("n", "m", "shift", "nearest"), [(40, 30, 0.3, 3), (12, 50, 1.0, 5), (50, 50, 0.0, 5)])
def test_the_four_shares_are_those_of_their_definitions(
    n: int, m: int, shift: float, nearest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diversity, "BLOCK", 16)  # several blocks, the last one shorter
    images, reference = gaussian(n, 4, 1, shift), gaussian(m, 4, 2)
    found = diversity.prdc(images, reference, nearest)
    assert found == pytest.approx(brute_force(images, reference, nearest), abs=1e-12)


def test_narrowed_samples_lose_recall_and_coverage_and_not_precision() -> None:
    reference = gaussian(400, 4, 1)
    alike, narrow = gaussian(400, 4, 2), 0.2 * gaussian(400, 4, 2)
    wide, small = diversity.prdc(alike, reference), diversity.prdc(narrow, reference)
    assert wide["coverage"] == pytest.approx(1 - 2**-5, abs=0.03)  # its expectation for equal distributions
    assert wide["density"] == pytest.approx(1, abs=0.1)
    assert small["precision"] >= wide["precision"]
    assert small["recall"] < 0.5 * wide["recall"]
    assert small["coverage"] < 0.5 * wide["coverage"]
    same = diversity.prdc(reference, reference)
    assert [same[key] for key in ("precision", "recall", "coverage")] == [1, 1, 1]


def test_a_reference_is_cut_to_the_number_of_images() -> None:
    reference = gaussian(50, 3)
    cut = diversity.balanced(reference, 20)
    assert cut.shape == (20, 3)
    assert np.array_equal(cut, diversity.balanced(reference, 20))
    assert diversity.balanced(reference, 60) is reference


def test_distances_within_prompts() -> None:
    features = np.array([[0, 0], [3, 4], [9, 9], [0, 8]], np.float32)
    ids = [(0, 0), (0, 1), (1, 0), (0, 2)]
    found = diversity.prompt_distances(features, ids)
    assert found == {(0, 0): pytest.approx((5 + 8) / 2), (0, 1): pytest.approx((5 + 5) / 2), (0, 2): pytest.approx(6.5)}
    values, images = diversity.diversity(features, None, ids)
    assert values == {"prompt_distance": pytest.approx(6)}  # the mean over prompts that have several
    assert images["prompt_distance"] == found
    assert diversity.diversity(features, None, [(i, 0) for i in range(4)]) == ({}, {})
    many, ids = gaussian(40, 2), [(i, 0) for i in range(38)] + [(0, 1), (1, 1)]
    values, images = diversity.diversity(many, None, ids)  # 40 images, of which 4 share a prompt
    assert values == {}
    assert len(images["prompt_distance"]) == 4


def distance(tmp_path: Path) -> FeatureDistance:
    np.savez(tmp_path / "reference.npz", features=gaussian(40, 12), digest="meancolour")
    return FeatureDistance(extractor=MeanColour(), reference=str(tmp_path / "reference.npz"))


def test_a_run_has_them_and_too_few_images_are_a_dash(tmp_path: Path) -> None:
    ids = [[i % 5, i // 5] for i in range(10)]
    run = a_run(tmp_path / "run", pixels(10), id=ids)
    values = score(run, {"fid": distance(tmp_path)})
    known = declared([run])
    names = {"precision", "recall", "density", "coverage", "prompt_distance"}
    assert names <= values.keys()
    assert len(read_scores(run)) == 10  # two images of each of five prompts
    assert withheld(values, known)["recall"] == "fewer than 500 images, whose shares have standard errors above 2 %"
    assert "prompt_distance" in withheld(values, known)
    assert not names & shown(values, known).keys()
    assert names <= shown(values | {"n_images": 500}, known).keys()
    few = score(
        a_run(tmp_path / "few", pixels(5)), {"fid": distance(tmp_path)}
    )  # no fifth neighbour, one image per prompt
    assert not names & few.keys()
    assert "fid" in few


# ---- distances for few images


def test_cmmd_is_the_unbiased_estimate_of_the_authors_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.metrics.cmmd.BLOCK", 5)  # several blocks, the last one shorter
    a, b = gaussian(12, 5, 1) / 3, gaussian(9, 5, 2, 0.5) / 3

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return math.exp(-(math.dist(x, y) ** 2) / 200)

    own = np.mean([kernel(x, y) for x, y in itertools.permutations(a, 2)])
    theirs = np.mean([kernel(x, y) for x, y in itertools.permutations(b, 2)])
    across = np.mean([kernel(x, y) for x, y in itertools.product(a, b)])
    assert cmmd(a, b) == pytest.approx(1000 * (own + theirs - 2 * across), rel=1e-6)
    halves = [cmmd(gaussian(60, 5, seed), gaussian(60, 5, 100 + seed)) for seed in range(30)]
    assert abs(np.mean(halves)) < 4 * np.std(halves) / 30**0.5  # no bias between equal distributions


@pytest.mark.full
def test_cmmd_of_a_run_on_the_shipped_clip(tmp_path: Path) -> None:
    extractor = ClipFeatures(device="cpu")
    extractor.check()
    reference = tmp_path / "reference"
    reference.mkdir()
    source = a_run(tmp_path / "source", pixels(4, 48))
    for file in (source.path / "images").iterdir():
        file.rename(reference / file.name)
    run = a_run(tmp_path / "run", pixels(4, 48))
    metric = Cmmd(extractor=extractor, reference=str(reference))
    metric.check()
    values = score(run, {"cmmd": metric})
    assert set(values) == {"n_images", "protocol", "cmmd", "cmmd_extractor", "cmmd_reference"}
    assert "cmmd" in withheld(values, declared([run]))
    features = np.load(next(run.path.glob("features-*.npz")))["features"]
    assert np.linalg.norm(features, axis=1) == pytest.approx(np.ones(4), abs=1e-3)
    np.savez(tmp_path / "moments.npz", mu=np.zeros(extractor.width), sigma=np.eye(extractor.width))
    values = score(run, {"cmmd": Cmmd(extractor=extractor, reference=str(tmp_path / "moments.npz"))})
    assert "moments only" in values["cmmd_warning"]


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random DINOv2 as save_pretrained writes it."""
    import torch
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    size = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.mark.full
def test_dino_features_come_from_a_folder(dino: Path, tmp_path: Path) -> None:
    extractor = DinoFeatures(model=str(dino), device="cpu")
    extractor.check()
    images = pixels(3, 32)
    features = extractor.load()(images)
    assert features.shape == (3, extractor.width) == (3, 16)
    assert np.allclose(extractor.load()(images[1:]), features[1:], atol=1e-5)
    assert extractor.digest() == DinoFeatures(model=str(dino)).digest()
    config = json.loads((dino / "config.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps(config))
    for model, message in (
        (None, "extractor.model is not set"), ("nowhere", "neither a folder nor a hub name"),
        ("no-such/network", "is not in the local cache and nothing"), (str(broken), "has no preprocessor_config"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            DinoFeatures(model=model).check()
