"""Measure how far a run's images lie from reference images: Frechet distance (FID) and kernel distance (KID).

Both compare features, and which network makes them decides the value, so every number carries its extractor, its
reference and N.

# N images, M reference images, D feature width
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch

from evaluation.metrics.diversity import NUMBERS as DIVERSITY
from evaluation.metrics.diversity import diversity
from evaluation.metrics.features import Extractor, RunFeatures
from evaluation.metrics.references import ImageFolder, Reference, Statistics, read_reference, wanted_files
from evaluation.prompts import metadata_of
from evaluation.run_folder import Record, Snapshot
from evaluation.score import FEWEST, Metric, MetricInfo, Scores
from sjd2.errors import UserError
from sjd2.files import ROOT, find
from sjd2.models.tiny import scenes

log = logging.getLogger(__name__)

SHIPPED_REFERENCE = ROOT / "sjd2" / "models" / "tiny" / "reference.npz"
ENOUGH = 10  # images per feature below which the bias of a Frechet distance exceeds most true differences
FEWEST_PER_FEATURE = 2  # images per feature below which a covariance is singular or nearly so, and FID mostly bias


# ---------------------------------------------------------------------------------------------------------- distances
def frechet(a: Statistics, b: Statistics) -> float:
    """Compute the Frechet distance of two Gaussians (Heusel et al. 2017, eq. 6).

    tr sqrt(A B) is the nuclear norm of root_A root_B^T: exact also for N < D, with neither a matrix square root nor
    an epsilon on the diagonal (clean-fid's scipy.linalg.sqrtm call fails from SciPy 1.18 on).
    """
    crossed = np.linalg.svd(a.root @ b.root.T, compute_uv=False).sum()
    return float(((a.mean - b.mean) ** 2).sum() + (a.root**2).sum() + (b.root**2).sum() - 2 * crossed)


class _Features(torch.nn.Module):
    """Pass features through torchmetrics, which wants a network."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@dataclass(frozen=True, kw_only=True)
class Subsets:
    """The random subsets that KID is averaged over: torchmetrics' defaults.

    A subset has at most half of the smaller set, since subsets that share most images would show no spread.
    """

    count: int = 100
    size: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.size < 2:
            raise UserError(f"kid_subsets={self.count} must be >= 1 and kid_subset_size={self.size} >= 2.")


def kernel_distances(features: np.ndarray, reference: np.ndarray, subsets: Subsets = Subsets()) -> np.ndarray:
    """Compute the unbiased cubic-kernel distance (Binkowski et al. 2018) of every subset: [N, D], [M, D] -> [count].

    Equal N and M give equal subsets, so two runs can be subtracted subset by subset. torch's global random state is left
    as it was.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # it warns of its memory use, and of a spread over one subset
        torch.manual_seed(subsets.seed)
        size = min(subsets.size, len(features) // 2, len(reference) // 2)
        metric = KernelInceptionDistance(feature=_Features(), subsets=1, subset_size=size, compute_with_cache=False)
        metric.update(torch.from_numpy(np.asarray(reference, np.float64)), real=True)
        metric.update(torch.from_numpy(np.asarray(features, np.float64)), real=False)
        return torch.stack([metric.compute()[0] for _ in range(subsets.count)]).numpy()


def kernel_distance(features: np.ndarray, reference: np.ndarray, subsets: Subsets = Subsets()) -> tuple[float, float]:
    """Return KID as every table and comparison here shows it: mean and standard deviation over random subsets."""
    values = torch.from_numpy(kernel_distances(features, reference, subsets))
    return float(values.mean()), float(values.std(unbiased=False))


def cubic_kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """KID's kernel (a.b / D + 1)^3: [N, D], [M, D] -> [N, M], in float64."""
    return (np.asarray(a, np.float64) @ np.asarray(b, np.float64).T / a.shape[1] + 1) ** 3


def mmd(features: np.ndarray, reference: np.ndarray) -> float:
    """Compute the unbiased squared MMD over all images at once, the value that KID's subsets estimate."""
    n, m = len(features), len(reference)
    own, theirs = cubic_kernel(features, features), cubic_kernel(reference, reference)
    within = (own.sum() - own.trace()) / (n * (n - 1)) + (theirs.sum() - theirs.trace()) / (m * (m - 1))
    return float(within - 2 * cubic_kernel(features, reference).mean())


# ------------------------------------------------------------------------------------------------------------- metric
class FeatureDistance(Metric):
    """FID and KID of a run against a reference; precision, recall, density, coverage, and the distance within prompts.

    reference: 'shipped' (rendered held-out images of the embedded model), an npz file, or a folder of images, whose
    features are kept in `cache`. only_prompts: compare only with those images of the folder that the run's prompts
    describe (COCO), instead of all.
    """

    numbers = (
        MetricInfo(
            name="fid",
            title="FID",
            higher_is_better=False,
            source="fid_extractor",
            biased=True,
            fewest=FEWEST_PER_FEATURE,
            fewest_per="features",
            fewest_why="whose covariance is singular or nearly so and the distance mostly bias",
        ),
        MetricInfo(
            name="kid",
            title="KID",
            digits=4,
            higher_is_better=False,
            spread="kid_std",
            fewest=FEWEST,
            fewest_why="too few to tell decoders apart",
        ),
        MetricInfo(name="kid_std", digits=4),
        *DIVERSITY,
    )
    details = ("fid_extractor", "fid_reference", "fid_warning")
    key, title = "evaluation.metrics.fid", "FID"  # in messages

    def __init__(
        self,
        *,
        extractor: Extractor,
        reference: str | None = "shipped",
        kid_subsets: int = 100,
        kid_subset_size: int = 1000,
        seed: int = 0,
        cache: str | None = None,
        only_prompts: bool = False,
    ) -> None:
        self.extractor = extractor
        self.path = SHIPPED_REFERENCE if reference == "shipped" else find(reference) if reference else None
        self.cache = Path(cache) if cache else None
        self.subsets = Subsets(count=kid_subsets, size=kid_subset_size, seed=seed)
        self.only_prompts, self.batch_size = only_prompts, extractor.batch_size

    def check(self) -> None:
        """Raise UserError if extractor or reference are missing or do not fit each other."""
        self.extractor.check()
        if not self.path:
            raise UserError(f"{self.title} needs {self.key}.reference=FOLDER of reference images, or an npz file.")
        if self.path.is_dir():
            self._folder.check(self.extractor)
        elif self.path.is_file():
            if not self.reference.files and self.only_prompts:
                raise UserError(f"only_prompts=true needs a folder of images as reference; {self.path} names none.")
        else:
            raise UserError(f"{self.key}.reference={self.path} is neither a folder nor a file.")

    def check_prompts(self, facts: Sequence[Mapping[str, Any]]) -> None:
        """Raise UserError if `only_prompts` lacks the name or the file of an image that a prompt describes."""
        if self.only_prompts and self.path is not None and len(facts) > 1:
            files = self._folder.files if self.path.is_dir() else map(Path, self.reference.files)
            wanted_files(self.path.name, [known.get("file_name") for known in facts], {file.name for file in files})

    @cached_property
    def _folder(self) -> ImageFolder:
        assert self.path is not None  # `check` has seen to it
        return ImageFolder(self.path, self.cache)

    @cached_property
    def reference(self) -> Reference:
        """The reference statistics, loaded once."""
        assert self.path is not None  # `check` has seen to it
        return self._folder.read(self.extractor) if self.path.is_dir() else read_reference(self.path, self.extractor)

    def reference_for(self, run: Snapshot) -> Reference:
        """Return the reference that this run is compared with; raises UserError if `only_prompts` cannot be done."""
        if not self.only_prompts:
            return self.reference
        facts = metadata_of(run.folder)
        return self.reference.only([facts.get(prompt, {}).get("file_name") for prompt, _ in run.ids])

    @property
    def protocol(self) -> str:
        """How the values come about."""
        return (
            f"fid: Frechet distance in float64 on {self.extractor.width} features of {self.extractor.name} over all "
            "n_images, biased upwards by about 1/N; kid: unbiased cubic-kernel distance on the same features "
            f"(torchmetrics), mean and standard deviation over {self.subsets.count} subsets of at most {self.subsets.size}."
        )

    def start(self, run: Snapshot) -> Sequence[Record] | None:
        """Want the images whose features are not kept yet; none where they do not suit the extractor."""
        self._unfit = self._misfit(run)
        if self._unfit:
            return ()
        self._reference, self._features = self.reference_for(run), RunFeatures(run, self.extractor)
        return self._features.missing

    def update(self, images: Sequence[np.ndarray], records: Sequence[Record]) -> None:
        """Extract the features of one batch."""
        self._features.add(images, records)

    def compute(self, run: Snapshot) -> Scores:
        """Compute the distances and the diversity; a `fid_warning` alone where the images do not suit the extractor."""
        if self._unfit:
            return Scores({"fid_warning": self._unfit})
        features, reference = self._features.finish(), self._reference
        del self._features  # and the network with it
        out: dict[str, Any] = {"fid": frechet(Statistics.of(features), reference.statistics)}
        out |= {"fid_extractor": f"{self.extractor.name} {self.extractor.digest()}", "fid_reference": reference.name}
        if reference.features is not None and min(len(features), len(reference.features)) >= 4:
            out["kid"], out["kid_std"] = kernel_distance(features, reference.features, self.subsets)
        if len(features) < ENOUGH * self.extractor.width:
            need = ENOUGH * self.extractor.width
            out["fid_warning"] = (
                f"N={len(features)} is few for {self.extractor.width} features (below {need}): FID is biased upwards; "
                "compare runs of equal N only, or use KID."
            )
        values, images = diversity(features, reference.features, run.ids, self.subsets.seed)
        return Scores(out | values, images)

    def _misfit(self, run: Snapshot) -> str:
        """Return why the run's images do not suit the extractor; '' where they do."""
        if len(run.records) < 2:
            return f"left out: {len(run.records)} images, a distance needs at least 2."
        size, asked = run.image_size, self.extractor.size
        if asked is not None and size is not None and asked != size:
            made, found = ("x".join(map(str, shape)) for shape in (asked, size))
            return f"left out: {self.extractor.name} is made for {made} pixels, not {found}."
        foreign = (
            [] if self.path != SHIPPED_REFERENCE else [r["prompt"] for r in run.records if not _is_shape(r["prompt"])]
        )
        if foreign:
            return (
                f"left out: the reference shows the held-out captions of prompts=shapes, and {shorten(foreign[0], 60)!r} is "
                "none of them; "
                f"{self.key}.reference=FOLDER takes images of your prompts."
            )
        return ""


def _is_shape(prompt: str) -> bool:
    """Return whether the shipped reference is of captions like this one."""
    try:
        scenes.attributes(prompt)
    except UserError:
        return False
    return scenes.is_held_out(prompt)
