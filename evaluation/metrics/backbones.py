"""Features of CLIP and of DINOv2, for distances of few images: extractors as `evaluation.metrics.features` describes them.

Weights come from a folder, a file or the hub's local cache, as those of the CLIP score do; a download happens only with
`allow_download=true`.

# B images, D feature width
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from evaluation.metrics.batches import check_weights, device_for
from evaluation.metrics.clip import load_clip
from evaluation.metrics.clip_source import KEY, WEIGHT_SUFFIXES, ClipSource, find_source, hub_folder
from sjd2.errors import UserError, first_line
from sjd2.files import digest, find


class ClipFeatures:
    """Unit vectors of a CLIP's image tower with its own preprocessing; CMMD's is OpenAI's ViT-L/14 at 336 pixels.

    model, pretrained, allow_download: as of the CLIP score.
    """

    size = None

    def __init__(
        self,
        *,
        model: str = "shipped",
        pretrained: str | None = None,
        allow_download: bool = False,
        device: str | None = None,
        batch_size: int = 64,
    ) -> None:
        self.model, self.pretrained, self.allow_download = model, pretrained, allow_download
        self.device, self.batch_size = device, batch_size

    @cached_property
    def source(self) -> ClipSource:
        """The files, found once; its errors name the settings of an extractor, not those of the CLIP score."""
        try:
            return find_source(self.model, self.pretrained, self.allow_download)
        except UserError as error:
            raise UserError(str(error).replace(f"{KEY}.", "extractor.")) from error

    @property
    def name(self) -> str:
        """The network in words; a folder by its name."""
        schema, _, rest = self.model.partition(":")
        return f"CLIP {schema}:{Path(rest).name}" if rest and find(rest).is_dir() else f"CLIP {self.model}"

    @cached_property
    def _width(self) -> int:
        return self.load()([np.zeros((8, 8, 3), np.uint8)]).shape[1]

    @property
    def width(self) -> int:
        """The features of an image; asks the network, once."""
        return self._width

    def check(self) -> None:
        """Raise UserError if library or weights are missing, or a file of weights was cut short."""
        for file in self.source.weights:
            check_weights(file)

    @cached_property
    def _digest(self) -> str:
        source = self.source
        settings = repr((source.preprocess, source.quick_gelu))
        return hashlib.blake2b(f"{digest(*source.weights)} clip {settings}".encode(), digest_size=6).hexdigest()

    def digest(self) -> str:
        """Return a hash of the weights and of how images are prepared."""
        return self._digest

    def load(self) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
        """Load the network: images, uint8 [H, W, 3] each, -> float32 [B, D]."""
        clip = load_clip(self.source, self.device)
        return lambda images: clip.images(images).cpu().numpy()


class DinoFeatures:
    """The class token of DINOv2 (arXiv 2304.07193) through transformers, with the preprocessing beside its weights.

    model: a folder as save_pretrained writes it, or ORG/REPO; FD-DINOv2 (arXiv 2306.04675) uses facebook/dinov2-large.
    """

    size = None
    KEY = "evaluation.metrics.fid.extractor"

    def __init__(
        self,
        *,
        model: str | None = None,
        allow_download: bool = False,
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        self.model, self.allow_download = model, allow_download
        self.device, self.batch_size = device, batch_size

    @cached_property
    def _folder(self) -> Path:
        if self.model is None:
            raise UserError(f"{self.KEY}.model is not set: give a folder of DINOv2, or facebook/dinov2-large.")
        if find(self.model).is_dir():
            return find(self.model)
        if self.model.count("/") != 1:
            raise UserError(f"{self.KEY}.model={self.model} is neither a folder nor a hub name (ORG/REPOSITORY).")
        return hub_folder(self.model, "", ["*.json", "model.safetensors"], self.allow_download, self.KEY)

    @property
    def name(self) -> str:
        """The network in words; a folder by its name."""
        return f"DINOv2 {Path(str(self.model)).name}"

    @property
    def width(self) -> int:
        """The features of an image."""
        from transformers import AutoConfig

        return int(AutoConfig.from_pretrained(self._folder, local_files_only=True).hidden_size)

    def check(self) -> None:
        """Raise UserError if settings, preprocessing or weights are missing, or a file of weights was cut short."""
        weights = [file for file in self._folder.iterdir() if file.suffix in WEIGHT_SUFFIXES]
        lacking = [n for n in ("config.json", "preprocessor_config.json") if not (self._folder / n).is_file()]
        if not weights or lacking:
            raise UserError(
                f"{self._folder} has no {lacking[0] if lacking else 'model.safetensors'}; give {self.KEY}.model=FOLDER as "
                "save_pretrained writes it."
            )
        for file in weights:
            check_weights(file)

    @cached_property
    def _digest(self) -> str:
        return digest(self._folder)

    def digest(self) -> str:
        """Return a hash of weights, settings and preprocessing."""
        return self._digest

    def load(self) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
        """Load the network: images, uint8 [H, W, 3] each, -> float32 [B, D]; raises UserError if its weights do not fit."""
        from transformers import AutoImageProcessor, AutoModel

        device = device_for(self.device)
        try:
            loader: Any = AutoModel
            network, report = loader.from_pretrained(self._folder, local_files_only=True, output_loading_info=True)
            prepare: Any = AutoImageProcessor.from_pretrained(self._folder, local_files_only=True)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise UserError(f"{self._folder} does not load as DINOv2 ({first_line(error)}).") from error
        if missing := sorted(report["missing_keys"]):
            raise UserError(f"{self._folder} does not load as DINOv2 (no {missing[0]} in its weights).")
        network.eval().requires_grad_(False).to(device)

        @torch.no_grad()
        def features(images: Sequence[np.ndarray]) -> np.ndarray:
            pixels = prepare(images=[Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
            return network(pixels.to(device)).last_hidden_state[:, 0].float().cpu().numpy()

        return features
