"""Neighbouring draft tokens that are accepted or rejected together, by the product of their ratios; lossy.

# B samples, S slots of a pass, V image vocabulary, n phrases
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sjd2.decoding.interfaces import DraftRun, Judgement, Verifier
from sjd2.decoding.sampling import likelihood_ratio, residual
from sjd2.errors import UserError
from sjd2.files import find
from sjd2.models.base import ImageModel
from sjd2.models.spec import ModelSpec


class JointRuns(Verifier):
    """Accept all draft tokens of a run with min(1, prod p / q) and one coin; `linked` tells what belongs together.

    A run that fails ends the pass at its first token, whose residual is the ordinary max(0, p - q). Not exact: the tokens of a
    run are accepted where a ratio above 1 makes up for one below.
    """

    joint: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def linked(self, run: DraftRun, ratio: Tensor) -> Tensor:
        """Return which draft tokens continue the run of the one before: ratio p / q [B, S-1] -> [B, S-1]."""
        raise NotImplementedError

    def judge(self, run: DraftRun) -> Judgement:
        """Decide run by run."""
        ratio = likelihood_ratio(run.p, run.q, run.token).masked_fill(run.certain, 1.0)
        follows = self.linked(run, ratio) & ~run.certain
        follows = follows & torch.nn.functional.pad(~run.certain[:, :-1], (1, 0))
        slot = torch.arange(ratio.shape[1], device=ratio.device)
        first = torch.where(follows, 0, slot).cummax(1).values  # [B, S-1] where the run of each token begins
        product = torch.zeros_like(ratio).scatter_add(1, first, ratio.log()).exp()
        prob = product.gather(1, first).clamp(max=1)
        return Judgement(run.coin.gather(1, first) < prob, prob)

    def residual(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return max(0, p - q)."""
        return residual(p, q, token)


@dataclass(frozen=True, kw_only=True)
class RisingRuns(JointRuns):
    """Join neighbouring draft tokens whose probability has not fallen below `alpha` of what it was (after SJD-SV, ICML 2026).

    alpha: 0.8, the paper's. Where its runs begin and end is not public: here a run is a longest stretch with p / q >= alpha.
    """

    alpha: float = 0.8

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise UserError(f"decoder.verifier.alpha must be 0 (one run) or more, got {self.alpha}.")

    def linked(self, run: DraftRun, ratio: Tensor) -> Tensor:
        rising = ratio >= self.alpha
        return rising & torch.nn.functional.pad(rising[:, :-1], (1, 0))


@dataclass(frozen=True, kw_only=True)
class Phrases(JointRuns):
    """Join neighbouring draft tokens that are a phrase of a library (after SJD-PV, arXiv 2603.06666).

    library: a .npy of pairs of codes [n, 2], most frequent first: python -m baselines.mine_phrases RUN FILE. count: how many
    are used. The paper mines its phrases from image data; that they are pairs, which may chain, is a guess.
    """

    library: str | None = None
    count: int = 2000

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"decoder.verifier.count must be 1 or more, got {self.count}.")

    def check(self, spec: ModelSpec, window: int) -> None:
        """Raise `UserError` if there is no library, or it is one of another vocabulary."""
        self.pairs(spec.layout.vocabulary)

    def pairs(self, vocabulary: int) -> np.ndarray:
        """Return the pairs [n, 2]."""
        if self.library is None:
            raise UserError(
                "decoder=sjd-phrases needs a library: sample images (decoder=ar), then python -m baselines.mine_phrases RUN "
                f"FILE --vocabulary {vocabulary}, and give FILE as decoder.verifier.library=."
            )
        file = find(self.library)
        try:
            pairs = np.load(file)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"decoder.verifier.library={self.library} cannot be read: {error}.") from error
        if not isinstance(pairs, np.ndarray):
            raise UserError(f"decoder.verifier.library={self.library} is a .npz; give the .npy of a library.")
        if pairs.ndim != 2 or pairs.shape[1] != 2 or (pairs.size and not 0 <= pairs.min() <= pairs.max() < vocabulary):
            raise UserError(
                f"decoder.verifier.library={self.library} holds no pairs of codes below {vocabulary}; mine it from a run of "
                "this model."
            )
        return pairs[: self.count]

    def bind(self, model: ImageModel, window: int) -> PhraseVerifier:
        return PhraseVerifier(self.pairs(model.layout.vocabulary), model)


class PhraseVerifier(JointRuns):
    """`Phrases` on a model, with its pairs as sorted numbers: a table of all pairs takes gigabytes at 64,000 codes."""

    def __init__(self, pairs: np.ndarray, model: ImageModel) -> None:
        self.vocabulary = model.layout.vocabulary
        wide = pairs.astype(np.int64)
        known = np.unique(np.append(wide[:, 0] * self.vocabulary + wide[:, 1], -1))  # -1 is no pair: never empty
        self.known = torch.from_numpy(known).to(model.device)  # [n + 1]

    def linked(self, run: DraftRun, ratio: Tensor) -> Tensor:
        pair = run.token[:, :-1] * self.vocabulary + run.token[:, 1:]
        place = torch.searchsorted(self.known, pair).clamp(max=len(self.known) - 1)
        return torch.nn.functional.pad(self.known[place] == pair, (1, 0))


def mine(tokens: np.ndarray, vocabulary: int, count: int) -> np.ndarray:
    """Return the `count` most frequent pairs of codes that follow each other in tokens [n, N]: [count, 2]."""
    left, right = tokens[:, :-1].ravel(), tokens[:, 1:].ravel()
    codes = (left >= 0) & (right >= 0) & (left < vocabulary) & (right < vocabulary)
    index, times = np.unique(left[codes].astype(np.int64) * vocabulary + right[codes], return_counts=True)
    best = index[np.lexsort((index, -times))[:count]]
    return np.stack([best // vocabulary, best % vocabulary], 1).astype(np.int32)


def mine_run(run: Path, vocabulary: int, count: int) -> np.ndarray:
    """Mine the tokens of a run folder. Raises `UserError` if it has none."""
    files = sorted((run / "tokens").glob("*.npy"))
    if not files:
        raise UserError(f"{run} has no tokens/; give the folder of a run, e.g. runs/tiny-ar-....")
    return mine(np.stack([np.load(file) for file in files]), vocabulary, count)
