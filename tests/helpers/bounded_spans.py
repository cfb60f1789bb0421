"""Caches that keep a bound instead of reading lengths, as on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sjd2.models.kv_cache import RowCache


@contextmanager
def as_on_a_gpu() -> Iterator[list[tuple[int, int]]]:
    """Let caches keep a bound in buckets of 8, and yield (span, entries needed) of every pass."""
    start, window, spans = RowCache.__init__, RowCache.window, []

    def build(cache: RowCache, *args: Any, **kwargs: Any) -> None:
        start(cache, *args, **kwargs)
        cache.reads = False
        cache.capacity = cache._room(cache.capacity)

    def checked(
        cache: RowCache, width: int, dtype: torch.dtype, attn_mask: Tensor | None = None, past: bool = False
    ) -> dict[str, Any]:
        attention = window(cache, width, dtype, attn_mask, past)
        spans.append((cache.span, int(cache.lengths.max()) + width))
        assert spans[-1][1] <= cache.span
        assert cache.span % 8 == 0 or (attn_mask is not None and attn_mask.shape[2] > width)
        return attention

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sjd2.models.kv_cache.SPAN_BUCKET", 8)
        patch.setattr(RowCache, "__init__", build)
        patch.setattr(RowCache, "window", checked)
        yield spans
