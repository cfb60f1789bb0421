"""GLM-Image's autoregressive stage: GLM-4 9B draws a small preview grid of codes, then the image's own grid.

One token sequence, as transformers' GlmImageProcessor and GlmImageModel have it:

    prompt <sop>H W<eop><sop>h w<eop><|dit_token_16384|>   h x w codes   H x W codes   <|dit_token_16385|>

A code of the grid H x W stands for 32 x 32 pixels; the preview h x w has the same shape and about 256 codes. 1024 px are
256 + 1024 + 1 = 1281 tokens; nothing separates the grids, and only the second becomes pixels. Codes are sampled without
guidance, among the codes alone; the end token is forced.
Positions have three axes (time, row, column). Text counts on all three. Code (i, j) of a grid that begins at p stands at
(p, p + i, p + j); what follows, the next grid or the end, begins at p + max(rows, columns).

# B samples, R model rows, S slots of a pass, P prompt tokens, V image vocabulary, C width of a code, D width
# N image-phase tokens, L codes of an image, H x W pixels
"""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sjd2.errors import UserError, first_line
from sjd2.models.base import Condition, ImageModel
from sjd2.models.glm_image_pixels import SCHEDULER, DiffusionSettings, DiffusionStage, pixel_sources
from sjd2.models.hub import WeightSource, check_source, locate
from sjd2.models.layout import TokenGrid
from sjd2.models.loading import load_pretrained, read_config
from sjd2.models.shared import image_logits, pad_right
from sjd2.models.spec import ModelSpec

PIXELS = 32  # of a code's side
PREVIEW = 16  # side of a square preview in codes
# a prompt token's position id is its number, an image token's is its number plus START times the prompt's length: the two
# together tell its place on all three axes, and no table of a batch's prompts has to be kept
START = 1 << 20
# transformers' values where a generation_config.json has none
UNSET = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
TEMPLATE = "chat_template.jinja"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GlmImageSpec(ModelSpec):
    """A GLM-Image checkpoint in diffusers' layout, and the size of its images.

    size: side in pixels or WIDTHxHEIGHT. end: id of the token that ends an image. diffusion_...: glm_image_pixels.py.
    """

    size: int | str = 1024
    end: int = 16385
    diffusion_steps: int = 50
    diffusion_guidance: float = 1.5
    diffusion_device: str | None = None
    diffusion_offload: bool = False

    can_guide: ClassVar[bool] = False

    @property
    def layout(self) -> TokenGrid:
        rows, columns = grid(self.size)
        return TokenGrid(
            rows, columns, self.vocabulary, suffix=(self.end,), preview=preview(rows, columns, str(self.size))
        )

    @property
    def diffusion(self) -> DiffusionSettings:
        """Return how pixels are drawn."""
        return DiffusionSettings(
            steps=self.diffusion_steps,
            guidance_scale=self.diffusion_guidance,
            device=self.diffusion_device,
            offload=self.diffusion_offload,
        )

    def check(self) -> None:
        """Raise `UserError` if a setting is wrong, or a library or weights are missing; takes seconds."""
        if self.pixels != "decode":
            super().check()
            return
        self.diffusion.check()
        replace(self, pixels="none").check()
        for source in pixel_sources(self.weights, self.revision):
            try:
                check_source(source)
            except UserError as error:
                raise UserError(
                    f"{str(error).rstrip('.')}; model.pixels=none does without the diffusion stage."
                ) from error

    def sources(self) -> list[WeightSource]:
        """Return the AR stage and its processor, then the diffusion stage if pixels are wanted."""
        pixels = [] if self.pixels == "none" else pixel_sources(self.weights, self.revision)
        return [*self.ar_sources(), *pixels]

    def ar_sources(self) -> list[WeightSource]:
        """Return the AR stage and its processor."""
        common: dict[str, Any] = {"where": self.weights, "key": "model.weights", "revision": self.revision}
        return [
            WeightSource(
                **common,
                required=("config.json",),
                patterns=("*.json", "*.safetensors"),
                subfolder="vision_language_encoder",
            ),
            WeightSource(
                **common,
                required=("tokenizer.json",),  # the image processor's settings have had two file names
                patterns=("*.json", "*.jinja"),
                subfolder="processor",
            ),
        ]

    def hashed_files(self) -> list[Path]:
        """Return the chat template and the scheduler's settings: edited ones make other images, so another run."""
        files = [locate(self.ar_sources()[1]) / TEMPLATE]
        if self.pixels != "none":
            files.append(locate(pixel_sources(self.weights, self.revision)[0]) / SCHEDULER)
        return [file for file in files if file.is_file()]

    def build(self, device: torch.device, dtype: torch.dtype) -> GlmImage:
        return GlmImage(self, device, dtype)


