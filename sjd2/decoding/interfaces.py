"""What an engine and the parts of a decoder hand each other: drafts, the state of the rows, and the three kinds of parts.

# B samples, R model rows (2B with guidance, else B), S slots of a pass, C slots carried from pass to pass, V image vocabulary
# D width, N image-phase tokens
Slot 0 of a pass is the last committed token, the others are draft tokens; the output at a slot is the distribution p of the
token after it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sjd2.decoding.finite import FaultSource, finite_rows
from sjd2.decoding.noise import Noise, Purpose
from sjd2.decoding.sampling import Sampler, SamplingParams
from sjd2.decoding.shapes import CHAIN, AcceptedPath, Shape
from sjd2.models.base import ImageModel
from sjd2.models.spec import ModelSpec

if TYPE_CHECKING:
    from sjd2.decoding.verify import Verification


@dataclass
class Draft:
    """The inputs of one pass.

    tokens [B, S]; probs [B, S-1, V]: q, the distribution each draft token was drawn from (None: deterministic, one-hot);
    embeds [B, S, D]: model inputs where they are not embed(tokens); level [B, S]: noise level, 0 = clean;
    latent [B, S, D]: SJD2's noisy vectors in normalised space; shape: which slot follows which.
    """

    tokens: Tensor
    probs: Tensor | None = None
    embeds: Tensor | None = None
    level: Tensor | None = None
    latent: Tensor | None = None
    shape: Shape = CHAIN

    def codes(self, vocabulary: int) -> Tensor:
        """Return the draft tokens as codes [B, S-1]; forced ids become the last code, these slots are accepted anyway."""
        return self.tokens[:, 1:].clamp(max=vocabulary - 1)


@dataclass(kw_only=True)
class Rows:
    """The rows in flight, as every engine has them."""

    length: int  # N
    tokens: Tensor  # [B, N + slack] the committed tokens; what lies beyond them means nothing
    committed: Tensor  # [B] number of tokens committed
    iteration: Tensor  # [B] the row's own pass counter
    forced: Tensor  # [N + slack] forced local id, -1 free; positions beyond N are forced dummies
    image_start: Tensor  # [R] the position id of the image's first token in each model row
    noise: Noise
    sampler: Sampler
    finite: Tensor  # [3, B] bool, by `FaultSource`: whether all that the row was drawn from was finite

    def watch(self, probs: Tensor, source: FaultSource) -> None:
        """Note unfinished rows whose probabilities [B, ..., V] are not finite; drafters with a network call it."""
        done = self.committed >= self.length
        self.finite[source].logical_and_(finite_rows(probs) | done)

    def forced_at(self, positions: Tensor) -> Tensor:
        """Return the forced id of each position, -1 where free: [B, S] -> [B, S]."""
        return self.forced[positions.clamp(max=len(self.forced) - 1)]

    def impose(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Replace tokens at forced positions by the forced ids: [B, S] -> [B, S]."""
        forced = self.forced_at(positions)
        return torch.where(forced < 0, tokens, forced)


@dataclass(kw_only=True)
class State(Rows):
    """What the parts of a window decoder may read."""

    model: ImageModel
    sampling: SamplingParams
    window: int  # S, slots of a pass
    cached: Tensor  # [B] tokens whose keys and values are final; committed - 1 except under rule=paper
    bound: int = 0  # the host's upper bound of the tokens in any row's cache, prompt included
    memory: Any = None  # what the drafter keeps of the batch
    # of the pass that runs: [B, window + 1] the positions of a whole window and the one after it, and the forced ids there
    ahead: Tensor | None = None
    forced_ahead: Tensor | None = None

    def begin(self) -> Tensor:
        """Lay out the positions of a pass, which all its parts ask for, and return them: [B, window + 1]."""
        self.ahead = self.cached[:, None] + torch.arange(self.window + 1, device=self.cached.device)
        self.forced_ahead = self.forced_at(self.ahead)
        return self.ahead

    def advance(self, num_final: Tensor) -> None:
        """End a pass after which `num_final` [B] more tokens have final keys and values."""
        self.cached, self.iteration = self.cached + num_final, self.iteration + 1
        self.ahead = self.forced_ahead = None
        self.noise.forget()

    def positions(self, size: int, shape: Shape = CHAIN) -> Tensor:
        """Return the image position of each slot of a pass of `size` slots: [B, size]."""
        if shape is CHAIN and self.ahead is not None and size <= self.window + 1:
            return self.ahead[:, :size]
        return self.cached[:, None] + shape.depths(size, self.cached.device)

    def forced_slots(self, size: int, shape: Shape = CHAIN) -> Tensor:
        """Return the forced id of each slot of a pass of `size` slots, -1 where free: [B, size]."""
        if shape is CHAIN and self.forced_ahead is not None and size <= self.window + 1:
            return self.forced_ahead[:, :size]
        return self.forced_at(self.positions(size, shape))

    def at_depth(self, depth: int) -> tuple[Tensor, Tensor]:
        """Return the position so many tokens after the last committed one, and the forced id there: [B, 1] each."""
        position = self.positions(depth + 1)[:, depth:]
        return position, self.forced_slots(depth + 1)[:, depth:]

    def draft_positions(self, draft: Draft) -> Tensor:
        """Return the image position of each draft token: [B, S-1]."""
        return self.positions(draft.tokens.shape[1], draft.shape)[:, 1:]

    def force(self, tokens: Tensor, shape: Shape = CHAIN) -> Tensor:
        """Put the forced ids into the draft tokens of the coming pass: [B, S] -> [B, S]."""
        forced = self.forced_slots(tokens.shape[1], shape)[:, 1:]  # slot 0 is committed
        return torch.cat([tokens[:, :1], torch.where(forced < 0, tokens[:, 1:], forced)], 1)


