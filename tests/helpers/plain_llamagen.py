"""LlamaGen written out plainly from its public description: what `sjd2.models.llamagen` and `vq16` have to equal.

# B samples, V image vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2.models.llamagen_text import clean
from tests.helpers import checkpoints_llamagen as small

# ---- the language model: fused projections, complex rotary embedding, all 120 places padded on the left, one mask, no cache


class Reference:
    """LlamaGen as its paper and public code describe it, written out plainly in one dtype."""

    def __init__(self, folder: Path, side: int, dtype: torch.dtype = torch.float64) -> None:
        from transformers import AutoTokenizer, T5EncoderModel

        file = torch.load(folder / "t2i_XL_stage2_512.pt", weights_only=True)["model"]
        self.w = {name: tensor.to(dtype) for name, tensor in file.items()}
        self.text = T5EncoderModel.from_pretrained(folder / "flan-t5-xl", dtype=dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "flan-t5-xl")
        width = self.w["norm.weight"].shape[0] // small.HEADS
        rates = 10000.0 ** (-torch.arange(0, width // 2, 2) / (width // 2))
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        angles = torch.cat([y.reshape(-1, 1) * rates, x.reshape(-1, 1) * rates], 1).float()
        turns = torch.polar(torch.ones_like(angles), angles)
        self.turns = torch.cat([torch.zeros(120, width // 2), turns]).to(torch.complex128)  # 0, not 1: nothing is left

    def captions(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return features [B, 120, F] and mask [B, 120], both padded on the left."""
        more = {"max_length": 120, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
        batch = self.tokenizer([clean(prompt) for prompt in prompts], **more)
        with torch.no_grad():
            features = self.text(**batch).last_hidden_state
        mask = batch["attention_mask"]
        rolled = [row.roll(120 - int(seen.sum()), 0) for row, seen in zip(features, mask, strict=True)]
        return torch.stack(rolled), mask.flip(1).bool()

    def logits(self, features: Tensor, mask: Tensor, codes: Tensor) -> Tensor:
        """Return the logits after the caption and each code: features [B, 120, F], codes [B, n] -> [B, n + 1, V]."""
        w = self.w
        caption = F.gelu(features @ w["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
        x = torch.cat([caption @ w["cls_embedding.cap_proj.fc2.weight"].T, w["tok_embeddings.weight"][codes]], 1)
        size = x.shape[1]
        seen = torch.ones(size, size, dtype=torch.bool).tril().repeat(len(x), 1, 1)
        seen[:, :, :120] &= mask[:, None]
        seen |= torch.eye(size, dtype=torch.bool)
        for layer in range(small.SMALL["layers"]):
            x = self._layer(x, f"layers.{layer}.", seen)
        return (self._norm(x, "norm.weight") @ w["output.weight"].T)[:, 119:]

    def guided(self, prompts: list[str], codes: Tensor, scale: float, masked: bool = True) -> Tensor:
        """Return u + g (c - u); the unconditional rows have the caption's mask, or with masked=False all 120 places."""
        features, mask = self.captions(prompts)
        nothing = self.w["cls_embedding.uncond_embedding"].expand_as(features)
        c = self.logits(features, mask, codes)
        u = self.logits(nothing, mask if masked else torch.ones_like(mask), codes)
        return u + scale * (c - u)

    def greedy(self, prompts: list[str], n: int, scale: float) -> Tensor:
        codes = torch.zeros(len(prompts), 0, dtype=torch.long)
        for _ in range(n):
            codes = torch.cat([codes, self.guided(prompts, codes, scale)[:, -1:].argmax(-1)], 1)
        return codes

    def _layer(self, x: Tensor, name: str, seen: Tensor) -> Tensor:
        w, shape = self.w, (*x.shape[:2], small.HEADS, -1)
        q, k, v = (self._norm(x, name + "attention_norm.weight") @ w[name + "attention.wqkv.weight"].T).chunk(3, -1)
        q, k = (self._turn(part.reshape(shape)).transpose(1, 2) for part in (q, k))
        scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~seen[:, None], -torch.inf)
        mixed = (scores.softmax(-1) @ v.reshape(shape).transpose(1, 2)).transpose(1, 2).flatten(2)
        x = x + mixed @ w[name + "attention.wo.weight"].T
        h = self._norm(x, name + "ffn_norm.weight")
        gate, up = h @ w[name + "feed_forward.w1.weight"].T, h @ w[name + "feed_forward.w3.weight"].T
        return x + (F.silu(gate) * up) @ w[name + "feed_forward.w2.weight"].T

    def _turn(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * self.turns[: x.shape[1], None]).flatten(-2).to(x.dtype)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.w[name]


# ---- the image tokeniser


def group_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def convolve(x: Tensor, w: dict[str, Tensor], name: str, **more: int) -> Tensor:
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], **({"padding": weight.shape[-1] // 2} | more))


def residual(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    h = convolve(F.silu(group_norm(x, w, f"{name}.norm1")), w, f"{name}.conv1")
    h = convolve(F.silu(group_norm(h, w, f"{name}.norm2")), w, f"{name}.conv2")
    return h + (convolve(x, w, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in w else x)


def attend(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    h = group_norm(x, w, f"{name}.norm")
    q, k, v = (convolve(h, w, f"{name}.{part}").flatten(2).transpose(1, 2)[:, None] for part in "qkv")
    mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
    return x + convolve(mixed, w, f"{name}.proj_out")


def tower(x: Tensor, w: dict[str, Tensor], name: str, between: Callable[[Tensor, str], Tensor]) -> Tensor:
    """Run the levels of an encoder or decoder: every block that the names tell of, then what leads to the next level."""
    for level in range(5):
        here = f"{name}.conv_blocks.{level}"
        for block in range(9):
            if f"{here}.res.{block}.conv1.weight" in w:
                x = residual(x, w, f"{here}.res.{block}")
            if f"{here}.attn.{block}.q.weight" in w:
                x = attend(x, w, f"{here}.attn.{block}")
        x = between(x, here)
    return x


def middle(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return residual(attend(residual(x, w, f"{name}.mid.0"), w, f"{name}.mid.1"), w, f"{name}.mid.2")


def ends(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return convolve(F.silu(group_norm(x, w, f"{name}.norm_out")), w, f"{name}.conv_out")


def book(w: dict[str, Tensor]) -> Tensor:
    """Return the code vectors, of length 1: [V, C]."""
    raw = w["quantize.embedding.weight"]
    return raw / raw.square().sum(1, keepdim=True).sqrt()


def draw(w: dict[str, Tensor], codes: Tensor) -> Tensor:
    """Decode codes [B, h, w] -> image around [-1, 1], [B, 3, H, W]."""

    def up(x: Tensor, here: str) -> Tensor:
        if f"{here}.upsample.conv.weight" not in w:
            return x
        return convolve(x.repeat_interleave(2, 2).repeat_interleave(2, 3), w, f"{here}.upsample.conv")

    x = convolve(book(w)[codes].permute(0, 3, 1, 2), w, "post_quant_conv")
    return ends(tower(middle(convolve(x, w, "decoder.conv_in"), w, "decoder"), w, "decoder", up), w, "decoder")


def read(w: dict[str, Tensor], images: Tensor) -> Tensor:
    """Encode images [B, 3, H, W] in [-1, 1] -> the nearest code at each place [B, h, w]."""

    def down(x: Tensor, here: str) -> Tensor:
        if f"{here}.downsample.conv.weight" not in w:
            return x
        return convolve(F.pad(x, (0, 1, 0, 1)), w, f"{here}.downsample.conv", stride=2, padding=0)

    z = middle(tower(convolve(images, w, "encoder.conv_in"), w, "encoder", down), w, "encoder")
    z = convolve(ends(z, w, "encoder"), w, "quant_conv").permute(0, 2, 3, 1)
    return (z / z.square().sum(-1, keepdim=True).sqrt())[..., None, :].sub(book(w)).square().sum(-1).argmin(-1)
