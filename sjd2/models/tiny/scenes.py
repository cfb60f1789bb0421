"""Render captioned images from a closed grammar whose every attribute can be read back from the caption.

    a large red circle left of a small blue square on a grainy striped teal background lit from the left
    three small yellow rings on a dotted brown background

Shapes are large and colours saturated, so that a 3M-parameter model learns them in an hour on one core; the free
choices that no caption names (position, texture phase, strength of the light, grain) keep the token entropy at 2-3 nats,
without which every decoder would look fast.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sjd2.errors import UserError

SIDE = 48  # pixels; 12 x 12 tokens of a 4x VQ
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses", "ring": "rings"}
COLOURS = {
    "red": (225, 35, 40),
    "green": (40, 190, 60),
    "blue": (45, 90, 245),
    "yellow": (250, 215, 40),
    "white": (245, 245, 245),
    "purple": (165, 50, 205),
}
BACKGROUNDS = {
    "gray": (120, 120, 120),
    "navy": (25, 30, 85),
    "teal": (20, 125, 125),
    "brown": (115, 70, 35),
    "pink": (235, 150, 185),
}
RADIUS = {"large": 10.0, "small": 7.0}  # pixels: 5 and 3.5 tokens across; below that a cross becomes a diamond
RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
COUNTS = ("one", "two", "three", "four")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(RADIUS),
    "count": ("none", *COUNTS),  # none: a scene of two objects with a relation
    "relation": ("none", *RELATIONS),  # none: a count scene; likewise the second object
    "shape2": ("none", *SHAPES),
    "colour2": ("none", *COLOURS),
    "size2": ("none", *RADIUS),
    "texture": ("plain", "striped", "checkered", "dotted"),
    "background": tuple(BACKGROUNDS),
    "light": ("none", "left", "right", "top", "bottom"),
    "noise": ("none", "grainy"),
}
WORDS: tuple[str, ...] = (
    *("a", "on", "background", "lit", "from", "the", "of", "grainy"),
    *("left", "right", "top", "bottom", "above", "below"),
    *(*COUNTS, *RADIUS, *COLOURS, *SHAPES, *PLURALS.values(), *ATTRIBUTES["texture"], *BACKGROUNDS),
)
HELD_OUT_SHARE = 16  # one caption in 16 is never trained on
COUNT_SHARE = 0.3  # share of count scenes; the others are two objects with a relation


@dataclass(frozen=True)
class Scene:
    """The attributes of one image, each a value of `ATTRIBUTES`."""

    shape: str
    colour: str
    size: str
    count: str
    relation: str
    shape2: str
    colour2: str
    size2: str
    texture: str
    background: str
    light: str
    noise: str


def sample_scene(rng: np.random.Generator) -> Scene:
    """Sample a scene: every attribute uniform, the two objects of a relation in different colours."""
    u = iter(rng.random(13))

    def pick(values: Sequence[str]) -> str:
        return values[int(next(u) * len(values))]

    counting = next(u) < COUNT_SHARE
    picked = {name: pick([v for v in values if v != "none"]) for name, values in list(ATTRIBUTES.items())[:8]}
    picked |= {name: pick(values) for name, values in list(ATTRIBUTES.items())[8:]}
    if counting:
        return Scene(**picked | dict.fromkeys(("relation", "shape2", "colour2", "size2"), "none"))
    if picked["colour2"] == picked["colour"]:
        names = tuple(COLOURS)
        picked["colour2"] = names[(names.index(picked["colour"]) + 1 + int(rng.integers(len(names) - 1))) % len(names)]
    return Scene(**picked | {"count": "none"})


def caption(scene: Scene) -> str:
    """Describe the scene in the grammar; at most 20 words, all of them in `WORDS`."""
    if scene.count == "none":
        first = f"a {scene.size} {scene.colour} {scene.shape}"
        subject = f"{first} {RELATIONS[scene.relation]} a {scene.size2} {scene.colour2} {scene.shape2}"
    else:
        noun = scene.shape if scene.count == "one" else PLURALS[scene.shape]
        subject = f"{scene.count} {scene.size} {scene.colour} {noun}"
    noise = "" if scene.noise == "none" else f"{scene.noise} "
    light = "" if scene.light == "none" else f" lit from the {scene.light}"
    return f"{subject} on a {noise}{scene.texture} {scene.background} background{light}"


def _pattern() -> re.Pattern[str]:
    """Build the regular expression that inverts `caption`."""

    def one_of(name: str, words: Sequence[str]) -> str:
        return f"(?P<{name}>{'|'.join(words)})"

    sizes, colours = tuple(RADIUS), tuple(COLOURS)
    pair = (
        f"a {one_of('size', sizes)} {one_of('colour', colours)} {one_of('shape', SHAPES)} "
        f"{one_of('relation', tuple(RELATIONS))}(?: of)? "
        f"a {one_of('size2', sizes)} {one_of('colour2', colours)} {one_of('shape2', SHAPES)}"
    )
    nouns = tuple(PLURALS.values()) + SHAPES
    several = f"{one_of('count', COUNTS)} {one_of('size_', sizes)} {one_of('colour_', colours)} {one_of('noun', nouns)}"
    ground = f"{one_of('texture', ATTRIBUTES['texture'])} {one_of('background', tuple(BACKGROUNDS))} background"
    light = f"(?: lit from the {one_of('light', ATTRIBUTES['light'][1:])})?"
    return re.compile(f"(?:{pair}|{several}) on a (?:(?P<noise>grainy) )?{ground}{light}")


_CAPTION = _pattern()


def attributes(text: str) -> dict[str, str]:
    """Read a caption back: `attributes(caption(scene)) == asdict(scene)`.

    Raises `UserError` if the text is not a sentence of the grammar.
    """
    match = _CAPTION.fullmatch(text)
    found = {name: value or "none" for name, value in match.groupdict().items()} if match else {}
    if match and found["count"] != "none":
        noun = found["noun"]
        singular = {plural: shape for shape, plural in PLURALS.items()}
        found |= {"shape": singular.get(noun, noun), "size": found["size_"], "colour": found["colour_"]}
    read = {name: found.get(name, "none") for name in ATTRIBUTES}
    # describing the scene again catches what the pattern lets through ("three circle", "above of").
    if not match or caption(Scene(**read)) != text:
        unknown = [word for word in text.split() if word not in WORDS]
        hint = f"it does not know {unknown[0]!r}" if unknown else "its words are known but not in this order"
        raise UserError(f"{text!r} is outside the grammar of sjd2.models.tiny.scenes: {hint}.")
    return read


def is_held_out(text: str) -> bool:
    """Return whether training must not see this caption: by a stable hash, the same on every machine."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()[0] % HELD_OUT_SHARE == 0


