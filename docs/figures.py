r"""Draw the figures of the documentation.

python docs/figures.py            # sjd2.png and sjd-fc.png, drawings of a pass
python docs/figures.py RUNS_DIR   # grid.png: the same seeds under AR, lossless and lossy decoders, from the run folders of
    python run.py -m decoder=ar,sjd,scd,sjd2,sjd2-fc,zipar,sjd2-paper sampler=gumbel dtype=float64 limit=12 batch_size=12 \\
        baseline=null evaluation=none runs_dir=RUNS_DIR
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import yaml
from matplotlib.patches import FancyArrowPatch, Rectangle

from sjd2.files import read_lines

SLOTS = 10
CLEAN, NOISE, DONE = "#4c9be8", "#b9b9b9", "#2e7d4f"
# level of each slot before and after the pass, and what becomes of it
BEFORE = [0, 0, 0, 0, 0, 1, 1, 2, 2, 2]
AFTER = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
ACCEPTED = 3


def box(axes: plt.Axes, x: float, y: float, colour: str, level: int, text: str, rng: np.random.Generator) -> None:
    """Draw one token, the noisier the higher its level."""
    axes.add_patch(Rectangle((x, y), 0.86, 0.86, facecolor=colour, edgecolor="black", linewidth=0.8, alpha=0.95))
    if level:
        grain = rng.standard_normal((14, 14)) * (0.25 * level)
        extent = (x + 0.02, x + 0.84, y + 0.02, y + 0.84)
        axes.imshow(grain, extent=extent, cmap="gray", vmin=-1, vmax=1, alpha=0.25 + 0.3 * level, zorder=2)
    axes.text(x + 0.43, y + 0.43, text, ha="center", va="center", fontsize=9, zorder=3)


def sjd2() -> None:
    """Draw a pass of SJD2: what is verified, what loses noise, what enters."""
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
        text, colour = ("ok", DONE) if slot <= ACCEPTED else ("rejected:\nrecovered", "#c0392b")
        axes.text(slot + 0.43, 3.75, text, ha="center", va="bottom", fontsize=8, color=colour)
    axes.text(5.93, 3.75, "after a noisy input: not committed", ha="left", va="bottom", fontsize=8, color="#555555")
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


def arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "#555555") -> None:
    """Draw an arrow."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=colour, linewidth=0.9))


def sjd_fc() -> None:
    """Draw a pass of SJD-FC: the rejected draft token, the stale distribution after it, its correction, the branches."""
    rng = np.random.default_rng(0)
    figure, axes = plt.subplots(figsize=(9, 4.9))
    stale, rejected, branch = "#f0b429", "#c0392b", "#9b7fd1"
    for slot in range(8):
        colour = DONE if slot == 0 else rejected if slot == 3 else stale if slot == 4 else CLEAN
        box(axes, slot, 6.2, colour, 0, "n" if slot == 0 else "x" if slot == 3 else f"+{slot}", rng)
    for slot in (1, 2):
        axes.text(slot + 0.43, 7.2, "ok", ha="center", fontsize=8, color=DONE)
    axes.text(3.43, 7.2, "rejected:\ny instead", ha="center", fontsize=8, color=rejected)
    axes.text(4.0, 8.1, "the distribution at +4 was computed given x, not y", ha="left", fontsize=8, color="#8a6200")
    arrow(axes, (4.43, 8.0), (4.43, 7.1), "#8a6200")
    axes.text(-0.3, 6.6, "pass t", ha="right", va="center", fontsize=10)
    axes.text(-0.3, 3.0, "pass t + 1", ha="right", va="center", fontsize=10)
    box(axes, 3, 2.6, DONE, 0, "y", rng)
    for slot in range(4, 11):
        box(axes, slot, 2.6, stale if slot == 4 else CLEAN, 0, f"+{slot}", rng)
    for number, height in enumerate((1.5, 0.4)):
        for slot in range(4, 7):
            text = f"+4{chr(39) * (number + 1)}" if slot == 4 else f"+{slot}"
            box(axes, slot, height, branch if slot == 4 else CLEAN, 0, text, rng)
        arrow(axes, (3.86, 2.75), (4.0, height + 0.45))
    box(axes, 5, 3.75, branch, 0, "+5'", rng)
    box(axes, 6, 3.75, CLEAN, 0, "+6", rng)
    arrow(axes, (4.7, 3.46), (5.0, 4.1))
    arrow(axes, (4.43, 6.15), (4.43, 3.5), "#8a6200")
    axes.text(
        4.6,
        5.35,
        "corrector(state of +4, state that drew y, x, y);\n"
        "the draft token is coupled to the corrected distribution, which is recorded",
        fontsize=8,
        va="center",
        color="#8a6200",
    )
    words = "siblings, without replacement;\ntheir children are corrected too"
    axes.text(7.15, 1.4, words, fontsize=8, color="#5b3fa0", va="center")
    axes.set(xlim=(-1.6, 11.2), ylim=(0.2, 8.6))
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("sjd-fc.png"), dpi=110, bbox_inches="tight")


