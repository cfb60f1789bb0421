"""Draw docs/sjd2.png, the README's picture of one pass: python docs/figure.py."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

SLOTS = 10
CLEAN, NOISE, DONE = "#4c9be8", "#b9b9b9", "#2e7d4f"
# level of each slot before and after the pass, and what becomes of it
BEFORE = [0, 0, 0, 0, 0, 1, 1, 2, 2, 2]
AFTER = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
ACCEPTED = 3


def box(axes: plt.Axes, x: float, y: float, colour: str, level: int, text: str, rng: np.random.Generator) -> None:
    axes.add_patch(Rectangle((x, y), 0.86, 0.86, facecolor=colour, edgecolor="black", linewidth=0.8, alpha=0.95))
    if level:
        grain = rng.standard_normal((14, 14)) * (0.25 * level)
        extent = (x + 0.02, x + 0.84, y + 0.02, y + 0.84)
        axes.imshow(grain, extent=extent, cmap="gray", vmin=-1, vmax=1, alpha=0.25 + 0.3 * level, zorder=2)
    axes.text(x + 0.43, y + 0.43, text, ha="center", va="center", fontsize=9, zorder=3)


def main() -> None:
    rng = np.random.default_rng(0)
    figure, axes = plt.subplots(figsize=(9, 3.5))
    for slot in range(SLOTS):
        name = "n" if slot == 0 else f"+{slot}"
        box(axes, slot, 2.6, DONE if slot == 0 else NOISE if BEFORE[slot] else CLEAN, BEFORE[slot], name, rng)
    for slot in range(SLOTS):
        x = slot + ACCEPTED + 1
        colour = DONE if slot == 0 else NOISE if AFTER[slot] else CLEAN
        box(axes, x, 0.2, colour, AFTER[slot], "n'" if slot == 0 else f"+{slot}", rng)
    for slot in range(1, ACCEPTED + 2):
        text, colour = ("ok", DONE) if slot <= ACCEPTED else ("rejected:\nresidual", "#c0392b")
        axes.text(slot + 0.43, 3.75, text, ha="center", va="bottom", fontsize=8, color=colour)
    axes.text(5.93, 3.75, "behind noise: not committed", ha="left", va="bottom", fontsize=8, color="#555555")
    for slot in range(ACCEPTED + 1, SLOTS):
        start, end = (slot + 0.43, 2.55), (slot + 0.43, 1.12)
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color="#555555", linewidth=0.9))
    axes.text(7.6, 1.8, "one denoising step,\nor a coupled redraw", fontsize=8, ha="left", va="center", color="#333333",
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    axes.text(11.9, 1.25, "enter as\npure noise", fontsize=8, ha="center", va="bottom", color="#333333")
    axes.text(-0.3, 3.03, "pass t", ha="right", va="center", fontsize=10)
    axes.text(-0.3, 0.63, "pass t + 1", ha="right", va="center", fontsize=10)
    axes.set(xlim=(-2.2, 14.2), ylim=(0, 4.6))
    axes.set_aspect("auto")
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("sjd2.png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
