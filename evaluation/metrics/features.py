"""Turn images into features for a distance, and keep a run's features beside its images.

An extractor is any object with the members of `Extractor`: two Inceptions here, the shipped one in alignment.py.

# N images, D feature width
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from evaluation.metrics.batches import batches, device_for, stack
from evaluation.metrics.transforms import centre_square
from evaluation.run_folder import Id, Record, RunFolder, Snapshot, record_id
from sjd2.errors import UserError, first_line
from sjd2.files import digest, find, write_atomically

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
PYTORCH_FID_FILE = "pt_inception-2015-12-05-6726825d.pth"
PYTORCH_FID_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{PYTORCH_FID_FILE}"


class Extractor(Protocol):
    """What turns images into features.

    name: network and preparation in words. width: D. size: the (H, W) it is made for, None if it takes any.
    """

    @property
    def name(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def size(self) -> tuple[int, int] | None: ...
    @property
    def batch_size(self) -> int: ...

    def check(self) -> None:
        """Raise UserError if a file or a library is missing; load nothing heavy."""
        ...

    def digest(self) -> str:
        """Return a short hash of all that decides the features: weights and preparation."""
        ...

    def load(self) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
        """Load the network: `batch_size` images or fewer, uint8 [H, W, 3] each, -> float32 [B, D]."""
        ...


def extract(extractor: Extractor, images: Iterable[np.ndarray]) -> np.ndarray:
    """Extract features batch by batch: uint8 [H, W, 3] each -> float32 [N, D]."""
    network = extractor.load()
    rows = [network(batch) for batch in batches(images, extractor.batch_size)]
    return np.concatenate(rows) if rows else np.zeros((0, extractor.width), np.float32)


# ---------------------------------------------------------------------------------------------------------- inception
class _InceptionFile:
    """What the two Inceptions share: a file that the user has fetched, and a crop."""

    width = 2048
    size = None
    file: str  # the name that the file was published under
    url: str
    source: str  # of the network and its resizing, in words

    def __init__(
        self, *, weights: str | None = None, crop: int | None = None, device: str | None = None, batch_size: int = 32
    ) -> None:
        if crop is not None and crop < 1:
            raise UserError(f"evaluation.metrics.fid.extractor.crop must be 1 or more, or null, got {crop}.")
        self.weights, self.crop, self.device, self.batch_size = weights, crop, device, batch_size

    @property
    def name(self) -> str:
        """Network, resizing and crop, in words."""
        return f"Inception-v3 ({self.source}{f', centre square of {self.crop} first' if self.crop else ''})"

    @property
    def _path(self) -> Path:
        path = find(str(self.weights))
        return path / self.file if path.is_dir() else path

    def check(self) -> None:
        """Raise UserError if clean-fid or the weights are missing, or do not load."""
        key = "evaluation.metrics.fid.extractor.weights"
        fetch = f"Fetch it once from {self.url} and give its folder: {key}=FOLDER"
        if self.weights is None:
            raise UserError(f"FID never downloads {self.file} by itself. {fetch}.")
        if not self._path.is_file():
            given = find(self.weights)
            raise UserError(f"{given} {f'has no {self.file}' if given.is_dir() else 'does not exist'}. {fetch}.")
        try:
            import cleanfid  # noqa: F401
        except ImportError as error:
            raise UserError("FID with an Inception needs clean-fid: pip install clean-fid.") from error
        self._network()  # a second now; a file that was cut short would be found when all images are made

    @cached_property
    def _digest(self) -> str:
        content = digest(self._path)
        if self.crop is None:
            return content
        return hashlib.blake2b(f"{content} crop {self.crop}".encode(), digest_size=6).hexdigest()

    def digest(self) -> str:
        """Return a hash of the weights and the crop."""
        return self._digest

    def load(self) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
        """Load the network up to its pool features: uint8 [H, W, 3] each, sizes may differ, -> float32 [B, 2048]."""
        device, crop = device_for(self.device), self.crop
        network, resize = self._network().eval().requires_grad_(False).to(device), self._resizer()

        @torch.no_grad()
        def features(images: Sequence[np.ndarray]) -> np.ndarray:
            squares = images if crop is None else [centre_square(image, crop) for image in images]
            pixels = stack([resize(image) for image in squares])  # float32 [B, 3, 299, 299], 0..255
            return network(pixels.to(device)).float().cpu().numpy()

        return features

    def _network(self) -> nn.Module:
        raise NotImplementedError

    def _resizer(self) -> Callable[[np.ndarray], np.ndarray]:
        raise NotImplementedError

    def _refused(self, error: Exception) -> UserError:
        first = first_line(error)
        return UserError(f"{self._path} cannot be read as {self.file} ({first}); fetch it again.")


class Inception(_InceptionFile):
    """The Inception-v3 of the FID literature with clean-fid's resizing (antialiased, not rounded).

    weights: inception-2015-12-05.pt or its folder. crop: side of a centred square that every image, the reference's
    too, is cropped and resized to first (LANTERN: 256); null: images as they are, squashed to 299 x 299.
    """

    file, url, source = INCEPTION_FILE, INCEPTION_URL, "clean-fid, mode clean"

    def _network(self) -> nn.Module:
        from cleanfid.inception_torchscript import InceptionV3W

        if self._path.name != self.file:
            raise UserError(f"{self._path} must be called {self.file}, the one name that clean-fid knows.")
        try:
            return InceptionV3W(str(self._path.parent), download=False)
        except RuntimeError as error:
            raise self._refused(error) from error

    def _resizer(self) -> Callable[[np.ndarray], np.ndarray]:
        from cleanfid.resize import build_resizer

        return build_resizer("clean")


class PytorchFidInception(_InceptionFile):
    """The Inception-v3 of pytorch-fid, which squashes every image to 299 x 299 bilinearly without antialiasing.

    The same TensorFlow weights in another port. Network blocks and resizing are clean-fid's (its mode legacy_pytorch,
    which is pytorch-fid); only the loading is ours, since clean-fid would fetch the file and unpickle it.
    weights: pt_inception-2015-12-05-6726825d.pth or its folder. crop: as in `Inception`.
    """

    file, url, source = PYTORCH_FID_FILE, PYTORCH_FID_URL, "pytorch-fid"

    def _network(self) -> nn.Module:
        try:
            weights = torch.load(self._path, map_location="cpu", weights_only=True)
            network = _pytorch_fid_network()
            network.load_state_dict(weights)
        except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError, LookupError, ValueError) as error:
            raise self._refused(error) from error
        network.fc = nn.Identity()  # the features are what it would classify
        return nn.Sequential(_ToUnit(), network)

    def _resizer(self) -> Callable[[np.ndarray], np.ndarray]:
        from cleanfid.resize import build_resizer

        with warnings.catch_warnings():  # clean-fid would silence the whole program's warnings here
            return build_resizer("legacy_pytorch")


class _ToUnit(nn.Module):
    """Bring pixels 0..255 to -1..1."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels / 255 * 2 - 1


