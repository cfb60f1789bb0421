"""Draw the race as an animated GIF for a README: the measured traces of the page, in a few frames per second."""

from __future__ import annotations

import io
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from evaluation.run_folder import Id
from sjd2.files import write_atomically
from sweeps.report.race import Heat, Lane, Race, in_a_row

LIMIT = 1_500_000  # bytes
SECONDS = 8.0  # about the length of the film; a race of similar length is shown in real time
FRAMES = 12  # per second
HOLD = 2.5  # seconds that the finished race is shown
ACROSS = 5  # lanes in a row
PACES = (0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100)
INK, SOFT, LINE, PAPER, BLANK = "#1d1f24", "#6b7078", "#d9d6cf", "#ffffff", "#e9e6df"
GOOD, LOSSY = "#0b7a5e", "#b4541a"
WINDOW = "#f3d596"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class _Size:
    """Pixels of one lane's image and of its text."""

    side: int
    font: int

    @property
    def head(self) -> int:
        return 2 * self.font + 14

    @property
    def foot(self) -> int:
        return 2 * self.font + 16


def pace(longest: float) -> float:
    """Return how fast to replay a race of `longest` seconds: real time from 3 to 20 s, else the nearest round pace."""
    return 1 if 3 <= longest <= 20 else min(PACES, key=lambda value: abs(math.log(longest / value / SECONDS)))


def write_gif(race: Race, path: Path, key: Id | None = None) -> Path:
    """Write the race on one prompt (the first by default) as a GIF below LIMIT bytes, with smaller images if necessary."""
    key = race.ids[0] if key is None else key
    lanes = [lane for lane in race.lanes if key in lane.heats]
    data = b""
    for side, frames in ((160, FRAMES), (128, FRAMES), (96, FRAMES), (96, FRAMES // 2), (64, FRAMES // 2)):
        pixels = max(lanes[0].heats[key].image.shape)
        sharp = side // pixels * pixels if pixels < side else side  # small images by an integer factor
        data = _film(race, lanes, key, _Size(sharp, 13 if side > 100 else 11), frames)
        if len(data) <= LIMIT:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    return path


def _film(race: Race, lanes: list[Lane], key: Id, size: _Size, frames: int) -> bytes:
    longest = max(lane.heats[key].seconds[-1] for lane in lanes)
    speed = pace(longest)
    count = math.ceil(longest / speed * frames)
    images = {lane.index: _fit(lane.heats[key].image, size.side) for lane in lanes}
    moments = [min(number * speed / frames, longest) for number in range(count + 1)]
    drawn = [_frame(race, lanes, key, size, images, moment, speed) for moment in moments]
    palette = _palette(drawn[-1])
    drawn = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in drawn]
    duration = [round(1000 / frames)] * (len(drawn) - 1) + [round(1000 * HOLD)]
    buffer = io.BytesIO()
    drawn[0].save(buffer, "GIF", save_all=True, append_images=drawn[1:], duration=duration, loop=0, optimize=True)
    return buffer.getvalue()


def _palette(last: Image.Image) -> Image.Image:
    """Return a palette: the film's own colours exactly, the others from the last frame, which has all images."""
    own = [ImageColor.getrgb(name) for name in (INK, SOFT, LINE, PAPER, BLANK, GOOD, LOSSY, WINDOW)]
    others = last.quantize(256 - len(own), method=Image.Quantize.MEDIANCUT).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for colour in own for value in colour] + others[: 3 * (256 - len(own))])
    return palette


def _fit(image: np.ndarray, side: int) -> Image.Image:
    """Return the image scaled to `side` pixels on its longer side; a small one keeps sharp pixels."""
    shown = Image.fromarray(image)
    scale = side / max(shown.size)
    small = max(shown.size) < side
    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return shown.resize((round(shown.width * scale), round(shown.height * scale)), method)


def _frame(
    race: Race, lanes: list[Lane], key: Id, size: _Size, images: dict[int, Image.Image], moment: float, speed: float
) -> Image.Image:
    across = in_a_row(len(lanes), ACROSS)
    gap, down = 14, -(-len(lanes) // across)
    width = across * (size.side + gap) + gap
    font, top = _font(size.font), 3 * size.font + 26
    tile = size.head + size.side + size.foot
    frame = Image.new("RGB", (width, top + down * (tile + gap)), PAPER)
    pen = ImageDraw.Draw(frame)
    prompt = textwrap.wrap(" ".join(race.prompt(key).split()), max(20, int((width - 2 * gap) / (size.font * 0.55))))
    text = prompt[0] + (" ..." if len(prompt) > 1 else "")
    pen.text((gap, gap), text, fill=INK, font=font)
    clock = f"{moment:.2f} s" + ("" if speed == 1 else f"   replayed at {speed:g}x real time")
    pen.text((gap, gap + size.font + 8), clock, fill=SOFT, font=font)
    for place, lane in enumerate(lanes):
        corner = (gap + place % across * (size.side + gap), top + place // across * (tile + gap))
        _tile(pen, frame, race, lane, lane.heats[key], images[lane.index], corner, size, moment)
    return frame


def _tile(
    pen: ImageDraw.ImageDraw,
    frame: Image.Image,
    race: Race,
    lane: Lane,
    heat: Heat,
    shown: Image.Image,
    corner: tuple[int, int],
    size: _Size,
    moment: float,
) -> None:
    """Draw one decoder at one moment: its name, the image so far, passes and time."""
    x, y = corner
    font = _font(size.font)
    step = int(np.searchsorted(heat.seconds, moment, side="right"))
    done = step == len(heat.seconds)
    pen.text((x, y), _cut(pen, lane.run.label, size.side, font), fill=INK, font=font)
    good = lane.run.lossless
    pen.text((x, y + size.font + 4), "lossless" if good else "lossy", fill=GOOD if good else LOSSY, font=font)
    so_far = _partial(race, lane, heat, shown, heat.cells[step - 1] if step else 0, done)
    frame.paste(so_far, (x, y + size.head))
    y += size.head + size.side + 5
    share = (heat.cells[step - 1] if step else 0) / (race.rows * race.columns)
    pen.rectangle((x, y, x + size.side - 1, y + 3), fill=LINE)
    if share:
        pen.rectangle((x, y, x + round(share * (size.side - 1)), y + 3), fill=GOOD if good else LOSSY)
    passes = heat.passes[step - 1] if step else 0
    text = f"{passes} passes" + (f", {heat.seconds[-1]:.2f} s" if done else "")
    pen.text((x, y + 8), text, fill=INK if done else SOFT, font=font)


def _partial(race: Race, lane: Lane, heat: Heat, shown: Image.Image, cells: int, done: bool) -> Image.Image:
    """Return the image with its first `cells` cells; drafted cells are tinted, the others blank."""
    if done:
        return shown
    total = race.rows * race.columns
    order = heat.order or list(range(total))
    cover = np.zeros(total, np.uint8)
    cover[order[:cells]] = 255
    drafted = np.zeros(total, np.uint8)
    drafted[order[cells : cells + lane.ahead]] = 255
    masks = [
        Image.fromarray(flat.reshape(race.rows, race.columns)).resize(shown.size, Image.Resampling.NEAREST)
        for flat in (drafted, cover)
    ]
    so_far = Image.new("RGB", shown.size, BLANK)
    so_far.paste(WINDOW, mask=masks[0])
    so_far.paste(shown, mask=masks[1])
    return so_far


def _cut(pen: ImageDraw.ImageDraw, text: str, width: int, font: Font) -> str:
    text = " ".join(text.split())
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def _font(size: int) -> Font:
    return ImageFont.load_default(size)