def _distinct(rng: np.random.Generator, keep: Callable[[str], bool]) -> Iterator[Scene]:
    seen: set[str] = set()
    while True:
        scene = sample_scene(rng)
        text = caption(scene)
        if keep(text) and text not in seen:
            seen.add(text)
            yield scene


def held_out(n: int, seed: int) -> list[Scene]:
    """Sample n scenes with distinct held-out captions."""
    scenes = _distinct(np.random.default_rng([seed, 1]), is_held_out)
    return [next(scenes) for _ in range(n)]


def training(n: int, seed: int) -> list[Scene]:
    """Sample n scenes that are not held out; captions may repeat."""
    rng = np.random.default_rng([seed, 0])
    scenes: list[Scene] = []
    while len(scenes) < n:
        scene = sample_scene(rng)
        if not is_held_out(caption(scene)):
            scenes.append(scene)
    return scenes


def write_captions(path: Path, n: int = 2000, seed: int = 0) -> None:
    """Write n distinct held-out captions, one per line: the prompt set `prompts=shapes`."""
    path.write_text("".join(caption(scene) + "\n" for scene in held_out(n, seed)))


def render(scenes: Sequence[Scene], seed: int) -> np.ndarray:
    """Render scenes -> uint8 [n, 48, 48, 3]; an image depends on its caption and the seed alone."""
    chunks = [_render(scenes[i : i + 64], seed) for i in range(0, len(scenes), 64)]  # 64: arrays stay in the cache
    return np.concatenate(chunks) if chunks else np.zeros((0, SIDE, SIDE, 3), np.uint8)


