"""Time whole images of several decoders in turns and compare each with the first one.

    python -m benchmarks.whole_images scd sjd2 sjd2-wc         # the embedded model, one image at a time, one thread
    python -m benchmarks.whole_images scd "scd window=20" sjd2-wc-narrow --images 48
    python -m benchmarks.whole_images scd sjd-pac --model lumina --device cuda --dtype bfloat16

A decoder is its name, followed by its settings. All draw the same prompts with the same seeds, image by image in turns, so
that a drift of the machine cancels in the ratio; the interval is 95 %, bootstrap over images. On a CPU the clock is the
process's own, which other programs on the machine lengthen less than the time that passes. Seconds are medians, passes means.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf

from benchmarks.result_file import write_result
from evaluation.bootstrap import median_of_ratios
from harness.provenance import start_entry
from sjd2 import api
from sjd2.decoding.decoder import BaseDecoder
from sjd2.errors import UserError
from sjd2.files import find, read_text, split_lines
from sjd2.models.base import ImageModel

FEWEST = 4  # images of each decoder that an interval needs


class Drawn(NamedTuple):
    """What one image took."""

    seconds: float
    passes: int
    draft_passes: int


def decoder_of(words: str, model: str) -> BaseDecoder:
    """Build the decoder of "NAME SETTING=VALUE ..." with its defaults on a model. Raises `UserError`."""
    name, *settings = words.split() or [""]
    values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(settings))
    return api.decoder(name, model=model, **values)


def draw_in_turns(
    model: ImageModel, decoders: Sequence[BaseDecoder], prompts: Sequence[str], **settings: Any
) -> Iterator[list[Drawn]]:
    """Yield for each prompt what each decoder took, after one image of each that does not count."""
    for seed, prompt in enumerate([prompts[0], *prompts]):
        order = [(seed + i) % len(decoders) for i in range(len(decoders))]  # each comes first in turn
        found = {}
        for number in order[:: -1 if seed % 2 else 1]:  # and after the one before it as well as after the next
            found[number] = _draw(model, decoders[number], prompt, seed, settings)
        if seed > 0:
            yield [found[number] for number in range(len(decoders))]


def _draw(model: ImageModel, decoder: BaseDecoder, prompt: str, seed: int, settings: dict[str, Any]) -> Drawn:
    begin = time.process_time()
    images = api.generate(model, prompt, decoder=decoder, seed=seed, progress=False, **settings)
    # on a GPU a decoder after another records its passes again, which these seconds leave out
    seconds = time.process_time() - begin if model.device.type == "cpu" else sum(images.seconds.values())
    passes = images.forwards[0]
    return Drawn(seconds, passes, (passes - 1) * decoder.num_forwards)


def main(arguments: list[str] | None = None) -> Path:
    """Run the command and return the file written."""
    options = _parse(arguments)
    result: dict[str, Any] = start_entry(options.loaded.device, dtype=options.dtype, model=options.model)
    spec = options.loaded.spec
    given = {} if options.guidance_scale is None else {"guidance_scale": options.guidance_scale}
    rounds: list[list[Drawn]] = []
    try:
        rounds.extend(draw_in_turns(options.loaded, options.built, options.lines, **given))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        if len(rounds) < FEWEST:
            raise
        print(f"interrupted: the {len(rounds)} images of each decoder that are finished count.")
    result |= {"sampling": ({} if spec is None else dict(spec.sampling)) | given, "images": len(rounds), "rows": []}
    found = list(zip(*rounds, strict=True))
    print(f"| decoder | slots | passes + draft | s per image | to {options.decoders[0]} |")
    print("| :--- | ---: | ---: | ---: | ---: |")
    for words, decoder, images in zip(options.decoders, options.built, found, strict=True):
        seconds, passes, drafts = zip(*images, strict=True)
        ratio = median_of_ratios([(a.seconds, b.seconds, 1) for a, b in zip(images, found[0], strict=True)])
        row = {
            "decoder": words, "slots": decoder.window, "passes": statistics.fmean(passes),
            "draft_passes": statistics.fmean(drafts), "seconds": statistics.median(seconds), "to_first": ratio,
            "each": images,
        }  # fmt: skip
        result["rows"].append(row)
        took = f"{row['passes']:.1f} + {row['draft_passes']:.0f} | {row['seconds']:.3f}"
        print(f"| {words} | {decoder.window} | {took} |", "{:.3f} [{:.3f}, {:.3f}] |".format(*ratio), flush=True)
    names = dict.fromkeys(words.split()[0] for words in options.decoders)
    return write_result(result, options.out, options.model, "whole-images", *names, options.dtype)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.whole_images",
        description=f"{str(__doc__).partition(chr(10))[0]} Seconds are CPU time where the device is a CPU; "
        "prints passes, seconds and the ratio with a 95 % interval, and writes a JSON file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("decoders", nargs="+", metavar="DECODER", help='a name, or "NAME SETTING=VALUE ..."')
    parser.add_argument("--model", default="tiny", choices=api.list_models(), help="its weights must be there")
    parser.add_argument("--images", type=int, default=24, help="images per decoder")
    parser.add_argument("--prompts", default="sjd2/models/tiny/captions.txt", help="a text file, one prompt per line")
    parser.add_argument("--skip", type=int, default=0, help="first lines of the prompts file that are left out")
    parser.add_argument("--guidance-scale", type=float, help="None: the model's own")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtype", default="float32", choices=("bfloat16", "float16", "float32", "float64"), help="of the model"
    )
    parser.add_argument(
        "--out", type=Path, help="the JSON file; None: one named after machine and model in benchmarks/results/"
    )
    options = parser.parse_args(arguments)
    if options.images < FEWEST:
        parser.error(f"--images must be {FEWEST} or more: fewer are too few for an interval")
    if options.skip < 0:
        parser.error("--skip must be 0 or more")
    try:
        options.built = [decoder_of(words, options.model) for words in options.decoders]
        lines = [line for line in split_lines(read_text(find(options.prompts))) if line.strip()]
        options.lines = lines[options.skip : options.skip + options.images]
        if len(options.lines) < options.images:
            raise UserError(f"--prompts has {len(lines)} lines, fewer than --skip and --images together")
        options.loaded = api.load(options.model, device=options.device, dtype=options.dtype, pixels="none")
        for decoder in options.built:
            decoder.check_window(options.loaded.layout.length)
    except (UserError, OSError) as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
