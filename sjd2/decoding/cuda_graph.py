"""Passes as CUDA graphs: recorded once, or for each bound of the rows' lengths, then replayed by a single launch.

An eager pass of a 7B model is some 2000 launches, for which the host needs longer than the device for its work. A pass reads
nothing on the host and all its control is data (tests/engine/test_syncs.py), so it can be recorded as it is; what remains is
to have every tensor that outlives a pass at a fixed address.
# B samples, R model rows (2B with guidance, else B)
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from sjd2.decoding.decoder import BaseDecoder
from sjd2.decoding.dispatch import engine_class
from sjd2.decoding.engine import Engine
from sjd2.decoding.recorded_prompt import MOST_TOKENS, RecordedPrompt
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import first_line
from sjd2.models.base import ImageModel
from sjd2.models.kv_cache import RowCache
from sjd2.models.spec import ModelSpec
from sjd2.models.timesteps import Timesteps

# tokens between two bounds of a cache that is not fused: each is a graph, and a pass reads up to so many entries for nothing
BUCKET = 256
WARM = 3  # passes before the first recording: kernels are loaded, and tensors that were None get their shape
PROMPT = 64  # room for prompts is made in such steps, because a larger cache makes all graphs void

Replay = Callable[[], Any]
logger = logging.getLogger(__name__)


class CudaGraphs:
    """Records work on a CUDA device; all graphs share one pool of memory, since they run one after the other."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, work: Callable[[], None]) -> Replay:
        """Record `work` without doing it and return what does it."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                work()
        finally:
            torch.cuda.set_stream(stream)  # older torch stays on its own stream where a recording fails
        self.pool = graph.pool()
        return graph.replay


class Replayed(Engine):
    """An engine whose passes are recorded and replayed; the tokens are those of the plain engine with the same spans.

    To be mixed into the engine that it replays (`replayed`).
    """

    def __init__(
        self,
        model: ImageModel,
        decoder: BaseDecoder,
        rows: int,
        prompt: int,
        sampling: SamplingParams,
        record: Callable[[Callable[[], None]], Replay],
    ) -> None:
        super().__init__(model, decoder, rows, prompt, sampling)
        self.record, self.adapter, self.compiler = record, model.adapter, model.compiler
        self.graphs: dict[int, Replay | None] = {}  # None: one pass has run at this bound
        self.prefills: dict[int, RecordedPrompt] = {}  # by the number of prompts
        self.fixed: list[Tensor] = []  # the tensors that outlive a pass, at the addresses that the graphs know
        self.num_new = torch.zeros_like(self.state.committed)  # [B] tokens committed in the last pass
        self.warm = 0
        self.refused = False  # whether the device refused to record a pass

    def grow(self) -> None:
        super().grow()
        self.graphs.clear()  # keys and values may lie elsewhere now, the model's or a draft network's
        self.prefills.clear()  # there is room for longer prompts

    def run_prompts(
        self,
        embeds: Tensor,
        positions: Tensor | None = None,
        gate: Tensor | None = None,
        timesteps: Timesteps | None = None,
    ) -> tuple[Tensor, RowCache]:
        """Run prompts: replayed where they are those of all rows, of one, or one that all share, and are not many tokens."""
        count, room = len(embeds), self.prompt + self.drafted
        entering = count // self.branches if self.drafted else count  # with draft tokens the branches come together
        usual = entering in (1, self.num_rows) and count * room <= MOST_TOKENS
        if self.refused or not usual or timesteps is not None:
            return super().run_prompts(embeds, positions, gate, timesteps)
        if count not in self.prefills:
            self.prefills[count] = RecordedPrompt(self.model, embeds, room)
        prefill = self.prefills[count]
        return prefill(embeds, positions, gate, self._record_prompts), prefill.cache

    def _record_prompts(self, work: Callable[[], None]) -> Replay:
        try:
            return self.record(work)
        except RuntimeError as error:  # of CUDA
            self._refuse(error)
        return work

    @torch.inference_mode()
    def step(self) -> None:
        """Run one pass: replayed where one of this bound was recorded."""
        if self.warm < WARM:
            self.warm += 1
            super().step()
            return
        bound, most = self.cache.bound, self.prompt + self.total
        # one graph serves the whole image where attention reads the lengths on the device
        level = self.cache.bound = most if self.cache.fused else min(-(-bound // BUCKET) * BUCKET, most)
        if level not in self.graphs:  # as it is: kernels of new shapes are loaded, which cannot happen in a recording
            self.graphs[level] = None
            self._fix()
            self._work()
        else:
            graph = self.graphs[level] = self.graphs[level] or self._recorded()
            graph()
        self.history.append(self.num_new.clone())
        self.cache.bound = min(bound + self.decoder.window, most)

    def _recorded(self) -> Replay:
        """Record a pass; where the device refuses, leave everything as it was and return the pass itself, from now on."""
        owners = {name: getattr(self, name) for name in self.persistent}
        kept, passes, bound = list(self._kept()), len(self.history), self.cache.bound
        try:
            return self.record(self._work)
        except RuntimeError as error:  # of CUDA: nothing of the pass has been done
            self._refuse(error)
        for name, owner in owners.items():
            setattr(self, name, owner)
        for (owner, name), fixed in zip(kept, self.fixed, strict=True):
            setattr(owner, name, fixed)
        del self.history[passes:]
        self.cache.bound = bound
        return self._work

    def _refuse(self, error: RuntimeError) -> None:
        logger.warning("passes run as they are, not as CUDA graphs: %s.", first_line(error))
        self.record, self.refused = (lambda work: work), True

    def _fix(self) -> None:
        """Give every tensor that outlives a pass an address of its own, once."""
        if not self.fixed:
            for owner, name in list(self._kept()):
                self.fixed.append(getattr(owner, name).clone())
                setattr(owner, name, self.fixed[-1])

    def _work(self) -> None:
        """Run a pass and bring its results to the fixed addresses."""
        super().step()
        self.num_new.copy_(self.history.pop())
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
        """Yield where every tensor is kept that a pass leaves to the next: (owner, attribute)."""
        for name in self.persistent:
            yield from _tensors(self, name)

    def serves(self, model: ImageModel, decoder: BaseDecoder, rows: int, sampling: SamplingParams) -> bool:
        """Return whether this is an engine of just these; a decoder built again from equal settings is the same one.

        A smaller batch is served too: its other rows stay empty, as recording passes of its own would cost more.
        """
        same = self.model is model and self.adapter is model.adapter and self.decoder == decoder
        same = same and self.cache.fused == model.fused and self.compiler is model.compiler
        return same and self.num_rows >= rows and self.sampling == sampling


@functools.cache  # one class each: compiled pieces know their engine by its class
def replayed(engine: type[Engine]) -> type[Replayed]:
    """Return the class of an engine's replayed counterpart."""
    return type(f"Replayed{engine.__name__}", (Replayed, engine), {})


