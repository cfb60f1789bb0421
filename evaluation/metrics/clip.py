"""CLIP score through open_clip or transformers: how well an image fits its prompt, 100 max(cos, 0).

Hessel et al. 2021 without their factor w. Protocols also differ in what is done to images and prompts before.

Which CLIP makes it decides the value, so its name stands beside every number. Weights come from a folder, a file or the
hub's local cache; a download happens only with `allow_download=true`, and then before any image is made.

# B images, E embedding width
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.metrics.batches import check_weights, device_for
from evaluation.metrics.clip_source import KEY, SHIPPED, ClipSource, find_source, tag_and_file
from evaluation.metrics.transforms import centre_square, squash
from evaluation.run_folder import Id, Record, Snapshot, record_id
from evaluation.score import Metric, MetricInfo, Scores
from sjd2.errors import UserError, first_line
from sjd2.files import find

log = logging.getLogger(__name__)


class Clip:
    """A loaded CLIP of open_clip: images and texts to unit vectors."""

    # Any: the stubs of both libraries do not know what their factories return
    model: Any
    preprocess: Any
    tokenizer: Any
    processor: Any

    def __init__(self, source: ClipSource, device: str | None = None) -> None:
        """Load model, preprocessing and tokenizer; raises UserError if weights and architecture do not fit."""
        import open_clip

        self.device = device_for(device)
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                source.name,
                pretrained=source.file,
                force_quick_gelu=source.quick_gelu,
                require_pretrained=True,  # else missing weights are a mere warning
                device=self.device,
                **dict(source.preprocess),
            )
            self.tokenizer = open_clip.get_tokenizer(source.name)
        except (RuntimeError, AssertionError, ValueError, KeyError, OSError) as error:
            raise _does_not_load(source.file or source.name, error) from error
        if source.file is not None:
            self._check_shapes(source.name, source.file)
        self.model.eval().requires_grad_(False)

    def _check_shapes(self, name: str, file: str) -> None:
        """Raise UserError if open_clip stretched position embeddings to fit, as it does without a word."""
        from open_clip.factory import load_state_dict

        if Path(file).suffix in (".npz", ".npy"):  # of big_vision, with names of its own
            return
        stored: Any = load_state_dict(file)
        own = self.model.state_dict()
        for key in stored.keys() & own.keys():
            if key.endswith("positional_embedding") and stored[key].shape != own[key].shape:
                sizes = " and ".join("x".join(map(str, side[key].shape)) for side in (stored, own))
                raise UserError(
                    f"CLIP weights {file} are of another image size or context length than {name} ({key} is {sizes}); set "
                    f"{KEY}.model to their architecture, e.g. {name}-336."
                )

    @torch.no_grad()
    def images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Embed images: uint8 [H, W, 3] each -> unit vectors [B, E]."""
        pixels = torch.stack([self.preprocess(Image.fromarray(image)) for image in images])
        return self.model.encode_image(pixels.to(self.device), normalize=True).float()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed prompts (cut at the model's context length): -> unit vectors [B, E]."""
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.device), normalize=True).float()

    def scores(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> Tensor:
        """Score pairs: -> 100 max(cos, 0), [B]."""
        return 100 * (self.images(images) * self.texts(texts)).sum(1).clamp_min(0)


class TransformersClip(Clip):
    """A loaded CLIP of transformers, used as torchmetrics' CLIPScore uses it (1.9 itself breaks with transformers 5)."""

    def __init__(self, source: ClipSource, device: str | None = None) -> None:
        """Load model and processor; raises UserError if weights are missing or do not fit."""
        from transformers import CLIPModel, CLIPProcessor

        self.device, folder = device_for(device), source.name.partition(":")[2]
        try:
            # missing weights are a mere warning, and random ones score noise
            loader: Any = CLIPModel
            self.model, report = loader.from_pretrained(folder, local_files_only=True, output_loading_info=True)
            self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise _does_not_load(folder, error) from error
        if missing := sorted(report["missing_keys"]):
            raise _does_not_load(folder, ValueError(f"no {missing[0]} in them"))
        self.model.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Embed images: uint8 [H, W, 3] each -> unit vectors [B, E]."""
        pixels = [torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1) for image in images]
        values = self.processor(images=pixels, return_tensors="pt")["pixel_values"]
        return _unit(self.model.get_image_features(values.to(self.device)))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed prompts: -> unit vectors [B, E]; what exceeds the context is cut off, the end token with it."""
        found = self.processor(text=list(texts), return_tensors="pt", padding=True)
        context = self.model.config.text_config.max_position_embeddings
        ids, mask = (found[key][:, :context].to(self.device) for key in ("input_ids", "attention_mask"))
        return _unit(self.model.get_text_features(ids, mask))


def load_clip(source: ClipSource, device: str | None = None) -> Clip:
    """Load a CLIP with the library its source is made for."""
    return (TransformersClip if source.name.startswith("transformers:") else Clip)(source, device)


def _unit(features: Any) -> Tensor:
    """Return unit vectors of projected features, which transformers 5 returns as `pooler_output`."""
    return torch.nn.functional.normalize(getattr(features, "pooler_output", features).float(), dim=1)


def _does_not_load(what: str, error: Exception) -> UserError:
    first = first_line(error)
    return UserError(f"CLIP weights {what} do not load ({first}).")


class ClipScore(Metric):
    """Mean CLIP score of a run's images under their prompts.

    crop: side of a centred square that images are cropped and resized to first (LANTERN); squash: side of the square
    that they are squeezed into first (SJD); null: neither. prefix: put before every prompt.
    """

    numbers = (
        MetricInfo(
            name="clip_score",
            title="CLIP score",
            higher_is_better=True,
            per_image="clip",
            source="clip_model",
            source_in_cells=False,  # too long for a cell
        ),
    )
    details = ("clip_model",)

    def __init__(
        self,
        *,
        model: str = "shipped",
        pretrained: str | None = None,
        allow_download: bool = False,
        crop: int | None = None,
        squash: int | None = None,
        prefix: str = "",
        device: str | None = None,
        batch_size: int = 64,
    ) -> None:
        if crop is not None and squash is not None:
            raise UserError(f"{KEY}.crop={crop} and {KEY}.squash={squash} exclude each other; leave one null.")
        if min(crop or 1, squash or 1, batch_size) < 1:
            raise UserError(f"{KEY}.crop, {KEY}.squash and {KEY}.batch_size must be 1 or more.")
        self.model, self.pretrained, self.allow_download = model, pretrained, allow_download
        self.crop, self.squash, self.prefix = crop, squash, prefix
        self.device, self.batch_size = device, batch_size

    @cached_property
    def source(self) -> ClipSource:
        """The files, found once."""
        return find_source(self.model, self.pretrained, self.allow_download)

    @property
    def label(self) -> str:
        """What metrics.json calls the model and its protocol; folders by name, since their place differs."""
        schema, _, rest = self.model.partition(":")
        if self.model == "shipped":
            name = "shipped (shapes)"
        elif schema == "local-dir" or (schema == "transformers" and find(rest).is_dir()):
            name = f"{schema}:{Path(rest).name}"
        else:
            name = " ".join(filter(None, (self.model, self.pretrained and self._weights)))
        return ", ".join(filter(None, (name, self._prepared, self.prefix and f"prefix '{self.prefix}'")))

    @property
    def _weights(self) -> str:
        """A tag, a file's name, or TAG:NAME."""
        tag, file = tag_and_file(str(self.pretrained))
        return f"{tag}:{file.name}" if tag and file else Path(str(self.pretrained)).name

    @property
    def _prepared(self) -> str:
        if self.crop:
            return f"centre square of {self.crop} first"
        return f"squashed to {self.squash} first" if self.squash else ""

    @property
    def protocol(self) -> str:
        """How the value comes about."""
        library = "transformers" if self.model.startswith("transformers:") else "open_clip"
        how = "with the prefix" if self.prefix else "as it stands"
        return (
            f"clip_score: mean over n_images of 100 max(cos, 0) of the image under its prompt {how}, {library} "
            f"{self.label}, then its own preprocessing."
        )

    def check(self) -> None:
        """Raise UserError if library or weights are missing, or a file of weights was cut short."""
        for file in self.source.weights:
            check_weights(file)

    def start(self, run: Snapshot) -> Sequence[Record] | None:
        """Want all images; the shipped CLIP knows the words of the shapes only and does not apply to other prompts."""
        if not run.records or (self.model == "shipped" and not _knows_all(run.records)):
            return None
        self._clip: Clip | None = load_clip(self.source, self.device)
        self._values: dict[Id, float] = {}
        return run.records

    def update(self, images: Sequence[np.ndarray], records: Sequence[Record]) -> None:
        """Score one batch of pairs."""
        assert self._clip is not None
        texts = [self.prefix + record["prompt"] for record in records]
        scores = self._clip.scores([self._prepare(image) for image in images], texts)
        if not bool(scores.isfinite().all()):
            raise UserError(
                f"CLIP {self.label} gives scores that are not finite: its weights are damaged; get them anew."
            )
        values = scores.tolist()
        self._values.update(zip(map(record_id, records), values, strict=True))

    def compute(self, run: Snapshot) -> Scores:
        """Return the mean over images and the name of the CLIP."""
        self._clip = None
        return Scores({"clip_score": fmean(self._values.values()), "clip_model": self.label}, {"clip": self._values})

    def _prepare(self, image: np.ndarray) -> np.ndarray:
        if self.crop:
            return centre_square(image, self.crop)
        return squash(image, self.squash) if self.squash else image


def _knows_all(records: Sequence[Record]) -> bool:
    """Return whether every word of every prompt is in the shipped CLIP's vocabulary."""
    words = json.loads((SHIPPED / "tokenizer.json").read_text())["model"]["vocab"]
    strange = next((word for record in records for word in record["prompt"].split() if word not in words), None)
    if strange:
        log.info("clip: left out, the shipped CLIP does not know %r", strange)
    return strange is None
