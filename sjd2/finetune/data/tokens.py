"""Captioned images as tokens: encoded once by the model's own image tokeniser and kept, then read by every training.

# n images, H x W pixels, L codes of an image
In the folder tokens-<key>/, per part of the images: 00000.npy, codes [n, L], and 00000.jsonl, a line per image: its
name, caption and a number made from its content, or why it was skipped. The key is a hash of the tokeniser's weights, the
size in pixels and the list of images and captions. A part is written when complete, so a kill loses the unfinished parts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sjd2.errors import UserError
from sjd2.files import digest, find, read_lines, write_atomically
from sjd2.finetune import distributed
from sjd2.finetune.data.images import BROKEN, Part, StoredImage, find_parts, find_shards, number, pixels
from sjd2.finetune.data.sources import Collection, ScaledData
from sjd2.models.base import ImageModel
from sjd2.models.hub import locate

SMALL = "too small"  # skipped as asked for, which is no damage
VALIDATION = 64  # held-out images that an EAGLE head is measured on
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ImageTokens(Collection, ScaledData):
    """Tokens and captions of a folder of images, or of WebDataset shards.

    images: folder, .tar file or pattern of .tar files. captions: a .jsonl or .json list of a folder's captions (None:
    metadata.jsonl, else a .txt, .caption or .json next to each image). folder: where tokens are kept (None: the training's
    output folder). held_out_share: one image in so many, chosen by its content, is never trained on. smallest: images
    with a shorter side are left out. tolerated: share of images that may be damaged or lack a caption. batch_size: images
    encoded together; workers: threads that decode and scale them.
    Call `prepare` first; then all else is a pure function of its arguments.
    """

    images: str | None = None
    captions: str | None = None
    folder: str | None = None
    held_out_share: int = 64
    smallest: int = 0
    tolerated: float = 0.05
    batch_size: int = 8
    workers: int = 8
    _rows: dict[bool, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.images is None:
            raise UserError(
                "this training needs images with captions: give finetune.data.images=FOLDER (or .tar shards); "
                "docs/fine-tuning.md shows the layouts."
            )
        if min(self.batch_size, self.workers) < 1 or self.held_out_share < 2 or self.smallest < 0:
            raise UserError(
                "finetune.data.batch_size and workers must be 1 or more, held_out_share 2 or more, smallest 0 or more."
            )
        if not 0 <= self.tolerated <= 1:
            raise UserError(f"finetune.data.tolerated is a share, 0 to 1, got {self.tolerated}.")

    def check(self) -> None:
        """Raise `UserError` if the images do not exist."""
        if not self._place.is_dir() and not find_shards(str(self._place)):
            raise UserError(
                f"finetune.data.images={self.images} does not exist; give a folder of images with captions, or .tar shards."
            )

    @property
    def _place(self) -> Path:
        return find(str(self.images))

    # ---- encoding

    def prepare(self, model: ImageModel, out: Path) -> None:
        """Encode what is not kept yet, each process its own parts; raises `UserError` if too many images are damaged."""
        # one process lists for all: the folder could change between two listings
        parts = distributed.from_first(lambda: find_parts(str(self._place), self.captions))
        height, width = _size(model)
        key = _key(model, parts, height, width, self.smallest)
        folder = (find(self.folder) if self.folder is not None else out) / f"tokens-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        missing = distributed.from_first(lambda: [i for i in range(len(parts)) if not _file(folder, i).is_file()])
        mine, wrong, began = missing[distributed.rank() :: distributed.size()], None, time.monotonic()
        with ThreadPoolExecutor(self.workers) as pool:
            for place, i in enumerate(mine, 1):
                try:
                    self._encode_part(model, parts[i], _file(folder, i), (height, width), pool)
                except UserError as error:  # one process fails, all must stop
                    wrong = str(error)
                    break
                logger.info("encoded %d of this process's %d parts, %.0f s", place, len(mine), time.monotonic() - began)
        if wrong := next(filter(None, distributed.gather(wrong)), None):
            raise UserError(wrong)
        self._open(model, folder, len(parts))

    def _encode_part(
        self, model: ImageModel, part: Part, file: Path, size: tuple[int, int], pool: ThreadPoolExecutor
    ) -> None:
        """Decode, scale and encode the images of a part; threads work on the next ones while the model encodes."""
        codes, lines, waiting = [], [], None
        for chunk in chain(_chunks(part.samples(), self.batch_size), [None]):
            ready = waiting
            waiting = [pool.submit(self._load, sample, *size) for sample in chunk] if chunk is not None else None
            loaded = [future.result() for future in ready or ()]
            lines += [line for line, _ in loaded]
            arrays = [array for _, array in loaded if array is not None]
            if arrays:
                codes.append(_encode(model, np.stack(arrays)))
        length = model.layout.num_codes
        kept = np.concatenate([np.zeros((0, length), _kind(model)), *codes])
        text = "".join(json.dumps(line) + "\n" for line in lines)  # ASCII: a file name need not be UTF-8
        write_atomically(file.with_suffix(".jsonl"), text.encode())
        write_atomically(file, lambda opened: np.save(opened, kept))  # last: it marks the part as complete

    def _load(self, sample: StoredImage, height: int, width: int) -> tuple[dict[str, Any], np.ndarray | None]:
        """Turn a sample into its line and its pixels, None if it is skipped."""
        line: dict[str, Any] = {"name": sample.name}
        if sample.data is None:
            return line | {"skipped": "cannot be read"}, None
        if sample.caption is None:
            return line | {"skipped": "no caption"}, None
        try:
            array = pixels(sample.data, height, width, self.smallest)
        except BROKEN as error:
            return line | {"skipped": f"damaged: {' '.join(str(error).split())[:80]}"}, None
        if array is None:
            return line | {"skipped": SMALL}, None
        return line | {"caption": sample.caption, "content": number(sample.data)}, array

    # ---- reading

    def _open(self, model: ImageModel, folder: Path, parts: int) -> None:
        """Map the kept tokens into memory and report what was skipped."""
        self._codes, self._texts, rows, skipped = [], [], {False: [], True: []}, []
        for i in range(parts):
            lines, damaged = read_lines(_file(folder, i).with_suffix(".jsonl"))
            if damaged:
                raise UserError(f"{_file(folder, i).with_suffix('.jsonl')} is damaged; delete {_file(folder, i)} too.")
            kept = [line for line in lines if "skipped" not in line]
            skipped += [line for line in lines if "skipped" in line]
            # an empty file cannot be mapped
            self._codes.append(np.load(_file(folder, i), mmap_mode="r" if kept else None))
            self._texts.append([line["caption"] for line in kept])
            for row, line in enumerate(kept):
                rows[line["content"] % self.held_out_share == 0].append((i, row))
        self._report(len(rows[False]), len(rows[True]), skipped)
        held_out = np.array(rows[True], np.int64)
        self._rows = {False: np.array(rows[False], np.int64), True: np.random.default_rng(0).permutation(held_out)}
        self._epoch: tuple[tuple[int, int], np.ndarray] | None = None
        usual = model.spec.sampling if model.spec is not None else {}
        self._scale = float(usual.get("guidance_scale", 1.0))

    def _report(self, train: int, held_out: int, skipped: list[dict[str, Any]]) -> None:
        """Log one line on the images; raises `UserError` if they cannot be trained on."""
        reasons = Counter(line["skipped"].split(":")[0] for line in skipped)
        causes = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        bad = [line for line in skipped if line["skipped"] != SMALL]
        example = f" (e.g. {bad[0]['name']}: {bad[0]['skipped']})" if bad else ""
        text = f"{train} images to train on, {held_out} held out, {len(skipped)} skipped"
        text += f": {causes}{example}" if causes else ""
        if distributed.first():
            logger.info("%s", text)
        everything = train + held_out + len(bad)
        if everything and len(bad) > self.tolerated * everything:
            raise UserError(
                f"too many images of {self.images} cannot be used: {text}; fix them, or raise finetune.data.tolerated."
            )
        if not train or not held_out:
            raise UserError(
                f"{self.images} has {text}; give more images, or change finetune.data.held_out_share={self.held_out_share}."
            )

    @property
    def validation_images(self) -> int:
        """Return how many held-out images there are to measure on."""
        return min(VALIDATION, len(self._rows[True]))

    def count(self) -> int:
        """Return the number of training images."""
        return len(self._rows[False])

    def batch(self, n: int, seed: int, held_out: bool = False) -> tuple[list[str], Tensor]:
        """Return n captions and codes [n, L]: random ones, or the first held-out ones (at most all, whatever the seed)."""
        rows = self._rows[held_out]
        return self._take(rows[:n] if held_out else rows[np.random.default_rng(seed).integers(len(rows), size=n)])

    def shuffled(self, n: int, step: int, seed: int) -> tuple[list[str], Tensor]:
        """Return the captions and codes [n, L] of one step; every epoch has an order of its own."""
        size = self.count()
        places = np.arange(step * n, (step + 1) * n)
        rows = [self._rows[False][self._order(place // size, seed)[place % size]] for place in places.tolist()]
        return self._take(np.stack(rows))

    def scaled(self, n: int, seed: int, held_out: bool = False) -> tuple[list[str], Tensor, Tensor]:
        """Return captions, codes and the guidance scale [n] that the model usually samples under."""
        prompts, codes = self.batch(n, seed, held_out)
        return prompts, codes, torch.full((len(prompts),), self._scale)

    def _order(self, epoch: int, seed: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != (epoch, seed):
            self._epoch = (epoch, seed), np.random.default_rng([seed, 3, epoch]).permutation(self.count())
        return self._epoch[1]

    def _take(self, rows: np.ndarray) -> tuple[list[str], Tensor]:
        codes = np.stack([self._codes[part][row] for part, row in rows.tolist()]).astype(np.int64)
        return [self._texts[part][row] for part, row in rows.tolist()], torch.from_numpy(codes)


def _file(folder: Path, part: int) -> Path:
    return folder / f"{part:05d}.npy"


def _kind(model: ImageModel) -> type[np.unsignedinteger]:
    return np.uint16 if model.layout.vocabulary <= 2**16 else np.uint32


def _encode(model: ImageModel, arrays: np.ndarray) -> np.ndarray:
    """Encode pixels uint8 [n, H, W, 3] -> codes [n, L]."""
    images = torch.from_numpy(arrays).to(model.vq.codebook.device).permute(0, 3, 1, 2) / 127.5 - 1
    return model.vq.encode(images).flatten(1).cpu().numpy().astype(_kind(model))


def _size(model: ImageModel) -> tuple[int, int]:
    """Return the size (H, W) in pixels of the images that the model's tokeniser encodes."""
    if model.vq is None:
        raise UserError("this model has no image tokeniser that encodes, so it cannot be trained on images.")
    if model.encoded_size is not None:
        return model.encoded_size
    codes = torch.zeros(1, model.layout.num_codes, dtype=torch.long, device=model.device)
    height, width = model.decode(model.layout.tokens(codes)).shape[2:]
    return height, width


def _key(model: ImageModel, parts: list[Part], *more: int) -> str:
    """Return 12 hex digits over what the tokens depend on."""
    assert model.spec is not None
    sources = {source.key: source for source in reversed(model.spec.sources())}  # the first of each key
    tokeniser = sources.get("model.vq_weights", sources["model.weights"])  # some models hold theirs in their own files
    facts = [digest(locate(tokeniser)), model.layout.rows, model.layout.columns, more, [part.facts() for part in parts]]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=6).hexdigest()


def _chunks(samples: Iterable[StoredImage], n: int) -> Iterator[list[StoredImage]]:
    samples = iter(samples)
    while chunk := list(islice(samples, n)):
        yield chunk
