"""What is between the products of a layer as Triton kernels; imported only where Triton is installed.

Each rounds where transformers' modules round, so that in half precision they differ from those by little more than sums do.

# N rows of a matrix, R model rows, S slots of a pass, H query heads, G of them share keys, D head width, E of it rotated
"""
# ruff: noqa: ANN001, ANN202 - Triton types its functions by their use
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers of a program of `silu_product`
SLOTS = 8  # slots of a program of `rotary_store`, at most


@triton.jit
def _silu_product(gate, up, out, gate_row, up_row, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    x = tl.load(gate + row * gate_row + place, mask=inside, other=0.0)
    silu = (x.to(tl.float32) * tl.sigmoid(x.to(tl.float32))).to(x.dtype)
    factor = tl.load(up + row * up_row + place, mask=inside, other=0.0)
    product = silu.to(tl.float32) * factor.to(tl.float32)
    tl.store(out + row * width + place, product.to(x.dtype), mask=inside)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """Return SiLU(gate) * up: [..., W] twice -> [..., W]; the two may be parts of one matrix."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = _matrix(gate), _matrix(up)
    rows, width = gate.shape
    with torch.cuda.device_of(gate):  # Triton launches on the current device
        _silu_product[(rows, triton.cdiv(width, BLOCK))](
            gate, up, out, gate.stride(0), up.stride(0), width, BLOCK=BLOCK
        )
    return out


@triton.jit
def _normed(x, weight, inside, place, width, eps):
    """Return RMSNorm(x) of a vector in float32 that holds numbers of its type."""
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    factor = tl.load(weight + place, mask=inside, other=0.0)
    return (x * scale).to(factor.dtype).to(tl.float32) * factor.to(tl.float32)


@triton.jit
def _add_norm(
    residual, delta, before, after, total, normed, residual_row, delta_row, width, eps_before, eps_after,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Add to the residual; BEFORE: what is added is normed first, AFTER: the sum is normed too."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PADDED)
    inside = place < width
    kind = total.dtype.element_ty
    x = tl.load(delta + row * delta_row + place, mask=inside, other=0.0).to(tl.float32)
    if BEFORE:
        x = _normed(x, before, inside, place, width, eps_before).to(kind).to(tl.float32)
    x = (tl.load(residual + row * residual_row + place, mask=inside, other=0.0).to(tl.float32) + x).to(kind)
    tl.store(total + row * width + place, x, mask=inside)
    if AFTER:
        x = _normed(x.to(tl.float32), after, inside, place, width, eps_after)
        tl.store(normed + row * width + place, x.to(kind), mask=inside)


def norm_shape(width: int) -> dict[str, int]:
    """Return the shape of a program that norms a row."""
    padded = triton.next_power_of_2(width)
    return {"PADDED": padded, "num_warps": min(16, max(1, padded // 256))}


def add_norm(
    residual: Tensor, delta: Tensor, before: Tensor | None, after: Tensor | None, eps_before: float, eps_after: float
) -> tuple[Tensor, Tensor]:
    """Return residual + delta and its RMSNorm: [..., W] twice -> [..., W] twice.

    before: weights of a norm of delta before it is added; after: weights of the norm of the sum, None: an empty tensor.
    """
    total = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    normed = torch.empty_like(total) if after is not None else total.new_empty(0)
    residual, delta = _matrix(residual), _matrix(delta)
    rows, width = residual.shape
    with torch.cuda.device_of(total):
        _add_norm[(rows,)](
            residual, delta, total if before is None else before, total if after is None else after, total, normed,
            residual.stride(0), delta.stride(0), width, eps_before, eps_after,
            BEFORE=before is not None, AFTER=after is not None, **norm_shape(width),
        )  # fmt: skip
    return total, normed


@triton.jit
def _head_norm(x, mean, scale, weight, bias, dim, width):
    """Return LayerNorm(x) in float32, rounded after each step to the type of the weights."""
    factor = tl.load(weight + dim, mask=width, other=0.0)
    shift = tl.load(bias + dim, mask=width, other=0.0)
    x = ((x - mean[:, None]) * scale[:, None]).to(factor.dtype).to(tl.float32)
    x = (x * factor.to(tl.float32)[None]).to(factor.dtype).to(tl.float32)
    return (x + shift.to(tl.float32)[None]).to(factor.dtype).to(tl.float32)


@triton.jit
def _rotated(
    source, cos, sin, weight, bias, slot, real, eps,
    source_slot, cos_slot, sin_slot, WIDTH: tl.constexpr, ROTARY: tl.constexpr, PADDED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Return one head of some slots, normed and rotated: [TILE, PADDED]."""
    dim = tl.arange(0, PADDED)
    half = ROTARY // 2
    partner = tl.where(dim < half, dim + half, tl.where(dim < ROTARY, dim - half, dim))
    width, turned = dim < WIDTH, dim < ROTARY
    inside = real[:, None] & width[None]
    kind = source.dtype.element_ty
    x = tl.load(source + slot[:, None] * source_slot + dim[None], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + slot[:, None] * source_slot + partner[None], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(x, 1) / WIDTH
        apart = tl.where(inside, x - mean[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(apart * apart, 1) / WIDTH + eps)
        x = _head_norm(x, mean, scale, weight, bias, dim, width)
        y = _head_norm(y, mean, scale, weight, bias, partner, width)
    rotated = real[:, None] & turned[None]
    c = tl.load(cos + slot[:, None] * cos_slot + dim[None], mask=rotated, other=0.0).to(tl.float32)
    s = tl.load(sin + slot[:, None] * sin_slot + dim[None], mask=rotated, other=0.0).to(tl.float32)
    y = tl.where((dim < half)[None], -y, y)
    total = (x * c).to(kind).to(tl.float32) + (y * s).to(kind).to(tl.float32)
    return tl.where(turned[None], total, x).to(kind)


@triton.jit(do_not_specialize=["num_slots", "cos_row", "sin_row"])
def _rotary_store(
    query, key, value, cos, sin, query_weight, query_bias, key_weight, key_bias, out, keys, values, slots, eps,
    query_row, query_slot, key_row, key_slot, value_row, value_slot, cos_row, cos_slot, sin_row, sin_slot,
    query_norm, key_norm, capacity, num_slots,
    HEADS: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr, PADDED: tl.constexpr,
    TILE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Rotate one head of a tile of slots: of the queries, or of the keys, stored with its values."""
    tiles = tl.cdiv(num_slots, TILE)
    head = tl.program_id(0) // tiles % (HEADS + SHARED)
    row = (tl.program_id(0) // tiles // (HEADS + SHARED)).to(tl.int64)
    slot, dim = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE), tl.arange(0, PADDED)
    real = slot < num_slots
    inside = real[:, None] & (dim < WIDTH)[None]
    cos += row * cos_row
    sin += row * sin_row
    if head < HEADS:
        x = _rotated(
            query + row * query_row + head * WIDTH, cos, sin, query_weight + head * query_norm,
            query_bias + head * query_norm, slot, real, eps, query_slot, cos_slot, sin_slot, WIDTH, ROTARY, PADDED, NORM,
        )  # fmt: skip
        target = ((row * num_slots + slot) * HEADS + head)[:, None] * WIDTH + dim[None]
        tl.store(out + target, x, mask=inside)
    else:
        head -= HEADS
        x = _rotated(
            key + row * key_row + head * WIDTH, cos, sin, key_weight + head * key_norm,
            key_bias + head * key_norm, slot, real, eps, key_slot, cos_slot, sin_slot, WIDTH, ROTARY, PADDED, NORM,
        )  # fmt: skip
        entry = tl.load(slots + row * num_slots + slot, mask=real, other=0)
        target = ((row * SHARED + head) * capacity + entry)[:, None] * WIDTH + dim[None]
        tl.store(keys + target, x, mask=inside)
        source = value + row * value_row + head * WIDTH + slot[:, None] * value_slot + dim[None]
        tl.store(values + target, tl.load(source, mask=inside), mask=inside)


def rotary_shape(num_slots: int, width: int) -> dict[str, int]:
    """Return the shape of a program that rotates a head of some slots."""
    at_once, padded = min(SLOTS, triton.next_power_of_2(num_slots)), max(16, triton.next_power_of_2(width))
    return {"TILE": at_once, "PADDED": padded, "num_warps": min(4, max(1, at_once * padded // 128))}


def rotary_store(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, norms: list[Tensor], eps: float,
    keys: Tensor, values: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """Return the rotated queries, store keys and values: query [R, S, H * D], key, value [R, S, H / G * D] -> [R, S, H, D].

    cos, sin [1 or R, S, E], rotating the halves of the first E numbers of a head; slots [R, S]: entries of keys, values
    [R, H / G, capacity, D]. norms: weight and bias of the queries' LayerNorm, then of the keys', each [1 or heads, D].
    """
    (rows, num_slots, _), (_, shared, capacity, width) = query.shape, keys.shape
    query, key, value, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, cos, sin))
    heads, shape = query.shape[-1] // width, rotary_shape(num_slots, width)
    out = query.new_empty(rows, num_slots, heads, width)
    query_weight, query_bias, key_weight, key_bias = norms or [out] * 4
    with torch.cuda.device_of(query):
        _rotary_store[(triton.cdiv(num_slots, shape["TILE"]) * rows * (heads + shared),)](
            query, key, value, cos, sin, query_weight, query_bias, key_weight, key_bias, out, keys, values,
            slots.contiguous(), eps, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
            cos.stride(0) if len(cos) > 1 else 0, cos.stride(1), sin.stride(0) if len(sin) > 1 else 0, sin.stride(1),
            width if len(query_weight) > 1 and norms else 0, width if len(key_weight) > 1 and norms else 0,
            capacity, num_slots,
            HEADS=heads, SHARED=shared, WIDTH=width, ROTARY=cos.shape[-1], NORM=bool(norms), **shape,
        )  # fmt: skip
    return out


def _matrix(x: Tensor) -> Tensor:
    """Return [..., W] as a matrix [N, W] whose rows are whole; a view wherever that is possible."""
    x = x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()
