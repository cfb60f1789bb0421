"""LlamaGen-XL text to image, stage 1 (256 px) and stage 2 (512 px): the published files in a transformers `LlamaModel`.

# B samples, R model rows, S slots of a pass, P caption tokens, F text features, V image vocabulary, D width, N image tokens
A caption takes 120 positions, padded on the left; the padding is masked for everything after it, so that only caption tokens
are fed here. The rotary table is zero at all caption positions: their keys and queries vanish, and it does not matter which
of the 120 a token has. Image input i has position 120 + i, whatever the caption's length (`image_start`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sjd2.errors import UserError
from sjd2.files import find
from sjd2.models.base import Condition, ImageModel
from sjd2.models.hub import WeightSource, locate
from sjd2.models.layout import TokenGrid
from sjd2.models.loading import load_assembled
from sjd2.models.shared import float32_at_least
from sjd2.models.spec import ModelSpec
from sjd2.models.tensors import load_exactly, read_tensors

if TYPE_CHECKING:
    from transformers import LlamaConfig

CAPTION_POSITIONS = 120  # (cls_token_num in LlamaGen's sample_t2i.py)
PIXELS = 16  # of a code, in each direction
BASE, EPS = 10000.0, 1e-5  # of the rotary embedding and the norms (ModelArgs in LlamaGen's gpt.py)
FILES = {256: "t2i_XL_stage1_256.pt", 512: "t2i_XL_stage2_512.pt"}
VQ_FILE = "vq_ds16_t2i.pt"
CHUNK = 8  # images decoded at once: one of 512 px takes 0.13 GB per layer at full size

# public name -> name in transformers' LlamaForCausalLM; `attention.wqkv` becomes three (convert)
TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
WQKV = "attention.wqkv.weight"
CAPTION = {
    "cls_embedding.uncond_embedding": "uncond_embedding",
    "cls_embedding.cap_proj.fc1.weight": "fc1.weight",
    "cls_embedding.cap_proj.fc2.weight": "fc2.weight",
}
TABLE = "freqs_cis"  # older checkpoints contain the rotary table


@dataclass(frozen=True, kw_only=True)
class LlamaGenSpec(ModelSpec):
    """A LlamaGen text-to-image checkpoint.

    size: pixels of the image's side, a multiple of 16; 256 and 512 choose the published file in `weights`, for others
    `weights` is a file. vq_weights: the image tokeniser, folder, file or hub id. text_weights: flan-T5, folder or hub id.
    heads: attention heads, which the file does not say. text_device: of the text encoder (null: the model's).
    """

    size: int
    vq_weights: str
    text_weights: str
    heads: int = 20
    text_device: str | None = None

    def __post_init__(self) -> None:
        if self.size < PIXELS or self.size % PIXELS:
            raise UserError(
                f"model.size must be a multiple of {PIXELS}, got {self.size}; the published checkpoints have 256 and 512."
            )
        if self.size not in FILES and not find(self.weights).is_file():
            raise UserError(
                f"model.size={self.size} has no published checkpoint; use 256 or 512, or give model.weights=FILE of one."
            )
        trained = next((size for size, file in FILES.items() if Path(self.weights).name == file), self.size)
        if self.size in FILES and self.size != trained:  # the tensors of either stage fit, so nothing else would notice
            raise UserError(f"model.weights={self.weights} generates {trained} pixels; set model.size={trained}.")

    @property
    def layout(self) -> TokenGrid:
        return TokenGrid(self.size // PIXELS, self.size // PIXELS, self.vocabulary)

    def sources(self) -> list[WeightSource]:
        """Return the language model, the image tokeniser and the text encoder."""
        file = FILES.get(self.size)
        return [
            WeightSource(self.weights, "model.weights", revision=self.revision, may_be_file=True, file_inside=file),
            WeightSource(self.vq_weights, "model.vq_weights", may_be_file=True, file_inside=VQ_FILE),
            WeightSource(
                self.text_weights,
                "model.text_weights",
                required=("config.json", "tokenizer.json"),
                patterns=("*.json", "*.safetensors"),
            ),
        ]

    def build(self, device: torch.device, dtype: torch.dtype) -> LlamaGen:
        return LlamaGen(self, device, dtype)


class LlamaGen(ImageModel):
    """A loaded LlamaGen text-to-image model (contract: `ImageModel`)."""

    spec: LlamaGenSpec

    def __init__(self, spec: LlamaGenSpec, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import LlamaForCausalLM

        from sjd2.models.llamagen_text import TextEncoder
        from sjd2.models.vq16 import VQ16

        weights, vq, text = map(locate, spec.sources())
        config, tensors, caption = convert(read_tensors(weights, "model.weights"), spec.heads, weights)
        if config.vocab_size != spec.vocabulary:
            raise UserError(
                f"{weights} has {config.vocab_size} image codes, but model.vocabulary is "
                f"{spec.vocabulary}; set model.vocabulary={config.vocab_size}."
            )
        self.full = load_assembled(LlamaForCausalLM, config, tensors, spec.load_options(device, dtype))
        decoder, layout = self.full.get_decoder(), spec.layout
        decoder.rotary_emb = GridRotary(layout, config.hidden_size // config.num_attention_heads).to(decoder.device)
        super().__init__(decoder, layout)
        self.head_module = self.full.lm_head
        self.vq = VQ16.load(vq).to(device)
        if len(self.vq.codebook) != spec.vocabulary:
            raise UserError(
                f"model.vq_weights={spec.vq_weights} has {len(self.vq.codebook)} codes and the language model "
                f"{spec.vocabulary}; use {VQ_FILE}."
            )
        self.text = TextEncoder(text, CAPTION_POSITIONS, torch.device(spec.text_device or device), dtype)
        self.caption = CaptionEmbedder(caption).to(device=device, dtype=dtype)
        if self.text.width != self.caption.fc1.in_features:
            raise UserError(
                f"model.text_weights={spec.text_weights} has {self.text.width} features, but the checkpoint was trained on "
                f"{self.caption.fc1.in_features}; use google/flan-t5-xl."
            )
        self.spec = spec

    @property
    def codebook(self) -> Tensor:
        """The VQ code vectors, of length 1: [V, C]."""
        return self.vq.codebook

    def image_start(self, lengths: Tensor) -> Tensor:
        """Return the position of the image's first token: after all caption positions, however many are in use."""
        return torch.full_like(lengths, CAPTION_POSITIONS)

    def encode(self, prompts: list[str]) -> Condition:
        """Embed captions; the unconditional branch has the learned vectors of the same positions and length.

        The reference masks it like the caption (generate.py), which is padded on the left: it uses the last positions.
        """
        features, lengths = self.text(prompts)
        lengths = lengths.to(self.device)
        embeds = self.caption(features.to(device=self.device, dtype=self.dtype))
        position = CAPTION_POSITIONS - lengths[:, None] + torch.arange(embeds.shape[1], device=self.device)
        nothing = self.caption(self.caption.uncond_embedding)[position.clamp(max=CAPTION_POSITIONS - 1)]
        return Condition(embeds, lengths, nothing, lengths)

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up model inputs: codes [B, S] -> [B, S, D]."""
        return self.full.get_input_embeddings()(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the head, all of whose rows are image codes, in float32 at least: [..., D] -> [..., V]."""
        return float32_at_least(self.full.lm_head(hidden).to(hidden.device))

    def decode(self, tokens: Tensor) -> Tensor:
        """Decode whole token sequences to images: [B, N] -> uint8 [B, 3, H, W]."""
        codes = self.layout.codes(tokens.to(self.device))
        return torch.cat([self.vq.decode(images) for images in codes.split(CHUNK)])


class CaptionEmbedder(nn.Module):
    """Text features to model inputs, and the learned features of an absent caption [120, F]."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        width, features = tensors["fc1.weight"].shape
        self.fc1 = nn.Linear(features, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)
        self.uncond_embedding = nn.Buffer(torch.zeros(CAPTION_POSITIONS, features))
        load_exactly(self, tensors, "model.weights")
        self.eval().requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        """Project features [..., F] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class GridRotary(nn.Module):
    """Rotary embedding by table: zero for the caption, then rows in the first half of a head, columns in the second.

    Replaces `LlamaModel.rotary_emb`. The table is that of precompute_freqs_cis_2d in LlamaGen's gpt.py.
    """

    def __init__(self, layout: TokenGrid, width: int, base: float = BASE) -> None:
        super().__init__()
        half = width // 2
        rates = 1.0 / base ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
        rows = torch.arange(layout.rows)[:, None, None] * rates
        columns = torch.arange(layout.columns)[None, :, None] * rates
        angles = torch.cat(torch.broadcast_tensors(rows, columns), -1).flatten(0, 1)  # [N, width / 2]
        angles = torch.cat([angles, angles], -1)
        self.cos = nn.Buffer(F.pad(angles.cos(), (0, 0, CAPTION_POSITIONS, 0)), persistent=False)
        self.sin = nn.Buffer(F.pad(angles.sin(), (0, 0, CAPTION_POSITIONS, 0)), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of positions [R, S] -> [R, S, head width]; windows may extend beyond the image's end."""
        position = position_ids.clamp(max=len(self.cos) - 1)
        return self.cos[position].to(x.dtype), self.sin[position].to(x.dtype)


def convert(
    tensors: dict[str, Tensor], heads: int, path: Path
) -> tuple[LlamaConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Turn a published checkpoint into (config, tensors of LlamaForCausalLM, tensors of CaptionEmbedder).

    Sizes are read off the tensors. Raises `UserError` if a name is missing or unknown.
    """
    from transformers import LlamaConfig

    layers = 1 + max((int(m[1]) for name in tensors if (m := re.match(r"layers\.(\d+)\.", name))), default=0)
    wanted = public_names(layers)
    missing, unknown = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted - {TABLE})
    if missing or unknown:
        problem = f"lacks {missing[0]!r}" if missing else f"has an unknown {unknown[0]!r}"
        raise UserError(
            f"model.weights={path} is not a LlamaGen text-to-image checkpoint: it {problem} ({len(missing)} missing, "
            f"{len(unknown)} unknown names)."
        )
    codes, width = tensors["tok_embeddings.weight"].shape
    if width % heads or (width // heads) % 4:
        raise UserError(
            f"model.heads={heads} does not divide the width {width} into multiples of 4; LlamaGen-XL has 20."
        )
    config = LlamaConfig(
        vocab_size=codes,
        hidden_size=width,
        intermediate_size=len(tensors["layers.0.feed_forward.w1.weight"]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        rms_norm_eps=EPS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    out = {name: tensors[source] for source, name in TOP.items()}
    for layer in range(layers):
        here = f"layers.{layer}."
        out |= {f"model.{here}{name}": tensors[here + source] for source, name in LAYER.items()}
        query, key, value = tensors[here + WQKV].chunk(3)
        for name, tensor in (("q", split_pairs(query, heads)), ("k", split_pairs(key, heads)), ("v", value)):
            out[f"model.{here}self_attn.{name}_proj.weight"] = tensor
    return config, out, {name: tensors[source] for source, name in CAPTION.items()}


def public_names(layers: int) -> set[str]:
    """Return the names of a published checkpoint of that depth (Transformer in LlamaGen's gpt.py)."""
    inner = (*LAYER, WQKV)
    return {*TOP, *CAPTION, *(f"layers.{layer}.{name}" for layer in range(layers) for name in inner)}


def split_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head: LlamaGen rotates the pairs (2i, 2i + 1), transformers (i, i + width / 2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
