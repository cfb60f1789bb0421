"""The target distribution: guidance, temperature, top-k, top-p and min-p in one place for every decoder; and draws from it.

# B samples, R model rows (2B with guidance, else B), S slots of a pass, V image vocabulary
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sjd2.decoding.noise import Noise, Purpose
from sjd2.errors import UserError, choose
from sjd2.ranges import check_sampling_ranges

if TYPE_CHECKING:
    from sjd2.decoding.interfaces import Verifier

TINY_MASS = 1e-12  # a residual below this is rounding: p and q are equal, and a rejection has probability 0


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The distribution that every decoder samples from.

    guidance_scale: g in l = u + g (c - u); 1 leaves the unconditional rows out.
    temperature: 0 is greedy. top_k: 0 is off; ties with the k-th logit are kept. top_p: 1 is off. min_p: codes
    less probable than min_p times the most probable one are out, after top-k and top-p; 0 is off.
    sampler: `cdf` draws by inverse CDF; `gumbel` by argmax(log p + G) with G fixed per position, under which exact
    verification is Gumbel matching and every lossless decoder returns exactly the same tokens as AR (docs/exactness.md).
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    sampler: str = "cdf"
    min_p: float = 0.0

    def __post_init__(self) -> None:
        choose("sampler", self.sampler, tuple(SAMPLERS))
        ranges = {key: getattr(self, key) for key in ("guidance_scale", "temperature", "top_k", "top_p", "min_p")}
        check_sampling_ranges(**ranges)

    def settings(self) -> dict[str, Any]:
        """Return what identifies the distribution in run folders and file keys; min_p only where it is on."""
        return {key: value for key, value in vars(self).items() if key != "min_p" or value}

    def check(self, vocabulary: int) -> None:
        """Raise `UserError` if top_k exceeds the image vocabulary."""
        if self.top_k > vocabulary:
            raise UserError(f"top_k={self.top_k} exceeds the model's image vocabulary of {vocabulary}; use 0 for off.")

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1.0

    def probs(self, logits: Tensor) -> Tensor:
        """Turn logits [R, S, V] into probabilities [B, S, V]; rows B..2B-1 are the unconditional ones.

        Where a logit is NaN or infinitely large, all V probabilities are NaN (`finite.finite_rows`).
        """
        if self.guided:
            conditional, unconditional = logits.chunk(2)
            logits = torch.lerp(unconditional, conditional, self.guidance_scale)
        if self.temperature == 0:
            return _greedy(logits)
        if self.temperature != 1:
            logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            threshold = logits.topk(self.top_k, sorted=False).values.amin(-1, keepdim=True)
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        if self.top_p < 1:
            logits = _nucleus(logits, self.top_p)
        if self.min_p > 0:
            logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(self.min_p), -torch.inf)
        return logits.softmax(-1)


def _greedy(logits: Tensor) -> Tensor:
    best = logits.argmax(-1, keepdim=True)  # a NaN where there is one
    probs = torch.nn.functional.one_hot(best[..., 0], logits.shape[-1]).to(logits.dtype)
    return probs.masked_fill(~logits.gather(-1, best).isfinite(), torch.nan)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    ordered, order = logits.sort(-1, descending=True)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs
    outside = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(outside, -torch.inf)


def draw(mass: Tensor, u: Tensor, block: int = 32) -> Tensor:
    """Draw from unnormalised distributions by two-level inverse CDF: mass [..., V], u [...] in (0, 1) -> index [...].

    One uniform per draw and 20-75 times cheaper than `multinomial`; never returns an index of zero mass.
    """
    pad = -mass.shape[-1] % block
    mass = torch.nn.functional.pad(mass, (0, pad)) if pad else mass  # padding by nothing would copy it
    blocks = mass.unflatten(-1, (-1, block))
    sums = blocks.sum(-1)
    edges = sums.cumsum(-1)
    below = 1 - torch.finfo(mass.dtype).eps
    target = (u.clamp(max=below) * edges[..., -1])[..., None]
    outer = (edges[..., :-1] <= target).sum(-1, keepdim=True)  # the last edge lies above every target
    within = target - (edges - sums).gather(-1, outer)
    inner = blocks.gather(-2, outer[..., None].expand(*outer.shape, block)).squeeze(-2).cumsum(-1)
    # rounding may leave `within` outside the block: the clamp keeps the draw on an entry with mass
    within = torch.minimum(within.clamp(min=0), inner[..., -1:] * below)
    return (inner <= within).sum(-1).add(outer[..., 0], alpha=block)


def draw_gumbel(probs: Tensor, gumbel: Tensor) -> Tensor:
    """Draw argmax(log p + G): probs and gumbel [..., V] -> index [...]."""
    return (probs.log() + gumbel).argmax(-1)


def likelihood_ratio(p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
    """Return p / q of each draft token; q None is one-hot: p, q [..., V], token [...] -> [...]."""
    p = p.gather(-1, token[..., None])[..., 0]
    if q is None:
        return p
    q = q.gather(-1, token[..., None])[..., 0]
    # q = 0 happens only for draft tokens that are no draws from q (rule=paper): min(1, p / 0) is 1, and 0 where p is 0 too
    return torch.where(q > 0, p / q, (p > 0).to(p))


def accept_prob(p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
    """Return min(1, p / q) of each draft token: speculative sampling (Leviathan et al., arXiv 2211.17192)."""
    return likelihood_ratio(p, q, token).clamp(max=1)


def residual(p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
    """Return max(0, p - q), unnormalised; q None is one-hot at `token`: [..., V], [...] -> [..., V]."""
    left = p.scatter(-1, token[..., None], 0.0) if q is None else (p - q).clamp(min=0)
    return torch.where(left.sum(-1, keepdim=True) > TINY_MASS, left, p)


def without(p: Tensor, token: Tensor) -> Tensor:
    """Return p without a token that was drawn from it, renormalised: [..., V], [...] -> [..., V]."""
    left = p.scatter(-1, token[..., None], 0.0)
    mass = left.sum(-1, keepdim=True)
    return torch.where(mass > 0, left / mass, p)  # a distribution on one token has no second


class Stream(NamedTuple):
    """Which numbers a draw takes (`Noise.uniform`)."""

    purpose: Purpose
    iteration: Tensor | int = 0
    sibling: Tensor | int | None = None


class Sampler:
    """How one batch draws tokens and verifies drafts: the strategy behind the setting `sampler`.

    residuals: whether a rejected draft token leaves a residual that the next token is drawn from.
    """

    residuals: ClassVar[bool]

    def __init__(self, noise: Noise) -> None:
        self.noise = noise

    def draw(
        self,
        probs: Tensor,
        positions: Tensor,
        purpose: Purpose,
        iteration: Tensor | int = 0,
        sibling: Tensor | int | None = None,
    ) -> Tensor:
        """Draw one token per position: probs [B, S, V], positions [B, S] -> [B, S]."""
        return self.pick(probs, positions, Stream(purpose, iteration, sibling))

    def recover(
        self,
        p: Tensor,
        q: Tensor | None,
        token: Tensor,
        accepted: Tensor,
        positions: Tensor,
        purpose: Purpose,
        iteration: Tensor,
        sibling: Tensor | None = None,
    ) -> Tensor:
        """Turn draft tokens of q into tokens of p, changing as few as possible: p, q [B, S, V], token [B, S] -> [B, S]."""
        if not self.residuals:
            return self.draw(p, positions, purpose, iteration, sibling)
        return torch.where(accepted, token, self.draw(residual(p, q, token), positions, purpose, iteration, sibling))

    def pick(self, probs: Tensor, positions: Tensor, stream: Stream) -> Tensor:
        """Draw with the numbers of a stream: probs [B, S, V], positions [B, S] -> [B, S]."""
        raise NotImplementedError

    def draw_next(self, probs: Tensor, bonus: Tensor, positions: Tensor, iteration: Tensor) -> Tensor:
        """Draw the token after the accepted ones: a bonus token [B, S] of p, or a recovered one of the residual."""
        raise NotImplementedError

    def accept_prob(self, verifier: Verifier, p: Tensor, q: Tensor | None, token: Tensor, positions: Tensor) -> Tensor:
        """Return the acceptance probability of draft tokens of q under p: p, q [B, S, V], token [B, S] -> [B, S]."""
        raise NotImplementedError


class CdfSampler(Sampler):
    """Inverse CDF with a number for each purpose; drafts are verified by speculative sampling."""

    residuals = True

    def pick(self, probs: Tensor, positions: Tensor, stream: Stream) -> Tensor:
        return draw(probs, self.noise.uniform(positions, *stream))

    def draw_next(self, probs: Tensor, bonus: Tensor, positions: Tensor, iteration: Tensor) -> Tensor:
        fixed = self.noise.uniform(positions, Purpose.SAMPLE)  # AR's number: a bonus token is drawn as AR draws it
        return draw(probs, torch.where(bonus, fixed, self.noise.uniform(positions, Purpose.RESIDUAL, iteration)))

    def accept_prob(self, verifier: Verifier, p: Tensor, q: Tensor | None, token: Tensor, positions: Tensor) -> Tensor:
        return verifier.accept_prob(p, q, token)


class GumbelSampler(Sampler):
    """argmax(log p + G) with G fixed per position, whatever the stream: a draft token is right if it equals AR's draw."""

    residuals = False

    def pick(self, probs: Tensor, positions: Tensor, stream: Stream) -> Tensor:
        return draw_gumbel(probs, self.noise.gumbel(positions, probs.shape[-1]))

    def draw_next(self, probs: Tensor, bonus: Tensor, positions: Tensor, iteration: Tensor) -> Tensor:
        return self.draw(probs, positions, Purpose.SAMPLE)

    def accept_prob(self, verifier: Verifier, p: Tensor, q: Tensor | None, token: Tensor, positions: Tensor) -> Tensor:
        return (token == self.draw(p, positions, Purpose.SAMPLE)).to(p)


SAMPLERS: dict[str, type[Sampler]] = {"cdf": CdfSampler, "gumbel": GumbelSampler}
