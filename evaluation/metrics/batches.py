"""Stack images for a network, on the device that is there, whose weights are whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor

from sjd2.errors import UserError
from sjd2.models.tensors import header_size, read_header


def stack(images: Sequence[np.ndarray]) -> Tensor:
    """Stack images of one size: uint8 or float [H, W, 3] each -> [B, 3, H, W].

    Raises UserError when the images differ in size.
    """
    for image in images:
        if image.shape != images[0].shape:
            raise UserError(f"images of one run must have one size, found {images[0].shape} and {image.shape}.")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def check_weights(file: Path) -> None:
    """Raise UserError for a file of weights that was cut short or is none; reads no tensor."""
    if file.suffix == ".safetensors":
        header = read_header(file, "weights")
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = file.stat().st_size >= 8 + header_size(file) + max(ends, default=0)
    else:
        with file.open("rb") as handle:
            begin = handle.read(2)
        # torch's files are zip archives, older ones pickles
        whole = is_zipfile(file) if begin == b"PK" else begin[:1] == b"\x80"
    if not whole:
        raise UserError(f"{file} is cut short or no file of weights; fetch it again.")


def batches(images: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Yield lists of `size` images, the last one shorter."""
    waiting = iter(images)
    while batch := list(islice(waiting, size)):
        yield batch


def device_for(name: str | None) -> torch.device:
    """Return the named device; None and 'auto' mean CUDA where there is one.

    Raises UserError for a CUDA device on a machine without.
    """
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name} needs a CUDA GPU, which this machine or torch build does not have: device=cpu.")
    return device
