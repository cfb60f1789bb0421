"""Which accepted draft tokens a pass may commit, and which of their keys and values are final.

# B samples, S slots of a pass
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sjd2.decoding.interfaces import Draft


class CommitRule:
    """How the window engine commits (the setting `rule`). lossless: whether the output distribution stays the model's."""

    lossless: ClassVar[bool]

    def clean(self, draft: Draft) -> Tensor | None:
        """Return the inputs after which tokens may be committed: [B, S]; None: all."""
        raise NotImplementedError

    def num_final(self, draft: Draft, num_new: Tensor) -> Tensor:
        """Return how many slots have final keys and values when `num_new` [B] tokens follow slot 0: [B]."""
        raise NotImplementedError


@dataclass(frozen=True)
class CleanInputs(CommitRule):
    """rule=exact: commit only after clean inputs, so that every committed token is one of the untouched model's."""

    lossless: ClassVar[bool] = True

    def clean(self, draft: Draft) -> Tensor | None:
        return None if draft.level is None else draft.level == 0

    def num_final(self, draft: Draft, num_new: Tensor) -> Tensor:
        return num_new


@dataclass(frozen=True, kw_only=True)
class AnyInput(CommitRule):
    """rule=paper: commit after noisy inputs too (SJD2, arXiv 2510.08994).

    refeed: committed tokens whose keys came from a noisy input are fed once more, clean; else these keys stay.
    """

    refeed: bool = True
    lossless: ClassVar[bool] = False

    def clean(self, draft: Draft) -> Tensor | None:
        return None

    def num_final(self, draft: Draft, num_new: Tensor) -> Tensor:
        if draft.level is None or not self.refeed:
            return num_new
        return torch.minimum(num_new, (draft.level == 0).cumprod(1).sum(1))
