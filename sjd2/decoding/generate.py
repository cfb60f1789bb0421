"""What a decoder is made of, and the two ways to run one: `generate` a batch, or `stream` requests through a few rows.

# B samples, S slots of a pass, N image-phase tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sjd2.decoding.interfaces import Drafter, Refiner, Verifier
from sjd2.decoding.sampling import SamplingParams
from sjd2.decoding.window import Decoding, Sample
from sjd2.errors import UserError
from sjd2.models.base import Condition, ImageModel

if TYPE_CHECKING:
    from sjd2.decoding.cuda_graph import Graphs

CHECK_EVERY = 8  # passes between two looks at the device for finished rows; a CPU looks after every pass


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder is its parts and a window; the loop is `loop.Decoding`, the same for all.

    window: model inputs per pass, the last committed token and the nodes of trees included (AR is 1, drafts = window - 1).
    refiner: None where the drafter draws all guesses anew in each pass (EAGLE).
    rule: `exact` commits only behind clean inputs (docs/exactness.md), `paper` commits any accepted slot.
    refeed: with rule=paper, committed tokens whose keys came from a noisy input pass once more, clean (else they stay).
    """

    name: str
    window: int
    lossless: bool
    drafter: Drafter | None = None
    verifier: Verifier | None = None
    refiner: Refiner | None = None
    rule: str = "exact"
    refeed: bool = True

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"decoder.window must be 1 or more, got {self.window}; 1 is plain AR.")
        if self.window > 1 and (self.drafter is None or self.verifier is None):
            raise UserError(f"decoder '{self.name}' with window {self.window} needs a drafter and a verifier.")
        if self.window > 1 and (self.carried > 1) != (self.refiner is not None):
            raise UserError(
                f"decoder '{self.name}' needs a refiner for the guesses that live on, e.g. decoder/refiner=coupled."
                if self.refiner is None
                else f"decoder '{self.name}' draws all its guesses anew in each pass, so a refiner has nothing to refine; "
                "leave decoder/refiner=null."
            )
        if self.window > 1 and self.drafter.recorded and not getattr(self.refiner, "record", True):
            raise UserError(
                f"{type(self.drafter).__name__} drafts from recorded laws; set decoder.refiner.record=true, or use "
                "decoder/refiner=coupled."
            )
        if self.rule == "paper" and self.carried != self.window:
            raise UserError("rule=paper commits along a chain, so it cannot be combined with trees; use rule=exact.")
        if self.rule not in ("exact", "paper"):
            raise UserError(f"decoder.rule must be exact or paper, got '{self.rule}'.")
        if self.lossless and self.rule == "paper":
            raise UserError("rule=paper commits tokens behind noisy inputs, so the decoder cannot be called lossless.")
        for part in (self.drafter, self.verifier, self.refiner):
            if self.lossless and part is not None and not part.exact:
                raise UserError(
                    f"decoder '{self.name}' claims to be lossless, but its part {type(part).__name__} is not exact; "
                    "set decoder.lossless=false."
                )

    @property
    def extra(self) -> int:
        return self.drafter.extra if self.drafter is not None else 0

    @property
    def forwards(self) -> int:
        """Evaluations of a draft network per pass."""
        return self.drafter.forwards(self.window) if self.window > 1 else 0

    @property
    def ahead(self) -> int:
        """Positions behind the last committed token that a pass guesses."""
        return self.drafter.ahead(self.window) if self.window > 1 else 0

    @property
    def carried(self) -> int:
        """Slots that live on from pass to pass."""
        return self.drafter.carried(self.window) if self.window > 1 else 1

    def start(self, model: ImageModel, rows: int, prompt: int, sampling: SamplingParams) -> Decoding:
        """Open a loop of `rows` rows for prompts of up to `prompt` tokens."""
        return Decoding(model, self, rows, prompt, sampling)

    def check(self, spec: object) -> None:
        """Raise `UserError` if this decoder cannot run on the model that `spec` describes."""
        for part in (self.drafter, self.verifier, self.refiner):
            if hasattr(part, "check"):
                part.check(spec, self.window)

    def check_sampling(self, sampling: SamplingParams) -> None:
        """Raise `UserError` if this decoder cannot sample from `sampling`."""
        if sampling.sampler == "gumbel" and self.verifier is not None and not self.verifier.exact:
            raise UserError(
                f"sampler=gumbel verifies by matching AR's tokens, which leaves nothing to relax; use sampler=cdf with "
                f"decoder '{self.name}', or decoder/verifier=exact."
            )

    def prepare(self, model: ImageModel) -> None:
        """Let the parts build their tables and load their networks, once per model and not once per batch."""
        if self.__dict__.get("_prepared") is model:
            return
        object.__setattr__(self, "_prepared", model)  # the settings are frozen, this is none
        for part in (self.drafter, self.verifier, self.refiner):
            if part is not None:
                part.prepare(model)


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
    """What a per-step callback sees: tensors on the model's device, nothing is synchronised for it."""

    pass_index: int
    committed: Tensor  # [B]
    accepted: Tensor  # [B] tokens committed in this pass
    tokens: Tensor  # [B, N + S] the live buffer: clone what you keep
    look: Callable[[], dict[str, Tensor]]  # what else a trace keeps of this pass: the loop's own `look`


def _done(decoding: Decoding, passes: int) -> list[int]:
    look = decoding.cache.reads or passes % CHECK_EVERY == 0
    return decoding.finished() if look else []


def _report(decoding: Decoding, on_step: Callable[[StepInfo], None] | None, passes: int) -> None:
    if on_step is not None:
        state = decoding.state
        on_step(StepInfo(passes, state.committed, decoding.history[-1], state.tokens, decoding.look))


def _start(
    model: ImageModel, decoder: Decoder, rows: int, prompt: int, sampling: SamplingParams, graphs: Graphs | None
) -> Decoding:
    return (
        decoder.start(model, rows, prompt, sampling)
        if graphs is None
        else graphs.start(model, decoder, rows, prompt, sampling)
    )


def generate(
    model: ImageModel,
    decoder: Decoder,
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
    decoding = _start(model, decoder, rows, prompt, sampling, graphs)
    decoding.admit(list(range(rows)), condition, seeds)
    begin, passes = decoding.now(), 0
    while len(_done(decoding, passes)) < rows:
        decoding.step()
        passes += 1
        _report(decoding, on_step, passes)
    decoding.seconds["decode"] = decoding.now() - begin
    return DecodeResult([decoding.collect(row) for row in range(rows)], decoding.seconds)


def stream(
    model: ImageModel,
    decoder: Decoder,
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
    waiting = enumerate(requests)
    decoding = _start(model, decoder, rows, 1, sampling, graphs)
    owner: dict[int, int] = {}
    passes, empty = 0, list(range(rows))
    while True:
        taken = [entry for _, entry in zip(empty, waiting, strict=False)]
        if taken:
            places = empty[: len(taken)]
            decoding.admit(places, model.encode([prompt for _, (prompt, _) in taken]), [seed for _, (_, seed) in taken])
            owner.update(zip(places, (index for index, _ in taken), strict=True))
        if not owner:
            return
        decoding.step()
        passes += 1
        _report(decoding, on_step, passes)
        empty = [row for row in _done(decoding, passes) if row in owner]
        for row in empty:
            yield owner.pop(row), decoding.collect(row)
        empty = [row for row in range(rows) if row not in owner]
