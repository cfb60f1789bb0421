"""What a run's images are compared with: statistics in a file, or a folder of images; checked before anything is sampled.

# M reference images, D feature width
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from evaluation.metrics.features import Extractor, extract, save_npz
from sjd2.errors import UserError, first_line

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for damaged files
UNREADABLE = (OSError, ValueError, EOFError, NotImplementedError, BadZipFile, zlib.error)  # for damaged npz files
NAMED = 3  # broken files that a message names
WORKERS = 8  # threads that try the images


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


@dataclass(frozen=True)
class Reference:
    """Reference statistics; `features` [M, D] is None where only the moments are known (then there is no KID).

    files: the images' names within their folder, one per feature, where the reference is a folder.
    """

    name: str
    statistics: Statistics
    features: np.ndarray | None = None
    files: tuple[str, ...] = ()

    def only(self, names: Sequence[str | None]) -> Reference:
        """Keep the images with these file names; raises UserError as `wanted_files` does."""
        by_name = {Path(file).name: row for row, file in enumerate(self.files)}
        wanted = wanted_files(self.name, names, by_name.keys())
        assert self.features is not None  # a folder's are always there
        features = self.features[sorted(by_name[name] for name in wanted)]
        return Reference(f"{self.name}, the {len(wanted)} of the prompts", Statistics.of(features), features)


def wanted_files(reference: str, names: Sequence[str | None], there: Set[str]) -> set[str]:
    """Return the file names that prompts give; raises UserError where one gives none, or if too few of them are there."""
    if None in names:
        raise UserError("only_prompts=true needs prompts that name their images: prompts=coco2017 or coco2014.")
    wanted = {str(name) for name in names}
    lacking = sorted(wanted - there)
    if lacking or len(wanted) < 2:
        what = f"lacks {lacking[0]}" if lacking else f"would keep {len(wanted)} image"
        raise UserError(f"reference {reference} {what}: give the folder of all images, or only_prompts=false.")
    return wanted


def read_reference(path: Path, extractor: Extractor) -> Reference:
    """Read an npz with `features` (and `digest`, `name`, `files`), or with `mu` and `sigma` (clean-fid, pytorch-fid, ADM).

    Only these arrays are read: ADM's files hold gigabytes of images besides. Raises UserError when the file is damaged,
    an array has another shape or holds a number that is not finite, or another extractor made it.
    """
    try:
        loaded = np.load(path)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with loaded as file:
            keys = ("features",) if "features" in file.files else ("mu", "sigma")
            arrays = {key: file[key] for key in (*keys, "digest", "name", "files") if key in file.files}
            others = ", ".join(file.files)
    except UNREADABLE as error:
        raise UserError(f"reference {path} is no readable npz file ({first_line(error)}).") from error
    if not arrays.keys() >= set(keys):
        raise UserError(f"reference {path} has neither `features` nor `mu` and `sigma`, but {others}.")
    digest = str(arrays.get("digest", extractor.digest()))
    if digest != extractor.digest():
        fix = "give the folder of reference images instead, or the extractor it was made with"
        raise UserError(f"reference {path} holds features of extractor {digest}, not {extractor.digest()}: {fix}.")
    _check_arrays(path, {key: arrays[key] for key in keys}, extractor)
    name = str(arrays.get("name", path.stem))
    if "features" not in arrays:
        return Reference(name, Statistics.of_moments(arrays["mu"], arrays["sigma"]))
    files = tuple(arrays["files"].tolist()) if "files" in arrays else ()
    return Reference(name, Statistics.of(arrays["features"]), arrays["features"], files)


def _check_arrays(path: Path, arrays: dict[str, np.ndarray], extractor: Extractor) -> None:
    """Raise UserError for features or moments that no distance can be computed from."""
    first = next(iter(arrays.values()))
    width = extractor.width
    if first.ndim and first.shape[-1] != width:
        raise UserError(f"reference {path} has {first.shape[-1]} features, {extractor.name} makes {width}.")
    if "features" in arrays:
        shapes = {"features": (max(2, len(first)), width)} if first.ndim else {"features": (2, width)}
    else:
        shapes = {"mu": (width,), "sigma": (width, width)}
    for key, array in arrays.items():
        if array.shape != shapes[key]:
            needs = "at least 2 rows" if key == "features" else f"shape {shapes[key]}"
            raise UserError(f"reference {path}: `{key}` has shape {array.shape}, a distance needs {needs}.")
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise UserError(f"reference {path}: `{key}` holds values that are no finite numbers; make the file again.")


class ImageFolder:
    """A folder of reference images, its subfolders included, in a fixed order; cache: where their features are kept."""

    def __init__(self, path: Path, cache: Path | None) -> None:
        self.path, self.cache = path, cache

    @cached_property
    def files(self) -> list[Path]:
        """The images; what is left out is logged. Raises UserError if there are fewer than two."""
        there = sorted(path for path in self.path.rglob("*") if not path.is_dir())
        found = [path for path in there if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
        if len(found) < 2:
            endings = ", ".join(IMAGE_SUFFIXES)
            raise UserError(f"reference folder {self.path} has {len(found)} images ({endings}); a distance needs 2.")
        if others := Counter(path.suffix or path.name for path in set(there) - set(found)):
            words = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
            log.info("reference folder %s: %d images; left out: %s", self.path, len(found), words)
        return found

    def check(self, extractor: Extractor) -> None:
        """Read every image once unless their features are kept; raises UserError naming those that cannot be read."""
        files = self.files
        if self._kept(extractor) is not None:
            return
        log.info("checking %d reference images in %s", len(files), self.path)
        with ThreadPoolExecutor(WORKERS) as pool:
            wrong = [f"{path} ({why})" for path, why in zip(files, pool.map(_fault, files), strict=True) if why]
        if wrong:
            more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
            raise UserError(
                f"{len(wrong)} of {len(files)} reference images cannot be read: {', '.join(wrong[:NAMED])}{more}; fetch "
                "them again or remove them."
            )

    def read(self, extractor: Extractor) -> Reference:
        """Extract the features of the images, or take them from the cache."""
        if (kept := self._kept(extractor)) is not None:
            return kept
        files, stored = self.files, self._place(extractor)
        log.info("extracting %s features of %d reference images in %s", extractor.name, len(files), self.path)
        features = extract(extractor, _read_images(files))
        name, names = f"{self.path.name} ({len(files)} images)", tuple(str(p.relative_to(self.path)) for p in files)
        if stored:
            arrays = {"features": features, "digest": extractor.digest(), "name": name, "files": np.array(names)}
            save_npz(stored, arrays)
        return Reference(name, Statistics.of(features), features, names)

    def _kept(self, extractor: Extractor) -> Reference | None:
        place = self._place(extractor)
        if place is None or not place.is_file():
            return None
        try:
            return read_reference(place, extractor)
        except UserError as error:
            log.info("the features are extracted again: %s", error)
            return None

    def _place(self, extractor: Extractor) -> Path | None:
        """Return where the features are kept: a hash of the extractor and of the name, size and date of every image."""
        if self.cache is None:
            return None
        stats = ((path, path.stat()) for path in self.files)
        facts = "".join(f"{path}:{stat.st_size}:{stat.st_mtime_ns};" for path, stat in stats)
        key = hashlib.sha256(f"{extractor.digest()}{facts}".encode(errors="surrogateescape")).hexdigest()[:12]
        return self.cache / f"reference-{key}.npz"


def _fault(path: Path) -> str:
    """Return why an image cannot be read, '' if it can."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (1, 1))  # a JPEG at an eighth of its size: all its bytes are read, few are transformed
            image.load()
    except BROKEN as error:
        return first_line(error)
    return ""


def _read_images(files: list[Path]) -> Iterator[np.ndarray]:
    for path in files:
        try:
            with Image.open(path) as image:
                yield np.asarray(image.convert("RGB"))
        except BROKEN as error:
            raise UserError(f"reference image {path} cannot be read ({first_line(error)}).") from error
