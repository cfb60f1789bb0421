"""Decoders: their parts, window and commit rule; settings only, shared by all models and batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from sjd2.decoding.commit_rule import AnyInput, CleanInputs, CommitRule
from sjd2.decoding.interfaces import Drafter, Redrafted, Refiner, Verifier
from sjd2.decoding.sampling import SAMPLERS, SamplingParams
from sjd2.errors import UserError
from sjd2.models.base import ImageModel
from sjd2.models.spec import ModelSpec


class BaseDecoder:
    """What `generate` runs. engine: the class that runs it, where it is neither AR's nor the window's.

    window: model inputs per pass. lookahead: positions after the last committed token that a pass drafts. num_forwards:
    evaluations of a draft network per pass. draft_in_prefill: draft tokens follow the prompt in its prefill, which is then
    the window's first pass.
    """

    name: str
    lossless: bool
    window: int
    lookahead: int = 0
    num_forwards: int = 0
    draft_in_prefill: bool = False
    # Any is an Engine, whose name only a type checker could import here
    engine: ClassVar[type[Any] | None] = None

    def check(self, spec: ModelSpec) -> None:
        """Raise `UserError` if this decoder cannot run on the model that `spec` describes."""

    def check_sampling(self, sampling: SamplingParams) -> None:
        """Raise `UserError` if this decoder cannot sample from `sampling`."""

    def check_window(self, length: int) -> None:
        """Raise `UserError` if the window exceeds an image of `length` tokens: for one that was asked for, a default may."""
        if self.window > length:
            raise UserError(
                f"decoder.window={self.window} is longer than the image, which has {length} tokens; give {length} or less."
            )


class Parts(NamedTuple):
    """The parts of a decoder, bound to a model."""

    drafter: Drafter
    verifier: Verifier
    refiner: Refiner


@dataclass(frozen=True, kw_only=True)
class Decoder(BaseDecoder):
    """A decoder is its parts and a window; without parts, in a window of 1, it is AR.

    window: model inputs per pass, the last committed token and the nodes of trees included (drafts = window - 1).
    refiner: None where the drafter draws all tokens anew in each pass (EAGLE).
    rule: `exact` commits only after clean inputs (docs/exactness.md), `paper` commits any accepted slot.
    refeed: with rule=paper, committed tokens whose keys came from a noisy input are fed once more, clean (else they stay).
    """

    name: str
    window: int
    lossless: bool
    drafter: Drafter | None = None
    verifier: Verifier | None = None
    refiner: Refiner | None = None
    rule: str = "exact"
    refeed: bool = True
    draft_in_prefill: bool = False
    # the parts of the last (model, fine-tuning): all batches of a run share their tables and networks
    _bound: dict[tuple, Parts] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"decoder.window must be 1 or more, got {self.window}; 1 is plain AR.")
        if self.window > 1:
            self._check_parts()
        elif self.draft_in_prefill and self.drafter is None:
            raise UserError(self._no_chain)
        if self.rule not in ("exact", "paper"):
            raise UserError(f"decoder.rule must be exact or paper, got '{self.rule}'.")
        if self.rule == "paper" and self.num_carried != self.window:
            raise UserError("rule=paper commits along a chain, so it cannot be combined with trees; use rule=exact.")
        if self.lossless and not self.commit_rule.lossless:
            raise UserError("rule=paper commits tokens after noisy inputs, so the decoder cannot be called lossless.")
        for part in self._parts:
            if self.lossless and not part.exact:
                raise UserError(
                    f"decoder '{self.name}' claims to be lossless, but its part {type(part).__name__} is not exact; "
                    "set decoder.lossless=false."
                )

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings alone: copies and pickles do not hold the model that the parts are bound to."""
        return self.__dict__ | {"_bound": {}}

    @property
    def _no_chain(self) -> str:
        return (
            "decoder.draft_in_prefill needs one chain of draft tokens that lives on from pass to pass, which decoder "
            f"'{self.name}' does not have; leave it out."
        )

    def _check_parts(self) -> None:
        if self.drafter is None or self.verifier is None:
            raise UserError(f"decoder '{self.name}' with window {self.window} needs a drafter and a verifier.")
        if self.refiner is None and self.num_carried > 1:
            raise UserError(
                f"decoder '{self.name}' needs a refiner for the draft tokens that it keeps, e.g. decoder/refiner=coupled."
            )
        if self.refiner is not None and self.num_carried == 1:
            raise UserError(
                f"decoder '{self.name}' draws all its draft tokens anew in each pass, so a refiner has nothing to refine; "
                "set decoder.refiner=null."
            )
        if self.drafter.needs_records and self.refiner is not None and not self.refiner.records:
            raise UserError(
                f"{type(self.drafter).__name__} drafts from recorded distributions; set decoder.refiner.record=true, or use "
                "decoder/refiner=coupled."
            )
        if self.drafter.keeps_lanes and self.refiner is not None and not self.refiner.by_lane:
            raise UserError(
                f"refiner {type(self.refiner).__name__} would draw the draft tokens of all chains with the same noise, and "
                "then they cannot be tested one after the other; use decoder/refiner=resample or coupled (coupling=maximal)."
            )
        if self.draft_in_prefill and (self.num_carried == 1 or self.drafter.keeps_lanes):
            raise UserError(self._no_chain)
        if self.verifier.joint:
            self._check_joint(self.verifier, self.drafter)

    def _check_joint(self, verifier: Verifier, drafter: Drafter) -> None:
        """Raise `UserError` where draft tokens cannot be judged together."""
        kind = type(verifier).__name__
        if drafter.is_tree and (not verifier.joint_trees or drafter.separated() is None):
            raise UserError(
                f"verifier {kind} judges a chain of draft tokens together, and not the tree of this drafter; use "
                "decoder.drafter.shape=chain (eagle), decoder.drafter.siblings=[] (front), or decoder/verifier=exact."
            )
        if verifier.exact and self.rule == "paper":
            raise UserError(
                f"verifier {kind} needs draft tokens that are draws from their recorded distributions, which those of "
                "rule=paper are not; use rule=exact, or decoder/verifier=exact."
            )
        if verifier.exact and self.refiner is not None and not self.refiner.after_joint:
            raise UserError(
                f"verifier {kind} decides by later draft tokens too, and then refiner {type(self.refiner).__name__} would not "
                "draw from what it records; use decoder/refiner=resample or coupled (coupling=maximal)."
            )

    @property
    def _parts(self) -> list[Drafter | Verifier | Refiner]:
        return [part for part in (self.drafter, self.verifier, self.refiner) if part is not None]

    @property
    def commit_rule(self) -> CommitRule:
        """Return what `rule` stands for."""
        return CleanInputs() if self.rule == "exact" else AnyInput(refeed=self.refeed)

    @property
    def num_carried(self) -> int:
        """Return the slots that are carried from pass to pass."""
        return self.drafter.num_carried(self.window) if self.drafter is not None and self.window > 1 else 1

    @property
    def lookahead(self) -> int:
        return self.drafter.lookahead(self.window) if self.drafter is not None and self.window > 1 else 0

    @property
    def num_forwards(self) -> int:
        return self.drafter.num_forwards(self.window) if self.drafter is not None and self.window > 1 else 0

    def check(self, spec: ModelSpec) -> None:
        for part in self._parts:
            part.check(spec, self.window)

    def check_sampling(self, sampling: SamplingParams) -> None:
        if self.verifier is not None and not self.verifier.exact and not SAMPLERS[sampling.sampler].residuals:
            raise UserError(
                f"sampler={sampling.sampler} verifies by matching AR's tokens, which leaves nothing to relax; use sampler=cdf "
                f"with decoder '{self.name}', or decoder/verifier=exact."
            )

    def bind(self, model: ImageModel) -> Parts:
        """Return the parts, ready to run on `model`. Raises `UserError` if one is missing or does not fit the model."""
        if self.drafter is None or self.verifier is None:
            raise UserError(f"decoder '{self.name}' needs a drafter and a verifier.")
        key = (model, model.adapter)
        if key not in self._bound:
            self._bound.clear()
            drafter = (self.drafter.separated() if self.verifier.apart else None) or self.drafter
            parts = (drafter, self.verifier, self.refiner or Redrafted())
            self._bound[key] = Parts(*(part.bind(model, self.window) for part in parts))
        return self._bound[key]