@dataclass
class PassResult:
    """The result of a pass, for drafters that learn from it.

    draft: as it was fed; refined: as the refiner returned it; hidden [R, S, D]: after the final norm; num_new [B]: tokens
    that follow slot 0 now; source [B, C]: the slot that each carried token comes from; fresh [B, C]: those that come from
    none.
    """

    draft: Draft
    refined: Draft
    hidden: Tensor
    path: AcceptedPath
    num_new: Tensor
    source: Tensor
    fresh: Tensor


@dataclass(frozen=True, kw_only=True)
class DraftRun:
    """The draft tokens of a pass, as a verifier judges them.

    p [B, S-1, V]: the target distribution of each, on trees what its earlier siblings have left; q [B, S-1, V]: its own (None:
    one-hot); token [B, S-1]; depth [b, S-1]: how many tokens after the last committed one; certain [B, S-1]: forced or
    committed already; inside [B, S-1]: may be committed (rule=exact: only clean inputs before it; None: all); coin [B, S-1].
    shape: which slot follows which; for a joint decision on a tree p is what the model returned.
    """

    p: Tensor
    q: Tensor | None
    token: Tensor
    depth: Tensor
    certain: Tensor
    inside: Tensor | None
    coin: Tensor
    shape: Shape = CHAIN

    def at(self, slots: Tensor) -> DraftRun:
        """Return the draft tokens `slots` [n] alone, numbered from 0."""
        q, inside = self.q, self.inside
        return replace(
            self,
            p=self.p[:, slots],
            q=None if q is None else q[:, slots],
            token=self.token[:, slots],
            depth=self.depth[..., slots],
            certain=self.certain[:, slots],
            inside=None if inside is None else inside[:, slots],
            coin=self.coin[:, slots],
        )


@dataclass(frozen=True)
class Judgement:
    """What a verifier decides: the draft tokens that are accepted [B, S-1], and the probability coin was compared with.

    weight [B, S-1]: of a joint decision, what p is multiplied by before q is subtracted; the residual after a rejected draft
    token is that of weight p, and a draft token that was not accepted is one of norm(max(0, q - weight p)).
    tested [B, S-1, V]: the p meant here, on trees what earlier siblings have left; None: as in `DraftRun`.
    """

    accepted: Tensor
    accept_prob: Tensor
    weight: Tensor | None = None
    tested: Tensor | None = None


class Part:
    """One part of a decoder: settings from yaml, immutable and shared by models; `bind` makes it ready to run on one.

    exact: whether the output distribution stays the model's own with this part.
    """

    exact: bool = True

    def check(self, spec: ModelSpec, window: int) -> None:
        """Raise `UserError` if this part cannot serve the model that `spec` describes; loads no weights."""

    def bind(self, model: ImageModel, window: int) -> Any:
        """Return this part with what it needs of the model: tables, draft networks. By default that is nothing."""
        return self


