"""Rewards of packages in interpreters of their own, with packages that only imitate them."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.metrics import rewards
from evaluation.score import read_scores
from sjd2.errors import UserError
from tests.helpers.runs import a_run, pixels

FAKE_IMAGE_REWARD = """
import os
import clip
assert clip.OPENAI  # not evaluation/metrics/clip.py
def load(name, device, med_config):
    assert name == os.environ.get("EXPECTED_WEIGHTS", "ImageReward-v1.0") and device == "cpu" and med_config is None
    return Model()
class Model:
    def score(self, prompt, image):
        print("noise on the output")
        assert os.path.isfile(image)
        return len(prompt) - float(os.environ.get("MINUS", 2))
"""


@pytest.fixture
def reward_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("ImageReward", FAKE_IMAGE_REWARD), ("clip", "OPENAI = True")):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))


def test_image_reward_runs_in_another_interpreter(
    tmp_path: Path, reward_package: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path / "run", pixels(3), ["a", "b b", "crème 'brûlée'\n"])
    metric = rewards.ImageReward(device="cpu")
    metric.check()
    assert metric.score(run) == {"image_reward": pytest.approx((-1 + 1 + 13) / 3)}
    assert [row["image_reward"] for row in read_scores(run).values()] == [-1, 1, 13]
    (tmp_path / "ImageReward.pt").write_bytes(b"\x80")  # as a pickle begins
    monkeypatch.setenv("EXPECTED_WEIGHTS", str(tmp_path / "ImageReward.pt"))
    assert rewards.ImageReward(device="cpu", weights=str(tmp_path / "ImageReward.pt")).score(run)
    with pytest.raises(UserError, match="exit code 1"):
        metric.score(run)
    monkeypatch.setenv("MINUS", "nan")
    with pytest.raises(UserError, match="no finite"):
        rewards.ImageReward(device="cpu", weights=str(tmp_path / "ImageReward.pt")).score(run)


PACKAGES = {
    "hpsv3": """
class Reward(list):
    shape = (2,)
class HPSv3RewardInferencer:
    def __init__(self, checkpoint_path=None, device="cuda"):
        assert checkpoint_path is None and device == "cpu"
    def reward(self, image_paths, prompts):
        return [Reward([len(prompt), -7.0]) for prompt, _ in zip(prompts, image_paths, strict=True)]
""",
    "t2v_metrics": """
class VQAScore:
    def __init__(self, model, device):
        assert model == "clip-flant5-xl" and device == "cpu"
    def __call__(self, images, texts):
        return [[len(text) for text in texts] for image in images]
""",
}


@pytest.mark.parametrize(
    ("package", "metric"),
    [
        ("hpsv3", rewards.HpsV3(device="cpu")),
        ("t2v_metrics", rewards.VqaScore(model="clip-flant5-xl", device="cpu")),
    ],
)
def test_further_packages_run_in_another_interpreter(
    tmp_path: Path, package: str, metric: rewards.PackageReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{package}.py").write_text(PACKAGES[package])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = a_run(tmp_path / "run", pixels(2), ["a", "b b"])
    metric.check()
    assert metric.score(run) == {metric.name: 2.0}
    assert [row[metric.name] for row in read_scores(run).values()] == [1, 3]


def test_rewards_without_their_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"environment of its own, pip install image-reward==1.5 .*python=ENVIRONMENT"):
        rewards.ImageReward().check()
    with pytest.raises(UserError, match="nowhere/python is no interpreter"):
        rewards.ImageReward(python="nowhere/python").check()
    with pytest.raises(UserError, match=r"image_reward\.weights=x\.pt is no file"):
        rewards.ImageReward(weights="x.pt").check()
    for weights in (None, str(tmp_path)):
        with pytest.raises(UserError, match=r"fetch HPS_v2\.1_compressed\.pt of xswu/HPSv2"):
            rewards.HpsV2(weights=weights).check()
    assert rewards.HpsV2(weights="HPS_v2.1_compressed.pt").label == "ViT-H-14 HPS_v2.1_compressed.pt"
