"""`ModelSpec`: a model's settings, checked without loading a weight; `load` builds the `ImageModel`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from sjd2.errors import UserError, choose
from sjd2.files import digest
from sjd2.models.adapter import Adapter, read_settings
from sjd2.models.base import ImageModel
from sjd2.models.hub import WeightSource, check_part, check_source, locate, locate_part
from sjd2.models.layout import TokenGrid
from sjd2.models.loading import LoadOptions

PIXELS = ("decode", "none")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a configuration says about a model, checked without loading a weight; families add their own settings.

    weights: local folder or hub id. vocabulary: V. adapter: folder or hub id of an SJD2 fine-tuning. attention: kernel of
    transformers. revision: of `weights` on the hub. device_map, quantisation: how transformers loads (null: all on one
    device, in `dtype`). pixels: decode, or none to sample tokens only. dtype: what to sample in where the command names none
    (auto: bfloat16 on cuda, else float32). sampling: the model's customary sampling parameters.
    """

    name: str
    weights: str
    vocabulary: int
    adapter: str | None = None
    attention: str = "sdpa"
    revision: str | None = None
    device_map: str | None = None
    quantisation: str | None = None
    pixels: str = "decode"
    dtype: str = "float32"
    sampling: dict[str, float] = field(default_factory=dict)

    can_guide: ClassVar[bool] = True  # whether it has an unconditional prompt

    @property
    def layout(self) -> TokenGrid:
        """Return which token stands where."""
        raise NotImplementedError

    def sources(self) -> list[WeightSource]:
        """Return where each part of the weights is, the language model first."""
        raise NotImplementedError

    def hashed_files(self) -> list[Path]:
        """Return further files that decide tokens or pixels: of folders, the digest reads weights and JSON files alone."""
        return []

    def build(self, device: torch.device, dtype: torch.dtype) -> ImageModel:
        """Load everything but the adapter."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise `UserError` if a setting is wrong, or weights are neither here nor on the hub; takes seconds."""
        choose("model.pixels", self.pixels, PIXELS)
        self.load_options(torch.device("cpu"), torch.float32).check()
        _ = self.layout
        if self.adapter is not None:  # first: it is mostly local, while the next lines may ask the hub
            check_part(self._adapter_source(), read_settings)
        for source in self.sources():
            check_source(source)

    def check_guidance(self, scale: float) -> None:
        """Raise `UserError` if the model cannot be sampled under this guidance scale."""
        if scale != 1 and not self.can_guide:
            raise UserError(
                f"guidance_scale={scale:g}, but {self.name} draws its tokens without guidance; set guidance_scale=1."
            )

    def digest(self) -> str:
        """Return 12 hex digits over all weights and the adapter; fetches what is not on this machine."""
        adapter = locate_part(self._adapter_source()) if self.adapter else None
        return digest(*map(locate, self.sources()), *self.hashed_files(), adapter)

    def load(self, device: str = "cpu", dtype: str = "float32") -> ImageModel:
        """Load all weights; dtype: a torch dtype's name. Raises `UserError` if a file does not fit."""
        self.check()
        model = self.build(torch.device(device), getattr(torch, dtype))
        if self.adapter is not None:
            model.adapter = Adapter.load(locate_part(self._adapter_source()), model)
        return model

    def load_options(self, device: torch.device, dtype: torch.dtype) -> LoadOptions:
        """Return how transformers is to load the weights."""
        return LoadOptions(
            weights=self.weights,
            device=device,
            dtype=dtype,
            attention=self.attention,
            quantisation=self.quantisation,
            device_map=self.device_map,
        )

    def _adapter_source(self) -> WeightSource:
        return WeightSource(str(self.adapter), "model.adapter", required=("sjd2.json",))
