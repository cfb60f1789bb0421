"""Verify procedural captions: a small network reads the attributes back from an image, and its features feed FID.

The captions of `sjd2/models/tiny/scenes.py` name up to eleven attributes. An image's alignment is the share of the
named ones that the network finds. The network errs too, so a value stands beside three reference values: of rendered
images, of those after the VQ (the ceiling: no sampler can do better), and of images under others' captions (chance).

# B images, N images of a run, D feature width
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evaluation.metrics.batches import check_weights, device_for, stack
from evaluation.metrics.fid import SHIPPED_REFERENCE
from evaluation.run_folder import Record, Snapshot
from evaluation.score import Metric, MetricInfo, Scores
from sjd2.errors import UserError, first_line
from sjd2.files import ROOT, digest, find
from sjd2.models.tiny.scenes import ATTRIBUTES, SIDE, attributes

log = logging.getLogger(__name__)

SHIPPED = ROOT / "sjd2" / "models" / "tiny" / "weights" / "attributes"
WEIGHTS = "attributes.safetensors"
MIRRORED = {"right": "left", "below": "above"}
CHANCE_SHIFTS = 10  # pairings of every image with another image's caption


def canonical(named: dict[str, str]) -> dict[str, str]:
    """Name the left or upper object first: 'a left of b' and 'b right of a' are one scene, so they need one label."""
    if named["relation"] not in MIRRORED:
        return named
    swapped = {name: named[f"{name}2"] for name in ("shape", "colour", "size")}
    swapped |= {f"{name}2": named[name] for name in ("shape", "colour", "size")}
    return named | swapped | {"relation": MIRRORED[named["relation"]]}


def labels(captions: Iterable[str]) -> Tensor:
    """Turn captions into class numbers, canonical: -> int64 [N, A], one column per attribute of `ATTRIBUTES`.

    Raises ValueError for a caption outside the grammar.
    """
    rows = [canonical(attributes(text)) for text in captions]
    return torch.tensor([[values.index(row[name]) for name, values in ATTRIBUTES.items()] for row in rows])


def named_mask(target: Tensor) -> Tensor:
    """Return which attributes the captions name: [N, A] class numbers -> bool [N, A]; what is 'none' is not asked for."""
    absent = [values.index("none") if "none" in values else -1 for values in ATTRIBUTES.values()]
    return target != torch.tensor(absent)


# ------------------------------------------------------------------------------------------------------------- network
class AttributeNet(nn.Module):
    """A convolutional network from 48 x 48 pixels to every attribute, with one narrow layer whose values feed FID."""

    width = 64  # D
    centre: Tensor
    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),  # halves the sides and loses nothing; full-size layers would double the time
            *_convolution(12, 32),
            *_convolution(32, 48),
            nn.MaxPool2d(2),
            *_convolution(48, 64),
            *_convolution(64, 96),
            nn.MaxPool2d(2),
            *_convolution(96, 96),
            nn.Conv2d(96, 24, 1),
            nn.Flatten(),  # positions are kept: relation and light are about them
            nn.ReLU(),
            nn.Linear(24 * (SIDE // 8) ** 2, self.width),
        )
        self.heads = nn.Linear(self.width, sum(map(len, ATTRIBUTES.values())))
        self.register_buffer("centre", torch.zeros(self.width))
        self.register_buffer("spread", torch.ones(self.width))

    def narrow(self, images: Tensor) -> Tensor:
        """Compute the narrow layer: uint8 [B, 3, 48, 48] -> float [B, D]."""
        return self.body(images.to(self.heads.weight) / 127.5 - 1)

    def features(self, images: Tensor) -> Tensor:
        """Return the narrow layer in units of its spread over rendered images: uint8 [B, 3, 48, 48] -> float [B, D].

        KID's kernel (a.b / D + 1)^3 is made for features of about that size; with large ones the cube drowns all else.
        """
        return (self.narrow(images) - self.centre) / self.spread

    @torch.no_grad()
    def set_units(self, images: Tensor, batch_size: int = 128) -> None:
        """Measure centre and spread of the narrow layer on images: uint8 [N, 3, 48, 48]."""
        rows = torch.cat([self.narrow(b.to(self.centre.device)).double() for b in images.split(batch_size)])
        self.centre.copy_(rows.mean(0))
        self.spread.copy_(rows.std(0))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Score every value of every attribute: uint8 [B, 3, 48, 48] -> one [B, number of values] per attribute."""
        return list(self.heads(self.narrow(images).relu()).split([len(v) for v in ATTRIBUTES.values()], dim=1))

    def predict(self, images: Tensor) -> Tensor:
        """Return the likeliest class of every attribute: uint8 [B, 3, 48, 48] -> int64 [B, A]."""
        return torch.stack([scores.argmax(1) for scores in self(images)], dim=1)

    def save(self, path: Path) -> None:
        """Write the folder that `load` reads, in half precision."""
        path.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, path / WEIGHTS)
        (path / "config.json").write_text(json.dumps({"attributes": ATTRIBUTES}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, device: str | None = None) -> AttributeNet:
        """Read a folder that `save` wrote; raises UserError if it is missing, damaged or of another grammar."""
        check_folder(path)
        network = cls()
        try:
            network.load_state_dict(load_file(path / WEIGHTS))  # into float32
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"{path / WEIGHTS} is no attribute network ({first_line(error)}).") from error
        return network.eval().requires_grad_(False).to(device_for(device))


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def check_folder(path: Path) -> None:
    """Raise UserError if a folder has no attribute network, or one of another grammar."""
    missing = [name for name in ("config.json", WEIGHTS) if not (path / name).is_file()]
    if missing:
        raise UserError(f"{path} has no {missing[0]}; train it: python run.py stage=finetune finetune=attributes.")
    check_weights(path / WEIGHTS)
    known = json.loads((path / "config.json").read_text())["attributes"]
    if known != {name: list(values) for name, values in ATTRIBUTES.items()}:
        raise UserError(f"{path} was trained on another grammar: python run.py stage=finetune finetune=attributes.")


