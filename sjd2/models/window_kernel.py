"""Attention of the slots of a pass over per-row caches as Triton kernels; imported only where Triton is installed.

One program attends for a tile of query rows (the slots of all heads that share keys) to a part of one row's entries; it reads
on the device how many there are, so nothing is masked, launched or recorded by length. A second kernel merges the parts.

# R model rows, S slots of a pass, T entries of the tail, H query heads, G of them share keys, D head width
"""
# ruff: noqa: ANN001, ANN202 - Triton types its functions by their use
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 16  # parts that a row's entries are split into, at most
WAVES = 2  # programs per multiprocessor below which they are split
LEAST = tl.constexpr(-1e30)  # in place of -inf, whose difference to itself is no number
LOG2E = 1.4426950408889634


@triton.jit
def _entries(
    acc, top, total, query, keys, values, seen, n, end, length, past, scale, tail_row, allowed,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Take entries n..n + BLOCK - 1 into the running softmax; TAIL: they are not all before the tail."""
    place = n + tl.arange(0, BLOCK)
    dim = tl.arange(0, PADDED)
    if TAIL:
        there = place < end
        own = place - length  # place in the tail, < 0 before it
        visible = tl.load(
            seen + tail_row[:, None] + own[None], mask=allowed[:, None] & (there & (own >= 0))[None], other=0
        )
        visible = tl.where((own < 0)[None], past[:, None], visible != 0) & there[None]
        inside = there[:, None] & (dim < WIDTH)[None]
    else:
        visible = past[:, None] & (place >= 0)[None]
        inside = (place >= 0)[:, None] & (dim < WIDTH)[None]
    where = place[:, None] * WIDTH + dim[None]
    key = tl.load(keys + where, mask=inside, other=0.0)
    score = tl.dot(query, tl.trans(key), input_precision="tf32x3") * scale
    score = tl.where(visible, score, LEAST)
    new = tl.maximum(top, tl.max(score, 1))
    weight = tl.where(visible, tl.exp2(score - new[:, None]), 0.0)
    kept = tl.exp2(top - new)
    value = tl.load(values + where, mask=inside, other=0.0)
    acc = acc * kept[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="tf32x3")
    return acc, new, total * kept + tl.sum(weight, 1)


@triton.jit(do_not_specialize=["seen_row", "num_slots", "num_tail"])
def _attend(
    query, keys, values, lengths, seen, out, tops, totals,
    query_row, query_head, query_slot, seen_row, capacity, num_slots, num_tail, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Attend for one tile to one part of a row's entries; WHOLE: there is one part, which is divided here."""
    tiles = tl.cdiv(num_slots * GROUP, TILE)
    row = tl.program_id(0) // tiles // (HEADS // GROUP)
    shared = tl.program_id(0) // tiles % (HEADS // GROUP)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    length = tl.load(lengths + row).to(tl.int32)
    total_entries = length + num_tail
    chunk = tl.cdiv(tl.cdiv(total_entries, parts), BLOCK) * BLOCK
    begin = part * chunk
    end = tl.minimum(begin + chunk, total_entries)

    item = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)  # slot by slot, the heads of a group side by side
    slot, head = item // GROUP, shared * GROUP + item % GROUP
    real = slot < num_slots
    dim = tl.arange(0, PADDED)
    width = dim < WIDTH
    row = row.to(tl.int64)  # caches of large batches have more than 2^31 numbers
    where = row * query_row + head[:, None] * query_head + slot[:, None] * query_slot + dim[None]
    q = tl.load(query + where, mask=real[:, None] & width[None], other=0.0)
    seen += row * seen_row
    tail_row = slot * (num_tail + 1) + 1
    past = tl.load(seen + tail_row - 1, mask=real, other=0) != 0
    first = (row * (HEADS // GROUP) + shared) * capacity * WIDTH
    keys += first
    values += first

    top = tl.full([TILE], LEAST, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, PADDED], tl.float32)
    full = tl.minimum(end, length // BLOCK * BLOCK)  # whole blocks of entries before the tail
    for n in range(begin, full, BLOCK):
        acc, top, total = _entries(
            acc, top, total, q, keys, values, seen, n, end, length, past, scale, tail_row, real,
            WIDTH, PADDED, BLOCK, False,
        )  # fmt: skip
    for n in range(tl.maximum(begin, full), end, BLOCK):
        acc, top, total = _entries(
            acc, top, total, q, keys, values, seen, n, end, length, past, scale, tail_row, real,
            WIDTH, PADDED, BLOCK, True,
        )  # fmt: skip

    place = (row * num_slots + slot) * HEADS + head  # [R, S, H]
    if WHOLE:
        acc = acc / tl.where(real, total, 1.0)[:, None]
        tl.store(
            out + place[:, None] * WIDTH + dim[None], acc.to(out.dtype.element_ty), mask=real[:, None] & width[None]
        )
    else:
        place = place * parts + part
        tl.store(tops + place, top, mask=real)
        tl.store(totals + place, total, mask=real)
        tl.store(out + place[:, None] * WIDTH + dim[None], acc, mask=real[:, None] & width[None])


@triton.jit(do_not_specialize=["parts"])
def _merge(
    partial, tops, totals, out, parts, WIDTH: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Join the parts of one slot and head, each with its own maximum, into the softmax over all entries."""
    item = tl.program_id(0).to(tl.int64)
    part, dim = tl.arange(0, PARTS), tl.arange(0, PADDED)
    there, width = part < parts, dim < WIDTH
    top = tl.load(tops + item * parts + part, mask=there, other=LEAST)
    total = tl.load(totals + item * parts + part, mask=there, other=0.0)
    where = (item * parts + part[:, None]) * WIDTH + dim[None]
    acc = tl.load(partial + where, mask=there[:, None] & width[None], other=0.0)
    weight = tl.exp2(top - tl.max(top, 0))
    joined = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + item * WIDTH + dim, joined.to(out.dtype.element_ty), mask=width)


@triton.jit(do_not_specialize=["num_slots"])
def _store(
    key, value, keys, values, slots,
    key_row, key_head, key_slot, value_row, value_head, value_slot, capacity, num_slots,
    SHARED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the keys and values of a tile of slots of one row and head to their entries."""
    tiles = tl.cdiv(num_slots, TILE)
    row, head = tl.program_id(0) // tiles // SHARED, tl.program_id(0) // tiles % SHARED
    slot, dim = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE), tl.arange(0, PADDED)
    entry = tl.load(slots + row * num_slots + slot, mask=slot < num_slots, other=0)
    row = row.to(tl.int64)
    inside = (slot < num_slots)[:, None] & (dim < WIDTH)[None]
    target = ((row * SHARED + head) * capacity + entry)[:, None] * WIDTH + dim[None]
    new = tl.load(key + row * key_row + head * key_head + slot[:, None] * key_slot + dim[None], mask=inside)
    tl.store(keys + target, new, mask=inside)
    new = tl.load(value + row * value_row + head * value_head + slot[:, None] * value_slot + dim[None], mask=inside)
    tl.store(values + target, new, mask=inside)


def store(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write key, value [R, H / G, S, D] to the entries slots [R, S] of keys, values [R, H / G, capacity, D]."""
    rows, shared, num_slots, width = key.shape
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    rows_at_once = min(16, triton.next_power_of_2(num_slots))
    with torch.cuda.device_of(key):  # Triton launches on the current device
        _store[(triton.cdiv(num_slots, rows_at_once) * rows * shared,)](
            key, value, keys, values, slots.contiguous(), *key.stride()[:3], *value.stride()[:3], keys.shape[2], num_slots,
            SHARED=shared, WIDTH=width, PADDED=triton.next_power_of_2(width), TILE=rows_at_once,
        )  # fmt: skip


@dataclass(frozen=True)
class Card:
    """A GPU: its multiprocessors, the bytes of shared memory of each, and whether they multiply in groups of four warps."""

    processors: int
    shared_memory: int
    grouped: bool


def tile(num_items: int, width: int, dtype: torch.dtype, card: Card) -> dict[str, Any]:
    """Return the shape of a program: query rows, entries at once, and how Triton compiles it for a card.

    tests/models/test_window_attention.py compiles all shapes for several cards and holds what they take against the limit.
    """
    exact = dtype == torch.float32  # each product is three, with operands twice as large
    rows = max(16, min(32 if exact else 64, triton.next_power_of_2(num_items)))
    large = exact or width > 128
    wide = rows >= 32 if exact else rows >= 64 and not card.grouped  # with four warps a thread would spill
    return {
        "TILE": rows,
        "BLOCK": 32 if large else 64,
        "num_warps": 8 if wide else 4,
        "num_stages": 3 if not large and (rows < 64 or card.shared_memory >= 2**17) else 2,
    }


def split(query: Tensor, keys: Tensor, shape: dict[str, Any]) -> int:
    """Return into how many parts the entries of a row are split, so that the device has work: a power of two."""
    rows, heads, slots, _ = query.shape
    _, shared, capacity, _ = keys.shape
    programs = -(-slots * (heads // shared) // shape["TILE"]) * rows * shared
    parts, most = 1, min(PARTS, -(-capacity // shape["BLOCK"]))
    while parts * 2 <= most and programs * parts < WAVES * card(query.device).processors:
        parts *= 2
    return parts


@functools.cache
def card(device: torch.device) -> Card:
    """Return what a device is; a CPU, which interprets the kernels, is a small one."""
    if device.type != "cuda":
        return Card(processors=4, shared_memory=2**16, grouped=False)
    properties: Any = torch.cuda.get_device_properties(device)  # the stubs lack shared memory
    grouped = properties.major in (9, 10)  # Hopper, Blackwell of data centres
    return Card(properties.multi_processor_count, properties.shared_memory_per_block_optin, grouped)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, seen: Tensor, scale: float, parts: int | None = None
) -> Tensor:
    """Attend to `lengths` [R] entries and the tail after them: query [R, H, S, D] -> [R, S, H, D].

    keys, values [R, H / G, capacity, D], contiguous. seen [1 or R, S, 1 + T]: whether each slot sees the entries before the
    tail, then which entries of the tail. parts: programs that share a row's entries, by default as the device needs.
    """
    rows, heads, slots, width = query.shape
    shared = keys.shape[1]
    shape = tile(slots * (heads // shared), width, query.dtype, card(query.device))
    parts = split(query, keys, shape) if parts is None else parts
    out = query.new_empty(rows, slots, heads, width)
    partial = tops = totals = out
    if parts > 1:
        partial = query.new_empty(rows, slots, heads, parts, width, dtype=torch.float32)
        tops = query.new_empty(rows, slots, heads, parts, dtype=torch.float32)
        totals = torch.empty_like(tops)
    padded = max(16, triton.next_power_of_2(width))
    grid = (triton.cdiv(slots * (heads // shared), shape["TILE"]) * rows * shared, parts)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _attend[grid](
            query, keys, values, lengths, seen.view(torch.uint8), partial, tops, totals,
            *query.stride()[:3], seen.stride(0) if len(seen) > 1 else 0,
            keys.shape[2], slots, seen.shape[2] - 1, scale * LOG2E,
            HEADS=heads, GROUP=heads // shared, WIDTH=width, PADDED=padded, WHOLE=parts == 1, **shape,
        )  # fmt: skip
        if parts > 1:
            merged = (rows * slots * heads,)
            _merge[merged](partial, tops, totals, out, parts, WIDTH=width, PADDED=padded, PARTS=PARTS, num_warps=2)
    return out
