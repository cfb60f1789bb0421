"""Plots of one run: a grid of its images, and where on the token grid draft tokens waited to be accepted.

# N image-phase tokens
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from math import ceil, sqrt

import numpy as np
from PIL import Image

from evaluation.run_folder import Snapshot
from harness.console import say
from sjd2.decoding.decoder import BaseDecoder
from sjd2.errors import first_line
from sjd2.files import write_atomically
from sjd2.models.layout import TokenGrid

log = logging.getLogger(__name__)


def draw_grids(run: Snapshot, layout: TokenGrid, decoder: BaseDecoder, most: int) -> None:
    """Write grid.png and acceptance.png; one that cannot be drawn is reported and left out: scoring does not need it."""
    draws = {"grid.png": lambda: image_grid(run, most), "acceptance.png": lambda: acceptance_map(run, layout, decoder)}
    for name, draw in draws.items():
        try:
            draw()
        except Exception as error:  # the images are made, and a plot is no reason to stop before their scores
            log.debug("%s", name, exc_info=True)
            say(f"skipped {name}: {first_line(error)}")


def image_grid(run: Snapshot, most: int) -> None:
    """Write grid.png: the first `most` images of the run, row by row."""
    images = list(run.folder.images(run.ids[:most])) if run.drawn else []
    if not images:
        return
    height, width = images[0].shape[:2]
    columns = ceil(sqrt(len(images)))
    gap = 2
    size = (columns * (width + gap) - gap, ceil(len(images) / columns) * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        sheet.paste(Image.fromarray(image), (i % columns * (width + gap), i // columns * (height + gap)))
    _write(run, "grid.png", sheet)


def waiting(accepted: Sequence[int], window: int, draft_in_prefill: bool = False) -> np.ndarray:
    """Return how many passes each position held a draft token in the window before the pass that committed it: [N].

    accepted: tokens committed at each pass, the prefill first, which drafts nothing unless it is `draft_in_prefill`. A pass
    from n committed tokens drafts positions n .. n + window - 2, so AR waits nowhere; for trees window - 1 is their depth.
    """
    waited = np.zeros(sum(accepted), dtype=np.int64)
    committed = 0
    for number, count in enumerate(accepted):
        if number or draft_in_prefill:
            waited[committed + count : committed + window - 1] += 1
        committed += count
    return waited


def acceptance_map(run: Snapshot, layout: TokenGrid, decoder: BaseDecoder) -> None:
    """Write acceptance.png: per grid position the passes it waited in the window, mean over the run's images."""
    records = run.records
    if not records:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["text.usetex"] = False  # whatever the user's matplotlibrc says
    window, early = decoder.lookahead + 1, decoder.draft_in_prefill
    mean = np.mean([waiting(record["accepted"], window, early) for record in records], axis=0)
    shown = np.asarray(layout.shown)
    plot, axes = pyplot.subplots(figsize=(4.8, 4), layout="constrained")
    drawn = axes.imshow(mean[shown].reshape(layout.rows, layout.columns), cmap="viridis")
    axes.set_title(f"passes a position waits in the window\nmean of {len(records)} images")
    axes.set(xlabel="column", ylabel="row")
    plot.colorbar(drawn, ax=axes)
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=120)
    pyplot.close(plot)
    write_atomically(run.path / "acceptance.png", buffer.getvalue())


def _write(run: Snapshot, name: str, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_atomically(run.path / name, buffer.getvalue())
