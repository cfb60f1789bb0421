"""GLM-Image's diffusion stage: tokens and prompt to pixels, by diffusers' own pipeline, scheduler and weights.

# B images, H x W pixels, h x w codes of 32 x 32 pixels
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sjd2.devices import resolve_device
from sjd2.errors import UserError, first_line
from sjd2.models.hub import WeightSource
from sjd2.models.loading import free_bytes, quiet_transformers
from sjd2.models.tensors import stored_bytes

KEY = "model.weights"
NETWORKS = ("text_encoder", "transformer", "vae")  # folders of the pipeline with weights, but for the AR stage's
SCHEDULER = "scheduler/scheduler_config.json"
INDEX = ("model_index.json", "tokenizer/tokenizer_config.json", SCHEDULER)
CODE = 32  # pixels of a code's side
WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings:
    """How the diffusion stage draws; the defaults of steps and guidance_scale are those of the public pipeline.

    steps: of the scheduler. guidance_scale: 1: off, half the passes. device: of this stage (None: the model's). offload: keep
    its networks in the CPU's memory and bring each to the GPU while it works.
    """

    steps: int = 50
    guidance_scale: float = 1.5
    device: str | None = None
    offload: bool = False

    def check(self) -> None:
        """Raise `UserError` for settings that do not exist, or where diffusers is not installed; loads nothing."""
        if self.steps < 1:
            raise UserError(f"model.diffusion_steps must be 1 or more, got {self.steps}.")
        if self.guidance_scale < 1:
            raise UserError(f"model.diffusion_guidance must be 1 (off) or more, got {self.guidance_scale}.")
        if self.device is not None:
            try:
                resolve_device(self.device)
            except UserError as error:
                raise UserError(f"model.diffusion_device: {error}") from error
        if importlib.util.find_spec("diffusers") is None:
            raise UserError(
                "GLM-Image's pixels need diffusers: pip install -e '.[glm]', or set model.pixels=none for tokens only."
            )


def pixel_sources(weights: str, revision: str | None) -> list[WeightSource]:
    """Return where the diffusion stage is in the folder or hub repository of the whole pipeline: its index, its networks."""
    patterns = ("model_index.json", "tokenizer/*", "scheduler/*")
    index = WeightSource(weights, KEY, required=INDEX, patterns=patterns, revision=revision)
    networks = [
        WeightSource(
            weights,
            KEY,
            required=("config.json",),
            patterns=("*.json", "*.safetensors"),
            revision=revision,
            subfolder=name,
        )
        for name in NETWORKS
    ]
    return [index, *networks]


class DiffusionStage:
    """The loaded pipeline without its AR stage."""

    def __init__(self, folder: Path, settings: DiffusionSettings, device: torch.device, dtype: torch.dtype) -> None:
        """Load the weights of `folder` in `dtype`. Raises `UserError` if they do not fit their classes or the memory."""
        self.settings = settings
        self.device = torch.device(settings.device or device)
        self.offload = settings.offload and self.device.type != "cpu"
        self._check_memory(folder, dtype)
        self.pipeline = _load(folder, dtype)
        self.pipeline.set_progress_bar_config(disable=True)
        if self.offload:
            self.pipeline.enable_model_cpu_offload(device=self.device)
        else:
            self.pipeline.to(self.device)

    def draw(self, codes: Tensor, prompts: list[str], seeds: list[int], *, steps: int | None = None) -> Tensor:
        """Return pixels of the codes of the main grid [B, h, w] as uint8 [B, 3, 32 h, 32 w].

        One image after the other, each from its own noise: the pipeline pads the quoted texts of a batch without a mask, so
        an image would depend on its neighbours; and a single image keeps a GPU busy (4 h w latent tokens a pass).
        """
        images = [self._one(*row, steps or self.settings.steps) for row in zip(codes, prompts, seeds, strict=True)]
        return torch.stack(images)

    def warm_up(self, codes: Tensor) -> None:
        """Run a few steps of one image: [1, h, w]."""
        self.draw(codes, [""], [0], steps=WARM_UP_STEPS)

    def _one(self, codes: Tensor, prompt: str, seed: int, steps: int) -> Tensor:
        """Return the pixels of one image: [h, w] -> [3, 32 h, 32 w]. Raises `UserError` where they are not finite."""
        height, width = (CODE * side for side in codes.shape)
        found = self.pipeline(
            prompt=prompt,
            prior_token_ids=upsampled(codes.to(self.device))[None],
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=self.settings.guidance_scale,
            generator=torch.Generator().manual_seed(seed),  # on the CPU: the same noise on every device
            output_type="pt",
        )
        image = found.images[0].float()
        if not image.isfinite().all():
            raise UserError(
                "GLM-Image's diffusion stage gave pixels that are not finite, as float16 does; use dtype=bfloat16."
            )
        return (image * 255).round().to(torch.uint8)

    def _check_memory(self, folder: Path, dtype: torch.dtype) -> None:
        sizes = [stored_bytes(folder / name, dtype) for name in NETWORKS]
        needed, free = max(sizes) if self.offload else sum(sizes), free_bytes(self.device)
        if needed > free:
            fixes = ["model.diffusion_offload=true"] * (not self.offload) + ["model.diffusion_device=cpu"]
            fix = "".join(f"{setting}, or " for setting in fixes * (self.device.type != "cpu"))
            what = f"GLM-Image's diffusion stage takes {needed / 1e9:.1f} GB and {self.device} has {free / 1e9:.1f} GB free"
            raise UserError(f"{what}; use {fix}model.pixels=none for tokens only.")


def upsampled(codes: Tensor) -> Tensor:
    """Return the codes of 16 x 16 pixels that the pipeline takes, each code four times: [h, w] -> [4 h w]."""
    return codes.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()


def _load(folder: Path, dtype: torch.dtype) -> Any:
    """Load the pipeline without its AR stage. Raises `UserError` where files do not fit, or lack a tensor."""
    from transformers import T5EncoderModel

    diffusers: Any = importlib.import_module("diffusers")  # its classes are loaded lazily, which no type checker sees
    loaders: dict[str, Any] = {
        "text_encoder": partial(T5EncoderModel.from_pretrained, dtype=dtype),
        "transformer": partial(diffusers.GlmImageTransformer2DModel.from_pretrained, torch_dtype=dtype),
        "vae": partial(diffusers.AutoencoderKL.from_pretrained, torch_dtype=dtype),
    }
    parts: dict[str, Any] = {"vision_language_encoder": None, "processor": None}
    try:
        with _quiet():
            for name, load in loaders.items():
                # both libraries fill missing tensors with random numbers and only warn: the images would be noise
                parts[name], found = load(folder / name, local_files_only=True, output_loading_info=True)
                if missing := sorted(found["missing_keys"]):
                    raise UserError(f"{KEY}={folder} lacks {len(missing)} of the {name}'s tensors, e.g. {missing[0]}.")
            return diffusers.GlmImagePipeline.from_pretrained(folder, local_files_only=True, **parts)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, TypeError) as error:
        raise UserError(f"{KEY}={folder}: its diffusion stage cannot be loaded: {first_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the bars of both libraries, and their tables of tensors, which become one sentence."""
    logs = importlib.import_module("diffusers.utils.logging")
    bar, verbosity = logs.is_progress_bar_enabled(), logs.get_verbosity()
    logs.disable_progress_bar()
    logs.set_verbosity_error()
    try:
        with quiet_transformers():
            yield
    finally:
        logs.set_verbosity(verbosity)
        if bar:
            logs.enable_progress_bar()
