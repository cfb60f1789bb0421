"""Scores learned from human preferences: HPSv2 through open_clip, ImageReward through its own package elsewhere.

Neither has been run with its published weights here: HPSv2 is tested against the arithmetic of its code on a small
CLIP, ImageReward's package on random weights. Neither package can live beside transformers 5: hpsv2 1.2.0 on PyPI asks
for protobuf < 4 and pytest 7.2 and lacks its own vocabulary file, image-reward 1.5 needs transformers < 5 and timm 0.6.

# B images, N images of a run
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

from evaluation.metrics.batches import check_weights, device_for
from evaluation.metrics.clip import ClipScore
from evaluation.metrics.clip_source import ClipSource
from evaluation.run_folder import Record, Snapshot
from evaluation.score import Metric, MetricInfo, Scores
from sjd2.errors import UserError
from sjd2.files import digest, find

WORKER = Path(__file__).with_name("reward_worker.py")
PACKAGES = (
    'image-reward==1.5 "transformers<4.50" "datasets>=3" "huggingface_hub<1" "setuptools<81" openai-clip torchvision'
)


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


class ImageReward(Metric):
    """ImageReward (Xu et al. 2023) through the package `image-reward` of another Python environment.

    python: that environment's interpreter; null: this one, if it has the package. weights: ImageReward.pt,
    med_config: med_config.json of THUDM/ImageReward; null: the package fetches them when it is first used. It also
    fetches the tokenizer bert-base-uncased, unless the hub's cache has it.
    """

    numbers = (
        MetricInfo(name="image_reward", title="ImageReward", digits=3, higher_is_better=True, per_image="image_reward"),
    )
    of_parts = False

    def __init__(
        self,
        *,
        python: str | None = None,
        weights: str | None = None,
        med_config: str | None = None,
        device: str | None = None,
    ) -> None:
        self.python, self.device = python or sys.executable, device
        self.files = {"weights": weights, "med_config": med_config}

    @property
    def protocol(self) -> str:
        """How the value comes about."""
        return "image_reward: mean over n_images of the score that the package image-reward gives an image under its prompt."

    def check(self) -> None:
        """Raise UserError if interpreter, package or files are missing; asks the interpreter, imports nothing heavy."""
        key = "evaluation.metrics.image_reward"
        for name, path in self.files.items():
            if path is not None and not find(path).is_file():
                raise UserError(f"{key}.{name}={path} is no file; null lets the package fetch its own.")
        if (weights := self.files["weights"]) is not None:
            check_weights(find(weights))
        if shutil.which(self.python) is None:
            raise UserError(f"{key}.python={self.python} is no interpreter; give the python of an environment.")
        code = "import importlib.util as u, sys; sys.exit(any(u.find_spec(n) is None for n in ('ImageReward', 'clip')))"
        if subprocess.run([self.python, "-c", code], capture_output=True, check=False).returncode:
            raise UserError(
                f"{self.python} has no package image-reward with clip: make an environment of its own, pip install "
                f"{PACKAGES}, and give its interpreter: {key}.python=ENVIRONMENT/bin/python."
            )

    @property
    def needs_images(self) -> bool:
        return True

    def start(self, run: Snapshot) -> Sequence[Record] | None:
        """Want no image: the other interpreter reads the files itself."""
        return () if run.records else None

    def compute(self, run: Snapshot) -> Scores:
        """Score all images in one call of the other interpreter; raises UserError with its last line if that fails."""
        records = run.records
        pairs = [{"image": str((run.path / r["image"]).absolute()), "prompt": r["prompt"]} for r in records]
        with tempfile.TemporaryDirectory() as folder:
            given, out = Path(folder, "pairs.jsonl"), Path(folder, "scores.txt")
            given.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
            files = [str(find(path).absolute()) if path else "" for path in self.files.values()]
            run_tool(
                [self.python, str(WORKER), str(given), str(out), *files, str(device_for(self.device))], "ImageReward"
            )
            values = [float(line) for line in out.read_text(encoding="utf-8").split()]
        if len(values) != len(records) or not all(map(math.isfinite, values)):
            raise UserError(f"ImageReward gave {len(values)} numbers for {len(records)} images, or no finite ones.")
        return Scores({"image_reward": fmean(values)}, {"image_reward": dict(zip(run.ids, values, strict=True))})


def run_tool(command: list[str], name: str) -> None:
    """Run a program to its end, its output passed through; raises UserError if it cannot start or fails."""
    try:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    except OSError as error:
        raise UserError(f"{name} does not start ({error.strerror}: {command[0]}).") from error
    if code:
        raise UserError(
            f"{name} ended with exit code {code}, its reason stands above; nothing is lost, the command was: "
            f"{shlex.join(command)}"
        )
