"""Scores learned from human preferences, and VQAScore: two CLIPs that run here, three packages in an interpreter of theirs.

None has been run with its published weights here: HPSv2 is tested against the arithmetic of its code on a small CLIP,
PickScore against its formula, ImageReward's package on random weights, HPSv3's and VQAScore's packages not at all. No
package can live beside transformers 5: hpsv2 1.2.0 asks for protobuf < 4 and pytest 7.2 and lacks its own vocabulary file,
image-reward 1.5 needs transformers < 5 and timm 0.6.

# B images, N images of a run
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from math import exp
from pathlib import Path
from statistics import fmean

from evaluation.metrics.clip import ClipScore
from evaluation.metrics.clip_source import ClipSource
from evaluation.metrics.workers import PackageReward
from evaluation.run_folder import Record, Snapshot
from evaluation.score import MetricInfo, Scores
from sjd2.errors import UserError
from sjd2.files import digest, find


class HpsV2(ClipScore):
    """HPSv2 (Wu et al. 2023): a CLIP score of OpenCLIP's ViT-H/14, tuned on human choices; 100 times the package's value.

    weights: HPS_v2.1_compressed.pt (or HPS_v2_compressed.pt) of xswu/HPSv2. Images are scaled to 224 on the long side
    and padded, as in hpsv2's img_score.py; there after, here before they become floats, which differs by rounding.
    """

    numbers = (MetricInfo(name="hpsv2", title="HPSv2", higher_is_better=True, per_image="hpsv2"),)
    details = ("hpsv2_model",)
    architecture = "ViT-H-14"

    def __init__(self, *, weights: str | None = None, device: str | None = None, batch_size: int = 16) -> None:
        super().__init__(model=self.architecture, pretrained=weights, device=device, batch_size=batch_size)

    @cached_property
    def source(self) -> ClipSource:
        """The file, found once; raises UserError if it is not there."""
        key = "evaluation.metrics.hpsv2.weights"
        if self.pretrained is None or not find(self.pretrained).is_file():
            given = "is not set" if self.pretrained is None else f"'{self.pretrained}' is no file"
            raise UserError(
                f"{key} {given}: fetch HPS_v2.1_compressed.pt of xswu/HPSv2 from the hub once and give {key}=FILE."
            )
        if find_spec("open_clip") is None:
            raise UserError("HPSv2 needs open_clip: pip install open-clip-torch.")
        return ClipSource(self.architecture, str(find(self.pretrained)), (("image_resize_mode", "longest"),))

    @property
    def protocol(self) -> str:
        """How the value comes about."""
        return (
            f"hpsv2: mean over n_images of 100 cos of the image under its prompt, open_clip {self.label}, scaled on the "
            "long side and padded."
        )

    def compute(self, run: Snapshot) -> Scores:
        """Return the mean over images and the weights that made it."""
        self._clip = None
        file = Path(str(self.source.file))
        model = f"{file.name} {digest(file)}"
        return Scores({"hpsv2": fmean(self._values.values()), "hpsv2_model": model}, {"hpsv2": self._values})


class PickScore(ClipScore):
    """PickScore (Kirstain et al. 2023): a CLIP of transformers, tuned on human choices; its logit, exp(scale) cos.

    weights: a folder of yuvalkirstain/PickScore_v1 with the processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K beside
    it, or a hub name in the local cache.
    """

    numbers = (MetricInfo(name="pickscore", title="PickScore", higher_is_better=True, per_image="pickscore"),)
    details = ("pickscore_model",)

    def __init__(self, *, weights: str | None = None, device: str | None = None, batch_size: int = 16) -> None:
        super().__init__(model=f"transformers:{weights}", device=device, batch_size=batch_size)
        self.weights = weights

    def check(self) -> None:
        """Raise UserError if the folder is not set, or lacks a file."""
        if self.weights is None:
            raise UserError(
                "evaluation.metrics.pickscore.weights is not set: give a folder of yuvalkirstain/PickScore_v1 with the "
                "processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K in it."
            )
        super().check()

    @property
    def protocol(self) -> str:
        """How the value comes about."""
        return f"pickscore: mean over n_images of exp(logit scale) cos of the image under its prompt, {self.label}."

    def start(self, run: Snapshot) -> Sequence[Record] | None:
        """Want all images."""
        records = super().start(run)
        self._factor = exp(float(self._clip.model.logit_scale)) / 100 if records and self._clip is not None else 1.0
        return records

    def compute(self, run: Snapshot) -> Scores:
        """Return the mean over images and the weights that made it."""
        self._clip = None
        values = {key: self._factor * value for key, value in self._values.items()}
        model = f"{self.label} {digest(*self.source.weights)}"
        return Scores({"pickscore": fmean(values.values()), "pickscore_model": model}, {"pickscore": values})


def _number(name: str, title: str) -> tuple[MetricInfo, ...]:
    return (MetricInfo(name=name, title=title, digits=3, higher_is_better=True, per_image=name),)


class ImageReward(PackageReward):
    """ImageReward (Xu et al. 2023) through the package `image-reward`.

    weights: ImageReward.pt, med_config: med_config.json of THUDM/ImageReward; null: the package fetches them when it is
    first used. It also fetches the tokenizer bert-base-uncased, unless the hub's cache has it.
    """

    name, title, package, modules = "image_reward", "ImageReward", "image-reward", ("ImageReward", "clip")
    numbers = _number(name, title)
    install = 'image-reward==1.5 "transformers<4.50" "datasets>=3" "huggingface_hub<1" "setuptools<81" openai-clip torchvision'

    def __init__(
        self,
        *,
        python: str | None = None,
        weights: str | None = None,
        med_config: str | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__(python=python, device=device, files={"weights": weights, "med_config": med_config})


class HpsV3(PackageReward):
    """HPSv3 (Ma et al. 2025, arXiv 2508.03789) through the package `hpsv3`: the mean of the score that it predicts.

    weights: the checkpoint of MizzenAI/HPSv3; null: the package fetches it, and its Qwen2-VL, from the hub.
    """

    name, title, package, modules = "hpsv3", "HPSv3", "hpsv3", ("hpsv3",)
    numbers = _number(name, title)
    install = "hpsv3==1.0.0"

    def __init__(self, *, python: str | None = None, weights: str | None = None, device: str | None = None) -> None:
        super().__init__(python=python, device=device, files={"weights": weights})


class VqaScore(PackageReward):
    """VQAScore (Lin et al. 2024, arXiv 2404.01291) through the package `t2v-metrics`: the probability of "yes".

    model: one of its models, which it fetches from the hub when first used.
    """

    name, title, package, modules = "vqascore", "VQAScore", "t2v-metrics", ("t2v_metrics",)
    numbers = _number(name, title)
    install = "t2v-metrics==3.0"

    def __init__(self, *, python: str | None = None, model: str = "clip-flant5-xxl", device: str | None = None) -> None:
        super().__init__(python=python, device=device, files={}, model=model)
