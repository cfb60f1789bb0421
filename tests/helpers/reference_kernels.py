"""What the kernels of a layer compute, in plain torch: to compare with, and in their place where a test is not about them.

Triton's interpreter takes some 5 ms for each program of a kernel.
# R model rows, S slots of a pass, H query heads, G of them share keys, D head width, E of it rotated, W width
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu

from sjd2.models.kv_cache import Window


def attend(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attend as `window_kernel.attend` does: query [R, H, S, D] -> [R, S, H, D]."""
    keys, values = (x.repeat_interleave(query.shape[1] // keys.shape[1], 1) for x in (keys, values))
    mask = Window(lengths, seen).over(keys.shape[2])[:, None]
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale).transpose(1, 2).contiguous()


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """Return SiLU(gate) * up: [..., W] twice -> [..., W]."""
    return silu(gate) * up


def add_norm(
    residual: Tensor, delta: Tensor, before: Tensor | None, after: Tensor | None, eps_before: float, eps_after: float
) -> tuple[Tensor, Tensor]:
    """Return residual + delta and its RMSNorm: [..., W] twice -> [..., W] twice."""
    total = residual + (delta if before is None else _rms_norm(delta, before, eps_before))
    return total, total.new_empty(0) if after is None else _rms_norm(total, after, eps_after)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def rotary_store(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, norms: list[Tensor], eps: float,
    keys: Tensor, values: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """Return the rotated queries, store keys and values: query [R, S, H * D], key, value [R, S, H / G * D] -> [R, S, H, D]."""
    query, key, value = (x.unflatten(-1, (-1, keys.shape[-1])) for x in (query, key, value))
    if norms:
        query = layer_norm(query, query.shape[-1:], eps=eps) * norms[0] + norms[1]
        key = layer_norm(key, key.shape[-1:], eps=eps) * norms[2] + norms[3]
    key = _rotate(key, cos, sin).transpose(1, 2)
    index = slots[:, None, :, None].expand_as(key)
    keys.scatter_(2, index, key)
    values.scatter_(2, index, value.transpose(1, 2))
    return _rotate(query, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first E numbers of each head: [R, S, heads, D]."""
    turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
    left, right = turned.chunk(2, -1)
    turned = turned * cos[:, :, None] + torch.cat([-right, left], -1) * sin[:, :, None]
    return torch.cat([turned, rest], -1)


def replace_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute all kernels in plain torch."""
    monkeypatch.setattr("sjd2.models.window_kernel.attend", attend)
    for kernel in (silu_product, add_norm, rotary_store):
        monkeypatch.setattr(f"sjd2.models.layer_kernels.{kernel.__name__}", kernel)
