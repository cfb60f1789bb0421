"""Turn pictures into data URIs, so that a page needs no file beside it.

# H, W height and width of a picture
"""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

EXACT = 128  # pixels up to which a picture keeps every one of them


def picture(image: np.ndarray, side: int) -> str:
    """Return a picture uint8 [H, W, 3 or 4] as a WebP data URI, at most `side` pixels high and wide.

    Small pictures are kept exactly; large ones are stored at the size they are shown at, at quality 82.
    """
    shown = Image.fromarray(image)
    exact = max(shown.size) <= EXACT
    if not exact:
        shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, format="WEBP", lossless=exact, quality=82, method=4)
    return _uri("webp", buffer)


def drawing(image: np.ndarray) -> str:
    """Return a drawing of few colours, uint8 [H, W, 4], as a PNG data URI; every pixel is kept."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return _uri("png", buffer)


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
