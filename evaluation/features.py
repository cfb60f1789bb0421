"""Turn images into features for a distance, and keep a run's features beside its images.

An extractor is any object with the members of `Extractor`: Inception here, the shipped one in alignment.py.

# N images, D feature width
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch

from evaluation.batches import batches, device_for
from evaluation.records import Id, RunFolder, write_atomically
from sjd2.errors import UserError
from sjd2.paths import digest, find

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"


class Extractor(Protocol):
    """What turns images into features. `size`: the (H, W) it is made for, None if it takes any."""

    name: str
    width: int
    size: tuple[int, int] | None

    def check(self) -> None:
        """Raise UserError if a file or a library is missing; load nothing heavy."""

    def digest(self) -> str:
        """Return a short hash of all that decides the features: weights and preparation."""

    def __call__(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Extract features: uint8 [H, W, 3] each -> float32 [N, D]."""


# ---------------------------------------------------------------------------------------------------------- inception
class Inception:
    """The Inception-v3 of the FID literature with clean-fid's resizing, from a file that the user has fetched."""

    width = 2048
    size = None
    name = "Inception-v3 (clean-fid, mode clean)"

    def __init__(self, *, weights: str | None = None, device: str | None = None, batch_size: int = 32) -> None:
        self.weights, self.device, self.batch_size = weights, device, batch_size

    @property
    def _folder(self) -> Path:
        """The folder that holds the file, under the one name that clean-fid knows."""
        path = find(str(self.weights))
        return path.parent if path.name == INCEPTION_FILE else path

    def check(self) -> None:
        """Raise UserError if clean-fid or the weights are missing."""
        key = "evaluation.metrics.fid.extractor.weights"
        fetch = f"Fetch it once from {INCEPTION_URL} and give its folder: {key}=FOLDER"
        if self.weights is None:
            raise UserError(f"evaluation=inception never downloads {INCEPTION_FILE} by itself. {fetch}.")
        if not (self._folder / INCEPTION_FILE).is_file():
            raise UserError(f"{self._folder} has no {INCEPTION_FILE}. {fetch}.")
        try:
            import cleanfid  # noqa: F401
        except ImportError as error:
            raise UserError("evaluation=inception needs clean-fid: pip install clean-fid.") from error

    @cached_property
    def _digest(self) -> str:
        return digest(self._folder / INCEPTION_FILE)

    def digest(self) -> str:
        """Return a hash of the weights."""
        return self._digest

    def __call__(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Extract the pool features: uint8 [H, W, 3] each -> float32 [N, 2048]."""
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer

        device = device_for(self.device)
        try:
            network = InceptionV3W(str(self._folder), download=False).eval().to(device)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"{self._folder / INCEPTION_FILE} cannot be read ({first}); fetch it again.") from error
        resize = build_resizer("clean")  # -> float32 [299, 299, 3] in 0..255, not rounded
        rows = []
        with torch.no_grad():
            for batch in batches((resize(image) for image in images), self.batch_size):
                rows.append(network(batch.to(device)).float().cpu().numpy())
        return np.concatenate(rows) if rows else np.zeros((0, self.width), np.float32)


# -------------------------------------------------------------------------------------------- features of a run, kept
def features_file(run: RunFolder, extractor: Extractor) -> Path:
    """Return where a run keeps its features under this extractor."""
    return run.path / f"features-{extractor.digest()}.npz"


def load_features(path: Path) -> dict[Id, np.ndarray]:
    """Read a features file: {(prompt index, repeat): float32 [D]}; empty if there is none."""
    return {key: row for key, (_, row) in _stored(path).items()}


def _stored(path: Path) -> dict[Id, tuple[str, np.ndarray]]:
    """Return {id: (hash of its tokens, features)}; a damaged file counts as none."""
    try:
        with np.load(path) as file:
            ids, hashes, rows = file["ids"], file["tokens"], file["features"]
    except (OSError, ValueError, KeyError, BadZipFile):
        return {}
    return {tuple(key): (text, row) for key, text, row in zip(ids.tolist(), hashes.tolist(), rows, strict=True)}


def run_features(run: RunFolder, extractor: Extractor) -> np.ndarray:
    """Return the features [N, D] of all images in record order; only images not seen before are computed."""
    path = features_file(run, extractor)
    old = _stored(path)
    wanted = {tuple(record["id"]): record["tokens_sha256"][:16] for record in run.records()}
    missing = [key for key, text in wanted.items() if key not in old or old[key][0] != text]
    if missing:
        rows = extractor(run.images(missing))
        old |= {key: (wanted[key], row) for key, row in zip(missing, rows, strict=True)}
    kept = {key: old[key][1] for key in wanted}
    features = np.stack(list(kept.values())).astype(np.float32)
    if missing:
        arrays = {"ids": np.array(list(kept)), "tokens": np.array(list(wanted.values())), "features": features}
        save_npz(path, arrays)
    return features


def save_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Write an npz file so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
