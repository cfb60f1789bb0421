"""What a decoder is made of: drafts, the state that parts may read, and the protocols of the three parts.

# B samples, R model rows (2B with guidance, else B), S slots of a pass, V image vocabulary, D width, N image-phase tokens
Slot 0 of a pass is the last committed token, the others are guesses; the output at a slot is the law of the slots behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sjd2.decoding.noise import Noise
from sjd2.decoding.sampling import SamplingParams
from sjd2.decoding.shapes import Tree
from sjd2.models.base import ImageModel


@dataclass
class Draft:
    """The guesses of one pass.

    tokens [B, S]; probs [B, S-1, V]: the law each guess was drawn from (None: deterministic, one-hot);
    embeds [B, S, D]: model inputs where they are not embed(tokens); level [B, S]: noise level, 0 = clean;
    latent [B, S, D]: SJD2's noisy vectors in normalised space; tree: the shape (None: a chain).
    """

    tokens: Tensor
    probs: Tensor | None
    embeds: Tensor | None = None
    level: Tensor | None = None
    latent: Tensor | None = None
    tree: Tree | None = None


@dataclass
class State:
    """What the parts may read of the rows in flight."""

    tokens: Tensor  # [B, N + S] the committed tokens; what lies beyond `committed` means nothing
    committed: Tensor  # [B] n, tokens committed
    cached: Tensor  # [B] tokens whose keys and values are final; n - 1 except under rule=paper
    iteration: Tensor  # [B] the row's own pass counter
    forced: Tensor  # [N + S] forced local id, -1 free; positions beyond N are forced dummies
    noise: Noise
    sampling: SamplingParams
    window: int  # S, slots of a pass
    starts: Tensor  # [R] the position id of the image's first token in each model row
    bound: int = 0  # the host's upper bound of the tokens in any row's cache, prompt included
    memory: Any = None  # what the drafter keeps of the batch

    def positions(self, width: int, tree: Tree | None = None) -> Tensor:
        """Return the image position of each slot of the coming pass: [B, width]."""
        depth = torch.arange(width, device=self.cached.device) if tree is None else tree.depth
        return self.cached[:, None] + depth

    def guesses(self, draft: Draft) -> Tensor:
        """Return the image positions of the guesses of the pass that has just run: [B, S-1]."""
        return self.positions(draft.tokens.shape[1], draft.tree)[:, 1:]

    def at(self, positions: Tensor) -> Tensor:
        """Return the forced id of each position, -1 where free: [B, S] -> [B, S]."""
        return self.forced[positions.clamp(max=len(self.forced) - 1)]

    def force(self, tokens: Tensor, tree: Tree | None = None) -> Tensor:
        """Put the forced tokens into the guesses of the coming pass: [B, S] -> [B, S]."""
        forced = self.at(self.positions(tokens.shape[1], tree))
        forced = forced.index_fill(1, torch.zeros(1, dtype=torch.long, device=tokens.device), -1)  # slot 0 is committed
        return torch.where(forced < 0, tokens, forced)


@dataclass
class Outcome:
    """What a pass came to, for drafters that learn from it.

    hidden [R, S, D] after the final norm; draft: as the pass has seen it; moved [B] tokens committed; path [B, L + 1]: slots
    of the accepted path by depth; end [B]: the slot behind which the last token was drawn; source [B, C]: the slot that each
    carried guess comes from, fresh [B, C]: those that come from none.
    """

    hidden: Tensor
    draft: Draft
    moved: Tensor
    path: Tensor
    end: Tensor
    source: Tensor
    fresh: Tensor


class Part(Protocol):
    exact: bool  # whether the output law stays the model's own with this part

    def prepare(self, model: ImageModel) -> None: ...


class Drafter:
    """Base of all drafters. Only `fill` must be written; the hooks are for drafters that keep something of their own."""

    exact: bool = True
    recorded: bool = False  # whether it needs the laws that the guesses were drawn from
    extra: int = 0  # slots appended behind the pass (SJD2's timestep codes); never committed, no logits

    def check(self, spec: object, window: int) -> None:
        """Raise `UserError` if this part cannot serve the model that `spec` describes; loads no weights."""

    def prepare(self, model: ImageModel) -> None:
        """Build tables, load a draft network; once per model."""

    def carried(self, window: int) -> int:
        """Return how many slots live on from pass to pass: all of a chain; 1 is the last committed token alone."""
        return window

    def ahead(self, window: int) -> int:
        """Return how many positions behind the last committed token a pass guesses; trees are less deep than this."""
        carried = self.carried(window)
        return (window if carried == 1 else carried) - 1

    def forwards(self, window: int) -> int:
        """Return the evaluations of a draft network per pass."""
        return 0

    def open(self, model: ImageModel, rows: int, capacity: int, sampling: SamplingParams) -> Any:
        """Return the memory of a batch of `rows` samples; it becomes `state.memory`."""

    def reserve(self, memory: Any, capacity: int) -> None:
        """Make room for rows of up to `capacity` tokens: a prompt is longer than any before."""

    def admit(
        self, memory: Any, rows: Tensor, branch: int, embeds: Tensor, hidden: Tensor, lengths: Tensor, token: Tensor
    ) -> None:
        """See prompts enter rows [b]: embeds, hidden [b, P, D], lengths [b], first token [b]; branch 1 is unconditional."""

    def fill(self, draft: Draft, fresh: Tensor, state: State) -> Draft:
        """Return the guesses of the coming pass from those carried over: `fresh` [B, C] slots have just entered."""
        raise NotImplementedError

    def observe(self, outcome: Outcome, state: State) -> None:
        """See what a pass came to, after its commit."""


class Verifier(Part, Protocol):
    """A test of one draft. On trees p is what earlier siblings have left: multi-round speculative sampling."""

    def chance(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return the chance to accept: law p [..., V], draft law q [..., V] (None: one-hot), token [...] -> [...]."""
        ...

    def rest(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return the law, unnormalised, after the draft was rejected: -> [..., V]; never all zero."""
        ...


class Refiner(Part, Protocol):
    def __call__(self, draft: Draft, law: Tensor, chance: Tensor, keep: Tensor, state: State) -> Draft:
        """Return the drafts for the next pass: law [B, S-1, V] is each guess's new law, keep [B, S-1] < exact chance."""
        ...
