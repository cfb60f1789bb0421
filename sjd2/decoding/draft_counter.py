"""Count on the device how often a draft token was tested and accepted, by its depth in the pass.

# B samples, D depths: a pass drafts at most D positions after the last committed token
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftCounts:
    """What became of the draft tokens of one image.

    tests, accepts: by depth, the first one after the committed token first, how often a free draft token was reached (all
    before it in its pass were accepted) and how often it was then accepted; depths that were never reached are left out.
    accepted: all accepted draft tokens, forced ones included.
    """

    tests: list[int] = field(default_factory=list)
    accepts: list[int] = field(default_factory=list)
    accepted: int = 0


@dataclass
class AcceptanceCounter:
    """Counters of all rows in flight: tests, accepts [B, D], accepted [B]; nothing is read before a row is finished.

    A forced token is no test. A draft token after a noisy input, beyond the image, or below a leaf of a tree is not
    reached.
    """

    tests: Tensor
    accepts: Tensor
    accepted: Tensor

    @classmethod
    def of(cls, rows: int, depths: int, device: torch.device) -> AcceptanceCounter:
        """Return counters at zero."""
        zeros = torch.zeros(rows, depths, dtype=torch.long, device=device)
        return cls(zeros, zeros.clone(), zeros.new_zeros(rows))

    def clear(self, index: Tensor) -> None:
        """Set rows `index` [b] to zero."""
        for counter in (self.tests, self.accepts, self.accepted):
            counter[index] = 0

    def add(self, num_accepted: Tensor, rejected: Tensor, free: Tensor) -> None:
        """Count one pass: draft tokens accepted [B], whether the next one was rejected [B], which depths are free [B, D]."""
        depth = torch.arange(self.tests.shape[1], device=free.device)
        self.tests += free & (depth < (num_accepted + rejected)[:, None])
        self.accepts += free & (depth < num_accepted[:, None])
        self.accepted += num_accepted

    def collect(self, row: int) -> DraftCounts:
        """Return the counts of a finished row (waits for the device)."""
        tests, accepts = torch.stack([self.tests[row], self.accepts[row]]).tolist()
        reached = max((depth + 1 for depth, count in enumerate(tests) if count), default=0)
        return DraftCounts(tests[:reached], accepts[:reached], int(self.accepted[row]))
