"""Draw plots as SVG text that uses the page's colours, light or dark, and needs no script.

Every colour is a class (`c0` ... `c9`, the place of a run in its table); points have a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLOURS = 10
WIDTH, HEIGHT = 520, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 18, 14, 46
LONG = 26  # characters of a name that fits beside a point


@dataclass(frozen=True)
class Dot:
    """One point of a plot; `hollow` for a lossy decoder; `error` is half the length of the error bar."""

    label: str
    x: float
    y: float
    colour: int
    hollow: bool = False
    error: float | None = None


@dataclass(frozen=True)
class Axis:
    """The range of an axis and its ticks; `log`: a logarithmic one."""

    title: str
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Return the position of a value on the axis, 0 to 1."""
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def axis(title: str, values: Sequence[float], *, zero: bool = False, log: bool = False) -> Axis:
    """Return an axis with round ticks that covers all `values`, and zero if asked."""
    if log:
        low = math.floor(math.log10(min(values)))
        high = max(math.ceil(math.log10(max(values))), low + 1)
        return Axis(title, 10.0**low, 10.0**high, tuple(10.0**power for power in range(low, high + 1)), True)
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    span = high - low or abs(high) or 1.0
    low, high = (low if zero and low == 0 else low - 0.08 * span), high + 0.08 * span
    step = _round((high - low) / 5)
    first = math.ceil(low / step - 1e-9)
    ticks = tuple(number * step for number in range(first, math.floor(high / step + 1e-9) + 1))
    return Axis(title, low, high, ticks)


def _round(step: float) -> float:
    """Return the smallest 1, 2 or 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def short_number(value: float) -> str:
    """Return a number with the digits a reader needs."""
    if value and abs(value) < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.4g}"


def scatter(dots: Sequence[Dot], x: str, y: str, *, front: Sequence[Dot] = (), level: float | None = None) -> Markup:
    """Plot quality against cost: the points of `front` are joined by a line, `level` is a horizontal one, e.g. AR's."""
    heights = [value for dot in dots for value in (dot.y - (dot.error or 0), dot.y + (dot.error or 0))]
    across = axis(x, [dot.x for dot in dots], zero=True)
    up = axis(y, heights + ([] if level is None else [level]))
    parts = [*_frame(across, up)]
    if level is not None:
        parts.append(_line([(LEFT, _y(up, level)), (WIDTH - RIGHT, _y(up, level))], "level"))
    if len(front) > 1:
        parts.append(_line([(_x(across, dot.x), _y(up, dot.y)) for dot in front], "front"))
    parts += [_mark(dot, across, up) for dot in dots]
    parts += _names(dots, across, up)
    return _svg(parts, f"{y} against {x}")


def lines(
    series: Mapping[str, tuple[int, Sequence[tuple[float, float]]]], x: str, y: str, *, log: bool = False
) -> Markup:
    """Plot {label: (colour, points)} as lines; points that a logarithmic axis cannot show are skipped."""
    shown = {name: (colour, [p for p in points if not log or p[1] > 0]) for name, (colour, points) in series.items()}
    shown = {name: value for name, value in shown.items() if value[1]}
    points = [point for _, found in shown.values() for point in found]
    across = axis(x, [point[0] for point in points])
    up = axis(y, [point[1] for point in points], log=log)
    parts = [*_frame(across, up)]
    for name, (colour, found) in shown.items():
        spots = [(_x(across, a), _y(up, b)) for a, b in found]
        dash = ("", " dash", " dots")[colour // COLOURS % 3]
        parts.append(_line(spots, f"c{colour % COLOURS} stroke{dash}"))
        parts += [
            _shape(cx, cy, 3, colour, "dot", f"{name}: {short_number(a)}, {short_number(b)}")
            for (cx, cy), (a, b) in zip(spots, found, strict=True)
        ]
    return _svg(parts, f"{y} against {x}")


def _x(across: Axis, value: float) -> float:
    return LEFT + across.place(value) * (WIDTH - LEFT - RIGHT)


def _y(up: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - up.place(value) * (HEIGHT - TOP - BOTTOM)


def _frame(across: Axis, up: Axis) -> list[str]:
    bottom = HEIGHT - BOTTOM
    found = []
    for value in up.ticks:
        y = _y(up, value)
        found.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        found.append(f'<text class="tick end" x="{LEFT - 8}" y="{y + 4:.1f}">{short_number(value)}</text>')
    for value in across.ticks:
        x = _x(across, value)
        found.append(f'<line class="base" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        found.append(f'<text class="tick mid" x="{x:.1f}" y="{bottom + 19}">{short_number(value)}</text>')
    found.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle = (TOP + bottom) / 2
    found.append(
        f'<text class="name mid" x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 8}">{escape(across.title)}</text>'
    )
    found.append(
        f'<text class="name mid" x="14" y="{middle:.1f}" transform="rotate(-90 14 {middle:.1f})">{escape(up.title)}</text>'
    )
    return found


def _line(points: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _mark(dot: Dot, across: Axis, up: Axis) -> str:
    x, y, colour = _x(across, dot.x), _y(up, dot.y), f"c{dot.colour % COLOURS}"
    bar = ""
    if dot.error:
        top, bottom = _y(up, dot.y + dot.error), _y(up, dot.y - dot.error)
        bar = _line([(x, top), (x, bottom)], f"{colour} stroke bar")
    words = f"{dot.label}{' (lossy)' if dot.hollow else ''}: {short_number(dot.x)}, {short_number(dot.y)}"
    words += f" ± {short_number(dot.error)}" if dot.error else ""
    return bar + _shape(x, y, 5.5, dot.colour, "ring" if dot.hollow else "dot", words)


def _shape(x: float, y: float, size: float, colour: int, kind: str, words: str) -> str:
    """Return a mark with a tooltip: a circle, or another shape when the colours repeat."""
    name, inner = f'class="c{colour % COLOURS} {kind}"', f"<title>{escape(words)}</title>"
    turn = colour // COLOURS % 3
    if turn == 0:
        return f'<circle {name} cx="{x:.1f}" cy="{y:.1f}" r="{size}">{inner}</circle>'
    place = f'x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" height="{2 * size}"'
    rotated = f' transform="rotate(45 {x:.1f} {y:.1f})"' if turn == 2 else ""
    return f"<rect {name} {place}{rotated}>{inner}</rect>"


def _names(dots: Sequence[Dot], across: Axis, up: Axis) -> list[str]:
    """Write each name beside its point where it hides nothing; the legend below the plots has all of them."""
    spots = [(_x(across, dot.x), _y(up, dot.y)) for dot in dots]
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in spots]
    found = []
    for dot, (x, y) in zip(dots, spots, strict=True):
        if len(dot.label) > LONG:
            continue
        width = 7 * len(dot.label)
        near = ((x + 9, y + 4, ""), (x - 9 - width, y + 4, " end"), (x - width / 2, y - 10, " mid"))
        for left, base, anchor in (*near, (x - width / 2, y + 19, " mid")):
            box = (left, base - 10, left + width, base + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                start = {"": left, " end": left + width, " mid": x}[anchor]
                found.append(f'<text class="label{anchor}" x="{start:.1f}" y="{base:.1f}">{escape(dot.label)}</text>')
                break
    return found


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _svg(parts: Sequence[str], title: str) -> Markup:
    body = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>')