def _render(scenes: Sequence[Scene], seed: int) -> np.ndarray:
    n = len(scenes)
    uniforms = np.empty((n, 24), np.float32)  # of the free choices, a fixed column for each
    grain = np.empty((n, SIDE // 2, SIDE // 2), np.float32)
    for i, scene in enumerate(scenes):
        key = int.from_bytes(hashlib.blake2b(caption(scene).encode(), digest_size=8).digest(), "little")
        rng = np.random.default_rng([seed, key])
        uniforms[i] = rng.random(24, np.float32)
        grain[i] = rng.standard_normal(grain.shape[1:], np.float32)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5
    image = _background(scenes, uniforms[:, :4], x, y)
    place, radius, shape, colour = _objects(scenes, uniforms[:, 4:20])
    for slot in range(place.shape[1]):
        _paint(image, place[:, slot], radius[:, slot], shape[:, slot], colour[:, slot], x, y)
    image *= _light(scenes, uniforms[:, 20:21, None], x, y)[..., None]
    strength = np.array([18.0 if scene.noise == "grainy" else 3.0 for scene in scenes], np.float32)
    # Grain of 2 x 2 pixels: finer grain would not survive a 4x VQ.
    speckle = (grain * strength[:, None, None]).repeat(2, 1).repeat(2, 2)
    return np.clip(image + speckle[..., None] + 0.5, 0, 255).astype(np.uint8)


def _background(scenes: Sequence[Scene], uniforms: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two shades of the background colour in the texture's pattern -> [n, 48, 48, 3]."""
    base = np.array([BACKGROUNDS[scene.background] for scene in scenes], np.float32)
    wave = np.zeros((len(scenes), SIDE, SIDE), np.float32)
    for i, scene in enumerate(scenes):
        period, phase = 12.0 + 5.0 * uniforms[i, 0], uniforms[i, 1:3] * 2 * np.pi
        across, down = x * (2 * np.pi / period) + phase[0], y * (2 * np.pi / period) + phase[1]
        if scene.texture == "striped":
            mix = ((1, 0), (0, 1), (0.75, 0.75), (0.75, -0.75))[int(uniforms[i, 3] * 4)]
            wave[i] = 3 * np.sin(mix[0] * across + mix[1] * down)
        elif scene.texture == "checkered":
            wave[i] = 4 * np.sin(across) * np.sin(down)
        elif scene.texture == "dotted":
            wave[i] = 3 * (np.cos(across) + np.cos(down)) - 2.5
    shade = 1 + 0.22 * np.clip(wave, -1, 1)
    return shade[..., None] * base[:, None, None] + (10 * np.clip(wave, -1, 1))[..., None]  # + 10: dark colours too


def _objects(scenes: Sequence[Scene], uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Place up to four objects -> places [n, 4, 2] and radii [n, 4] in pixels (0: none), shapes [n, 4], colours."""
    n, middle = len(scenes), SIDE / 2
    place, radius = np.zeros((n, 4, 2), np.float32), np.zeros((n, 4), np.float32)
    shape, colour = np.zeros((n, 4), np.int64), np.zeros((n, 4, 3), np.float32)
    jitter = uniforms[:, :8].reshape(n, 4, 2) * 2 - 1  # -1..1
    for i, scene in enumerate(scenes):
        if scene.count == "none":
            sign = -1 if scene.relation in ("left", "above") else 1
            axis = 0 if scene.relation in ("left", "right") else 1
            for slot, direction in enumerate((sign, -sign)):
                along, aside = jitter[i, slot]
                place[i, slot, axis] = middle + direction * 11.5 + along * 1.5
                place[i, slot, 1 - axis] = middle + aside * 8.0  # never further across than along the relation
            kinds = ((scene.size, scene.colour, scene.shape), (scene.size2, scene.colour2, scene.shape2))
        else:
            count = COUNTS.index(scene.count) + 1
            corners = np.argsort(uniforms[i, 8:12])[:count]  # each object in its own quarter: they never touch
            room = SIDE / 4 - RADIUS[scene.size]
            place[i, :count, 0] = SIDE * (0.25 + 0.5 * (corners % 2)) + jitter[i, :count, 0] * room
            place[i, :count, 1] = SIDE * (0.25 + 0.5 * (corners // 2)) + jitter[i, :count, 1] * room
            kinds = ((scene.size, scene.colour, scene.shape),) * count
        for slot, (size, name, kind) in enumerate(kinds):
            radius[i, slot] = RADIUS[size] * (0.94 + 0.12 * uniforms[i, 12 + slot])
            shape[i, slot] = SHAPES.index(kind)
            colour[i, slot] = COLOURS[name]
    return place, radius, shape, colour


def _paint(
    image: np.ndarray,
    place: np.ndarray,
    radius: np.ndarray,
    shape: np.ndarray,
    colour: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
) -> None:
    """Paint one object into each image [n, 48, 48, 3] in place, edges anti-aliased over one pixel."""
    for kind, name in enumerate(SHAPES):
        rows = np.flatnonzero((shape == kind) & (radius > 0))
        if len(rows) == 0:
            continue
        size = radius[rows, None, None]
        u = (x - place[rows, 0, None, None]) / size
        v = (y - place[rows, 1, None, None]) / size
        cover = np.clip(0.5 - _outside(name, u, v) * size, 0, 1)[..., None]
        image[rows] += cover * (colour[rows, None, None] - image[rows])


def _outside(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to a shape of radius 1 around the origin, negative inside."""
    if name == "circle":
        return np.hypot(u, v) - 1
    if name == "ring":
        return np.abs(np.hypot(u, v) - 0.74) - 0.26
    if name == "triangle":  # three half-planes, moved down so that it fills the box
        return np.maximum(v - 0.29, 0.866 * np.abs(u) - 0.5 * (v - 0.29)) - 0.6
    u, v = np.abs(u), np.abs(v)
    if name == "square":
        return np.maximum(u, v) - 0.9
    return np.maximum(np.maximum(u, v) - 1, np.minimum(u, v) - 0.34)  # cross


def _light(scenes: Sequence[Scene], uniforms: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Brightness falling off from the lit side -> [n, 48, 48]; one where no light is named."""
    towards = {"none": 0 * x, "left": 1 - x / 24, "right": x / 24 - 1, "top": 1 - y / 24, "bottom": y / 24 - 1}
    slope = np.stack([towards[scene.light] for scene in scenes]).astype(np.float32)
    lit = np.array([scene.light != "none" for scene in scenes], np.float32)[:, None, None]
    return 1 - 0.15 * lit + slope * (0.35 + 0.15 * uniforms)