GROUPS = {  # of decoders, left to right
    "reference": ("ar",),
    "lossless: exactly AR's tokens": ("sjd", "scd", "sjd2", "sjd2-fc"),
    "lossy": ("zipar", "sjd2-paper"),
}
COLOURS = {"reference": "#333333", "lossless: exactly AR's tokens": "#2e7d4f", "lossy": "#c0392b"}
PROMPTS = (0, 1, 4, 10)  # indices of the prompts shown


def read_runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the records of every run in a folder by its decoder's name, each with the path of its image."""
    runs = {}
    for settings in sorted(folder.glob("*/config.yaml")):
        name = yaml.safe_load(settings.read_text(encoding="utf-8"))["decoder"]["name"]
        records = sorted(read_lines(settings.parent / "samples.jsonl")[0], key=lambda record: record["id"])
        runs[name] = [record | {"image": settings.parent / record["image"]} for record in records]
    return runs


def grid(folder: Path) -> None:
    """Draw the same prompts and seeds over decoders, grouped by what they promise.

    Below each image: the passes it took, in green where its tokens are exactly AR's.
    """
    runs = read_runs(folder)
    names = [name for group in GROUPS.values() for name in group]
    figure, axes = plt.subplots(
        len(PROMPTS), len(names) + 1, figsize=(11.4, 6.4), gridspec_kw={"wspace": 0.06, "hspace": 0.28}
    )
    for row, prompt in enumerate(PROMPTS):
        axes[row, 0].text(1, 0.5, textwrap.fill(runs["ar"][prompt]["prompt"], 20), ha="right", va="center", fontsize=9)
        axes[row, 0].axis("off")
        for axis, name in zip(axes[row, 1:], names, strict=True):
            record = runs[name][prompt]
            axis.imshow(plt.imread(record["image"]), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            equal = record["tokens_sha256"] == runs["ar"][prompt]["tokens_sha256"]
            colour = "#2e7d4f" if equal else "#c0392b"
            axis.set_xlabel(f"{record['forwards']} passes", fontsize=9, labelpad=3, color=colour)
            if row == 0:
                axis.set_title(name, fontsize=12, fontfamily="monospace")
    first = 1
    for title, group in GROUPS.items():
        left, right = (axes[0, index].get_position() for index in (first, first + len(group) - 1))
        line = plt.Line2D([left.x0, right.x1], [0.945, 0.945], color=COLOURS[title], linewidth=2)
        figure.add_artist(line)
        middle = (left.x0 + right.x1) / 2
        figure.text(middle, 0.96, title, ha="center", fontsize=12, color=COLOURS[title])
        first += len(group)
    figure.savefig(Path(__file__).with_name("grid.png"), dpi=110, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    if sys.argv[1:]:
        grid(Path(sys.argv[1]))
    else:
        sjd2()
        sjd_fc()
