"""Prepare images the way published protocols do, before a network's own preparation.

# H, W pixels
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as F


def centre_square(image: np.ndarray, side: int) -> np.ndarray:
    """Crop to the short side about the centre, then resize by Lanczos: uint8 [H, W, 3] -> uint8 [side, side, 3].

    LANTERN's evaluation (eval_fid_clip.py, after BigGAN's and GigaGAN's) does so to references and generated images.
    """
    whole = Image.fromarray(image)
    square: Any = F.center_crop(whole, [min(whole.size)] * 2)  # pyright: ignore[reportArgumentType]  takes PIL images too
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def squash(image: np.ndarray, side: int) -> np.ndarray:
    """Resize bilinearly without antialiasing, whatever the shape: uint8 [H, W, 3] -> uint8 [side, side, 3].

    SJD's evaluation_metrics.py does so before its CLIP score, on whole numbers as here.
    """
    pixels = torch.tensor(image).permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)
    return small[0].permute(1, 2, 0).numpy()