def grid(size: int | str) -> tuple[int, int]:
    """Return the codes (rows, columns) of an image. Raises `UserError` for sizes that the model cannot generate."""
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", str(size))
    width, height = (int(sides[1]), int(sides[2] or sides[1])) if sides else (0, 0)
    if min(width, height) < PIXELS or width % PIXELS or height % PIXELS:
        raise UserError(
            f"model.size must be a side or WIDTHxHEIGHT in multiples of {PIXELS} pixels, e.g. 1024 or 1152x768, got {size}."
        )
    return height // PIXELS, width // PIXELS


def preview(rows: int, columns: int, size: str) -> tuple[int, int]:
    """Return the codes (rows, columns) of the preview before a grid, rounded down as GlmImageProcessor does.

    Raises `UserError` where the image is so long that its preview has no row or column.
    """
    ratio = rows / columns
    small = int(math.sqrt(ratio) * PREVIEW), int(math.sqrt(1 / ratio) * PREVIEW)
    if min(small) < 1:
        raise UserError(
            f"model.size={size} is too long: its preview would have no row or column; one side may be at most "
            f"{PREVIEW * PREVIEW} times the other."
        )
    return small


def offsets(layout: TokenGrid) -> Tensor:
    """Return the position of each image token on the three axes, from the image's start: [3, N]."""
    assert layout.preview is not None
    parts, begin = [], 0
    for rows, columns in (layout.preview, (layout.rows, layout.columns)):
        place = torch.arange(rows * columns)
        parts.append(begin + torch.stack([torch.zeros_like(place), place // columns, place % columns]))
        begin += max(rows, columns)
    return torch.cat([*parts, torch.full((3, len(layout.suffix)), begin)], 1)


class GlmImage(ImageModel):
    """A loaded GLM-Image (contract: `ImageModel`); its diffusion stage is loaded when pixels are first wanted."""

    spec: GlmImageSpec
    pixel_part: ClassVar[str] = "diffusion"

    def __init__(self, spec: GlmImageSpec, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import GlmImageForConditionalGeneration

        folder, words = map(locate, spec.ar_sources())
        config = read_config(folder, "model.weights", "glm_image", "zai-org/GLM-Image")
        self.spec = spec
        self.processor = load_processor(words)
        check_ids(spec, config, self.processor.tokenizer)
        report_sampling(spec, folder)
        full = load_pretrained(
            GlmImageForConditionalGeneration, folder, spec.load_options(device, dtype), optional=None
        )
        self.fill(full, spec.layout)

    def fill(self, full: Any, layout: TokenGrid) -> None:
        """Take the parts of transformers' model."""
        self.full = full
        super().__init__(full.get_decoder(), layout)
        self.head_module = full.lm_head
        self.vq = GlmImageTokens(full.model.visual, full.model.vqmodel, layout)
        self.encoded_size = tuple(side * self.vq.patch for side in (layout.rows, layout.columns))
        # [V + F] the model's id of each local id: a code's embedding is the row of its own number
        self.ids = torch.tensor([*range(layout.vocabulary), *layout.forced_ids], device=self.device)
        self.offsets = offsets(layout).to(self.device)  # [3, N]

    @property
    def codebook(self) -> Tensor:
        """The code vectors as they are compared, of length 1: [V, C]."""
        return self.vq.codebook

    def encode(self, prompts: list[str]) -> Condition:
        """Tokenise and embed prompts with the processor's own template; the empty one stands where others are unguided."""
        padded, lengths = pad_right(self.prompt_ids([*prompts, ""]), self.device)
        embeds = self.full.get_input_embeddings()(padded)
        return Condition(embeds[:-1], lengths[:-1], embeds[-1:, : int(lengths[-1])], lengths[-1:])

    def prompt_ids(self, prompts: list[str]) -> list[list[int]]:
        """Return the token ids of prompts, the sizes of both grids and the start of the image included.

        Raises `UserError` for prompts that hold a source image's placeholder, as the processor does.
        """
        word = self.processor.image_token
        if found := next((prompt for prompt in prompts if word in prompt), None):
            raise UserError(
                f"the prompt '{found}' has {word}, which stands for a source image; write it in other words."
            )
        messages = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in prompts]
        height, width = self.layout.rows * PIXELS, self.layout.columns * PIXELS
        texts = self.processor.apply_chat_template(messages, tokenize=False)
        return self.processor(text=texts, target_h=height, target_w=width)["input_ids"]

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up model inputs: local ids [B, S] -> [B, S, D]."""
        return self.full.get_input_embeddings()(self.ids[tokens])

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the rows of the head that are codes, in float32 at least: [..., D] -> [..., V]."""
        return image_logits(self.full.lm_head, hidden, 0, self.layout.vocabulary)

    @cached_property
    def diffusion(self) -> DiffusionStage:
        """The loaded diffusion stage. Raises `UserError` if there is none to load, or no memory for it."""
        if self.spec.pixels == "none":
            raise UserError("GLM-Image's pixels come from its diffusion stage, which model.pixels=none leaves out.")
        index, *_ = map(locate, pixel_sources(self.spec.weights, self.spec.revision))
        dtype = torch.float32 if self.dtype == torch.float64 else self.dtype  # no token depends on it
        return DiffusionStage(index, self.spec.diffusion, self.device, dtype)

    def draw(self, tokens: Tensor, prompts: list[str], seeds: list[int]) -> Tensor:
        """Draw the images of these prompts and sample seeds: [B, N] -> uint8 [B, 3, H, W]."""
        return self.diffusion.draw(self.layout.codes(tokens), prompts, seeds)

    def decode(self, tokens: Tensor) -> Tensor:
        """Draw images without the prompt's quoted text, from the noise of seed 0: [B, N] -> uint8 [B, 3, H, W]."""
        return self.draw(tokens, [""] * len(tokens), [0] * len(tokens))

    def warm_up_pixels(self, batch: int) -> None:
        """Load the diffusion stage and run a few steps of one image: images are drawn one by one."""
        layout = self.layout
        self.diffusion.warm_up(torch.zeros(1, layout.rows, layout.columns, dtype=torch.long, device=self.device))

    def image_start(self, lengths: Tensor) -> Tensor:
        """Return the position id of the image's first token after prompts of `lengths` tokens: [R] -> [R]."""
        return lengths * START

    def rotary_ids(self, positions: Tensor) -> Tensor:
        """Return the place of each position id on the three axes: [R, S] -> [3, R, S]."""
        # the length of the prompt before an image token, 0 at a prompt token; numbers below 0 are EAGLE's, of the pair that
        # holds the prompt's last token
        begin = torch.div(positions + START // 2, START, rounding_mode="floor")
        number = positions - begin * START
        place = self.offsets[:, number.clamp(0, self.offsets.shape[1] - 1)]
        return begin + torch.where((begin > 0) & (number >= 0), place, number)


class GlmImageTokens(nn.Module):
    """GLM-Image's image tokeniser, a vision encoder and a codebook: it encodes, pixels come from the diffusion stage."""

    def __init__(self, visual: Any, quantiser: Any, layout: TokenGrid) -> None:
        super().__init__()
        self.visual, self.quantiser = visual, quantiser
        if visual.dtype != torch.float64:
            self.quantiser.float()  # neighbours in a codebook of 16,384 are closer than bfloat16 can tell
        self.patch = int(visual.patch_size)
        self.layout = layout

    @property
    def codebook(self) -> Tensor:
        """The code vectors as they are compared, of length 1: [V, C]."""
        return F.normalize(self.quantiser.quantize.embedding.weight, dim=-1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokenise images [B, 3, H, W] in [-1, 1], a patch for each code of the grid -> codes [B, L], the preview's first.

        The preview is the image at its own, smaller size.
        """
        assert self.layout.preview is not None
        small = [side * self.patch for side in self.layout.preview]
        reduced = F.interpolate(images, small, mode="bicubic", antialias=True).clamp(-1, 1)
        return torch.cat([self._codes(reduced), self._codes(images)], 1)

    def _codes(self, images: Tensor) -> Tensor:
        """Tokenise images of one size [B, 3, H, W] -> [B, h * w]."""
        count, rows, columns = len(images), *(side // self.patch for side in images.shape[2:])
        patches = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)  # [B, h * w, 3 * patch ** 2]
        sizes = torch.tensor([[1, rows, columns]] * count, device=images.device)
        hidden = self.visual(patches.flatten(0, 1).to(self.visual.dtype), grid_thw=sizes).last_hidden_state
        latent = hidden.view(count, rows, columns, -1).permute(0, 3, 1, 2).to(self.quantiser.dtype)
        return self.quantiser.encode(latent).image_tokens.view(count, -1)


def load_processor(folder: Path) -> Any:
    """Load the processor that builds prompts. Raises `UserError` if it lacks a file or a token."""
    from transformers import GlmImageProcessor

    try:
        processor: Any = GlmImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"model.weights: {folder} holds no processor of GLM-Image: {first_line(error)}") from error
    if processor.chat_template is None:
        raise UserError(f"model.weights: {folder} has no {TEMPLATE}; copy or download it again.")
    return processor


def check_ids(spec: GlmImageSpec, config: dict[str, Any], tokenizer: Any) -> None:
    """Raise `UserError` if codes, or the tokens around them, do not have the ids that the settings and the files say."""
    codes = config.get("vq_config", {}).get("num_embeddings", spec.vocabulary)
    if codes != spec.vocabulary:
        raise UserError(
            f"{spec.weights} has {codes} image codes, but model.vocabulary is {spec.vocabulary}; set "
            f"model.vocabulary={codes}."
        )
    start, end = config.get("image_start_token_id", codes), config.get("image_end_token_id", codes + 1)
    if end != spec.end:
        raise UserError(
            f"{spec.weights} ends images with token {end}, but model.end is {spec.end}; set model.end={end}."
        )
    found = tokenizer.convert_tokens_to_ids(tokenizer.bos_token)
    if found != start:
        raise UserError(
            f"the tokenizer of {spec.weights} has id {found} for the start of an image ({tokenizer.bos_token}), its model "
            f"{start}; take both from one checkpoint, e.g. zai-org/GLM-Image."
        )


def report_sampling(spec: GlmImageSpec, folder: Path) -> None:
    """Log where the checkpoint's own sampling parameters are not those of the settings."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    stored = json.loads(file.read_text())
    own = {key: stored.get(key, usual) for key, usual in UNSET.items()}
    own["top_k"] = 0 if own["top_k"] is None or own["top_k"] >= spec.vocabulary else own["top_k"]
    other = {key: value for key, value in own.items() if value is not None and value != spec.sampling.get(key, value)}
    if other:
        words = " ".join(f"{key}={value}" for key, value in other.items())
        logger.warning("%s samples with %s by its generation_config.json, conf/model/glm-image.yaml does not.",
                       spec.weights, words)  # fmt: skip