def _tensors(owner: Any, name: str) -> Iterator[tuple[Any, str]]:
    value = getattr(owner, name)
    if isinstance(value, Tensor):
        yield owner, name
    elif isinstance(value, RowCache):
        yield value, "lengths"
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(value, field.name)


def usual_graphs(
    device: str, spec: ModelSpec | None, decoder: BaseDecoder, wanted: bool | None = None
) -> tuple[Graphs | None, str | None]:
    """Return what records the passes of a decoder on this device, and the sentence that says why nothing does.

    wanted: True records whatever can be tried, False nothing, None what has been tested. Off CUDA there is nothing to record,
    and nothing to say of it.
    """
    if wanted is False or not device.startswith("cuda"):
        return None, None
    why = None if wanted else obstacle(spec, decoder)
    return (Graphs(), None) if why is None else (None, f"passes run as they are, not as CUDA graphs: {why}")


def obstacle(spec: ModelSpec | None, decoder: BaseDecoder) -> str | None:
    """Return why the passes of a decoder cannot be recorded on a GPU, or None."""
    if getattr(spec, "device_map", None) is not None:
        return "model.device_map may spread the layers over several devices"
    if (quantisation := getattr(spec, "quantisation", None)) is not None:
        return f"the layers of model.quantisation={quantisation} have not been recorded yet"
    if not engine_class(decoder).replayable:
        return f"{decoder.name} plans its passes on the host"
    return None


class Graphs:
    """Opens engines of replayed passes; the next batch of no more rows gets the last one's engine, graphs and memory."""

    def __init__(self, record: Callable[[Callable[[], None]], Replay] | None = None) -> None:
        self.record = record or CudaGraphs()
        self.kept: Replayed | None = None
        self.refused = False

    def release(self) -> None:
        """Free the last engine: its keys and values, and its graphs."""
        if self.kept is not None:
            self.kept.prefills.clear()
            self.kept.graphs.clear()  # a refused pass refers to its engine, which would stay until Python looks for cycles
        self.kept = None

    def holds(self, model: ImageModel, decoder: BaseDecoder, rows: int, sampling: SamplingParams) -> bool:
        """Return whether `start` would hand out the last engine, with what it has recorded."""
        return self.kept is not None and self.kept.serves(model, decoder, rows, sampling)

    def start(
        self, model: ImageModel, decoder: BaseDecoder, rows: int, prompt: int, sampling: SamplingParams
    ) -> Engine:
        """Open an engine as `generate.start_engine` does; it runs as it is if it is not replayable, or one was refused."""
        engine = engine_class(decoder)
        self.refused = self.refused or (self.kept is not None and self.kept.refused)
        if not engine.replayable or self.refused:
            self.release()
            return engine(model, decoder, rows, prompt, sampling)
        if self.kept is not None and self.kept.serves(model, decoder, rows, sampling):
            self.kept.clear()
            return self.kept
        self.release()  # its memory first
        self.kept = replayed(engine)(model, decoder, rows, -(-prompt // PROMPT) * PROMPT, sampling, self.record)
        return self.kept