class AttributeFeatures:
    """The shipped extractor for FID: the narrow layer of the attribute network; made for 48 x 48 pixels."""

    name = "attribute network (shapes)"
    width = AttributeNet.width
    size = (SIDE, SIDE)

    def __init__(self, *, weights: str | None = None, device: str | None = None, batch_size: int = 128) -> None:
        self.path = find(weights) if weights else SHIPPED
        self.device, self.batch_size = device, batch_size

    def check(self) -> None:
        """Raise UserError if the weights are missing."""
        check_folder(self.path)

    @cached_property
    def _digest(self) -> str:
        return digest(self.path)

    def digest(self) -> str:
        """Return a hash of the weights."""
        return self._digest

    def load(self) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
        """Load the network: images, uint8 [48, 48, 3] each, -> float32 [B, D]."""
        network = AttributeNet.load(self.path, self.device)
        return lambda images: network.features(stack(images).to(network.heads.weight.device)).cpu().numpy()


# -------------------------------------------------------------------------------------------------------------- metric
def shares(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Compare predicted with true classes, both [N, A] -> share of named attributes right [N], all right [N]."""
    named = named_mask(target)
    right = (predicted == target) & named
    return right.sum(1).double() / named.sum(1), right.sum(1) == named.sum(1)


def chance(predicted: Tensor, target: Tensor) -> float | None:
    """Return the mean share when each image is judged by others' captions; None for fewer than two captions."""
    shifts = range(1, min(CHANCE_SHIFTS, len(target) - 1) + 1)
    values = [shares(predicted, target.roll(shift, 0))[0].mean().item() for shift in shifts]
    return float(np.mean(values)) if values else None


class Alignment(Metric):
    """Share of the caption's attributes that the verifier finds, for prompt sets inside the grammar of the shapes."""

    numbers = (
        MetricInfo(name="alignment", title="alignment", digits=3, higher_is_better=True, per_image="alignment"),
        MetricInfo(name="alignment_all", digits=3, higher_is_better=True, per_image="alignment_all"),
        *(
            MetricInfo(name=f"alignment_{line}", digits=3, higher_is_better=True)
            for line in ("chance", "ceiling", "all_ceiling", "real", "all_real")
        ),
    )

    def __init__(self, *, weights: str | None = None, device: str | None = None, batch_size: int = 128) -> None:
        self.path = find(weights) if weights else SHIPPED
        self.lines = self.path / "reference.npz" if weights else SHIPPED_REFERENCE
        self.device, self.batch_size = device, batch_size

    @property
    def protocol(self) -> str:
        """How the values come about; stage=compare refuses two runs of different text, so an edit parts new from old."""
        lines = read_lines_of(self.lines)
        measured = f" ({lines['n']} held-out pictures)" if lines else ""
        return (
            "alignment: mean share of the attributes named in the caption that the attribute network "
            f"{digest(self.path)} reads back, alignment_all: share of images with all of them right; "
            f"alignment_real, alignment_ceiling: the same on rendered pictures and their VQ reconstructions{measured}; "
            "alignment_chance: this run's images under other images' captions."
        )

    def check(self) -> None:
        """Raise UserError if the verifier is missing."""
        check_folder(self.path)

    def start(self, run: Snapshot) -> Sequence[Record] | None:
        """Want all images; does not apply where a prompt is outside the grammar or the images have another size."""
        try:
            self._target = labels(record["prompt"] for record in run.records)
        except ValueError as error:
            log.info("alignment: left out, %s", error)
            return None
        if run.image_size != (SIDE, SIDE):
            return None
        self._network: AttributeNet | None = AttributeNet.load(self.path, self.device)
        self._predicted: list[Tensor] = []
        return run.records

    def update(self, images: Sequence[np.ndarray], records: Sequence[Record]) -> None:
        """Read the attributes of one batch."""
        assert self._network is not None
        self._predicted.append(self._network.predict(stack(images).to(self._network.heads.weight.device)).cpu())

    def compute(self, run: Snapshot) -> Scores:
        """Compare what was read with the captions."""
        self._network, predicted = None, torch.cat(self._predicted)
        share, complete = shares(predicted, self._target)
        means = {"alignment": share.mean().item(), "alignment_all": complete.double().mean().item()}
        by_chance = chance(predicted, self._target)
        means |= {} if by_chance is None else {"alignment_chance": by_chance}
        names = {info.name for info in self.numbers}
        means |= {key: value for key, value in read_lines_of(self.lines).items() if key in names}
        columns = {"alignment": share.tolist(), "alignment_all": complete.int().tolist()}
        return Scores(means, {name: dict(zip(run.ids, values, strict=True)) for name, values in columns.items()})


def read_lines_of(path: Path) -> dict[str, Any]:
    """Read what the verifier scores on rendered images and on reconstructions out of a reference file; {} if unknown."""
    try:
        with np.load(path) as file:
            return json.loads(str(file["alignment"]))
    except (OSError, KeyError, ValueError, BadZipFile):
        return {}
