"""Measure how far a run's images lie from reference images: Frechet distance (FID) and kernel distance (KID).

Both compare features, and which network makes them decides the value, so every number carries its extractor, its
reference and N.

# N images, M reference images, D feature width
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image

from evaluation.metrics.features import Extractor, RunFeatures, extract, save_npz
from evaluation.prompts import metadata_of
from evaluation.run_folder import Record, Snapshot
from evaluation.score import FEWEST, Metric, MetricInfo, Scores
from sjd2.errors import UserError
from sjd2.files import ROOT, find
from sjd2.models.tiny import scenes

log = logging.getLogger(__name__)

SHIPPED_REFERENCE = ROOT / "sjd2" / "models" / "tiny" / "reference.npz"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ENOUGH = 10  # images per feature below which the bias of a Frechet distance exceeds most true differences
FEWEST_PER_FEATURE = 2  # images per feature below which a covariance is singular or nearly so, and FID mostly bias


# ---------------------------------------------------------------------------------------------------------- distances
@dataclass(frozen=True)
class Statistics:
    """Mean [D] and a root [R, D] of the covariance of a set of features (root^T root = covariance), in float64."""

    mean: np.ndarray
    root: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Statistics:
        """Summarise features [N, D], N >= 2; the covariance divides by N - 1, as numpy's and clean-fid's do."""
        features = np.asarray(features, np.float64)
        mean = features.mean(0)
        root: Any = (features - mean) / np.sqrt(len(features) - 1)
        if len(root) > root.shape[1]:
            root = np.linalg.qr(root, mode="r")  # same root^T root in D rows
        return cls(mean, root)

    @classmethod
    def of_moments(cls, mean: np.ndarray, covariance: np.ndarray) -> Statistics:
        """Take a mean [D] and a covariance [D, D] that another tool has computed."""
        values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
        return cls(np.asarray(mean, np.float64), np.sqrt(values.clip(0))[:, None] * vectors.T)


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


# ---------------------------------------------------------------------------------------------------------- reference
@dataclass(frozen=True)
class Reference:
    """Reference statistics; `features` [M, D] is None where only the moments are known (then there is no KID).

    files: the images' names within their folder, one per feature, where the reference is a folder.
    """

    name: str
    statistics: Statistics
    features: np.ndarray | None = None
    files: tuple[str, ...] = ()

    def only(self, wanted: Set[str]) -> Reference:
        """Keep the images whose file names are `wanted`; raises UserError if some are not there or fewer than 2."""
        by_name = {Path(file).name: row for row, file in enumerate(self.files)}
        lacking = sorted(wanted - by_name.keys())
        if lacking or len(wanted) < 2:
            what = f"lacks {lacking[0]}" if lacking else f"would keep {len(wanted)} image"
            raise UserError(f"reference {self.name} {what}: give the folder of all images, or only_prompts=false.")
        assert self.features is not None  # a folder's are always there
        features = self.features[sorted(by_name[name] for name in wanted)]
        return Reference(f"{self.name}, the {len(wanted)} of the prompts", Statistics.of(features), features)


def read_reference(path: Path, extractor: Extractor) -> Reference:
    """Read an npz with `features` (and `digest`, `name`, `files`), or with `mu` and `sigma` (clean-fid, pytorch-fid).

    Raises UserError when the file is damaged or comes from another extractor.
    """
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(f"reference {path} is no readable npz file ({error}).") from error
    digest = str(arrays.get("digest", extractor.digest()))
    if digest != extractor.digest():
        fix = "give the folder of reference images instead, or the extractor it was made with"
        raise UserError(f"reference {path} holds features of extractor {digest}, not {extractor.digest()}: {fix}.")
    name = str(arrays.get("name", path.stem))
    if "features" in arrays:
        files = tuple(arrays["files"].tolist()) if "files" in arrays else ()
        reference = Reference(name, Statistics.of(arrays["features"]), arrays["features"], files)
    elif {"mu", "sigma"} <= arrays.keys():
        reference = Reference(name, Statistics.of_moments(arrays["mu"], arrays["sigma"]))
    else:
        raise UserError(f"reference {path} has neither `features` nor `mu` and `sigma`, but {', '.join(arrays)}.")
    if len(reference.statistics.mean) != extractor.width:
        width = len(reference.statistics.mean)
        raise UserError(f"reference {path} has {width} features, {extractor.name} makes {extractor.width}.")
    return reference


def image_files(folder: Path) -> list[Path]:
    """List the images of a folder and its subfolders in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _read_images(files: list[Path]) -> Iterator[np.ndarray]:
    for path in files:
        with Image.open(path) as image:
            yield np.asarray(image.convert("RGB"))