def _pytorch_fid_network() -> nn.Module:
    """Build torchvision's Inception-v3 with the blocks that pytorch-fid changes; random weights."""
    from cleanfid import inception_pytorch as blocks
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
    network.Mixed_5b = blocks.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = blocks.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = blocks.FIDInceptionA(288, pool_features=64)
    network.Mixed_6b = blocks.FIDInceptionC(768, channels_7x7=128)
    network.Mixed_6c = blocks.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6d = blocks.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6e = blocks.FIDInceptionC(768, channels_7x7=192)
    network.Mixed_7b = blocks.FIDInceptionE_1(1280)
    network.Mixed_7c = blocks.FIDInceptionE_2(2048)
    return network


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


class RunFeatures:
    """The features of a run's images, kept in its folder: only the images of `missing` have to be given to `add`."""

    def __init__(self, run: Snapshot, extractor: Extractor) -> None:
        self.path = features_file(run.folder, extractor)
        self._hashes = {record_id(record): record["tokens_sha256"][:16] for record in run.records}
        self._known = _stored(self.path)
        self.missing = [record for record in run.records if not self._is_known(record_id(record))]
        self._network = extractor.load() if self.missing else None

    def _is_known(self, key: Id) -> bool:
        return key in self._known and self._known[key][0] == self._hashes[key]

    def add(self, images: Sequence[np.ndarray], records: Sequence[Record]) -> None:
        """Extract the features of one batch."""
        assert self._network is not None
        for record, row in zip(records, self._network(images), strict=True):
            self._known[record_id(record)] = (self._hashes[record_id(record)], row)

    def finish(self) -> np.ndarray:
        """Keep and return the features of all images, float32 [N, D] in the order of the records."""
        features = np.stack([self._known[key][1] for key in self._hashes]).astype(np.float32)
        if self.missing:
            hashes = np.array(list(self._hashes.values()))
            save_npz(self.path, {"ids": np.array(list(self._hashes)), "tokens": hashes, "features": features})
        return features


def save_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Write an npz file so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
