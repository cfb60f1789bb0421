"""Draw plots: quality against latency, where tokens waited, tokens per pass, the same seeds side by side.

Every function takes plain numbers and arrays, writes one PNG and returns its path; none knows a run folder. Texts are
drawn as they stand: no mathematics between dollar signs, no LaTeX. matplotlib is imported inside, so that `--help` and
tab completion stay fast. Needs no display.
"""

from __future__ import annotations

import logging
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sjd2.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

FONTS = (  # tried, where installed, for characters that matplotlib's own font lacks
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Arial Unicode MS",
)
GLYPH = re.compile(r"Glyph (\d+) .*missing from font")  # matplotlib's warning
COLUMNS_MAX = 8  # decoders in one image grid or row of maps: more would shrink the images to stamps


@dataclass(frozen=True)
class Point:
    """One decoder in the Pareto plot."""

    label: str
    latency_s: float
    quality: float
    lossless: bool
    error: float | None = None  # half the length of the error bar
    ranked: bool = True  # rests on enough images for the Pareto line


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **settings: Any) -> tuple[Figure, np.ndarray]:
    """Return a figure with a [rows, columns] array of axes, made without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **settings)


def _save(figure: Figure, path: Path) -> Path:
    from matplotlib import font_manager
    from matplotlib.text import Text

    there = {font.name for font in font_manager.fontManager.ttflist}
    others = [name for name in FONTS if name in there]
    # matplotlib's own texts, 10^-1 and offsets: of all ticks, also those that only the final layout shows or copies
    both = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    own = {id(text) for axis in both for text in axis.findobj(Text) if text is not axis.label}
    for text in figure.findobj(Text):
        if id(text) not in own:
            text.set_parse_math(False)
            text.set_usetex(False)
            if not text.get_text().isascii():
                text.set_fontfamily([*text.get_fontfamily(), *others])
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    if lacking := sorted({found[1] for warning in caught if (found := GLYPH.match(str(warning.message)))}, key=int):
        characters = "".join(chr(int(code)) for code in lacking)
        log.info("%s: no font here has %s, drawn as boxes; Noto Sans CJK has most.", path.name, characters)
    return path


def _legend(place: Axes | Figure, entries: Mapping[str, Any], **settings: Any) -> None:
    """Add a legend; matplotlib itself leaves labels out that begin with an underscore."""
    legend = place.legend(list(entries.values()), [str(number) for number in range(len(entries))], **settings)
    for text, label in zip(legend.get_texts(), entries, strict=True):
        text.set_text(label)


def pareto_front(points: Sequence[Point], *, lower_is_better: bool) -> list[Point]:
    """Return the ranked points that no other ranked point beats in both latency and quality, by latency."""
    best, kept = math.inf, []
    sign = 1 if lower_is_better else -1
    ranked = [point for point in points if point.ranked]
    for point in sorted(ranked, key=lambda point: (point.latency_s, sign * point.quality)):
        if sign * point.quality < best:
            best = sign * point.quality
            kept.append(point)
    return kept


def _pareto_panel(axis: Axes, title: str, points: Sequence[Point], lower_is_better: bool | None) -> dict[str, Any]:
    """Draw one panel; return what its legend explains."""
    entries: dict[str, Any] = {}
    for index, point in enumerate(points):
        colour = f"C{index % 10}"
        entries[point.label if point.lossless else f"{point.label} (lossy)"] = axis.errorbar(
            point.latency_s,
            point.quality,
            yerr=point.error,
            color=colour,
            marker="o" if point.lossless else "X",
            markersize=7,
            markerfacecolor=colour if point.lossless else "white",
            capsize=3,
            linestyle="none",
        )
    if lower_is_better is not None:
        line = pareto_front(points, lower_is_better=lower_is_better)
        axis.plot([p.latency_s for p in line], [p.quality for p in line], color="0.6", linewidth=1, zorder=0)
    arrow = {True: " (lower is better)", False: " (higher is better)", None: ""}[lower_is_better]
    axis.set(xlabel="latency of an image, median (s)", ylabel=f"{title}{arrow}")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    return entries


def pareto(panels: Mapping[str, tuple[Sequence[Point], bool | None]], path: Path, *, caption: str) -> Path:
    """Plot quality against latency, one panel per measure: {title: (points, lower is better; None: neither)}.

    The grey line joins the Pareto-optimal runs. Filled: lossless; hollow cross: lossy.
    """
    figure, axes = _figure(1.5 + 4.6 * len(panels), 4.6, 1, len(panels))
    entries: dict[str, Any] = {}
    for axis, (title, (points, lower)) in zip(axes[0], panels.items(), strict=True):
        entries |= _pareto_panel(axis, title, points, lower)
    _legend(figure, entries, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.suptitle(caption, fontsize="small")
    return _save(figure, path)


def acceptance_maps(
    maps: Mapping[str, np.ndarray], rows: int, columns: int, path: Path, *, shown: np.ndarray | None = None
) -> Path:
    """Draw one map per decoder, {label: [N]}, of the mean passes that a position was a draft token; one colour scale.

    shown: [N] bool, the rows x columns image positions, without forced tokens and previews; None: all positions.
    """
    names = list(maps)[:COLUMNS_MAX]
    across = min(4, len(names))
    down = -(-len(names) // across)
    figure, axes = _figure(2.6 * across + 1, 2.6 * down + 0.4, down, across)
    top = max(float(np.max(maps[name])) for name in names)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        values = np.asarray(maps[name], dtype=float)
        values = values if shown is None else values[shown]
        axis.imshow(values.reshape(rows, columns), vmin=0, vmax=max(top, 0.01), cmap="viridis")
        axis.set_title(f"{name}\nmean {values.mean():.2f}", fontsize="small")
    figure.colorbar(axes[0, 0].images[0], ax=axes, label="passes waited in the window", shrink=0.8)
    return _save(figure, path)


Series = Mapping[str, Sequence[tuple[float, float]]]  # {label: points}


def acceptance_histogram(counts: Mapping[str, Mapping[int, int]], path: Path) -> Path:
    """Draw for each decoder the share of passes that committed k tokens: {label: {k: passes}}."""
    shares = {}
    for name, histogram in counts.items():
        if total := sum(histogram.values()):
            shares[name] = [(length, passes / total) for length, passes in sorted(histogram.items()) if passes]
    return line_plots([(shares, "tokens committed by a pass", "share of passes")], path, yscale="log")


def line_plots(
    panels: Sequence[tuple[Series, str, str]], path: Path, *, yscale: str = "linear", doubling: bool = False
) -> Path:
    """Draw panels of lines side by side, (series, title of x, title of y) each; x is whole numbers.

    doubling: x are sizes that double, a tick each.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(6.5 * len(panels), 4, 1, len(panels))
    for axis, (series, x, y) in zip(axes[0], panels, strict=True):
        entries: dict[str, Any] = {}
        for index, (name, points) in enumerate(series.items()):
            style = ("-", "--", ":")[index // 10 % 3]
            places, values = zip(*points, strict=True)
            (entries[name],) = axis.plot(places, values, marker=".", color=f"C{index % 10}", linestyle=style)
        axis.set(xlabel=x, ylabel=y, yscale=yscale)
        if doubling:
            axis.set_xscale("log", base=2)
            sizes = sorted({place for points in series.values() for place, _ in points})
            axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
        else:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        _legend(axis, entries, fontsize="small")
    return _save(figure, path)


def comparison_grid(
    images: Mapping[str, Sequence[np.ndarray | None]], captions: Sequence[str], path: Path, *, note: str = ""
) -> Path:
    """Draw the same prompts and seeds over decoders: a column per decoder, a row per prompt, its caption on the left.

    images: {decoder: [uint8 [H, W, 3], or None if a run lacks the image]}, each as long as `captions`.
    Small images are not smoothed, so that a 48 px image is seen as it is.
    """
    names = list(images)[:COLUMNS_MAX]
    rows = len(captions)
    figure, axes = _figure(
        1.5 + 1.45 * len(names), 0.5 + 1.5 * rows, rows, len(names) + 1, width_ratios=[1.0] + [1.0] * len(names)
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for row, caption in enumerate(captions):
        text = textwrap.fill(textwrap.shorten(caption, 160, placeholder=" ..."), 22)
        axes[row, 0].text(
            0.98, 0.5, text, ha="right", va="center", fontsize="x-small", transform=axes[row, 0].transAxes
        )
        for column, name in enumerate(names, start=1):
            image = images[name][row]
            if image is not None:
                axes[row, column].imshow(image, interpolation="nearest" if image.shape[0] < 128 else "antialiased")
            if row == 0:
                axes[row, column].set_title(textwrap.fill(name, 18), fontsize="small")
    if note:
        figure.supxlabel(note, fontsize="x-small")
    return _save(figure, path)
