"""Janus-Pro: a Llama with a table, a head and a tokeniser of its own for images; no forced tokens.

Both prompts, conditional and not, are those of generation_inference.py in deepseek-ai/Janus; the classes are
transformers' own. An image token enters through the aligner, an MLP over 8 numbers per code: its outputs are computed once for
all codes.

# B samples, S slots of a pass, P prompt tokens, V image vocabulary, C width of a code, D width, N image-phase tokens
# H x W pixels, h x w codes
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sjd2.errors import UserError
from sjd2.files import find
from sjd2.models.base import Condition, ImageModel
from sjd2.models.hub import WeightSource, locate
from sjd2.models.layout import TokenGrid
from sjd2.models.loading import load_pretrained, load_tokenizer, read_config
from sjd2.models.shared import float32_at_least, pad_right, to_bytes
from sjd2.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import JanusVQVAE

DOWN = 16  # pixels per code, each way
PUBLIC = 384  # pixels: the only size of the public models
START = "<begin_of_image>"
CHUNK = 16  # images decoded at once


@dataclass(frozen=True, kw_only=True)
class JanusSpec(ModelSpec):
    """A Janus-Pro checkpoint in transformers' layout; size: side of its square images in pixels."""

    size: int = PUBLIC

    @property
    def layout(self) -> TokenGrid:
        return TokenGrid(self.size // DOWN, self.size // DOWN, self.vocabulary)

    def sources(self) -> list[WeightSource]:
        return [WeightSource(self.weights, "model.weights", ("config.json", "tokenizer.json"), revision=self.revision)]

    def check(self) -> None:
        """Raise `UserError` if a setting is wrong, or weights are neither here nor on the hub; takes seconds."""
        if self.size < DOWN or self.size % DOWN:
            raise UserError(
                f"model.size must be a multiple of {DOWN} pixels, got {self.size}; Janus-Pro's images have {PUBLIC}."
            )
        super().check()
        config, size = find(self.weights) / "config.json", PUBLIC
        if config.is_file():
            size = json.loads(config.read_text()).get("vision_config", {}).get("image_size", PUBLIC)
        if self.size != size:
            raise UserError(
                f"model.size={self.size}, but {self.weights} generates {size} pixels; set model.size={size}."
            )

    def build(self, device: torch.device, dtype: torch.dtype) -> Janus:
        return Janus(self, device, dtype)


class Janus(ImageModel):
    """A loaded Janus-Pro (contract: `ImageModel`)."""

    spec: JanusSpec

    def __init__(self, spec: JanusSpec, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import JanusForConditionalGeneration

        (folder,) = map(locate, spec.sources())
        read_config(folder, "model.weights", "janus", "deepseek-community/Janus-Pro-1B")
        self.spec = spec
        self.tokenizer = load_tokenizer(folder, "model.weights")
        ids, names = self.tokenizer.get_vocab(), (START, self.tokenizer.bos_token, self.tokenizer.pad_token)
        special = [ids[name] for name in names if name in ids]
        if len(special) < len(names):
            raise UserError(
                f"the tokenizer of {spec.weights} lacks {START}, a bos or a pad token, so it is not Janus's; use e.g. "
                "deepseek-community/Janus-Pro-1B."
            )
        self.start, self.bos, self.pad = special
        options = spec.load_options(device, dtype)
        self.full = load_pretrained(JanusForConditionalGeneration, folder, options, optional=None)
        super().__init__(self.full.get_decoder(), spec.layout)
        self.head_module = self.full.model.generation_head
        self.vq = JanusPixels(self.full.model.vqmodel)
        self.full.model.vqmodel = None  # kept in float32 instead
        self.vq.float().to(self.device)
        if len(self.codebook) != spec.vocabulary:
            raise UserError(
                f"{spec.weights} has {len(self.codebook)} image codes, but model.vocabulary is "
                f"{spec.vocabulary}; set model.vocabulary={len(self.codebook)}."
            )
        with torch.no_grad():
            codes = torch.arange(spec.vocabulary, device=self.device)
            self.table = self.full.prepare_embeddings_for_image_generation(codes).to(self.device)  # [V, D]

    @property
    def codebook(self) -> Tensor:
        """The VQ code vectors, of length 1: [V, C]."""
        return self.vq.codebook

    def encode(self, prompts: list[str]) -> Condition:
        """Tokenise and embed both guidance branches.

        The unconditional prompt is as long as the other, with padding for all ids but the first and the last; the model
        attends to that padding, so it depends on the length and each prompt has its own.
        """
        texts = [f"<|User|>: {prompt.strip()}\n\n<|Assistant|>:{START}" for prompt in prompts]
        ids = [[self.bos, *row] for row in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        padded, lengths = pad_right(ids, self.device, self.pad)
        nothing = torch.full_like(padded, self.pad)
        nothing[:, 0] = self.bos
        nothing[torch.arange(len(ids), device=self.device), lengths - 1] = self.start
        table = self.full.get_input_embeddings()
        return Condition(table(padded), lengths, table(nothing), lengths)

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up model inputs: codes [B, S] -> [B, S, D]."""
        return F.embedding(tokens, self.table)

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the image head, in float32 at least: [..., D] -> [..., V]."""
        return float32_at_least(self.full.model.generation_head(hidden).to(hidden.device))

    def decode(self, tokens: Tensor) -> Tensor:
        """Decode whole token sequences to images: [B, N] -> uint8 [B, 3, H, W]."""
        codes = self.layout.codes(tokens.to(self.device))
        return torch.cat([self.vq.decode(images) for images in codes.split(CHUNK)])


class JanusPixels(nn.Module):
    """Janus's image tokeniser: `encode` [B, 3, H, W] -> codes [B, h, w], `decode` back to uint8."""

    def __init__(self, vae: JanusVQVAE) -> None:
        super().__init__()
        self.vae = vae

    @property
    def codebook(self) -> Tensor:
        """The code vectors as they are looked up, of length 1: [V, C]."""
        return F.normalize(self.vae.quantize.embedding.weight, dim=-1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokenise images [B, 3, H, W] in [-1, 1] -> codes [B, h, w].

        The nearest code is that of the nearest direction, as in vq_model.py of deepseek-ai/Janus; transformers' own
        `JanusVQVAE.encode` compares unnormalised vectors and finds other codes.
        """
        latent = self.vae.quant_conv(self.vae.encoder(images.to(self.codebook)))  # [B, C, h, w]
        return torch.einsum("bchw,vc->bhwv", latent, self.codebook).argmax(-1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes [B, h, w] -> uint8 [B, 3, H, W]; rounds down, as the reference does."""
        vectors = F.embedding(codes, self.codebook).permute(0, 3, 1, 2).contiguous()
        vectors = vectors.to(self.vae.post_quant_conv.weight.dtype)
        return to_bytes(self.vae.decoder(self.vae.post_quant_conv(vectors)), rounded=False)

    def pixel_parts(self) -> list[nn.Module]:
        """Return what turns code vectors into pixels."""
        return [self.vae.post_quant_conv, self.vae.decoder]

    def compiled_parts(self) -> list[nn.Module]:
        """Return the networks of `decode` that are worth compiling: they are called once for an image."""
        return [self.vae.decoder]
