"""Feed images to a network in batches, on the device that is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from sjd2.errors import UserError


def batches(images: Iterable[np.ndarray], size: int) -> Iterator[Tensor]:
    """Stack images of one size: uint8 [H, W, 3] each -> uint8 [B, 3, H, W], B <= size.

    Raises UserError when the images differ in size.
    """
    waiting: list[np.ndarray] = []
    for image in images:
        if waiting and image.shape != waiting[0].shape:
            raise UserError(f"images of one run must have one size, found {waiting[0].shape} and {image.shape}.")
        waiting.append(image)
        if len(waiting) == size:
            yield _stack(waiting)
            waiting = []
    if waiting:
        yield _stack(waiting)


def _stack(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def device_for(name: str | None) -> torch.device:
    """Return the named device; None and 'auto' mean CUDA where there is one.

    Raises UserError for a CUDA device on a machine without.
    """
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name} needs a CUDA GPU, which this machine or this torch build has not: device=cpu.")
    return device
