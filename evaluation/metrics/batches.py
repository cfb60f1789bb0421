"""Stack images for a network, on the device that is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from sjd2.errors import UserError


def stack(images: Sequence[np.ndarray]) -> Tensor:
    """Stack images of one size: uint8 or float [H, W, 3] each -> [B, 3, H, W].

    Raises UserError when the images differ in size.
    """
    for image in images:
        if image.shape != images[0].shape:
            raise UserError(f"images of one run must have one size, found {images[0].shape} and {image.shape}.")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


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
