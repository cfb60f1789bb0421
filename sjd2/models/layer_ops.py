"""The kernels between a layer's products as operations of torch: one each to whatever records or compiles a pass.

# R model rows, S slots of a pass, H query heads, G of them share keys, D head width, E of it rotated
"""

from __future__ import annotations

import torch
from torch import Tensor

# Triton need not be installed, so the kernels are imported where they run


@torch.library.custom_op("sjd2::silu_product", mutates_args=())
def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """Return SiLU(gate) * up: [..., W] twice -> [..., W]."""
    from sjd2.models import layer_kernels

    return layer_kernels.silu_product(gate, up)


@silu_product.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("sjd2::add_norm", mutates_args=())
def add_norm(
    residual: Tensor, delta: Tensor, before: Tensor | None, after: Tensor | None, eps_before: float, eps_after: float
) -> tuple[Tensor, Tensor]:
    """Return residual + delta and its RMSNorm: [..., W] twice -> [..., W] twice.

    before: weights of a norm of delta before it is added; after: weights of the norm of the sum, None: an empty tensor.
    """
    from sjd2.models import layer_kernels

    return layer_kernels.add_norm(residual, delta, before, after, eps_before, eps_after)


@add_norm.register_fake
def _(
    residual: Tensor, delta: Tensor, before: Tensor | None, after: Tensor | None, eps_before: float, eps_after: float
) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(0 if after is None else residual.shape)


@torch.library.custom_op("sjd2::rotary_store", mutates_args=("keys", "values"))
def rotary_store(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, norms: list[Tensor], eps: float,
    keys: Tensor, values: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """Return the rotated queries, store keys and values: query [R, S, H * D], key, value [R, S, H / G * D] -> [R, S, H, D].

    cos, sin [1 or R, S, E]; slots [R, S]: entries of keys, values [R, H / G, capacity, D]. norms: weight and bias of the
    queries' LayerNorm, then of the keys', or nothing.
    """
    from sjd2.models import layer_kernels

    return layer_kernels.rotary_store(query, key, value, cos, sin, norms, eps, keys, values, slots)


@rotary_store.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, norms: list[Tensor], eps: float,
    keys: Tensor, values: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    width = keys.shape[-1]
    return query.new_empty(*query.shape[:2], query.shape[-1] // width, width)
