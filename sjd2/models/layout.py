"""Which token stands where in an image: free codes, forced tokens (row ends, headers), rows and columns.

Local token ids: 0..V-1 are codes of the image vocabulary, V + j is the layout's j-th forced id.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sjd2.errors import UserError


@dataclass(frozen=True)
class TokenGrid:
    """A raster of rows x columns codes with optional forced tokens around and between the rows.

    prefix, suffix: forced ids (the model's own token ids) before and after the grid; row_end: one after each row.
    E.g. Lumina-mGPT 768: rows = columns = 48, prefix (8197, 8828, 8828), row_end 8803, suffix (8196, 8710): N = 2357.
    """

    rows: int
    columns: int
    vocabulary: int
    prefix: tuple[int, ...] = ()
    row_end: int | None = None
    suffix: tuple[int, ...] = ()
    forced_ids: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if min(self.rows, self.columns, self.vocabulary) < 1:
            raise UserError(f"a token grid needs at least one row, column and code, got {self}.")
        ids = dict.fromkeys((*self.prefix, *(() if self.row_end is None else (self.row_end,)), *self.suffix))
        object.__setattr__(self, "forced_ids", tuple(ids))

    @property
    def stride(self) -> int:
        """Distance between a position and the one above it."""
        return self.columns + (self.row_end is not None)

    @property
    def length(self) -> int:
        """N, the number of image-phase tokens, forced ones included."""
        return len(self.prefix) + self.rows * self.stride + len(self.suffix)

    def forced(self) -> Tensor:
        """Return the forced local id of every position, -1 where the token is free: [N]."""
        local = {token: self.vocabulary + j for j, token in enumerate(self.forced_ids)}
        row = [-1] * self.columns + ([] if self.row_end is None else [local[self.row_end]])
        return torch.tensor([local[t] for t in self.prefix] + row * self.rows + [local[t] for t in self.suffix])

    @property
    def free(self) -> Tensor:
        """Return which positions the model really chooses: bool [N]."""
        return self.forced() < 0

    def codes(self, tokens: Tensor) -> Tensor:
        """Cut the codes out of complete token sequences: [B, N] -> [B, rows, columns]."""
        return tokens[:, self.free.to(tokens.device)].view(-1, self.rows, self.columns)

    def tokens(self, codes: Tensor) -> Tensor:
        """Put forced tokens around codes: [B, rows * columns] -> [B, N]."""
        out = self.forced().to(codes.device).repeat(len(codes), 1)
        out[:, self.free.to(codes.device)] = codes
        return out
