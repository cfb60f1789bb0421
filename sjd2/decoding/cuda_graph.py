"""Passes as CUDA graphs: recorded once for each bound of the rows' lengths, then replayed by a single launch.

An eager pass of a 7B model is some 2000 launches, for which the host needs longer than the device for its work. A pass reads
nothing on the host and all its control is data (tests/engine/test_syncs.py), so it can be recorded as it is; what remains is to have
every tensor that outlives a pass at a fixed address.
# B samples, R model rows (2B with guidance, else B)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from sjd2.decoding.generate import Decoder
from sjd2.decoding.sampling import SamplingParams
from sjd2.decoding.window import Decoding
from sjd2.models.base import ImageModel
from sjd2.models.kv_cache import RowCache

BUCKET = 256  # tokens between two bounds: each is a graph, and a pass reads up to so many entries for nothing
WARM = 3  # passes before the first recording: parts build their tables, and tensors that were None get their shape
PROMPT = 64  # room for prompts is made in such steps, because a larger cache makes all graphs void

Replay = Callable[[], Any]


class CudaGraphs:
    """Records work on a CUDA device; all graphs share one pool of memory, since they run one after the other."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, work: Callable[[], None]) -> Replay:
        """Record `work` without doing it and return what does it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            work()
        self.pool = graph.pool()
        return graph.replay


class Replayed(Decoding):
    """A loop whose passes are recorded and replayed; the tokens are those of the plain loop with the same spans."""

    def __init__(
        self,
        model: ImageModel,
        decoder: Decoder,
        rows: int,
        prompt: int,
        sampling: SamplingParams,
        record: Callable[[Callable[[], None]], Replay],
    ) -> None:
        super().__init__(model, decoder, rows, prompt, sampling)
        self.record = record
        self.graphs: dict[int, Replay | None] = {}  # None: one pass has run at this bound
        self.fixed: list[Tensor] = []  # the tensors that outlive a pass, at the addresses that the graphs know
        self.moved = torch.zeros_like(self.state.committed)  # [B] tokens committed in the last pass
        self.warm = 0
        self.room = self.cache.capacity

    @torch.inference_mode()
    def step(self) -> None:
        """One pass, as `Decoding.step`: replayed where one of this bound was recorded."""
        if self.warm < WARM:
            self.warm += 1
            super().step()
            return
        if self.cache.capacity != self.room:  # keys and values lie elsewhere now
            self.graphs.clear()
            self.room = self.cache.capacity
        bound, most = self.cache.bound, self.prompt + self.total
        level = self.cache.bound = min(-(-bound // BUCKET) * BUCKET, most)
        if level not in self.graphs:  # as it is: kernels of new shapes are loaded, which cannot happen in a recording
            self.graphs[level] = None
            self._fix()
            self._work()
        else:
            self.graphs[level] = self.graphs[level] or self.record(self._work)
            self.graphs[level]()
        self.history.append(self.moved.clone())
        self.cache.bound = min(bound + self.decoder.window, most)

    def _fix(self) -> None:
        """Give every tensor that outlives a pass an address of its own, once."""
        if not self.fixed:
            for owner, name in list(self._kept()):
                self.fixed.append(getattr(owner, name).clone())
                setattr(owner, name, self.fixed[-1])

    def _work(self) -> None:
        """Run a pass and bring its results to the fixed addresses."""
        super().step()
        self.moved.copy_(self.history.pop())
        kept = list(self._kept())
        results = [getattr(owner, name) for owner, name in kept]
        known = {tensor.untyped_storage().data_ptr() for tensor in self.fixed}
        # what now lies where another result goes is moved out of the way first
        results = [
            result.clone() if result is not fixed and result.untyped_storage().data_ptr() in known else result
            for result, fixed in zip(results, self.fixed, strict=True)
        ]
        for (owner, name), result, fixed in zip(kept, results, self.fixed, strict=True):
            if result.shape != fixed.shape or result.dtype != fixed.dtype:
                raise RuntimeError(f"a pass changed the shape of {type(owner).__name__}.{name}, it cannot be replayed.")
            if result is not fixed:
                fixed.copy_(result)
            setattr(owner, name, fixed)

    def _kept(self) -> Iterator[tuple[Any, str]]:
        """Yield where every tensor is kept that a pass hands on to the next: (owner, attribute)."""
        yield self, "fresh"
        for part in (self.state, self.draft, self.cache):
            yield from _tensors(part)

    def serves(self, model: ImageModel, decoder: Decoder, rows: int, sampling: SamplingParams) -> bool:
        """Say whether this is a loop of just these."""
        return (
            self.model is model and self.decoder is decoder and len(self.started) == rows and self.sampling == sampling
        )

    @torch.inference_mode()
    def rewind(self) -> None:
        """Forget all rows, as if the loop had just been opened."""
        self.state.committed.fill_(self.total)
        self.state.cached.fill_(self.total - 1)
        self.cache.lengths.fill_(0)
        self.cache.bound = 0
        self.history, self.dropped, self.started = [], 0, [0] * len(self.started)
        self.seconds = dict.fromkeys(self.seconds, 0.0)


def _tensors(part: Any) -> Iterator[tuple[Any, str]]:
    if isinstance(part, RowCache):
        yield part, "lengths"
    elif is_dataclass(part):
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, Tensor):
                yield part, field.name
            else:
                yield from _tensors(value)


class Graphs:
    """Opens loops of replayed passes; the next batch of as many rows gets the last one's loop, graphs and memory."""

    def __init__(self, record: Callable[[Callable[[], None]], Replay] | None = None) -> None:
        self.record = record or CudaGraphs()
        self.kept: Replayed | None = None

    def start(self, model: ImageModel, decoder: Decoder, rows: int, prompt: int, sampling: SamplingParams) -> Decoding:
        """Open a loop as `Decoder.start` does; a decoder with a loop of its own runs as it is."""
        if not isinstance(decoder, Decoder):
            return decoder.start(model, rows, prompt, sampling)
        if self.kept is not None and self.kept.serves(model, decoder, rows, sampling):
            self.kept.rewind()
            return self.kept
        self.kept = None  # its memory first
        self.kept = Replayed(model, decoder, rows, -(-prompt // PROMPT) * PROMPT, sampling, self.record)
        return self.kept
