"""Lumina-mGPT 7B (arXiv 2408.02657): Chameleon for any width and height, with forced tokens around and between rows.

Prompt: <s> instruction with the size, text, end of turn. Image: start, height, width, rows of codes with an end of row each,
end of image, end of turn. Ids and prompts as in Lumina-mGPT's item_processor and inference_solver.
"""

from __future__ import annotations

import re

from sjd2.errors import UserError, choose
from sjd2.models.chameleon import ChameleonSpec, default_tokenizer

START = ("<racm3:break>", 8197)
END = ("<eoss>", 8196)
TURN = ("<reserved08706>", 8710)
ROW_END = ("<reserved08799>", 8803)
CELL = 32  # pixels: height and width are written in these
PIXELS = 16  # of a code's side
SIDES = (512, 768, 1024)  # pixels that the published checkpoints were fine-tuned for
HUB = "Alpha-VLLM/Lumina-mGPT-7B-{}"
# the only one of the three repositories with a tokenizer; Lumina-mGPT's code takes it from there too
TOKENIZER = HUB.format(768)
UNCOND = {"start_token": (), "sep_token": (TURN[0],)}


def parse_size(size: int | str) -> tuple[int, int]:
    """Return (width, height) in pixels of a side or WIDTHxHEIGHT. Raises `UserError` for sizes that cannot be generated."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(size))
    sides = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(sides) < CELL or any(side % CELL for side in sides):
        raise UserError(
            f"model.size must be a side or WIDTHxHEIGHT in multiples of {CELL} pixels, e.g. 768 or 1024x576, got {size}."
        )
    return sides


def checkpoint(width: int, height: int) -> str:
    """Return the hub id of the smallest checkpoint fine-tuned for at least this area."""
    fitting = [side for side in SIDES if width * height <= side * side]
    if not fitting:
        raise UserError(
            f"model.size={width}x{height} is larger than any published checkpoint's {SIDES[-1]}x{SIDES[-1]}; use a smaller "
            "size, or give model.weights."
        )
    return HUB.format(fitting[0])


def lumina(
    *,
    name: str,
    size: int | str,
    vq_weights: str,
    sampling: dict[str, float],
    weights: str | None = None,
    text_weights: str | None = None,
    adapter: str | None = None,
    uncond_context: str = "start_token",
    vocabulary: int = 8192,
    attention: str = "sdpa",
    revision: str | None = None,
    device_map: str | None = None,
    quantisation: str | None = None,
    pixels: str = "decode",
    dtype: str = "float32",
) -> ChameleonSpec:
    """Describe a Lumina-mGPT checkpoint at one size.

    uncond_context: what precedes the image in the unconditional row. start_token: nothing, its first token is the forced start
    token at position 0 (Lumina-mGPT's inference_solver). sep_token: the end of turn (SJD, SCD and GSD mask all of the prompt
    but its last token). The two are different target distributions. Guidance starts at the first free token: start, height
    and width are forced. Raises `UserError` for sizes and contexts that do not exist.
    """
    choose("model.uncond_context", uncond_context, UNCOND)
    width, height = parse_size(size)
    weights = weights or checkpoint(width, height)
    sides = {f"<reserved{8800 + side // CELL:05d}>": 8804 + side // CELL for side in (height, width)}
    return ChameleonSpec(
        name=name,
        weights=weights,
        vocabulary=vocabulary,
        vq_weights=vq_weights,
        text_weights=text_weights or (None if weights == TOKENIZER else default_tokenizer(weights, TOKENIZER)),
        adapter=adapter,
        rows=height // PIXELS,
        columns=width // PIXELS,
        instruction=f"Generate an image of {width}x{height} according to the following prompt:\n",
        text_end=(TURN[0],),
        image_start=(),
        uncond=UNCOND[uncond_context],
        prefix=(START[1], 8804 + height // CELL, 8804 + width // CELL),
        row_end=ROW_END[1],
        suffix=(END[1], TURN[1]),
        forced_names=dict((START, END, TURN, ROW_END)) | sides,
        attention=attention,
        revision=revision,
        device_map=device_map,
        quantisation=quantisation,
        pixels=pixels,
        dtype=dtype,
        sampling=sampling,
    )
