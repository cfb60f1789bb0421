"""Keys and values at per-row positions: roll-back moves a length, no data moves.

# R model rows, S slots of a pass
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

CACHE_ARGUMENTS = ("cache", "past_key_values")  # the second one is its name before transformers 5.24
NARROW = 256  # slots up to which a cache keeps what causal passes share
SPAN_BUCKET = 64  # kernels want multiples of 64, and each span is a shape of its own


def cache_argument(module: type[nn.Module]) -> str:
    """Return what the forward pass of a class of transformers calls its cache.

    Raises TypeError if it has no such argument: it would swallow the cache among its keywords and attend to nothing before.
    """
    named = inspect.signature(module.forward).parameters
    for name in CACHE_ARGUMENTS:
        if name in named:
            return name
    raise TypeError(f"{module.__name__}.forward takes no cache: none of {', '.join(CACHE_ARGUMENTS)}")


class _RowLayer(CacheLayerMixin):
    """One layer's static keys and values [R, heads, capacity, head width], written at `owner.slots`."""

    # None to transformers until the first update; every use here comes after it
    keys: Tensor
    values: Tensor
    is_initialized: bool

    def __init__(self, owner: RowCache) -> None:
        super().__init__()
        # weak: in a cycle the keys and values, gigabytes of them, would stay until Python looks for cycles
        self._owner = weakref.ref(owner)

    @property
    def owner(self) -> RowCache:
        owner = self._owner()
        assert owner is not None  # the cache holds its layers, so it outlives them
        return owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros(rows, heads, self.owner.capacity, width)
        self.values = value_states.new_zeros(rows, heads, self.owner.capacity, value_states.shape[-1])
        self.is_initialized = True

    def room(self, key: Tensor, value: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values to write into, for heads of `width` side by side: key, value [R, S, heads * width]."""
        if not self.is_initialized:
            self.lazy_initialization(*(x.unflatten(2, (-1, width)).transpose(1, 2) for x in (key, value)))
        return self.keys, self.values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.owner.fused:  # one launch instead of two, and no index of every number
            torch.ops.sjd2.window_store(self.keys, self.values, key_states, value_states, self.owner.slots)
            return self.keys, self.values
        index = self.owner.slots[:, None, :, None].to(key_states.device)  # layers may lie on several GPUs
        self.keys.scatter_(2, index.expand_as(key_states), key_states)
        self.values.scatter_(2, index.expand_as(value_states), value_states)
        return self.keys[:, :, : self.owner.span], self.values[:, :, : self.owner.span]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.span, 0

    def get_seq_length(self) -> int:
        return self.owner.span

    def get_max_length(self) -> int:
        return self.owner.capacity

    get_max_cache_shape = get_max_length  # the name before transformers 5.20


@dataclass(frozen=True)
class Window:
    """What the slots of a pass see: lengths [R] entries of the cache, then a tail of T that ends with the slots themselves.

    seen [1 or R, S, 1 + T]: whether a slot sees the entries before the tail, then which entries of the tail it sees.
    """

    lengths: Tensor
    seen: Tensor

    def over(self, span: int) -> Tensor:
        """Return the same as a mask over the first `span` entries of each row: bool [R, S, span]."""
        tail, slots = self.seen.shape[2] - 1, self.seen.shape[1]
        seen = self.seen.expand(len(self.lengths), -1, -1)
        own = torch.arange(span, device=self.lengths.device) - self.lengths[:, None]  # [R, span] place in the tail
        within = seen.gather(2, own.clamp(0, tail - 1).add(1)[:, None].expand(-1, slots, -1))
        return torch.where((own < 0)[:, None], seen[:, :, :1], within & (own < tail)[:, None])


class RowCache(Cache):
    """A static cache for a transformers model in which every row has its own length (`lengths` [R]).

    `bound` is the host's upper bound of the longest row. Where the host `reads` lengths at no cost (on a CPU) a pass takes the
    exact value; on a GPU the decoder keeps the bound, so that no pass waits for the device, and spans are rounded up to keep
    the number of shapes small. A `fused` cache needs neither: window_attention.py reads the lengths on the device.
    """

    layers: list[_RowLayer]

    def __init__(self, layers: int, rows: int, capacity: int, device: torch.device, *, fused: bool = False) -> None:
        super().__init__(layers=[_RowLayer(self) for _ in range(layers)])
        self.reads = device.type == "cpu"
        self.fused = fused
        self.capacity = self._room(capacity)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.slots = self.lengths[:, None]
        self.span = 0
        self.bound = 0
        self._chains: dict[int, tuple[Tensor, Tensor]] = {}

    def _chain(self, width: int) -> tuple[Tensor, Tensor]:
        """Return 0..S-1 and what the slots of a causal pass see of a `Window` [1, S, 1 + S]: made once for narrow passes.

        Not kept from within a recording: there a tensor has no value until it is replayed.
        """
        if width in self._chains:
            return self._chains[width]
        device = self.lengths.device
        seen = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        seen = torch.cat([seen[:, :1], seen], 1)[None]  # all see slot 0, and so the entries before the pass
        chain = torch.arange(width, device=device), seen
        if width <= NARROW and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._chains[width] = chain
        return chain

    def _room(self, capacity: int) -> int:
        return capacity if self.reads else _rounded(capacity)  # so that the last span is a multiple too

    def window(
        self, width: int, dtype: torch.dtype, attn_mask: Tensor | None = None, past: bool = False
    ) -> dict[str, Any]:
        """Open the next `width` slots of every row and return the keyword arguments that a transformers model takes for them.

        attn_mask [R, S, T] (None: causal among the slots): which of the last T entries a slot sees, the pass' own S at the
        end. Whatever lies before is seen by all slots with `past`; else by those that see the first of the T, so that a slot
        that does not see slot 0 sees no cached entry either (SJD2's timestep tokens). That is a `Window` where the cache is
        fused, else an additive mask [R, 1, S, span]: float, as a bool mask costs three more operations a layer, and is wrong
        in eager attention.
        """
        device = self.lengths.device
        if attn_mask is None and self.fused:
            steps, seen = self._chain(width)
            self.slots, self.span = self.lengths[:, None] + steps, self.capacity
            return {"attention_mask": None, "window": Window(self.lengths, seen)}
        self.slots = self.lengths[:, None] + torch.arange(width, device=device)
        if attn_mask is None:
            self.span = self._reach(self.lengths, width)
            seen = torch.arange(self.span, device=device) <= self.slots[..., None]
            return {"attention_mask": additive(seen, dtype)[:, None]}
        tail = attn_mask.shape[2]
        first = torch.ones_like(attn_mask[:, :, :1]) if past else attn_mask[:, :, :1]
        window = Window(self.lengths + (width - tail), torch.cat([first, attn_mask], 2))
        if self.fused:
            self.span = self.capacity
            return {"attention_mask": None, "window": window}
        self.span = self._reach(window.lengths, tail)
        return {"attention_mask": additive(window.over(self.span), dtype)[:, None]}

    def _reach(self, before: Tensor, tail: int) -> int:
        """Return how many entries a pass has to look at: the longest row's and the tail's."""
        if self.reads:
            return int(before.max()) + tail
        return min(self.capacity, _rounded(self.bound + tail))

    def compact(self, path: Tensor) -> None:
        """Move the entries of an accepted tree path to the front of the pass: slots path [R, L] -> slots 1..L.

        Entries beyond what gets committed move too; the next pass overwrites them.
        """
        begin = self.lengths[:, None]
        source = (begin + path)[:, None, :, None]
        target = (begin + torch.arange(1, path.shape[1] + 1, device=path.device))[:, None, :, None]
        for layer in self.layers:
            for field in (layer.keys, layer.values):
                shape = (-1, field.shape[1], -1, field.shape[3])
                field.scatter_(2, target.expand(shape), field.gather(2, source.expand(shape)))

    def reserve(self, capacity: int) -> None:
        """Make room for rows of up to `capacity` tokens; what is stored stays."""
        capacity = self._room(capacity)
        if capacity <= self.capacity:
            return
        for layer in self.layers:
            if layer.is_initialized:
                room = (0, 0, 0, capacity - self.capacity)
                layer.keys = torch.nn.functional.pad(layer.keys, room)
                layer.values = torch.nn.functional.pad(layer.values, room)
        self.capacity = capacity

    def take_rows(self, rows: Tensor, source: RowCache, source_rows: Tensor) -> None:
        """Copy whole rows of another cache (a prefill) into these rows; what lies beyond is free to overwrite."""
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            if not mine.is_initialized:
                rows_heads = (len(self.lengths), theirs.keys.shape[1], self.capacity)
                mine.keys = theirs.keys.new_zeros(*rows_heads, theirs.keys.shape[-1])
                mine.values = theirs.values.new_zeros(*rows_heads, theirs.values.shape[-1])
                mine.is_initialized = True
            mine.keys[rows, :, : source.capacity] = theirs.keys[source_rows]
            mine.values[rows, :, : source.capacity] = theirs.values[source_rows]
        self.lengths[rows] = source.lengths[source_rows]


def _rounded(size: int) -> int:
    return -(-size // SPAN_BUCKET) * SPAN_BUCKET


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a bool mask into the float mask that attention adds: 0 where seen, the smallest number elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
