"""Gated low-rank products as Triton kernels; imported only where Triton is installed.

The first product is far too small to fill a GPU by its rows and columns, so its sum is split over programs; the second one
adds up the parts, applies the gate and adds its product to what the layers have computed, in place.

# M rows (model rows x slots), D inputs, O outputs, N low-rank numbers of all layers together, P parts of a sum
"""
# ruff: noqa: ANN001, ANN202 - Triton types its functions by their use
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 128  # low-rank numbers that a program can hold
PARTS = 16  # of a sum, at most: the second product reads them all
CHUNK = 256  # inputs that are worth a program
PROGRAMS = 256  # that fill a GPU


@triton.jit
def _down(
    x, down, parts, x_row, num_rows, width, chunk,
    NUMBERS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum a part of x A^T for one tile of rows."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    number = tl.arange(0, PADDED)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, width)
    acc = tl.zeros([TILE, PADDED], tl.float32)
    for at in range(begin, end, BLOCK):
        column = at + tl.arange(0, BLOCK)
        there = (column < end)[None]
        some = tl.load(
            x + row.to(tl.int64)[:, None] * x_row + column[None], mask=(row < num_rows)[:, None] & there, other=0.0
        )
        weight = tl.load(
            down + number[:, None] * width + column[None], mask=(number < NUMBERS)[:, None] & there, other=0.0
        )
        acc += tl.dot(some, tl.trans(weight), input_precision="tf32x3")
    where = (tl.program_id(1) * num_rows + row)[:, None] * NUMBERS + number[None]
    tl.store(parts + where, acc, mask=(row < num_rows)[:, None] & (number < NUMBERS)[None])


@triton.jit
def _up(
    parts, gate, up, out, out_row, num_rows, num_outputs, num_parts,
    NUMBERS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add gate (sum of parts) B^T to one tile of the outputs; nothing where the gate is 0, whatever the sum is."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number = tl.arange(0, PADDED)
    real, known = row < num_rows, number < NUMBERS
    low = tl.zeros([TILE, PADDED], tl.float32)
    for part in range(num_parts):
        where = (part * num_rows + row)[:, None] * NUMBERS + number[None]
        low += tl.load(parts + where, mask=real[:, None] & known[None], other=0.0)
    opened = tl.load(gate + row, mask=real, other=0) != 0
    low = tl.where(opened[:, None], low, 0.0)
    inside = output < num_outputs
    weight = tl.load(up + output[:, None] * NUMBERS + number[None], mask=inside[:, None] & known[None], other=0.0)
    added = tl.dot(low.to(weight.dtype), tl.trans(weight), input_precision="tf32x3")
    place = out + row.to(tl.int64)[:, None] * out_row + output[None]
    mask = real[:, None] & inside[None]
    total = tl.load(place, mask=mask, other=0.0).to(tl.float32) + added
    tl.store(place, total.to(out.dtype.element_ty), mask=mask)


def shape_of(rows: int, numbers: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Return the constants of both kernels, and the outputs of a program."""
    # products of float32 are three of tf32, whose operands need the registers
    wide = dtype == torch.float32
    tile = 16 if rows <= 16 or wide else 32 if rows <= 32 else 64
    shape = {"NUMBERS": numbers, "PADDED": max(16, triton.next_power_of_2(numbers)), "TILE": tile}
    return shape, 64 if wide else 128


def add_low_rank(x: Tensor, down: Tensor, up: Tensor, gate: Tensor, out: Tensor) -> None:
    """Add gate (x down^T) up^T to `out` in place: x [M, D], down [N, D], up [O, N], gate [M] bool, out [M, O]."""
    (rows, width), (outputs, numbers) = x.shape, up.shape
    shape, columns = shape_of(rows, numbers, x.dtype)
    tiles = triton.cdiv(rows, shape["TILE"])
    num_parts = max(1, min(PARTS, triton.cdiv(width, CHUNK), PROGRAMS // tiles))
    chunk = triton.cdiv(triton.cdiv(width, num_parts), 64) * 64
    num_parts = triton.cdiv(width, chunk)
    parts = x.new_empty(num_parts, rows, numbers, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _down[(tiles, num_parts)](x, down, parts, x.stride(0), rows, width, chunk, BLOCK=64, **shape)
        grid = (tiles, triton.cdiv(outputs, columns))
        _up[grid](
            parts, gate.view(torch.uint8), up, out, out.stride(0), rows, outputs, num_parts, BLOCK=columns, **shape
        )