class Drafter(Part):
    """Proposes the tokens of a pass. Only `propose` must be written; the hooks are for drafters with a memory.

    needs_records: whether it needs the distributions that the carried draft tokens were drawn from. keeps_lanes: whether
    several chains live on from pass to pass. timesteps [K, D]: model inputs that tell the noise levels apart, for
    fine-tunings that append them to each pass. repeated_draws: the purpose of its draws that are several for one position,
    and their marks (`noise.sibling_marks`), so that their numbers are mixed all at once. traceable: whether `propose` can be
    compiled: it calls no transformers layer with a cache.
    """

    needs_records: bool = False
    keeps_lanes: bool = False
    timesteps: Tensor | None = None
    repeated_draws: tuple[Purpose, Tensor] | None = None
    traceable: bool = True

    @property
    def is_tree(self) -> bool:
        """Return whether a pass may hold several draft tokens for one position."""
        return False

    def separated(self) -> Drafter | None:
        """Return this drafter with a draw of its own at each slot, as joint decisions on trees need; None: it cannot."""
        return None if self.is_tree else self

    def num_carried(self, window: int) -> int:
        """Return how many slots are carried from pass to pass: all of a chain; 1 is the last committed token alone."""
        return window

    def lookahead(self, window: int) -> int:
        """Return how many positions after the last committed token a pass drafts; trees are less deep than this."""
        carried = self.num_carried(window)
        return (window if carried == 1 else carried) - 1

    def num_forwards(self, window: int) -> int:
        """Return the evaluations of a draft network per pass."""
        return 0

    def init_state(self, rows: int, capacity: int, sampling: SamplingParams) -> Any:
        """Return the memory of a batch of `rows` samples of up to `capacity` tokens; it becomes `state.memory`."""

    def grow(self, memory: Any, capacity: int) -> None:
        """Make room for rows of up to `capacity` tokens: a prompt is longer than any before."""

    def admit(
        self, memory: Any, rows: Tensor, branch: int, embeds: Tensor, hidden: Tensor, lengths: Tensor, token: Tensor
    ) -> None:
        """See prompts enter rows [b]: embeds, hidden [b, P, D], lengths [b], first token [b]; branch 1 is unconditional.

        Not called with `draft_in_prefill`, where `update` sees the prefill.
        """

    def propose(self, carried: Draft, fresh: Tensor, state: State) -> Draft:
        """Return the draft of the coming pass from the tokens carried over: `fresh` [B, C] slots have just entered."""
        raise NotImplementedError

    def propose_first(self, carried: Draft, fresh: Tensor, state: State) -> Draft:
        """Return the draft of the prefill, a chain of all C carried slots, of which all but the first are fresh.

        As `propose`, for `draft_in_prefill`. Nothing is committed yet: slot 0, at position -1, is the end of the prompt. The
        memory must be a dataclass of tensors by sample or by model row, which are handed over to the rows in flight.
        """
        return self.propose(carried, fresh, state)

    def update(self, result: PassResult, state: State) -> None:
        """Learn from a pass, after its commit."""


class Verifier(Part):
    """Tests draft tokens. On trees p is what earlier siblings have left: multi-round speculative sampling.

    Token by token: write `accept_prob` and `residual`. A verifier that judges the whole run of a pass overrides `judge` and
    sets joint; it is refused on trees unless it sets joint_trees. apart: it gets trees without copies (`Drafter.separated`).
    Under sampler=gumbel draft tokens are matched with AR's and no verifier is asked.
    """

    joint: bool = False
    joint_trees: bool = False
    apart: bool = False

    def judge(self, run: DraftRun) -> Judgement:
        """Judge all draft tokens of a pass; a token counts if all before it on its path are accepted too."""
        prob = self.accept_prob(run.p, run.q, run.token).masked_fill(run.certain, 1.0)
        return Judgement(run.coin < prob, prob)  # strict: probability 0 never passes, 1 always

    def accept_prob(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return the acceptance probability: p, q [..., V] (None: one-hot), token [...] -> [...]."""
        raise NotImplementedError

    def residual(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return the distribution, unnormalised, after the token was rejected: -> [..., V]; never all zero."""
        raise NotImplementedError


class Refiner(Part):
    """Redraws the draft tokens under the distributions of the pass. records: whether it returns these in `probs`.

    after_joint: whether it stays exact after a joint decision, which depends on later draft tokens: it draws afresh, or moves
    tokens from `test.draft_probs()` instead of the recorded distribution. by_lane: whether it draws each lane with numbers of
    its own, so that chains stay independent.
    """

    records: bool = True
    after_joint: bool = False
    by_lane: bool = False

    def __call__(self, draft: Draft, test: Verification, state: State) -> Draft:
        """Return the draft for the next pass; its `probs` are the distributions that its tokens were truly drawn from."""
        raise NotImplementedError


class Redrafted(Refiner):
    """For drafters that draw all their tokens anew: nothing is left to refine."""

    records: ClassVar[bool] = False
    after_joint: ClassVar[bool] = True

    def __call__(self, draft: Draft, test: Verification, state: State) -> Draft:
        return Draft(draft.tokens, shape=CHAIN)