def reference_of_folder(folder: Path, extractor: Extractor, cache: Path | None) -> Reference:
    """Extract the features of a folder's images, or take them from `cache`, where they are kept.

    The cache's key holds the extractor's digest (weights, resizing, crop) and the name, size and date of every image.
    """
    files = image_files(folder)
    if len(files) < 2:
        raise UserError(f"reference folder {folder} has {len(files)} images; a distance needs at least 2.")
    facts = "".join(f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns};" for path in files)
    key = hashlib.sha256(f"{extractor.digest()}{facts}".encode()).hexdigest()[:12]
    stored = cache / f"reference-{key}.npz" if cache else None
    if stored and stored.is_file():
        return read_reference(stored, extractor)
    log.info("extracting %s features of %d reference images in %s", extractor.name, len(files), folder)
    features = extract(extractor, _read_images(files))
    name, names = f"{folder.name} ({len(files)} images)", tuple(str(path.relative_to(folder)) for path in files)
    if stored:
        save_npz(stored, {"features": features, "digest": extractor.digest(), "name": name, "files": np.array(names)})
    return Reference(name, Statistics.of(features), features, names)


# ------------------------------------------------------------------------------------------------------------- metric
class FeatureDistance(Metric):
    """FID and KID of a run against a reference.

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
    )
    details = ("fid_extractor", "fid_reference", "fid_warning")

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
        self.cache = Path(cache).expanduser() if cache else None
        self.subsets = Subsets(count=kid_subsets, size=kid_subset_size, seed=seed)
        self.only_prompts, self.batch_size = only_prompts, extractor.batch_size

    def check(self) -> None:
        """Raise UserError if extractor or reference are missing or do not fit each other."""
        self.extractor.check()
        if not self.path:
            raise UserError("FID needs evaluation.metrics.fid.reference=FOLDER of reference images, or an npz file.")
        if self.path.is_dir():
            if len(image_files(self.path)) < 2:
                raise UserError(f"reference folder {self.path} has fewer than 2 images ({', '.join(IMAGE_SUFFIXES)}).")
        elif self.path.is_file():
            if not read_reference(self.path, self.extractor).files and self.only_prompts:
                raise UserError(f"only_prompts=true needs a folder of images as reference; {self.path} names none.")
        else:
            raise UserError(f"evaluation.metrics.fid.reference={self.path} is neither a folder nor a file.")

    @cached_property
    def reference(self) -> Reference:
        """The reference statistics, loaded once."""
        assert self.path is not None  # `check` has seen to it
        if self.path.is_dir():
            return reference_of_folder(self.path, self.extractor, self.cache)
        return read_reference(self.path, self.extractor)

    def reference_for(self, run: Snapshot) -> Reference:
        """Return the reference that this run is compared with; raises UserError if `only_prompts` cannot be done."""
        if not self.only_prompts:
            return self.reference
        facts = metadata_of(run.folder)
        names = [facts.get(prompt, {}).get("file_name") for prompt, _ in run.ids]
        wanted = {name for name in names if name is not None}
        if None in names:
            raise UserError("only_prompts=true needs prompts that name their images: prompts=coco2017 or coco2014.")
        return self.reference.only(wanted)

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
        """Compute the distances; a `fid_warning` alone where the images do not suit the extractor."""
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
        return Scores(out)

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
                "none of them; evaluation.metrics.fid.reference=FOLDER takes images of your prompts."
            )
        return ""


def _is_shape(prompt: str) -> bool:
    """Return whether the shipped reference is of captions like this one."""
    try:
        scenes.attributes(prompt)
    except UserError:
        return False
    return scenes.is_held_out(prompt)
