"""Turn images into data URIs, so that the page needs no other file.

# H, W height and width of an image
"""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

EXACT = 128  # images up to this many pixels wide are stored losslessly


def image_uri(image: np.ndarray, side: int) -> str:
    """Return an image uint8 [H, W, 3 or 4] as a WebP data URI, at most `side` pixels high and wide.

    Small images are stored losslessly; large ones at the size they are shown at, with quality 82.
    """
    shown = Image.fromarray(image)
    exact = max(shown.size) <= EXACT
    if not exact:
        shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, format="WEBP", lossless=exact, quality=82, method=4)
    return _uri("webp", buffer)


def chart_uri(image: np.ndarray) -> str:
    """Return an image of few colours, uint8 [H, W, 4], as a lossless PNG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return _uri("png", buffer)


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
