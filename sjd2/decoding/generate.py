"""The two ways to run a decoder: `generate` a batch, or `stream` requests through a few rows.

# B samples, S slots of a pass, N image-phase tokens
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sjd2.decoding.cuda_graph import Graphs
from sjd2.decoding.decoder import BaseDecoder
from sjd2.decoding.dispatch import start_engine
from sjd2.decoding.engine import Engine, Sample
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError
from sjd2.models.base import Condition, ImageModel

WARM_UP_PASSES = 3
RECORDED_PASSES = 6  # where passes are replayed: enough to have one recorded before the first image is timed
CHECK_EVERY = 8  # passes between two reads of the rows' lengths from a GPU; on a CPU they are read after every pass


@dataclass
class DecodeResult:
    """The samples of one batch in the order of its seeds, and seconds {prefill, decode} of the whole batch."""

    samples: list[Sample]
    seconds: dict[str, float]

    @property
    def tokens(self) -> Tensor:
        """All tokens as one tensor [B, N]."""
        return torch.from_numpy(np.stack([sample.tokens for sample in self.samples]))


@dataclass
class StepInfo:
    """What a per-step callback sees: tensors on the model's device; nothing is synchronised for it."""

    pass_index: int
    committed: Tensor  # [B]
    accepted: Tensor  # [B] tokens committed in this pass
    tokens: Tensor  # [B, N + S] the live buffer: clone what you keep
    peek: Callable[[], dict[str, Tensor]]  # what else a trace keeps of this pass: the engine's own `peek`


def _finished(engine: Engine, passes: int) -> list[int]:
    return engine.finished() if engine.cache.reads or passes % CHECK_EVERY == 0 else []


def _report(engine: Engine, on_step: Callable[[StepInfo], None] | None, passes: int, rows: int) -> None:
    if on_step is not None:
        state = engine.state
        own = slice(rows)  # an engine may have more
        on_step(
            StepInfo(
                passes,
                state.committed[own],
                engine.history[-1][own],
                state.tokens[own],
                lambda: {name: values[own] for name, values in engine.peek().items()},
            )
        )


def generate(
    model: ImageModel,
    decoder: BaseDecoder,
    condition: Condition,
    seeds: list[int],
    *,
    sampling: SamplingParams,
    on_step: Callable[[StepInfo], None] | None = None,
    graphs: Graphs | None = None,
) -> DecodeResult:
    """Decode one image per prompt of `condition`, all rows started together.

    seeds: one integer per prompt (`noise.sample_seed`). on_step is called after every pass. graphs: replays passes as CUDA
    graphs; give the same object to all batches.
    Raises `UserError` if seeds and prompts differ in number.
    """
    rows = len(condition)
    if len(seeds) != rows:
        raise UserError(f"generate needs one seed per prompt, got {len(seeds)} seeds for {rows} prompts.")
    prompt = max(condition.embeds.shape[1], condition.uncond_embeds.shape[1])
    engine = (start_engine if graphs is None else graphs.start)(model, decoder, rows, prompt, sampling)
    engine.admit(list(range(rows)), condition, seeds)
    begin, passes = engine.now(), 0
    while len(_finished(engine, passes)) < engine.num_rows:  # rows without a prompt look finished
        engine.step()
        passes += 1
        _report(engine, on_step, passes, rows)
    engine.seconds["decode"] = engine.now() - begin
    return DecodeResult([engine.collect(row) for row in range(rows)], engine.seconds)


class _Enough(Exception):
    """Enough passes have run."""


def warm_up(
    model: ImageModel,
    decoder: BaseDecoder,
    condition: Condition,
    *,
    sampling: SamplingParams,
    graphs: Graphs | None = None,
) -> None:
    """Run the first passes of a batch and drop them: first calls load kernels, compile, and record.

    Afterwards `graphs` holds what the next batch of as many rows replays.
    """
    passes = WARM_UP_PASSES if graphs is None else RECORDED_PASSES

    def few(info: StepInfo) -> None:
        if info.pass_index >= passes:
            raise _Enough

    with contextlib.suppress(_Enough):
        generate(model, decoder, condition, [0] * len(condition), sampling=sampling, on_step=few, graphs=graphs)


def stream(
    model: ImageModel,
    decoder: BaseDecoder,
    requests: Iterable[tuple[str, int]],
    *,
    rows: int,
    sampling: SamplingParams,
    on_step: Callable[[StepInfo], None] | None = None,
    graphs: Graphs | None = None,
) -> Iterator[tuple[int, Sample]]:
    """Decode (prompt, seed) requests with `rows` in flight; a finished row takes the next request at once.

    Yields (index of the request, sample) in the order of finishing.
    """
    queue = enumerate(requests)
    engine = (start_engine if graphs is None else graphs.start)(model, decoder, rows, 1, sampling)
    owner: dict[int, int] = {}
    passes, empty = 0, list(range(rows))
    while True:
        entering = [entry for _, entry in zip(empty, queue, strict=False)]
        if entering:
            rows_free = empty[: len(entering)]
            engine.admit(
                rows_free, model.encode([prompt for _, (prompt, _) in entering]), [seed for _, (_, seed) in entering]
            )
            owner.update(zip(rows_free, (index for index, _ in entering), strict=True))
        if not owner:
            return
        engine.step()
        passes += 1
        _report(engine, on_step, passes, rows)
        empty = [row for row in _finished(engine, passes) if row in owner]
        for row in empty:
            yield owner.pop(row), engine.collect(row)
        empty = [row for row in range(rows) if row not in owner]
