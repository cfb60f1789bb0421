"""Training images that the model draws itself: a draft model learns exactly the distribution that decoding samples from.

# B samples of a batch, M images, N image-phase tokens, L codes of an image
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import generate
from sjd2.decoding.noise import sample_seed
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError
from sjd2.files import find, read_text, split_lines, write_atomically
from sjd2.finetune import distributed
from sjd2.finetune.data.sources import Captions, ScaledData
from sjd2.models.base import ImageModel

GOLDEN = 0.6180339887498949  # multiples of it modulo 1 fill the unit interval evenly, however many are taken
SAVE_S = 60.0  # seconds between two saves of the unfinished file, at least
DRAWN_PER_SAVED = 20  # seconds of drawing between them for each second that a save takes, at least
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FileCaptions(Captions):
    """Captions of a text file, one per line; one line in `held_out_share`, chosen by its content, is never trained on."""

    path: str | None = None
    held_out_share: int = 16

    def __post_init__(self) -> None:
        if self.path is None:
            raise UserError("give finetune.data.captions.path=FILE, a text file with one caption per line.")
        if self.held_out_share < 2:
            raise UserError(f"captions.held_out_share must be 2 or more, got {self.held_out_share}.")

    @property
    def file(self) -> Path:
        """The file of captions."""
        return find(str(self.path))

    def check(self) -> None:
        """Raise `UserError` if the file is missing."""
        if not self.file.is_file():
            raise UserError(f"captions.path={self.path} does not exist; give a text file with one caption per line.")

    def captions(self, n: int, seed: int, held_out: bool) -> list[str]:
        """Return n lines in an order given by the seed, from the start again when they run out."""
        self.check()
        lines = [line.strip() for line in split_lines(read_text(self.file)) if line.strip()]
        mine = [line for line in lines if (_number(line) % self.held_out_share == 0) == held_out]
        if not mine:
            raise UserError(f"{self.file} has no {'held-out ' if held_out else ''}captions; give a longer file.")
        order = np.random.default_rng(seed).permutation(len(mine))
        return [mine[order[i % len(mine)]] for i in range(n)]


@dataclass(kw_only=True)
class Generated(ScaledData):
    """The model's own images under several guidance scales, drawn once and kept in `<folder>/generated-<key>.npz`.

    captions: their prompts. images, validation_images: how many, the latter from held-out captions. scales, shares: guidance
    scales and how often each is used (None: equally often). seed: of captions and tokens. batch_size: images drawn together,
    all under one scale. decoder: any lossless one (None: AR). folder: where the file goes (None: the training's output
    folder); the key is a digest of model and settings, so equal trainings draw once. More images later extend the file.
    Call `prepare` first; then `batch` and `scaled` are pure functions of their arguments.
    """

    captions: Captions
    images: int
    validation_images: int = 128
    scales: tuple[float, ...] = (1.0, 3.0)
    shares: tuple[float, ...] | None = None
    seed: int = 0
    batch_size: int = 32
    decoder: Decoder | None = None
    folder: str | None = None
    _sets: dict[bool, dict[str, np.ndarray]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._decoder = self.decoder or Decoder(name="ar", window=1, lossless=True)
        if min(self.images, self.validation_images, self.batch_size) < 1:
            raise UserError("data.images, data.validation_images and data.batch_size must be 1 or more.")
        if not self.scales or (self.shares is not None and len(self.shares) != len(self.scales)):
            raise UserError(f"data.shares needs one number per guidance scale in data.scales={list(self.scales)}.")
        if self.shares is not None and (min(self.shares) < 0 or sum(self.shares) <= 0):
            raise UserError(f"data.shares must be positive numbers, got {list(self.shares)}.")
        if not self._decoder.lossless:
            raise UserError("data.decoder must be a lossless one: others do not sample the model's own distribution.")

    def check(self) -> None:
        """Raise `UserError` if the captions are missing."""
        self.captions.check()

    def prepare(self, model: ImageModel, out: Path) -> None:
        """Draw what the file does not hold yet, training images first; a killed drawing resumes from the last save."""
        folder = find(self.folder) if self.folder is not None else out
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"generated-{self._key(model)}.npz"
        for held_out, total in ((False, self.images), (True, self.validation_images)):
            distributed.barrier()  # the file of the set before is complete
            stored = _read(file)
            name = "held_out" if held_out else "train"
            self._sets[held_out] = self._complete(model, file, stored, name, total)
        self.layout = model.layout

    def batch(self, n: int, seed: int, held_out: bool = False) -> tuple[list[str], Tensor]:
        """Return n captions and codes [n, L]."""
        return self.scaled(n, seed, held_out)[:2]

    def scaled(self, n: int, seed: int, held_out: bool = False) -> tuple[list[str], Tensor, Tensor]:
        """Return n captions, codes [n, L] and the guidance scales [n] under which they were drawn.

        Held-out images come in their stored order, the same for every seed, so that validations can be compared.
        """
        stored = self._sets[held_out]
        size = len(stored["scales"])
        picked = np.arange(n) % size if held_out else np.random.default_rng(seed).integers(size, size=n)
        tokens = torch.from_numpy(stored["tokens"][picked].astype(np.int64))
        scales = torch.from_numpy(stored["scales"][picked].astype(np.float32))
        return [str(stored["captions"][i]) for i in picked], self.layout.all_codes(tokens), scales

    def _complete(
        self, model: ImageModel, file: Path, stored: dict[str, np.ndarray], name: str, total: int
    ) -> dict[str, np.ndarray]:
        """Draw batch after batch until the set `name` has `total` images -> its captions, tokens [M, N], scales [M]."""
        captions = self.captions.captions(total, self.seed, held_out=name == "held_out")
        tokens = list(stored.get(name, np.zeros((0, model.layout.length), np.int32))[:total])
        have, began, saved, took = len(tokens), time.monotonic(), time.monotonic(), 0.0
        while len(tokens) < total:
            batches, begin = [], len(tokens)  # one for each process
            while begin < total and len(batches) < distributed.size():
                end = min(total, (begin // self.batch_size + 1) * self.batch_size)
                batches.append(range(begin, end))
                begin = end
            mine = distributed.rank()
            drawn = self._draw(model, captions, batches[mine], name) if mine < len(batches) else []
            tokens += [row for rows in distributed.gather(drawn) for row in rows]
            now = time.monotonic()
            if distributed.first() and (now - saved > max(SAVE_S, DRAWN_PER_SAVED * took) or len(tokens) == total):
                arrays = {**stored, name: np.stack(tokens).astype(np.int32)}
                write_atomically(file, lambda opened, arrays=arrays: np.savez_compressed(opened, **arrays))
                saved = time.monotonic()
                took = saved - now
                pace = (len(tokens) - have) / (saved - began)
                logger.info("drew %d of %d images (%s), %.2g a second", len(tokens), total, name, pace)
        scales = np.array([self._scale(index) for index in range(total)])
        return {"captions": np.array(captions), "tokens": np.stack(tokens), "scales": scales}

    def _draw(self, model: ImageModel, captions: list[str], batch: range, name: str) -> list[np.ndarray]:
        """Draw the images of one batch -> tokens [N] of each."""
        # the purpose keeps the two sets and the images of runs (whose repeats count from 0) apart
        purpose = -2 if name == "held_out" else -1
        seeds = [sample_seed(self.seed, index, purpose) for index in batch]
        sampling = sampling_at(model, self._scale(batch.start))
        prompts = model.encode([captions[index] for index in batch])
        return list(generate(model, self._decoder, prompts, seeds, sampling=sampling).tokens.numpy())

    def _scale(self, index: int) -> float:
        """Return the guidance scale of an image: that of its batch, in the order of a low-discrepancy sequence."""
        shares = np.array(self.shares or [1.0] * len(self.scales), float)
        place = (index // self.batch_size + 0.5) * GOLDEN % 1
        return float(self.scales[int(np.searchsorted(shares.cumsum() / shares.sum(), place, side="right"))])

    def _key(self, model: ImageModel) -> str:
        """Return 12 hex digits over what the tokens depend on; their number is left out, more images extend the file."""
        facts = {
            "model": model.spec.digest() if model.spec is not None else _digest(model),
            "dtype": str(model.dtype),
            "law": [_text(sampling_at(model, scale)) for scale in self.scales],
            "captions": [self.captions.captions(8, self.seed, held_out) for held_out in (False, True)],
            "settings": [self.shares and list(self.shares), self.seed, self.batch_size, self._decoder.name],
        }
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=6).hexdigest()


def sampling_at(model: ImageModel, scale: float) -> SamplingParams:
    """Return the model's usual sampling parameters, under another guidance scale."""
    usual: dict[str, Any] = {**(model.spec.sampling if model.spec is not None else {}), "guidance_scale": scale}
    return SamplingParams(**usual)


def _text(sampling: SamplingParams) -> str:
    """Return the text that keys of files hold, the class under its name in release 0.1: drawn images stay valid."""
    return f"Sampling({', '.join(f'{key}={value!r}' for key, value in sampling.settings().items())})"


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _digest(model: ImageModel) -> str:
    """Return a digest of a model that did not come from files."""
    total = hashlib.blake2b(digest_size=6)
    for tensor in model.transformer.state_dict().values():
        total.update(tensor.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()


def _read(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        return {}
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}
